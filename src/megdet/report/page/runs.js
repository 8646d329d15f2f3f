// Lengths of a mask's runs out of COCO's text: five bits a character, the sixth says that more follow, the lowest bits
// first; from the fourth run on it is the difference from the run before the last.
function runsOf(text) {
  const runs = [];
  for (let at = 0; at < text.length;) {
    let value = 0, shift = 0, code;
    do {
      code = text.charCodeAt(at) - 48;
      at += 1;
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16 && shift < 32) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

// Validation pictures with what is there and what was found; a slider sets the score from which detections are shown.

// The pixels of an object, column by column, in an image of this height.
function maskPath(text, height) {
  const parts = [];
  let at = 0;
  runsOf(text).forEach((length, index) => {
    const end = at + length;
    while (index % 2 && at < end) {
      const [x, y] = [Math.floor(at / height), at % height];
      const high = Math.min(end - at, height - y);
      parts.push(`M${x} ${y}v${high}h1v${-high}z`);
      at += high;
    }
    at = end;
  });
  return parts.join("");
}

function picture(own, names) {
  const boxes = s("svg", { viewBox: `0 0 ${own.width} ${own.height}`, "aria-hidden": true });
  const says = h("span", { class: "says" });
  const unit = Math.max(own.width, own.height) / 100;
  const label = ([x, y, width], text, kind) => {
    const isRight = x + width / 2 > 0.6 * own.width; // its text ends where the box ends, so that it stays inside
    return s("text", {
      class: kind, x: isRight ? Math.min(own.width, x + width) - 0.6 * unit : Math.max(0, x) + 0.6 * unit,
      "text-anchor": isRight ? "end" : "start", y: Math.min(own.height - unit, Math.max(4.6 * unit, y - 0.8 * unit)),
      "font-size": 4.4 * unit, "stroke-width": unit,
    }, text);
  };
  const frame = ([x, y, width, height], kind) => s("rect", { class: kind, x, y, width, height });
  const enlarged = `scale(${own.width / own.small[0]} ${own.height / own.small[1]})`;
  const mask = (text, kind) => (text ? [s("path", { class: `mask ${kind}`, d: maskPath(text, own.small[1]), transform: enlarged })] : []);
  const element = h("figure", { class: "picture" },
    h("div", { class: "frame" }, h("img", {
      src: `data:image/jpeg;base64,${own.jpeg}`, alt: own.name, width: own.width, height: own.height,
    }), boxes), h("figcaption", {}, h("span", { class: "file" }, own.name), says));
  function draw(threshold, withTruth) {
    const shown = own.found.filter((box) => box[5] >= threshold);
    const found = new Set(shown.map((box) => box[6]));
    const missed = own.truth.filter((_, index) => !found.has(index));
    const wrong = shown.filter((box) => box[6] < 0);
    boxes.replaceChildren(
      ...(withTruth ? missed.flatMap((box) => mask(box[5], "missed")) : []),
      ...shown.toReversed().flatMap((box) => mask(box[7], box[6] < 0 ? "wrong" : "right")),
      ...(withTruth ? own.truth.flatMap((box, index) => [frame(box, "under"), frame(box, found.has(index) ? "truth" : "truth missed")]) : []),
      ...shown.toReversed().flatMap((box) => [frame(box, "under"), frame(box, box[6] < 0 ? "found wrong" : "found right")]),
      ...shown.toReversed().map((box) => label(box, `${box[6] < 0 ? "\u2717 " : ""}${names[box[4]]} ${Math.round(100 * box[5])}`, "name")),
      ...(withTruth ? missed.map((box) => label([box[0], box[1] + box[3] + 5.4 * unit, box[2]], `missed: ${names[box[4]]}`, "name")) : []));
    says.textContent = `${shown.length - wrong.length} right, ${wrong.length} wrong, ${missed.length} missed`;
    return { right: shown.length - wrong.length, wrong: wrong.length, missed: missed.length };
  }
  return { element, draw };
}

function pictures(own, analysis, kind) {
  const names = analysis.classes.map((one) => one.name);
  const groups = [["worst", "Worst"], ["best", "Best"]].map(([key, title]) => ({ title, all: own[key].map((one) => picture(one, names)) }));
  const every = groups.flatMap((group) => group.all);
  if (!every.length) return null;
  const slider = h("input", { type: "range", min: 0.05, max: 1, step: "any", value: analysis.threshold, "aria-label": "score from which detections are shown" });
  const truth = h("input", { type: "checkbox", checked: true });
  const says = h("output", { class: "threshold-says" });
  function draw() {
    const threshold = Number(slider.value);
    const sums = every.map((one) => one.draw(threshold, truth.checked))
      .reduce((all, one) => ({ right: all.right + one.right, wrong: all.wrong + one.wrong, missed: all.missed + one.missed }));
    says.textContent = `score ${score(threshold)} or more: ${sums.right + sums.wrong} detections shown, ${sums.right} right, `
      + `${sums.wrong} wrong; ${sums.missed} objects missed`;
  }
  slider.addEventListener("input", draw);
  truth.addEventListener("change", draw);
  draw();
  return section("Worst and best pictures", "pictures",
    `By the F1 of the image at the threshold ${score(analysis.threshold)}. ${kind === "bbox" ? "Boxes" : "Masks"} are right from IoU 0.5 on.`,
    h("label", { class: "slider" }, h("span", {}, "score"), slider), says,
    h("p", { class: "keys" }, h("span", { class: "key right" }, "right"), h("span", { class: "key wrong" }, "\u2717 wrong"),
      h("label", {}, truth, h("span", { class: "key truth" }, "ground truth")), h("span", { class: "key missed" }, "missed")),
    groups.filter((group) => group.all.length).map((group) => [h("h3", {}, group.title),
      h("div", { class: "pictures" }, group.all.map((one) => one.element))]));
}

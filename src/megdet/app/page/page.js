// Okabe and Ito's colours, told apart also by the colour blind; after eight classes the line is broken another way.
const COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999"];
const DASHES = [[], [6, 3], [2, 3], [10, 3, 2, 3]];
const MANY_CLASSES = 12, MASK_PIXELS = 1024;
const byId = id => document.getElementById(id);
const panes = [], names = [], chosen = new Set();
let maxBytes = Infinity, picture = null, turn = 0, stream = null;

const colourOf = name => COLOURS[names.indexOf(name) % COLOURS.length];
const dashOf = name => DASHES[Math.floor(names.indexOf(name) / COLOURS.length) % DASHES.length];
const threshold = () => Number(byId("score").value);
const shownIn = pane => pane.answer
  ? pane.answer.objects.filter(own => own.score >= threshold() && chosen.has(own.name)) : [];

function say(text) { byId("message").textContent = text; byId("message").hidden = !text; }

function element(kind, text) { const made = document.createElement(kind); made.textContent = text; return made; }

function swatch(name) {
  const made = element("span", ""); made.className = "swatch"; made.style.background = colourOf(name); return made;
}

async function start() {
  let known;
  try { known = await (await fetch("/api/classes")).json(); } catch { say("The server does not answer."); return; }
  maxBytes = known.max_bytes;
  for (const run of known.runs) {
    const own = byId("pane").content.cloneNode(true).firstElementChild;
    const pane = { run: run.run, name: run.name, element: own, canvas: own.querySelector("canvas"),
      status: own.querySelector(".status"), answer: null, marked: null };
    own.querySelector("h2").textContent = run.name;
    own.querySelector(".download").addEventListener("click", () => download(pane));
    panes.push(pane);
    byId("panes").append(own);
    for (const known of run.classes) if (!names.includes(known.name)) names.push(known.name);
  }
  byId("panes").classList.toggle("two", panes.length > 1);
  for (const name of names) {
    chosen.add(name);
    const chip = element("label", ""), box = document.createElement("input");
    chip.className = "chip"; box.type = "checkbox"; box.checked = true; box.value = name;
    box.addEventListener("change", () => { chosen[box.checked ? "add" : "delete"](name); show(); });
    chip.append(box, swatch(name), element("span", name), element("span", ""));
    chip.lastChild.className = "soft count";
    byId("classes").append(chip);
  }
}

function chooseAll(isAll) {
  for (const box of byId("classes").querySelectorAll("input")) {
    box.checked = isAll; chosen[isAll ? "add" : "delete"](box.value);
  }
  show();
}

async function open(file, name) {
  stopLive();
  const bitmap = await createImageBitmap(file).catch(() => null);  // none: a kind the browser cannot show
  await detect(file, bitmap, name);
}

async function detect(file, bitmap, name) {
  say("");
  if (file.size > maxBytes) {
    say(`This file has ${Math.ceil(file.size / 1e6)} MB, more than the ${Math.floor(maxBytes / 1e6)} that are taken.`);
    return false;
  }
  const mine = ++turn;
  const answers = await Promise.all(panes.map(async pane => {
    if (!stream) pane.status.textContent = "Looking ...";
    const started = performance.now();
    try {
      const answer = await fetch(`/api/detect?run=${pane.run}`, {
        method: "POST", body: file, headers: { "Content-Type": file.type.startsWith("image/") ? file.type
          : "application/octet-stream" } });
      const body = await answer.json();
      return answer.ok ? { ...body, whole: performance.now() - started } : { error: body.error };
    } catch { return { error: "The server does not answer." }; }
  }));
  if (mine !== turn) return true;
  picture = { bitmap, name };
  panes.forEach((pane, index) => {
    const own = answers[index];
    pane.answer = own.error ? null : own; pane.error = own.error; pane.marked = null;
  });
  show();
  return answers.every(own => !own.error);
}

function show() {
  byId("score-shown").textContent = threshold().toFixed(2);
  for (const pane of panes) {
    const { status, answer } = pane, shown = shownIn(pane), details = pane.element.querySelector("details");
    pane.element.querySelector(".download").disabled = !answer;
    pane.canvas.hidden = details.hidden = !answer;
    status.classList.toggle("bad", Boolean(pane.error));
    if (pane.error) status.textContent = pane.error;
    if (!answer) continue;
    const together = answer.images_together > 1 ? ` (${answer.images_together} images together)` : "";
    status.textContent = `${shown.length} of ${answer.objects.length} objects shown; detected in ` +
      `${answer.milliseconds.toFixed(0)} ms${together}, ${answer.whole.toFixed(0)} ms with sending`;
    pane.canvas.setAttribute("aria-label", `The image with ${shown.length} objects found by ${pane.name}`);
    fill(details.querySelector("tbody"), pane, shown);
    draw(pane, shown);
  }
  for (const chip of byId("classes").children) {
    const name = chip.firstChild.value;
    const counts = panes.map(pane => pane.answer
      ? pane.answer.objects.filter(own => own.name === name && own.score >= threshold()).length : 0);
    chip.querySelector(".count").textContent = picture ? counts.join(" / ") : "";
    chip.hidden = Boolean(picture) && names.length > MANY_CLASSES && chip.firstChild.checked && !counts.some(Boolean);
  }
}

function fill(body, pane, shown) {
  body.replaceChildren(...shown.map(own => {
    const row = element("tr", ""), name = element("td", ""), [x, y, width, height] = boxOf(own);
    name.append(swatch(own.name), ` ${own.name}`);
    row.append(name, element("td", own.score.toFixed(2)),
      element("td", [x, y, width, height].map(edge => edge.toFixed(0)).join(", ")));
    row.tabIndex = 0;
    const mark = own => () => { pane.marked = own; draw(pane, shownIn(pane)); };
    for (const event of ["mouseenter", "focus"]) row.addEventListener(event, mark(own));
    for (const event of ["mouseleave", "blur"]) row.addEventListener(event, mark(null));
    return row;
  }));
}

function boxOf({ box: [x1, y1, x2, y2] }) { return [x1, y1, x2 - x1, y2 - y1].map(edge => Math.round(edge * 1e3) / 1e3); }

function draw(pane, shown) {
  const { width, height } = pane.answer, longest = Math.max(width, height);
  const scale = longest < 640 ? Math.ceil(640 / longest) : Math.min(1, 1600 / longest);
  const canvas = pane.canvas, context = canvas.getContext("2d");
  canvas.width = Math.max(1, Math.round(width * scale)); canvas.height = Math.max(1, Math.round(height * scale));
  context.fillStyle = picture.bitmap ? "#fff" : "#777";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (picture.bitmap) context.drawImage(picture.bitmap, 0, 0, canvas.width, canvas.height);
  const rect = canvas.getBoundingClientRect();
  const unit = Math.max(canvas.width / (rect.width || canvas.width), canvas.height / (rect.height || canvas.height));
  const ordered = [...shown].reverse();  // the best lies on top
  if (pane.marked) ordered.push(pane.marked);
  for (const own of ordered) drawMask(context, own, scale);
  for (const own of ordered) drawBox(context, own, scale, unit, own === pane.marked);
  const plates = [];
  for (const own of ordered.reverse()) drawName(context, own, scale, unit, plates);
}

function drawBox(context, own, scale, unit, isMarked) {
  const [x, y, width, height] = boxOf(own).map(edge => edge * scale);
  const edge = (isMarked ? 5 : 2.5) * unit;
  context.setLineDash([]); context.lineWidth = edge + 2 * unit; context.strokeStyle = "rgba(0, 0, 0, .55)";
  context.strokeRect(x, y, width, height);
  context.setLineDash(dashOf(own.name).map(part => part * unit)); context.lineWidth = edge;
  context.strokeStyle = colourOf(own.name); context.strokeRect(x, y, width, height);
}

// Plates of names: those of the best first, the others below where they would lie on one.
function drawName(context, own, scale, unit, plates) {
  const [x, y] = boxOf(own).map(edge => edge * scale), size = 13 * unit;
  context.font = `600 ${size}px system-ui, sans-serif`;
  const text = `${own.name} ${Math.round(100 * own.score)}`, width = context.measureText(text).width + 8 * unit;
  const left = Math.max(0, Math.min(x, context.canvas.width - width)), high = 1.4 * size;
  const covers = top => plates.some(([l, t, w]) => left < l + w && l < left + width && Math.abs(top - t) < high);
  let top = Math.max(0, y - high);
  for (let tries = 0; tries < 8 && covers(top); tries++) top += high / 2;
  plates.push([left, top, width]);
  context.fillStyle = colourOf(own.name); context.fillRect(left, top, width, high);
  context.fillStyle = colourOf(own.name) === "#0072B2" ? "#fff" : "#000";
  context.fillText(text, left + 4 * unit, top + 1.08 * size);
}

function drawMask(context, own, scale) {
  if (!own.mask) return;
  own.drawn ??= maskPicture(own);
  const [x, y, width, height] = own.drawn.frame.map(edge => edge * scale);
  context.globalAlpha = .45; context.drawImage(own.drawn.canvas, x, y, width, height); context.globalAlpha = 1;
}

// The pixels of an object in the frame of its box, small enough to be drawn again at every move of the slider.
function maskPicture(own) {
  const [height, width] = own.mask.size, [left, top, right, bottom] = own.box;
  const x0 = Math.max(0, Math.floor(left) - 1), y0 = Math.max(0, Math.floor(top) - 1);
  const x1 = Math.min(width, Math.ceil(right) + 1), y1 = Math.min(height, Math.ceil(bottom) + 1);
  const scale = Math.min(1, MASK_PIXELS / Math.max(x1 - x0, y1 - y0, 1)), canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round((x1 - x0) * scale)); canvas.height = Math.max(1, Math.round((y1 - y0) * scale));
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer), colour = Number.parseInt(colourOf(own.name).slice(1), 16);
  const abgr = (0xff000000 | (colour & 255) << 16 | (colour & 0xff00) | colour >> 16) >>> 0;
  const inside = [];  // begin and end of each run of the object
  let at = 0;
  runsOf(own.mask.counts).forEach((length, index) => { if (index % 2) inside.push([at, at + length]); at += length; });
  let next = 0;
  for (let column = 0; column < canvas.width; column++) {
    const from = height * Math.min(width - 1, x0 + Math.floor((column + .5) / scale));
    while (next < inside.length && inside[next][1] <= from) next++;
    for (let run = next; run < inside.length && inside[run][0] < from + height; run++) {
      const begin = Math.max(inside[run][0] - from, 0), end = Math.min(inside[run][1] - from, height);
      const first = Math.max(0, Math.ceil((begin - y0) * scale - .5));
      const last = Math.min(canvas.height, Math.ceil((end - y0) * scale - .5));
      for (let row = first; row < last; row++) pixels[row * canvas.width + column] = abgr;
    }
  }
  context.putImageData(image, 0, 0);
  return { canvas, frame: [x0, y0, x1 - x0, y1 - y0] };
}

function download(pane) {
  const rows = shownIn(pane).map(own => ({ image_id: picture.name, category_id: own.category_id, bbox: boxOf(own),
    score: own.score, category: own.name, ...(own.mask ? { segmentation: own.mask } : {}) }));
  const link = document.createElement("a"), stem = picture.name.replace(/\.[^.]*$/, "");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(rows, null, 1)], { type: "application/json" }));
  link.download = `${stem}-${pane.name}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function useCamera() {
  if (stream) { stopCamera(); return; }
  try {
    if (!navigator.mediaDevices) throw new Error("browsers give it to pages of this machine and of https alone");
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1280 } } });
  } catch (error) { say(`No camera: ${error.message}.`); return; }
  const video = byId("video");
  video.srcObject = stream; video.hidden = false;
  byId("camera").textContent = "Stop the camera";
  await video.play().catch(() => {});  // stopped before its first frame
  byId("frame").hidden = byId("live").hidden = !stream;
}

function stopCamera() {
  stopLive();
  for (const track of stream.getTracks()) track.stop();
  stream = null; byId("video").srcObject = null;
  for (const id of ["video", "frame", "live"]) byId(id).hidden = true;
  byId("camera").textContent = "Use the camera";
}

function stopLive() { byId("live").setAttribute("aria-pressed", "false"); }

const isLive = () => Boolean(stream) && byId("live").getAttribute("aria-pressed") === "true";

async function takeFrame() {
  const video = byId("video"), canvas = document.createElement("canvas");
  if (!video.videoWidth) { say("The camera shows nothing yet."); return false; }
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const file = await new Promise(resolve => canvas.toBlob(resolve, "image/jpeg", .92));
  return detect(file, canvas, "camera.jpg");
}

async function goLive() {
  byId("live").setAttribute("aria-pressed", String(!isLive()));
  while (isLive()) {  // the next frame when the answer is there
    if (!await takeFrame()) await new Promise(resolve => setTimeout(resolve, 1000));
    await new Promise(requestAnimationFrame);
  }
}

function imageIn(list) { return [...list].find(file => file.type.startsWith("image/")) ?? list[0]; }

byId("choose").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", ({ target }) => {
  if (target.files.length) open(target.files[0], target.files[0].name);
  target.value = "";
});
for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, event => { event.preventDefault(); byId("drop").classList.add("over"); });
}
addEventListener("dragleave", event => { if (!event.relatedTarget) byId("drop").classList.remove("over"); });
addEventListener("drop", event => {
  event.preventDefault(); byId("drop").classList.remove("over");
  const file = imageIn(event.dataTransfer.files);
  if (file) open(file, file.name); else say("That was no file: drop an image file.");
});
addEventListener("paste", event => {
  const file = imageIn(event.clipboardData.files);
  if (file) open(file, file.name || "pasted.png"); else say("There is no image in the clipboard.");
});
byId("score").addEventListener("input", show);
byId("all").addEventListener("click", () => chooseAll(true));
byId("none").addEventListener("click", () => chooseAll(false));
byId("camera").addEventListener("click", useCamera);
byId("frame").addEventListener("click", () => { stopLive(); takeFrame(); });
byId("live").addEventListener("click", goLive);
addEventListener("resize", () => { if (picture) show(); });
start();

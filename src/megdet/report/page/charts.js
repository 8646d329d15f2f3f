// Line charts in SVG: a pointer, a finger or the arrow keys pick a point, and a line of text says what it is.

const CHART = { width: 360, height: 220, left: 40, right: 12, top: 10, bottom: 34 };

function ticks(low, high, most) {
  const raw = (high - low) / most || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((candidate) => candidate >= raw * 0.999);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-6; index += 1) {
    found.push(Number((index * step).toPrecision(12)));
  }
  return found;
}

// lines: [{name, points: [[x, y|null], ...], series, thin}]; marks: [{x, label}]; dots: [{x, y, label}];
// describe(picked): the text of [{line, index}, ...]; nearest: "x" or "point"; picks(index of the first line).
class LineChart {
  constructor({ title, label, lines, x, y, marks = [], dots = [], describe, nearest = "x", picks = null }) {
    Object.assign(this, { lines, x, y, describe, nearest, picks, index: 0 });
    this.says = h("output", { class: "says" });
    this.cursor = s("g", { class: "cursor" });
    this.svg = s("svg", {
      viewBox: `0 0 ${CHART.width} ${CHART.height}`, tabindex: 0, role: "slider", "aria-label": label || title,
      "aria-valuemin": 0, "aria-valuemax": Math.max(0, lines[0].points.length - 1), "aria-valuenow": 0,
      onpointermove: (event) => this.point(event), onpointerdown: (event) => this.point(event),
      onkeydown: (event) => this.key(event),
    }, this.axes(), this.drawnMarks(marks), lines.map((line) => this.drawn(line)), this.drawnDots(dots), this.cursor);
    const named = lines.length > 1 ? h("ul", { class: "legend" }, lines.map((line) =>
      h("li", { class: `series-${line.series}${line.thin ? " thin" : ""}` }, line.name))) : null;
    this.element = h("figure", { class: "chart" }, h("figcaption", {}, title), named, this.svg, this.says);
  }

  across(value) {
    const { low, high } = this.x;
    return CHART.left + ((value - low) / (high - low || 1)) * (CHART.width - CHART.left - CHART.right);
  }

  down(value) {
    const { low, high } = this.y;
    return CHART.height - CHART.bottom - ((value - low) / (high - low || 1)) * (CHART.height - CHART.top - CHART.bottom);
  }

  axes() {
    const floor = CHART.height - CHART.bottom;
    const rows = ticks(this.y.low, this.y.high, 5).map((value) => s("g", {},
      s("line", { class: "grid", x1: CHART.left, x2: CHART.width - CHART.right, y1: this.down(value), y2: this.down(value) }),
      s("text", { x: CHART.left - 5, y: this.down(value) + 4, "text-anchor": "end" }, (this.y.text || short)(value))));
    const columns = ticks(this.x.low, this.x.high, 6).map((value) => s("g", {},
      s("line", { class: "tick", x1: this.across(value), x2: this.across(value), y1: floor, y2: floor + 4 }),
      s("text", { x: this.across(value), y: floor + 15, "text-anchor": "middle" }, (this.x.text || short)(value))));
    const name = s("text", { class: "axis", x: CHART.width - CHART.right, y: CHART.height - 4, "text-anchor": "end" }, this.x.label);
    return [rows, columns, name];
  }

  drawnMarks(marks) {
    return marks.map((mark) => s("g", { class: "mark" },
      s("line", { x1: this.across(mark.x), x2: this.across(mark.x), y1: CHART.top, y2: CHART.height - CHART.bottom }),
      s("title", {}, mark.label)));
  }

  drawnDots(dots) {
    return dots.map((dot) => s("g", { class: `dot ${dot.kind}` }, s("title", {}, dot.label), dot.kind === "best"
      ? s("circle", { cx: this.across(dot.x), cy: this.down(dot.y), r: 4.5 })
      : s("rect", { x: this.across(dot.x) - 4, y: this.down(dot.y) - 4, width: 8, height: 8 })));
  }

  drawn(line) {
    const known = line.points.filter((point) => point[1] !== null);
    const path = known.map(([x, y], index) => `${index ? "L" : "M"}${this.across(x).toFixed(1)} ${this.down(y).toFixed(1)}`);
    const few = known.length <= 30 ? known.map(([x, y]) => s("circle", { cx: this.across(x), cy: this.down(y), r: 2.2 })) : [];
    return s("g", { class: `line series-${line.series}${line.thin ? " thin" : ""}` }, s("path", { d: path.join("") }), few);
  }

  point(event) {
    const frame = this.svg.getBoundingClientRect();
    const place = {
      x: ((event.clientX - frame.left) / frame.width) * CHART.width,
      y: ((event.clientY - frame.top) / frame.height) * CHART.height,
    };
    this.choose(this.near(this.lines[0], place), place.x);
  }

  near(line, place) {
    let best = 0;
    let least = Infinity;
    line.points.forEach(([x, y], index) => {
      if (y === null) return;
      const away = this.nearest === "x" ? Math.abs(this.across(x) - place.x)
        : Math.hypot(this.across(x) - place.x, this.down(y) - place.y);
      if (away < least) [best, least] = [index, away];
    });
    return best;
  }

  key(event) {
    const last = this.lines[0].points.length - 1;
    const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10, Home: -last, End: last };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const rising = this.lines[0].points[last][0] >= this.lines[0].points[0][0] ? 1 : -1;
    const index = Math.min(last, Math.max(0, this.index + rising * moves[event.key]));
    this.choose(index, this.across(this.lines[0].points[index][0]));
  }

  choose(index, x) {
    if (this.picks) this.picks(index);
    else this.select(index, x);
  }

  // Show point `index` of the first line, and of the others the one nearest to x in the drawing.
  select(index, x = this.across(this.lines[0].points[index][0])) {
    this.index = index;
    const picked = this.lines.map((line, place) => ({
      line, index: place && this.nearest === "x" && !this.picks ? this.near(line, { x }) : index,
    })).filter((one) => one.line.points[one.index]);
    const [at] = this.lines[0].points[index];
    this.cursor.replaceChildren(
      s("line", { x1: this.across(at), x2: this.across(at), y1: CHART.top, y2: CHART.height - CHART.bottom }),
      ...picked.filter((one) => one.line.points[one.index][1] !== null).map((one) => s("circle", {
        class: `series-${one.line.series}`, r: 4,
        cx: this.across(one.line.points[one.index][0]), cy: this.down(one.line.points[one.index][1]),
      })));
    const words = this.describe(picked);
    this.says.textContent = words;
    this.svg.setAttribute("aria-valuenow", index);
    this.svg.setAttribute("aria-valuetext", words);
  }
}

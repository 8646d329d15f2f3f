// How a run went, over epochs or hours, with the decays of the rate.

const clock = (place) => ({
  epochs: { label: "epochs", of: (one) => one.epoch }, hours: { label: "hours", of: (one) => one.hours },
})[place];

function range(lines, fromZero = true) {
  const values = lines.flatMap((line) => line.points.map((point) => point[1])).filter((value) => value !== null);
  const high = Math.max(...values);
  const low = Math.min(...values);
  return { low: fromZero && low >= 0 ? 0 : low, high: high > 0 ? high * 1.05 : 1 };
}

function chartOver(place, title, lines, marks, fullRange, text) {
  const { label } = clock(place);
  const high = Math.max(...lines.map((line) => (line.points.length ? line.points.at(-1)[0] : 0)));
  const chart = new LineChart({
    title, lines, marks, x: { low: 0, high: high || 1, label }, y: fullRange || range(lines),
    describe: (picked) => {
      const values = picked.map((one) => `${lines.length > 1 ? `${one.line.name} ` : ""}${(text || short)(one.line.points[one.index][1])}`);
      return `${label.replace(/s$/, "")} ${short(picked[0].line.points[picked[0].index][0])}: ${values.join(", ")}`;
    },
  });
  chart.select(lines[0].points.length - 1);
  return chart.element;
}

const decaysOf = (own, place) => own.decays.map((one) => ({ x: clock(place).of(one), label: `the rate falls at epoch ${one.epoch}` }));
const whole = { low: 0, high: 1, text: (value) => String(Math.round(100 * value)) };

function scoreChart(own, place) {
  if (!own.evaluations.length) return null;
  const names = ["mmAP", "AP50", "mmAR", "mask mmAP"].filter((name) => name in own.evaluations[0]);
  const lines = names.map((name, series) => ({ name, series, points: own.evaluations.map((one) => [clock(place).of(one), one[name]]) }));
  return chartOver(place, "Validation", lines, decaysOf(own, place), whole, percent);
}

function course(own) {
  if (!own.epochs.length) return section("How it went", "course", "No step has been logged yet.");
  const grid = h("div", { class: "charts" });
  const faults = own.faults.map((one) => `${one.what}: ${one.times}`);
  function draw(place) {
    const charts = own.charts.map((chart) => {
      const lines = Object.entries(chart.lines).map(([name, values], series) => ({
        name, series: series % 7, points: values.map((value, index) => [own[place][index], value]),
      }));
      return chartOver(place, `${chart.title}${chart.unit ? ` (${chart.unit})` : ""}`, lines, decaysOf(own, place));
    });
    const noise = own.noise.length > 1 ? chartOver(place, "Gradient noise scale (images)", [{
      name: "noise scale", series: 0, points: own.noise.map((one) => [clock(place).of(one), one.images]),
    }], decaysOf(own, place)) : null;
    grid.replaceChildren(...[scoreChart(own, place), ...charts, noise].filter(Boolean));
  }
  draw("epochs");
  return section("How it went", "course",
    `${own.decays.length ? "Dashed lines are the decays of the rate. " : ""}Each point is the mean of the steps around it.`,
    choice("place", "over", [{ value: "epochs", label: "epochs" }, { value: "hours", label: "hours" }], "epochs", draw), grid,
    h("p", {}, faults.length ? `It survived: ${faults.join("; ")}.` : "Nothing went wrong on the way."));
}

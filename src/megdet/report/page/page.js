// The page: several runs compared, then one of them in detail.

const DATA = JSON.parse(document.getElementById("data").textContent);

function comparison(runs, own, kind) {
  const scores = [
    { name: "run", left: true, value: (row) => row.name, text: (row) => row.name },
    { name: "recipe", left: true, value: (row) => row.group, text: (row) => row.group },
    { name: "seed", value: (row) => row.seed, text: (row) => String(row.seed) },
    { name: "mmAP", value: (row) => row.AP, text: (row) => percent(row.AP) },
    { name: "95% over images", value: (row) => row.over_images[0], text: (row) => `${percent(row.over_images[0])} to ${percent(row.over_images[1])}` },
    ...[["AP50", "AP50"], ["AP75", "AP75"], ["AR100", "mmAR"]].map(([key, name]) => ({ name, value: (row) => row[key], text: (row) => percent(row[key]) })),
  ];
  const recipes = [
    { name: "key", left: true, value: (row) => row[0], text: (row) => row[0] + (row[1] ? "" : " (no effect on the result)") },
    ...own.groups.map((group, place) => ({ name: group.name, left: true, value: (row) => row[2][place], text: (row) => row[2][place] })),
  ];
  return section(kind === "bbox" ? "Compared" : "Compared by masks", `compared-${kind}`,
    `On the same ${many(own.images, "image")}. Intervals are paired: every run is scored on the same ${own.resamples.toLocaleString("en")} draws of the images.`,
    h("ul", { class: "verdicts" }, own.differences.map((one) => h("li", {}, forest(one, own), h("p", {}, h("strong", {}, verdict(one)), " ", one.words)))),
    table("Scores in percent", scores, own.runs, { bar: 3 }),
    own.recipe_differences.length ? table("What differs in the recipes", recipes, own.recipe_differences) : h("p", {}, "The recipes do not differ."),
    kind === "bbox" ? overlay(runs) : null);
}

const verdict = (one) => ({
  differ: "They differ.", "differ on these weights": "These weights differ.", equal: "Equal.",
}[one.verdict] || "Perhaps noise.");

// The intervals of a difference on a line with 0 on it.
function forest(one, own) {
  const spans = [["images", one.over_images], ["seeds", one.over_seeds]].filter((pair) => pair[1]);
  const reach = Math.max(0.01, ...own.differences.flatMap((each) => [...each.over_images, ...(each.over_seeds || [])]).map(Math.abs)) * 1.1;
  const across = (value) => 70 + ((value + reach) / (2 * reach)) * 270;
  const height = 26 + 22 * spans.length;
  return s("svg", { class: "forest", viewBox: `0 0 360 ${height}`, role: "img", "aria-label": one.words },
    s("line", { class: "zero", x1: across(0), x2: across(0), y1: 4, y2: height - 18 }),
    s("text", { x: across(0), y: height - 5, "text-anchor": "middle" }, "0"),
    s("text", { x: 340, y: height - 5, "text-anchor": "end" }, `${one.second} better`),
    s("text", { x: 70, y: height - 5 }, `${one.first} better`),
    spans.map(([name, [low, high]], row) => s("g", {}, s("text", { x: 0, y: 20 + 22 * row }, name),
      s("line", { class: "span", x1: across(low), x2: across(high), y1: 16 + 22 * row, y2: 16 + 22 * row }),
      s("circle", { cx: across(one.AP), cy: 16 + 22 * row, r: 4 }),
      s("title", {}, `${name}: ${points(low)} to ${points(high)}`))));
}

function overlay(runs) {
  const known = runs.filter((run) => run.course.evaluations.length);
  if (known.length < 2) return null;
  const grid = h("div", { class: "charts" });
  for (const place of ["epochs", "hours"]) {
    const lines = known.map((run, series) => ({
      name: run.name, series: series % 7, points: run.course.evaluations.map((one) => [clock(place).of(one), one.mmAP]),
    }));
    grid.append(chartOver(place, `mmAP over ${place}`, lines, decaysOf(known[0].course, place), { ...range(lines, false), text: whole.text }, percent));
  }
  return grid;
}

function details(run) {
  const place = h("div", {});
  const kinds = Object.keys(run.analysis);
  const draw = (kind) => {
    const own = run.analysis[kind];
    const parts = [classes(own), curves(own), confusion(own), errors(own), sizes(own), pictures(run.pictures[kind], own, kind)];
    place.replaceChildren(...parts.filter(Boolean));
  };
  if (kinds.length) draw(kinds[0]);
  const interval = Object.fromEntries(kinds.map((kind) => [kind, run.analysis[kind].over_images]));
  return [
    DATA.runs.length > 1 ? h("h2", { class: "run" }, run.name) : null, tiles(run.numbers, interval), facts(run.facts), run.notes.map((note) => h("p", { class: "warning" }, note)),
    kinds.length > 1 ? choice("kind", "count by", [{ value: "bbox", label: "boxes" }, { value: "segm", label: "masks" }], "bbox", draw) : null,
    place, course(run.course), recipe(run.recipe),
  ].flat(9).filter(Boolean);
}

function draw() {
  const { runs } = DATA;
  const detail = h("div", { class: "detail" });
  const show = (index) => detail.replaceChildren(...details(runs[index]));
  show(0);
  const compared = Object.entries(DATA.comparisons).map(([kind, own]) => comparison(runs, own, kind));
  const chosen = runs.length > 1 ? choice("run", "in detail", runs.map((run, index) => ({ value: String(index), label: run.name })), "0", show) : null;
  document.getElementById("page").replaceChildren(...[
    h("header", {}, h("p", { class: "kicker" }, "MegDet report"), h("h1", {}, DATA.title)),
    ...(runs.length > 1 && !compared.length ? [h("p", { class: "warning" }, "The runs are not compared: one of them has no detections here.")] : []),
    ...compared, chosen, detail,
    h("footer", {}, `MegDet ${DATA.version}. This file needs nothing else.`),
  ].filter(Boolean));
}

draw();

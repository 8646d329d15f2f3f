// The first lines of a run, its classes, its recipe.

function tiles(numbers, interval) {
  const wanted = [["AP", "mmAP", "IoU 0.50 to 0.95"], ["AP50", "AP50", "IoU 0.50"], ["AP75", "AP75", "IoU 0.75"],
    ["AR100", "mmAR", "100 detections an image"]];
  const kinds = Object.entries(numbers);
  if (!kinds.length) return h("p", { class: "empty" }, "No evaluation yet.");
  return kinds.map(([kind, own]) => h("div", { class: "tiles" }, wanted.map(([key, name, what]) => h("div", { class: "tile" },
    h("span", { class: "name" }, kinds.length > 1 ? `${kind === "bbox" ? "box" : "mask"} ${name}` : name),
    h("strong", {}, percent(own[key])),
    h("span", { class: "what" }, key === "AP" && interval[kind]
      ? `${percent(interval[kind][0])} to ${percent(interval[kind][1])} on other such images (95%)` : what)))));
}

const facts = (rows) => h("dl", { class: "facts" }, rows.map(([what, value]) => h("div", {}, h("dt", {}, what), h("dd", {}, value))));

const MOST_ROWS = 40;

// columns: [{name, value(row), text(row), left}]. A heading sorts; on a narrow screen a row becomes a card. Of many rows
// the first are shown until one asks for all.
function table(caption, columns, rows, { bar = null } = {}) {
  const body = h("tbody");
  const heads = columns.map((column, place) => h("th", { scope: "col", class: column.left ? "left" : "" },
    h("button", { type: "button", onclick: () => sort(place) }, column.name)));
  let order = { place: -1, down: true };
  let current = rows;
  const all = rows.length > MOST_ROWS ? h("button", { type: "button", class: "all", onclick: () => { all.remove(); fillBody(current); } },
    `show all ${rows.length}`) : null;
  const fillBody = (sorted) => body.replaceChildren(...sorted.slice(0, all && all.isConnected ? MOST_ROWS : rows.length).map((row) => h("tr", {}, columns.map((column, place) => {
    const cell = h(place ? "td" : "th", { scope: place ? null : "row", class: column.left ? "left" : "", "data-name": column.name }, column.text(row));
    if (place === bar) cell.style.setProperty("--part", `${Math.max(0, 100 * column.value(row))}%`);
    if (place === bar) cell.classList.add("bar");
    return cell;
  }))));
  function sort(place) {
    order = { place, down: order.place === place ? !order.down : !columns[place].left };
    const key = columns[place].value;
    const sorted = [...rows].sort((a, b) => {
      const [one, two] = [key(a), key(b)];
      const way = typeof one === "string" ? one.localeCompare(two) : one - two;
      return order.down ? -way : way;
    });
    heads.forEach((head, index) => head.setAttribute("aria-sort", index === place ? (order.down ? "descending" : "ascending") : "none"));
    current = sorted;
    fillBody(sorted);
  }
  const element = h("div", { class: "table" }, h("table", { class: "cards" }, h("caption", {}, caption), h("thead", {}, h("tr", {}, heads)), body), all);
  fillBody(rows.slice(0, MOST_ROWS));
  return element;
}

function classes(analysis) {
  const of = (key) => ({ value: (row) => row[key], text: (row) => percent(row[key]) });
  const advised = (which, keys) => ({
    value: (row) => (row[which] ? row[which].threshold : -1),
    text: (row) => (row[which] ? `${score(row[which].threshold)} (${keys.map(([key, name]) => `${name} ${percent(row[which][key])}`).join(", ")})` : "-"),
  });
  const columns = [
    { name: "class", left: true, value: (row) => row.name, text: (row) => row.name },
    { name: "objects", value: (row) => row.objects, text: (row) => row.objects.toLocaleString("en") },
    { name: "mmAP", ...of("AP") }, { name: "AP50", ...of("AP50") }, { name: "AP75", ...of("AP75") }, { name: "mmAR", ...of("AR100") },
    { name: "best F1 from", ...advised("best", [["f1", "F1"]]) },
    { name: "precision 90 from", ...advised("sure", [["recall", "recall"]]) },
  ];
  return section("Classes", "classes",
    "Deploy a class with one of its two thresholds of the score: the one with the best balance of precision and recall, or the "
    + "lowest from which nine of ten detections are right. A dash: never reached, or no such object. Headings sort.",
    table("Scores in percent", columns, analysis.classes, { bar: 2 }));
}

function recipe(rows) {
  const columns = ["key", "value", "default"].map((name, place) => ({ name, left: true, value: (row) => row[place], text: (row) => row[place] }));
  return section("Recipe", "recipe", "What departs from the defaults.",
    rows.length ? table("", columns, rows) : h("p", {}, "Nothing: this is the paper's baseline."));
}

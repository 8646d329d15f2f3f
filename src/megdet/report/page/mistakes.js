// What is taken for what, sizes of objects, kinds of mistakes.

const MOST_IN_MATRIX = 12;

function confusion(analysis) {
  const names = analysis.classes.map((own) => own.name);
  const nothing = names.length;
  const cells = new Map(analysis.confusion.map(([truth, found, count]) => [`${truth} ${found}`, count]));
  const count = (truth, found) => cells.get(`${truth} ${found}`) || 0;
  const wrong = analysis.confusion.filter(([truth, found]) => truth !== found);
  let shown = names.map((_, index) => index);
  if (shown.length > MOST_IN_MATRIX) {
    const mixed = names.map(() => 0);
    wrong.forEach(([truth, found, times]) => {
      if (truth < nothing && found < nothing) [truth, found].forEach((index) => { mixed[index] += times; });
    });
    shown = shown.sort((a, b) => mixed[b] - mixed[a]).slice(0, MOST_IN_MATRIX).sort((a, b) => a - b);
  }
  const total = (truth) => analysis.confusion.filter((cell) => cell[0] === truth).reduce((sum, cell) => sum + cell[2], 0);
  const says = h("output", { class: "says" });
  const words = (truth, found, of) => {
    const times = count(truth, found);
    if (truth === nothing) return `${many(times, "detection")} of ${names[found]} where there is none`;
    const part = `${times} of ${of} ${names[truth]} (${percent(times / Math.max(of, 1))}%)`;
    return found === nothing ? `${part} missed` : found === truth ? `${part} found` : `${part} taken for ${names[found]}`;
  };
  const rows = [...shown, nothing].map((truth, row) => {
    const of = total(truth);
    return h("tr", {}, h("th", { scope: "row" }, h("span", {}, truth === nothing ? "nothing" : names[truth])),
      [...shown, nothing].map((found, column) => {
        if (truth === nothing && found === nothing) return h("td", {});
        const times = count(truth, found);
        const tell = () => { says.textContent = words(truth, found, of); };
        const cell = h("td", {
          tabindex: row || column ? -1 : 0, class: truth === found ? "right" : "wrong", "aria-label": words(truth, found, of),
          // Not pointerenter: a table that scrolls under a pointer at rest would take the words from the focused cell.
          onpointermove: tell, onfocus: tell, onpointerdown: tell,
        }, times ? String(times) : "");
        cell.style.setProperty("--part", `${Math.round(65 * Math.sqrt(times / Math.max(of, 1)))}%`);
        return cell;
      }));
  });
  const body = h("tbody", { onkeydown: (event) => walk(event, rows) }, rows);
  const heads = [...shown.map((index) => names[index]), "missed"].map((name) => h("th", { scope: "col" }, h("span", {}, name)));
  const pairs = wrong.filter(([truth, found]) => truth < nothing && found < nothing).sort((a, b) => b[2] - a[2]).slice(0, 8);
  return section("What is taken for what", "confusion",
    `Rows are the objects that are there, columns what was found, at the threshold ${score(analysis.threshold)} (the best F1 of all `
    + `classes together) and IoU 0.5. The last row has boxes that lie on no object, or on one that was found already.${shown.length < names.length ? ` Shown are the ${shown.length} classes that are confused most.` : ""}`,
    h("div", { class: "table" }, h("table", { class: "matrix" }, h("thead", {}, h("tr", {}, h("td", {}), heads)), body)), says,
    pairs.length ? h("p", {}, "Most often: ", pairs.map(([truth, found, times]) => `${names[truth]} for ${names[found]} (${times})`).join(", "), ".")
      : h("p", {}, "No object was taken for one of another class."));
}

function walk(event, rows) {
  const cell = event.target;
  const row = rows.indexOf(cell.parentElement);
  const column = [...cell.parentElement.children].indexOf(cell);
  const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [0, 0];
  const next = rows[row + down]?.children[column + right];
  if ((!down && !right) || !next || next.tagName !== "TD" || !next.hasAttribute("tabindex")) return;
  event.preventDefault();
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function bars(rows, { unit, high }) {
  return h("ul", { class: "bars" }, rows.map((row) => {
    const filled = h("span", { class: "filled" });
    filled.style.width = `${Math.max(0, Math.min(100, (100 * row.value) / (high || 1)))}%`;
    return h("li", {}, h("span", { class: "name" }, row.name), h("span", { class: "rail" }, filled),
      h("span", { class: "value" }, row.text, unit), h("span", { class: "what" }, row.what));
  }));
}

function sizes(analysis) {
  const edges = { small: "below 32 \u00d7 32 pixels", medium: "up to 96 \u00d7 96 pixels", large: "above 96 \u00d7 96 pixels" };
  const rows = analysis.sizes.map((own) => ({
    name: own.name, value: own.AP, text: own.objects ? percent(own.AP) : "-",
    what: `${edges[own.name]}: ${own.objects ? `${many(own.objects, "object")}, mmAR ${percent(own.AR)}` : "none"}`,
  }));
  return section("Sizes of objects", "sizes", "mmAP by the area of the object.", bars(rows, { unit: "", high: 1 }));
}

function errors(analysis) {
  const sorted = [...analysis.errors].sort((a, b) => b.cost - a.cost);
  const rows = sorted.map((own) => ({
    name: own.name, value: own.cost, text: points(own.cost), what: `${own.meaning}; ${many(own.count, "mistake")} at all scores`,
  }));
  return section("What the mistakes cost", "errors",
    `AP50 is ${percent(analysis.numbers.AP50)}. So much would be gained if all mistakes of one kind were mended and no other (TIDE).`,
    bars(rows, { unit: "", high: Math.max(0.01, sorted[0].cost) }));
}

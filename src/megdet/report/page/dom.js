// Elements and numbers. All text of files goes through text nodes, never through HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const isKnown = (value) => typeof value === "number" && value > -1;
const percent = (value) => (isKnown(value) ? (100 * value).toFixed(1) : "-");
const points = (value) => (value >= 0 ? "+" : "\u2212") + Math.abs(100 * value).toFixed(1);
const short = (value) => (value === null ? "-" : Number(value.toPrecision(4)).toString());
// Rounded down, so that a threshold as it is told lets through what it was chosen for.
const score = (value) => {
  const digits = value < 0.99 ? 3 : 5;
  return (Math.floor(value * 10 ** digits + 1e-6) / 10 ** digits).toFixed(digits);
};
const many = (count, one, more = one + "s") => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;

function section(title, id, lead, ...children) {
  return h("section", { id, "aria-labelledby": `${id}-title` },
    h("h2", { id: `${id}-title` }, title), lead ? h("p", { class: "lead" }, lead) : null, children);
}

// Buttons of which one is on: [{value, label}, ...]. `change` gets the value.
function choice(name, label, options, value, change) {
  return h("fieldset", { class: "choice" }, h("legend", {}, label), options.map((option) =>
    h("label", {}, h("input", {
      type: "radio", name, value: option.value, checked: option.value === value, onchange: () => change(option.value),
    }), h("span", {}, option.label))));
}

// Precision, recall and F1 at every threshold of the score.

function numbersAt(own, index) {
  if (index < 0) return { threshold: 1, right: 0, shown: 0, precision: 0, recall: 0, f1: 0 };
  const [threshold, right, shown] = own.points[index];
  return {
    threshold, right, shown, precision: right / Math.max(shown, 1), recall: right / Math.max(own.objects, 1),
    f1: (2 * right) / Math.max(shown + own.objects, 1),
  };
}

const sentence = (at) => `threshold ${score(at.threshold)}: precision ${percent(at.precision)}, recall `
  + `${percent(at.recall)}, F1 ${percent(at.f1)}`;

function curvesOf(own) {
  const at = own.points.map((_, index) => numbersAt(own, index));
  const whole = { low: 0, high: 1, text: (value) => String(Math.round(100 * value)) };
  const slider = h("input", { type: "range", min: 0, max: 1, step: 0.001, "aria-label": "threshold of the score" });
  const says = h("output", { class: "threshold-says" });
  const advised = [["best", own.best], ["sure", own.sure]].filter((pair) => pair[1]);
  const label = { best: "best F1", sure: "precision 90" };
  const dots = (x, y) => advised.map(([kind, one]) => ({ kind, x: one[x], y: one[y], label: `${label[kind]}: ${sentence(one)}` }));
  const describe = ([first]) => sentence(at[first.index]);
  const picks = (index) => show(index, at[index].threshold);
  const pr = new LineChart({
    title: "Precision over recall", nearest: "point", describe, picks, dots: dots("recall", "precision"),
    lines: [{ name: "precision", series: 0, points: at.map((one) => [one.recall, one.precision]) }],
    x: { ...whole, label: "recall" }, y: whole,
  });
  const f1 = new LineChart({
    title: "F1, precision and recall over the threshold", describe, picks, dots: dots("threshold", "f1"),
    lines: [
      { name: "F1", series: 0, points: at.map((one) => [one.threshold, one.f1]) },
      { name: "precision", series: 1, thin: true, points: at.map((one) => [one.threshold, one.precision]) },
      { name: "recall", series: 2, thin: true, points: at.map((one) => [one.threshold, one.recall]) },
    ],
    x: { low: 0, high: 1, label: "threshold of the score" }, y: whole,
  });

  // The point of a threshold is that of the lowest drawn score from it on; the words name that score.
  function show(index, threshold) {
    const now = numbersAt(own, index);
    slider.value = threshold;
    if (index >= 0) [pr, f1].forEach((chart) => chart.select(index));
    says.textContent = `${sentence(now)} (${now.right.toLocaleString("en")} of ${many(own.objects, "object")} found, `
      + `${many(now.shown - now.right, "wrong detection")})`;
  }

  slider.addEventListener("input", () => {
    const wanted = Number(slider.value);
    show(own.points.findLastIndex((point) => point[0] >= wanted), wanted);
  });
  const start = own.best ? own.best.threshold : 0.5;
  show(own.points.findLastIndex((point) => point[0] >= start - 1e-9), start);
  return [
    h("label", { class: "slider" }, h("span", {}, "threshold"), slider), says,
    h("div", { class: "charts" }, pr.element, f1.element),
    h("p", { class: "note" }, "\u25cf best F1   \u25a0 lowest threshold of 90% precision. Move along a curve, or use the arrow keys."),
  ];
}

function curves(analysis) {
  const all = [analysis.all, ...analysis.classes];
  const place = h("div", { class: "curves" });
  const draw = (own) => place.replaceChildren(...(own.points.length ? curvesOf(own) : [h("p", {}, "Nothing was found of this class.")]).flat());
  const select = h("select", { "aria-label": "class", onchange: () => draw(all[select.value]) },
    all.map((own, index) => h("option", { value: index }, `${own.name} (${many(own.objects, "object")})`)));
  draw(all[0]);
  return section("Which threshold?", "curves",
    "A detection counts from the score on that you choose. At IoU 0.5; all classes together unless you pick one.",
    h("p", {}, select), place);
}

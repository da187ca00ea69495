/* Fidelity over budget: lines with their own colour, marker and dash; intervals as error bars. */
kvscope.drawing("budget-curve", (box, data, page) => {
  const { element, select, plain, plot, lineStyle, number, colour } = kvscope;
  const usable = data.metrics.filter((metric) => data.lines.some((line) => line.values[metric.name].some((value) => value[0] !== null)));
  if (!usable.length) return;
  let metric = usable[0];
  const area = element("div", { class: "plot curve" });
  const behind = element("div");

  function lineTrace(line) {
    const style = lineStyle(page.labels.indexOf(line.label), line.replay);
    const values = line.values[metric.name];
    const bars = values.some((value) => value[1] !== null);
    return {
      type: "scatter", mode: "lines+markers", name: plain(line.name), x: line.keys, y: values.map((value) => value[0]),
      line: { color: style.color, dash: style.dash, width: 2 },
      marker: { symbol: style.symbol, size: 9, color: style.color },
      error_y: bars ? {
        type: "data", symmetric: false, thickness: 1, width: 4, color: style.color,
        array: values.map((value) => (value[2] === null ? 0 : value[2] - value[0])),
        arrayminus: values.map((value) => (value[1] === null ? 0 : value[0] - value[1])),
      } : undefined,
      text: line.budgets.map((budget, index) => plain(`${line.name}, budget ${budget}: ${number(values[index][0], metric)}`)),
      hovertemplate: "%{text}<extra></extra>",
    };
  }
  function referenceTrace(reference) {
    return {
      type: "scatter", mode: "lines", name: plain(reference.name), x: reference.keys, y: reference.values,
      line: { color: colour("muted"), dash: "dash", width: 2 },
      text: reference.values.map((value) => plain(`${reference.name}: ${number(value, metric)}`)),
      hovertemplate: "%{text}<extra></extra>",
    };
  }
  function draw() {
    const references = data.references[metric.name] || [];
    const ticks = new Map();
    for (const line of data.lines) line.keys.forEach((keys, index) => ticks.set(keys, line.budgets[index]));
    const at = [...ticks.keys()].sort((a, b) => a - b);
    const few = at.length <= 10;
    const text = (keys) => {
      const shown = String(Math.round(keys * 10) / 10);
      return ticks.get(keys) === shown ? shown : `${shown}<br>${plain(ticks.get(keys))}`;
    };
    plot(area, [...data.lines.map(lineTrace), ...references.map(referenceTrace)], {
      xaxis: { title: { text: "budget, keys per key/value head" }, ...(few ? { tickvals: at, ticktext: at.map(text) } : {}) },
      yaxis: { title: { text: plain(metric.title) + (metric.direction === "none" ? "" : ` (${metric.direction} is better)`) } },
      legend: { orientation: "v", x: 1.01, xanchor: "left", y: 1, font: { size: 13 } },
      showlegend: true,
    });
    const rows = data.lines.flatMap((line) => line.budgets.map((budget, index) =>
      [line.name, budget, number(line.keys[index], { name: "budget_keys" }), ...line.values[metric.name][index].map((value) => number(value, metric))]));
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this plot", ["Policy", "Budget", "Keys", metric.title, "low", "high"], rows));
  }

  const choice = select("Metric", usable.map((each) => ({ value: each.name, text: each.title })), metric.name, (value) => {
    metric = usable.find((each) => each.name === value);
    draw();
  });
  box.append(element("div", { class: "controls" }, choice.box), area, behind);
  draw();
  kvscope.onTheme(draw);
});

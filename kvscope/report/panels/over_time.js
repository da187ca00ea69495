/* Over time: a metric and the keys held against the step; the chosen run in front, others for comparison. */
kvscope.drawing("over-time", async (box, data, page) => {
  const { element, select, checkbox, state, numbers, plot, plain, number, sample, unique } = kvscope;
  const KEYS = "held_keys";
  const known = new Set(Object.values(data.parts).flatMap((part) => Object.values(part.runs).flatMap(Object.keys)));
  const usable = page.metrics.filter((metric) => known.has(metric.name) && metric.name !== KEYS);
  if (!usable.length) return;
  const curves = page.panels.find((panel) => panel.name === "budget-curve");
  state.declare("track", () => usable[0].name, state.oneOf(() => usable.map((metric) => metric.name)));
  state.declare("among", () => "ticked", state.oneOf(() => ["ticked", "alone"]));
  const area = element("div", { class: "plot tracks" });
  const legend = element("div", { class: "legend" });
  const said = element("p", { class: "small", role: "status" });
  const behind = element("div");

  /* The chosen run, the one to compare with, and the lines ticked under the budget curves, at the same budget. */
  function runs(part) {
    const { budget } = page.run();
    const ticked = state.get("among") === "ticked" && curves ? state.get("lines").split(".").filter(Boolean).map((index) => curves.data.lines[index].runs.find((id) => page.byId.get(id).budget === budget)) : [];
    return unique([state.get("run"), state.get("other"), ...ticked]).filter((id) => id && part.runs[id]);
  }
  const draw = kvscope.latest(async () => {
    const part = data.parts[state.get("part")];
    const metric = usable.find((each) => each.name === state.get("track"));
    if (!part) { said.textContent = "No values by step for this sequence."; area.replaceChildren(); behind.replaceChildren(); return; }
    const shown = runs(part);
    const { edges } = part;
    const width = (edges[edges.length - 1] - edges[0]) / (edges.length - 1);
    const steps = edges.slice(0, -1).map((from, index) => (from + edges[index + 1] - 1) / 2);
    said.textContent = [
      part.runs[state.get("run")] ? "" : "The page does not contain the chosen run.",
      width > 1 ? `Each point is the mean of about ${width.toFixed(1)} steps.` : "",
    ].join(" ");
    legend.replaceChildren(...shown.map((id) => element("span", { class: id === state.get("run") ? "front" : null }, sample(page.style(page.byId.get(id)), false), element("bdi", {}, page.byId.get(id).name))));
    const rows = [];
    const traces = [];
    for (const id of shown) {
      const run = page.byId.get(id);
      const style = page.style(run);
      for (const [name, axis] of [[metric.name, "y"], [KEYS, "y2"]]) {
        const packed = part.runs[id][name];
        if (!packed) continue;
        const values = [...await numbers(packed)];
        if (axis === "y") rows.push(...steps.map((step, index) => [run.name, step, number(values[index], metric)]));
        traces.push({
          type: "scatter", mode: "lines", name: plain(run.name), showlegend: false, x: steps, y: values.map((value) => (Number.isNaN(value) ? null : value)), yaxis: axis,
          line: { color: style.color, dash: style.dash, width: id === state.get("run") ? 3.5 : 1.6 },
          hovertemplate: `step %{x}: %{y:.4~g}<extra>${plain(run.name)}</extra>`,
        });
      }
    }
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this plot", ["Run", "Step", metric.title], rows));
    const drawn = traces.filter((trace) => trace.yaxis === "y").flatMap((trace) => trace.y).filter((value) => value !== null);
    const wide = metric.range[1] === null && Math.min(...drawn) > 0 && Math.max(...drawn) > 20 * Math.min(...drawn); // one bad token would flatten all others
    const at = state.get("step");
    await plot(area, traces, {
      xaxis: { title: { text: "step" }, anchor: "y2" },
      yaxis: { title: { text: plain(metric.title) }, domain: [0.38, 1], ...(wide ? { type: "log", tickformat: "~g", nticks: 6 } : {}) },
      yaxis2: { title: { text: "keys held" }, domain: [0, 0.28], rangemode: "tozero" },
      margin: { l: 72, r: 16, t: 38, b: 48 },
      shapes: at >= edges[0] ? [{ type: "line", xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: 1, line: { width: 1, dash: "dot", color: kvscope.colour("text") } }] : [],
    });
  });
  const choice = select("Metric", usable.map((each) => ({ value: each.name, text: each.title })), state.get("track"), (name) => state.set({ track: name }));
  const among = checkbox("with the policies ticked under Budget curves", state.get("among") === "ticked", (on) => state.set({ among: on ? "ticked" : "alone" }));
  box.append(element("div", { class: "controls" }, choice.box, among.box), said, legend, area, behind);
  state.on(["run", "other", "part", "step", "track", "among", "lines"], () => {
    choice.value = state.get("track");
    among.control.checked = state.get("among") === "ticked";
    draw();
  });
  kvscope.onTheme(draw);
  await draw();
  area.on("plotly_click", ({ points: [point] }) => state.set({ step: Math.round(point.x) }));
});

/* Query similarity: one line for each lag. */
kvscope.drawing("queries", async (box, data, page) => {
  const { element, state, numbers, plot, lineStyle, colour, sample } = kvscope;
  const DASHES = ["solid", "dash", "dot"];
  const THRESHOLD = 0.8;
  const area = element("div", { class: "plot scatter" });
  const said = element("p", { class: "small", role: "status" });
  const legend = element("div", { class: "legend" });
  const behind = element("div");
  const draw = kvscope.latest(async () => {
    const part = data.parts[state.get("part")];
    const packed = part && part.layers[state.get("layer")];
    area.hidden = legend.hidden = behind.hidden = !packed;
    if (!packed) { said.textContent = "The page does not contain the queries of this sequence."; return; }
    const { edges } = part;
    const count = edges.length - 1;
    const width = (edges[count] - edges[0]) / count;
    const steps = edges.slice(0, -1).map((from, index) => (from + edges[index + 1] - 1) / 2);
    const values = await numbers(packed);
    const line = (at) => [...values.subarray(at * count, (at + 1) * count)].map((value) => (Number.isNaN(value) ? null : value));
    said.textContent = `Layer ${state.get("layer")}; the dashed line is the threshold of Recycled Attention's dynamic schedule.${width > 1 ? ` Each point is the mean of about ${width.toFixed(1)} steps.` : ""}`;
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this plot", ["Step", ...data.lags.map((lag) => `${lag} before`)],
      () => steps.map((step, index) => [step, ...data.lags.map((_, at) => { const value = line(at)[index]; return value === null ? null : value.toFixed(4); })])));
    const at = state.get("step");
    const traces = data.lags.map((lag, index) => ({
      type: "scatter", mode: "lines", name: lag === 1 ? "1 step before" : `${lag} steps before`, x: steps, y: line(index), line: { color: lineStyle(index).color, width: 1.8, dash: DASHES[index] }, hovertemplate: "step %{x}: %{y:.3f}",
    }));
    legend.replaceChildren(...traces.map((trace) => element("span", {}, sample({ ...trace.line }, false), trace.name)));
    await plot(area, traces, {
      xaxis: { title: { text: "step" } }, yaxis: { title: { text: "cosine of mean queries" } },
      showlegend: false,
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: THRESHOLD, y1: THRESHOLD, line: { width: 1, dash: "dash", color: colour("muted") } },
        { type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line: { width: 1, dash: "dot", color: colour("text") } }],
    });
  });
  box.append(said, legend, area, behind);
  state.on(["part", "layer", "step"], draw);
  kvscope.onTheme(draw);
  await draw();
});

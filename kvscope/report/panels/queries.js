/* Query similarity: one line for each lag. */
kvscope.drawing("queries", async (box, data, page) => {
  const { element, state, numbers, plot, lineStyle, colour } = kvscope;
  const THRESHOLD = 0.8;
  const area = element("div", { class: "plot scatter" });
  const said = element("p", { class: "small", role: "status" });
  const behind = element("div");
  const draw = kvscope.latest(async () => {
    const part = data.parts[state.get("part")];
    const packed = part && part.layers[state.get("layer")];
    area.hidden = behind.hidden = !packed;
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
    await plot(area, data.lags.map((lag, index) => {
      const style = lineStyle(index);
      return { type: "scatter", mode: "lines", name: lag === 1 ? "1 step before" : `${lag} steps before`, x: steps, y: line(index), line: { color: style.color, width: 1.8, dash: ["solid", "dash", "dot"][index] }, hovertemplate: "step %{x}: %{y:.3f}" };
    }), {
      xaxis: { title: { text: "step" } }, yaxis: { title: { text: "cosine of mean queries" } },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: THRESHOLD, y1: THRESHOLD, line: { width: 1, dash: "dash", color: colour("muted") } },
        { type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line: { width: 1, dash: "dot", color: colour("text") } }],
    });
  });
  box.append(said, area, behind);
  state.on(["part", "layer", "step"], draw);
  kvscope.onTheme(draw);
  await draw();
});

/* Value norms against received attention, one point per key. */
kvscope.drawing("norms", async (box, data, page) => {
  const { element, state, numbers, plot, plain, raster, colour } = kvscope;
  const SINKS = 4;
  const residency = page.panels.find((panel) => panel.name === "residency");
  const area = element("div", { class: "plot scatter" });
  const said = element("p", { class: "small", role: "status" });
  const legend = element("div", { class: "legend points" });
  const behind = element("div");

  const draw = kvscope.latest(async () => {
    const layers = data.parts[state.get("part")] || {};
    const found = layers[state.get("layer")];
    area.hidden = legend.hidden = behind.hidden = !found;
    if (!found) { said.textContent = `Layer ${state.get("layer")} is not in this page; layers in this page: ${Object.keys(layers).join(", ") || "none"}.`; return; }
    const { length } = page.part();
    const head = state.get("head") === "all" ? 0 : Math.floor(state.get("head") / page.headsOf().group);
    const [received, norm] = await Promise.all([numbers(found.received), numbers(found.norm)]);
    const each = (residency && residency.data ? residency.data.rasters : []).find((one) => one.run === state.get("run") && one.part === state.get("part") && one.layer === state.get("layer"));
    const intervals = each ? (await raster.open(each, length)).heads[head] : null;
    const step = state.get("step");
    const keys = [...Array(length).keys()].filter((key) => received[head * length + key] > 0 && norm[head * length + key] > 0);
    const kinds = [
      { name: "sinks", symbol: "star", tone: "text", size: 11, has: (key) => key < SINKS },
      { name: intervals ? `held at step ${step} by the chosen run` : "keys", symbol: "circle", tone: "kept", size: 6, has: (key) => key >= SINKS && (!intervals || raster.holds(intervals, key, step)) },
      { name: "evicted, or not generated yet", symbol: "x-thin-open", tone: "only", size: 6, has: (key) => key >= SINKS && intervals && !raster.holds(intervals, key, step) },
    ];
    said.textContent = `Layer ${state.get("layer")}, key/value head ${head}${state.get("head") === "all" ? " (choose a query head in the bar for another)" : ""}.`;
    const token = state.get("token");
    const traces = kinds.map((kind) => {
      const mine = keys.filter(kind.has);
      return {
        type: "scatter", mode: "markers", name: plain(kind.name), x: mine.map((key) => received[head * length + key]), y: mine.map((key) => norm[head * length + key]), customdata: mine,
        marker: { symbol: kind.symbol, size: mine.map((key) => (key === token ? 18 : kind.size)), color: colour(kind.tone), opacity: 0.8, line: { width: 1.5, color: colour(kind.tone) } },
        text: mine.map((key) => plain(`${key} ${page.token(key)}`)), hovertemplate: "%{text}<br>received %{x:.3g}, norm %{y:.3g}<extra></extra>",
      };
    }).filter((trace) => trace.x.length);
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this plot", ["Token", "Position", "Attention received", "L1 norm of the value"],
      () => keys.map((key) => [page.token(key) || key, key, received[head * length + key].toPrecision(3), norm[head * length + key].toPrecision(3)])));
    legend.replaceChildren(...kvscope.pointLegend(traces));
    await plot(area, traces, {
      xaxis: { title: { text: "attention received, sum over all queries" }, type: "log", dtick: 1, tickformat: "~g" },
      yaxis: { title: { text: "L1 norm of the value" }, type: "log" },
      showlegend: false,
    });
  });
  box.append(said, legend, area, behind);
  state.on(["run", "part", "layer", "head", "step", "token"], draw);
  kvscope.onTheme(draw);
  await draw();
  if (area.on) area.on("plotly_click", ({ points: [point] }) => state.set({ token: point.customdata }));
});

/* Keys by depth: the share of keys held in each layer, one line for each run. */
kvscope.drawing("depth", async (box, data, page) => {
  const { element, plot, plain, sample } = kvscope;
  const area = element("div", { class: "plot scatter" });
  const percent = (value) => (value === null ? "" : `${(100 * value).toFixed(1)} %`);
  const name = (line) => page.byId.get(line.run).name;
  const legend = element("div", { class: "legend" });
  const draw = kvscope.latest(async () => {
    legend.replaceChildren(...data.lines.map((line) => element("span", {}, sample(page.style(page.byId.get(line.run))), element("bdi", {}, name(line)))));
    await plot(area, data.lines.map((line) => {
      const style = page.style(page.byId.get(line.run));
      return {
        type: "scatter", mode: "lines+markers", name: plain(name(line)), x: data.layers, y: line.mean, customdata: data.layers.map(() => line.run),
        line: { color: style.color, dash: style.dash, width: 2 }, marker: { symbol: style.symbol, size: 9, color: style.color },
        error_y: {
          type: "data", symmetric: false, thickness: 1, width: 4, color: style.color,
          array: line.high.map((high, at) => high - line.mean[at]), arrayminus: line.low.map((low, at) => line.mean[at] - low),
        },
        hovertemplate: `layer %{x}: %{y:.1%}<extra>${plain(name(line))}</extra>`,
      };
    }), { xaxis: { title: { text: "layer" }, dtick: Math.ceil(data.layers.length / 16) }, yaxis: { title: { text: "share of keys held" }, tickformat: ".0%", rangemode: "tozero" }, showlegend: false });
  });
  box.append(legend, area, kvscope.tableBehind("The numbers behind this plot", ["Run", "Layer", "Held", "Lowest head", "Highest head"],
    () => data.lines.flatMap((line) => data.layers.map((layer, at) => [name(line), layer, percent(line.mean[at]), percent(line.low[at]), percent(line.high[at])]))));
  kvscope.onTheme(draw);
  await draw();
  area.on("plotly_click", ({ points: [point] }) => kvscope.state.set({ run: point.customdata }));
});

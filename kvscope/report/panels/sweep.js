/* Parameter sweep: a metric over the values of one parameter, one line for each budget; and maps of what was tuned. */
kvscope.drawing("sweep", async (box, data, page) => {
  const { element, select, state, plot, plain, lineStyle, number, axisTitle } = kvscope;
  const value = (id, name) => (page.byId.get(id).values[name] || [null])[0];
  const ids = data.sweeps.flatMap((sweep) => sweep.lines.flatMap((line) => line.runs));
  for (const { run, parameter, layers, values } of data.tuned) {
    const perHead = values[0].length > 1;
    const given = kvscope.unique(values.flat());
    const numeric = given.every((each) => typeof each === "number");
    const place = (each) => (numeric ? each : given.indexOf(each));
    const grid = element("div");
    kvscope.heat(grid, {
      label: `${parameter} in every layer`, corner: perHead ? "layer / kv head" : "layer", rows: layers.map(String), columns: perHead ? values[0].map((_, head) => String(head)) : [parameter],
      scale: [Math.min(...given.map(place)), Math.max(...given.map(place))], value: (r, c) => place(values[r][c]), text: (at) => String(numeric ? at : given[at]),
      say: (r, c) => `layer ${layers[r]}${perHead ? `, key/value head ${c}` : ""}: ${parameter} ${values[r][c]}`,
      click: (r, c) => state.set({ run, layer: layers[r], ...(perHead ? { head: c * page.headsOf(layers[r]).group } : {}) }),
    });
    box.append(element("h3", {}, "Tuned: ", element("bdi", {}, `${page.byId.get(run).label}, ${parameter}`)), grid);
  }
  const usable = page.metrics.filter((metric) => ids.some((id) => value(id, metric.name) !== null));
  if (!usable.length) return;
  state.declare("sweep", () => 0, state.whole(() => 0, () => data.sweeps.length - 1));
  state.declare("swept", () => usable[0].name, state.oneOf(() => usable.map((metric) => metric.name)));
  const area = element("div", { class: "plot scatter" });
  const behind = element("div");
  const legend = element("div", { class: "legend" });
  const draw = kvscope.latest(async () => {
    const sweep = data.sweeps[state.get("sweep")];
    const metric = usable.find((each) => each.name === state.get("swept"));
    const name = (line) => { const run = page.byId.get(line.runs[0]); return `budget ${run.budget === null ? "none" : run.budget}${page.replays.length > 1 ? ` · ${run.replay}` : ""}`; };
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this plot", ["Line", sweep.parameter, metric.title],
      () => sweep.lines.flatMap((line) => line.runs.map((id, at) => [name(line), line.values[at], number(value(id, metric.name), metric)]))));
    legend.replaceChildren(...sweep.lines.map((line, index) => element("span", {}, kvscope.sample(lineStyle(index)), element("bdi", {}, name(line)))));
    await plot(area, sweep.lines.map((line, index) => {
      const style = lineStyle(index);
      return {
        type: "scatter", mode: "lines+markers", name: plain(name(line)), x: line.values, y: line.runs.map((id) => value(id, metric.name)), customdata: line.runs,
        line: { color: style.color, dash: style.dash, width: 2 }, marker: { symbol: style.symbol, size: 9, color: style.color },
        hovertemplate: `${plain(sweep.parameter)} %{x}: %{y:.4~g}<extra>${plain(name(line))}</extra>`,
      };
    }), { xaxis: { title: { text: plain(`${sweep.policy}: ${sweep.parameter}`) } }, yaxis: { title: { text: axisTitle(metric) } }, showlegend: false });
  });
  const which = select("Policy and parameter", data.sweeps.map((sweep, at) => ({ value: at, text: `${sweep.policy}: ${sweep.parameter}` })), state.get("sweep"), (at) => state.set({ sweep: at }));
  const metricChoice = select("Metric", usable.map((each) => ({ value: each.name, text: each.title })), state.get("swept"), (name) => state.set({ swept: name }));
  box.append(element("div", { class: "controls" }, which.box, metricChoice.box), legend, area, behind);
  state.on(["sweep", "swept"], () => { which.value = state.get("sweep"); metricChoice.value = state.get("swept"); draw(); });
  kvscope.onTheme(draw);
  await draw();
  area.on("plotly_click", ({ points: [point] }) => state.set({ run: point.customdata }));
});

/* Outcome: rank agreement of each cheap metric, and the scatter of the chosen one. */
kvscope.drawing("outcome", async (box, data, page) => {
  const { element, select, state, plot, plain, number, sample, axisTitle } = kvscope;
  const OUTCOME = page.metrics.find((metric) => metric.name === "perplexity_ratio");
  const names = page.metrics.filter((metric) => data.groups.some((group) => group.values[metric.name]));
  if (!names.length) return;
  state.declare("against", () => names[0].name, state.oneOf(() => names.map((metric) => metric.name)));
  const protocol = (group) => { const run = page.byId.get(group.runs[0]); return `${run.prefill} prefill, ${run.loop} loop${page.replays.length > 1 ? `, ${run.replay}` : ""}`; };
  const ratio = (id) => page.byId.get(id).values[OUTCOME.name][0];
  const area = element("div", { class: "plot scatter" });
  const body = element("tbody");
  const behind = element("div");
  const legend = element("div", { class: "legend points" });
  const rank = (value) => (value === null ? "–" : value.toFixed(2));
  /* Lower perplexity is better: for a metric of which more is better, a good agreement is near -1. */
  const good = (metric, found) => (found.within !== null && metric.direction !== "none" ? (metric.direction === "higher" ? -found.within : found.within) : null);

  const draw = kvscope.latest(async () => {
    const metric = names.find((each) => each.name === state.get("against"));
    body.replaceChildren(...data.groups.flatMap((group) => names.filter((each) => group.values[each.name]).map((each) => {
      const share = good(each, group.agreement[each.name]);
      return element("tr", { class: each.name === metric.name ? "shown" : null },
        element("th", { scope: "row" }, kvscope.button(each.title, () => state.set({ against: each.name }), { class: "plain" })),
        data.groups.length > 1 ? element("td", {}, protocol(group)) : null,
        element("td", { class: "number" }, rank(group.agreement[each.name].within)), element("td", { class: "number" }, String(group.agreement[each.name].budgets)),
        element("td", { class: "number" }, rank(group.agreement[each.name].rank)), element("td", { class: "number" }, String(group.agreement[each.name].runs)),
        element("td", {}, share === null ? "–" : share > 0.8 ? "foresees the order" : share > 0.4 ? "foresees it in part" : share > -0.4 ? "says little" : "misleads"));
    })));
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this plot", ["Run", metric.title, "perplexity ratio"],
      () => data.groups.flatMap((group) => group.runs.map((id, at) => [page.byId.get(id).name, number((group.values[metric.name] || [])[at], metric), number(ratio(id), OUTCOME)]))));
    const shown = kvscope.unique(data.groups.flatMap((group) => group.runs.map((id) => page.byId.get(id).label)));
    legend.replaceChildren(...shown.map((label) => {
      const run = page.runs.find((each) => each.label === label);
      return element("span", { class: label === page.run().label ? "front" : null }, sample(page.style(run)), element("bdi", {}, label));
    }));
    const traces = data.groups.flatMap((group) => kvscope.unique(group.runs.map((id) => page.byId.get(id).label)).map((label) => {
      const mine = group.runs.map((id, at) => ({ id, x: (group.values[metric.name] || [])[at] })).filter(({ id, x }) => page.byId.get(id).label === label && x !== null && x !== undefined);
      const style = page.style(page.byId.get(mine[0]?.id ?? group.runs[0]));
      return {
        type: "scatter", mode: "markers", name: plain(label), x: mine.map(({ x }) => x), y: mine.map(({ id }) => ratio(id)), customdata: mine.map(({ id }) => id),
        marker: { symbol: style.symbol, size: label === page.run().label ? 15 : 9, color: style.color, line: { width: label === page.run().label ? 2 : 0, color: kvscope.colour("text") } }, showlegend: false,
        text: mine.map(({ id }) => plain(page.byId.get(id).name)), hovertemplate: "%{text}<br>%{x:.4~g}, perplexity × %{y:.4~g}<extra></extra>",
      };
    })).filter((trace) => trace.x.length);
    const ratios = traces.flatMap((trace) => trace.y);
    const wide = Math.max(...ratios) > 10 * Math.min(...ratios); // a policy that breaks the model would flatten all others
    await plot(area, traces, { xaxis: { title: { text: axisTitle(metric) } }, yaxis: { title: { text: axisTitle(OUTCOME) }, ...(wide ? { type: "log", dtick: 1, tickformat: "~g" } : {}) }, showlegend: false });
  });
  const choice = select("Metric", names.map((each) => ({ value: each.name, text: each.title })), state.get("against"), (name) => state.set({ against: name }));
  box.append(element("div", { class: "controls" }, choice.box), legend, area, element("h3", {}, "Rank agreement with the perplexity ratio"),
    element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ["Metric", ...(data.groups.length > 1 ? ["Protocol"] : []), "Within a budget, mean", "Groups", "Over all", "Runs", "Within a budget, in words"].map((text) => element("th", { scope: "col", class: /^(Metric|Protocol|.* words)$/.test(text) ? null : "number" }, text)))), body)),
    behind);
  state.on(["against", "run"], () => { choice.value = state.get("against"); draw(); });
  kvscope.onTheme(draw);
  await draw();
  area.on("plotly_click", ({ points: [point] }) => state.set({ run: point.customdata }));
});

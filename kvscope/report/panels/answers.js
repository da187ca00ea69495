/* Right answers: accuracy over budget by task, a map of depth and length, and maps of heads that had evicted the needle. */
kvscope.drawing("answers", async (box, data, page) => {
  const { element, select, state, plot, plain, number, percent, sample, heat, scaleBar, axisTitle } = kvscope;
  const usable = page.metrics.filter((metric) => data.metrics.includes(metric.name)).sort((a, b) => data.metrics.indexOf(a.name) - data.metrics.indexOf(b.name));
  const mapped = Object.keys(data.values).filter((id) => data.depth[id] || data.heads[id]);
  state.declare("answer", () => usable[0].name, state.oneOf(() => usable.map((metric) => metric.name)));
  state.declare("task", () => 0, state.whole(() => 0, () => data.tasks.length));
  /* The run of the maps: at first the one of the page, or its closed twin, or the first that evicts. */
  const first = () => (mapped.includes(page.run().id) ? page.run().id : mapped.find((id) => page.byId.get(id).label === page.run().label && page.byId.get(id).budget === page.run().budget)) || mapped.find((id) => page.byId.get(id).budget !== null) || mapped[0];
  if (mapped.length) state.declare("answered", first, state.oneOf(() => mapped));
  const value = (id, name, task) => (data.values[id][name] || [])[task] || [null, null, null, 0];
  const area = element("div", { class: "plot curve" });
  const legend = element("div", { class: "legend" });
  const behind = element("div");
  const styleOf = (id) => page.style(page.byId.get(id));

  const draw = kvscope.latest(async () => {
    const metric = usable.find((each) => each.name === state.get("answer"));
    const task = state.get("task");
    const lines = data.lines.filter((line) => line.runs.some((id) => value(id, metric.name, task)[0] !== null));
    const keys = lines.flatMap((line) => line.runs.map((id) => page.byId.get(id).keys));
    const flat = data.flat.filter((id) => value(id, metric.name, task)[0] !== null);
    legend.replaceChildren(...[...lines.map((line) => [line.runs[0], line.name, true]), ...flat.map((id) => [id, page.byId.get(id).name, false])].map(([id, name, marks]) => element("span", {}, sample(styleOf(id), marks), element("bdi", {}, name))));
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this plot", ["Policy", "Budget", metric.title, "low", "high", "examples"],
      () => [...lines.flatMap((line) => line.runs), ...flat].map((id) => { const found = value(id, metric.name, task); return [page.byId.get(id).label, page.byId.get(id).budget === null ? "-" : page.byId.get(id).budget, ...found.slice(0, 3).map((each) => number(each, metric)), String(found[3])]; })));
    const traces = lines.map((line) => {
      const style = styleOf(line.runs[0]);
      const found = line.runs.map((id) => value(id, metric.name, task));
      return {
        type: "scatter", mode: "lines+markers", name: plain(line.name), x: line.runs.map((id) => page.byId.get(id).keys), y: found.map((each) => each[0]), customdata: line.runs, showlegend: false,
        line: { color: style.color, dash: style.dash, width: 2 }, marker: { symbol: style.symbol, size: 9, color: style.color },
        error_y: found.some((each) => each[1] !== null) ? { type: "data", symmetric: false, thickness: 1, width: 4, color: style.color, array: found.map((each) => (each[2] === null ? 0 : each[2] - each[0])), arrayminus: found.map((each) => (each[1] === null ? 0 : each[0] - each[1])) } : undefined,
        text: line.runs.map((id, at) => plain(`${line.name}, budget ${page.byId.get(id).budget}: ${number(found[at][0], metric)} over ${found[at][3]} examples`)), hovertemplate: "%{text}<extra></extra>",
      };
    });
    const ends = keys.length ? [Math.min(...keys), Math.max(...keys)] : [0, 1];
    traces.push(...flat.map((id) => {
      const y = value(id, metric.name, task)[0];
      const name = plain(page.byId.get(id).name);
      return { type: "scatter", mode: "lines", name, x: ends, y: [y, y], customdata: [id, id], showlegend: false, line: { color: styleOf(id).color, dash: "dash", width: 2 }, text: [name, name], hovertemplate: `%{text}: ${number(y, metric)}<extra></extra>` };
    }));
    await plot(area, traces, { xaxis: { title: { text: "budget, keys per key/value head" }, rangemode: "tozero" }, yaxis: { title: { text: axisTitle(metric) }, ...(metric.range[1] === 1 ? { range: [-0.05, 1.05] } : { rangemode: "tozero" }) } });
  });
  const metricChoice = select("Metric", usable.map((each) => ({ value: each.name, text: each.title })), state.get("answer"), (name) => state.set({ answer: name }));
  const taskChoice = select("Task and length", [{ value: 0, text: "all" }, ...data.tasks.map((task, at) => ({ value: at + 1, text: task.name }))], state.get("task"), (at) => state.set({ task: Number(at) }));
  box.append(element("div", { class: "controls" }, metricChoice.box, taskChoice.box), legend, area, behind);
  state.on(["answer", "task"], () => { metricChoice.value = state.get("answer"); taskChoice.value = state.get("task"); draw(); });
  kvscope.onTheme(draw);
  await draw();
  area.on("plotly_click", ({ points: [point] }) => state.set({ run: point.customdata, ...(mapped.includes(point.customdata) ? { answered: point.customdata } : {}) }));
  if (!mapped.length) return;

  const scored = usable.find((metric) => metric.name === data.metrics[0]);
  /* Scores are shares; of a replay in which nothing has a score, the map shows the first metric that there is. */
  const bounded = scored.range[1] === 1;
  const say = (each) => (bounded ? percent(each) : number(each, scored));
  const scale = bounded ? [0, 1] : [0, Math.max(1e-9, ...Object.values(data.depth).flatMap((each) => each.means.flat()))];
  const maps = element("div");
  const drawMaps = () => {
    const run = page.byId.get(state.get("answered"));
    const found = data.depth[run.id];
    const heads = data.heads[run.id];
    const parts = [];
    if (found) {
      const grid = element("div");
      heat(grid, {
        label: `${scored.title} by depth and length, ${run.name}`, corner: "depth / length", rows: found.depths, columns: found.lengths, scale,
        value: (r, c) => found.means[r][c], text: say,
        say: (r, c) => `fact at ${found.depths[r]} of the text, length ${found.lengths[c]}: ${found.means[r][c] === null ? "no example" : `${say(found.means[r][c])} over ${found.counts[r][c]} examples`}`,
      });
      parts.push(element("h3", {}, `Depth and length: ${scored.title}`), scaleBar(scale, say), grid);
    }
    for (const side of heads ? ["wrong", "right"] : []) {
      const count = heads[`${side}_examples`];
      parts.push(element("h3", {}, `Needle evicted where the answer is ${side}: ${count} example${count === 1 ? "" : "s"}`));
      if (!count) continue;
      const grid = element("div");
      heat(grid, {
        label: `Share of the needle evicted by layer and key/value head where the answer is ${side}, ${run.name}`, corner: "layer / kv head", rows: heads.layers.map(String), columns: heads[side][0].map((_, head) => String(head)), scale: [0, 1],
        value: (r, c) => heads[side][r][c], text: percent,
        say: (r, c) => `layer ${heads.layers[r]}, key/value head ${c}: ${heads[side][r][c] === null ? "not there" : `${percent(heads[side][r][c])} of the needle's tokens evicted at the end of the prompt`}`,
        click: (r, c) => heads[side][r][c] !== null && state.set({ run: run.id, layer: heads.layers[r], head: c * page.headsOf(heads.layers[r]).group }),
      });
      parts.push(scaleBar([0, 1], percent), grid);
    }
    maps.replaceChildren(...parts);
  };
  const runChoice = select("Run of the maps", mapped.map((id) => ({ value: id, text: page.byId.get(id).name })), state.get("answered"), (id) => state.set({ answered: id }));
  box.append(element("div", { class: "controls" }, runChoice.box), maps);
  state.on(["answered"], () => { runChoice.value = state.get("answered"); drawMaps(); });
  kvscope.onTheme(drawMaps);
  drawMaps();
});

/* Attention inspector: one row as points on a logarithmic scale, and its heaviest keys as a table. */
kvscope.drawing("inspector", async (box, data, page) => {
  const { element, state, numbers, plot, plain, raster, colour, percent, clamp } = kvscope;
  const FEW = 20; // rows of the table
  const MOST = 1500; // points of the plot
  const residency = page.panels.find((panel) => panel.name === "residency");
  const KINDS = [
    { name: "seen, and in the ideal set", symbol: "circle", size: 8, tone: "kept", opacity: 1 },
    { name: "seen, though not in the ideal set", symbol: "circle-open", size: 6, tone: "kept", opacity: 0.8 },
    { name: "in the ideal set, but not seen", symbol: "x", size: 9, tone: "only", opacity: 1 },
    { name: "neither", symbol: "line-ew-open", size: 5, tone: "muted", opacity: 0.5 },
  ];
  const area = element("div", { class: "plot inspect" });
  const said = element("p", { class: "small", role: "status" });
  const facts = element("p");
  const legend = element("div", { class: "legend points" });
  const body = element("tbody");
  const table = element("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "Heaviest keys of the row" },
    element("table", {}, element("thead", {}, element("tr", {}, ["Token", "Position", "Full weight", "Live weight", "Seen", "Ideal", "Mark"].map((text, at) => element("th", { scope: "col", class: at ? "number" : null }, text)))), body));

  /* The row of the chosen layer and head in this page that is nearest to the chosen step. */
  function nearest() {
    const rows = (data.parts[state.get("part")] || { rows: [] }).rows.filter((row) => row.layer === state.get("layer") && (state.get("head") === "all" || row.head === state.get("head")));
    return rows.reduce((best, row) => (!best || Math.abs(row.step - state.get("step")) < Math.abs(best.step - state.get("step")) ? row : best), null);
  }
  /* Which keys the chosen run could see at the row's step; null where the page does not contain its raster. */
  async function visible(row) {
    const each = (residency && residency.data ? residency.data.rasters : []).find((one) => one.run === state.get("run") && one.part === state.get("part") && one.layer === row.layer);
    if (!each) return null;
    const intervals = await raster.open(each, page.part().length);
    const head = intervals.heads[Math.floor(row.head / page.headsOf(row.layer).group)];
    return Array.from({ length: row.step + 1 }, (_, key) => key === row.step || raster.holds(head, key, row.step - 1));
  }
  /* The current key and as many others as the run saw, by weight; of equal weights the newer. */
  function ideal(weights, count) {
    const order = [...weights.keys()].slice(0, -1).sort((a, b) => weights[b] - weights[a] || b - a);
    return new Set([weights.length - 1, ...order.slice(0, count - 1)]);
  }

  const draw = kvscope.latest(async () => {
    const row = nearest();
    const layers = [...new Set((data.parts[state.get("part")] || { rows: [] }).rows.map((each) => each.layer))].sort((a, b) => a - b);
    table.hidden = area.hidden = legend.hidden = !row;
    facts.textContent = "";
    if (!row) { said.textContent = `No row of layer ${state.get("layer")}${state.get("head") === "all" ? "" : `, query head ${state.get("head")}`} is in this page. Layers with rows: ${layers.join(", ") || "none"}.`; return; }
    const weights = await numbers(row.weights);
    const seen = await visible(row);
    const count = seen ? seen.filter(Boolean).length : 0;
    const best = seen ? ideal(weights, count) : new Set();
    const sum = (keys) => keys.reduce((total, key) => total + weights[key], 0);
    const all = [...weights.keys()];
    const [mass, whole, bestMass] = [seen ? sum(all.filter((key) => seen[key])) : null, sum(all), sum([...best])];
    const live = (key) => (seen && seen[key] ? weights[key] / (mass + row.missing) : 0);
    const kind = (key) => (seen && seen[key] ? (best.has(key) ? 0 : 1) : best.has(key) ? 2 : 3);
    const heavy = new Set((data.parts[state.get("part")].heavy[row.layer] || [])[Math.floor(row.head / page.headsOf(row.layer).group)] || []);
    const mark = (key) => [key < data.sinks ? "S" : "", heavy.has(key) ? "H" : ""].filter(Boolean).join(" ");
    said.textContent = `Layer ${row.layer}, query head ${row.head}, step ${row.step} ${page.token(row.step)}${row.step === state.get("step") ? "" : `, the available row nearest to step ${state.get("step")}`}${state.get("head") === "all" ? "; choose a head in the bar for another" : ""}.${seen ? "" : " The page does not contain the raster of this layer, so what the chosen run saw is unknown."}`;
    if (seen) facts.textContent = `${page.run().name} sees ${count} of ${weights.length} keys with ${percent(mass / whole)} of the row; the ideal set of as many keys has ${percent(bestMass / whole)}.`;
    const order = [...all].sort((a, b) => weights[b] - weights[a]);
    body.replaceChildren(...order.slice(0, FEW).map((key) => element("tr", { class: key === state.get("token") ? "shown" : null },
      element("th", { scope: "row" }, kvscope.button(element("bdi", {}, page.token(key) || `token ${key}`), () => state.set({ token: key }), { class: "plain" })),
      [key, weights[key].toPrecision(3), seen ? (seen[key] ? live(key).toPrecision(3) : "–") : "–", seen ? (seen[key] ? "yes" : "no") : "–", seen ? (best.has(key) ? "yes" : "no") : "–", mark(key) || "–"].map((text) => element("td", { class: "number" }, String(text))))));
    const points = order.filter((key) => weights[key] > 0).slice(0, MOST);
    if (points.length === MOST) said.textContent += ` The ${MOST} heaviest keys are drawn.`;
    const traces = KINDS.map((each, at) => {
      const mine = points.filter((key) => kind(key) === at);
      return {
        type: "scatter", mode: "markers", name: each.name, x: mine, y: mine.map((key) => weights[key]),
        marker: { symbol: each.symbol, size: each.size, color: colour(each.tone), opacity: each.opacity, line: { width: 1.5, color: colour(each.tone) } },
        text: mine.map((key) => plain(`${key} ${page.token(key)} ${mark(key)}`)), hovertemplate: "%{text}<br>weight %{y:.3g}<extra></extra>",
      };
    }).filter((trace) => trace.x.length && (seen || trace.name === "neither"));
    legend.replaceChildren(...kvscope.pointLegend(traces));
    const marked = points.filter((key) => mark(key)); // an invisible marker of the size of a point lifts the letter above it
    traces.push({ type: "scatter", mode: "markers+text", x: marked, y: marked.map((key) => weights[key]), marker: { size: 8, opacity: 0 }, text: marked.map(mark), textposition: "top center", textfont: { size: 11, color: colour("text") }, hoverinfo: "skip" });
    const token = state.get("token");
    await plot(area, traces, {
      xaxis: { title: { text: "position of the key" }, range: [-weights.length * 0.015, weights.length * 1.015] },
      yaxis: { title: { text: "attention weight" }, type: "log", dtick: 1, exponentformat: "power" },
      showlegend: false,
      shapes: token >= 0 && token < weights.length ? [{ type: "line", xref: "x", yref: "paper", x0: token, x1: token, y0: 0, y1: 1, line: { width: 1, dash: "dot", color: colour("text") } }] : [],
    });
  });

  /* For the raster's pointer: the weight that the row of a step gives to a key, where the page contains that row. */
  kvscope.weightAt = async (step, key) => {
    const rows = data.parts[state.get("part")]?.rows || [];
    const row = rows.find((each) => each.layer === state.get("layer") && each.head === state.get("head") && each.step === step);
    return row && key <= step ? (await numbers(row.weights))[key] : null;
  };

  box.append(said, facts, legend, area, element("h3", {}, "Heaviest keys of this row"), table);
  state.on(["run", "part", "layer", "head", "step", "token"], draw);
  kvscope.onTheme(draw);
  await draw();
  if (area.on) area.on("plotly_click", ({ points: [point] }) => state.set({ token: clamp(point.x, 0, page.part().length - 1) }));
});

/* Layer x head map: cells in Cividis; choosing one chooses layer and head for all panels. */
kvscope.drawing("head-map", async (box, data, page) => {
  const { element, select, button, number, state, numbers, heat, scaleBar } = kvscope;
  const usable = page.metrics.filter((metric) => data.scale[metric.name]);
  if (!usable.length) return;
  state.declare("metric", () => usable[0].name, state.oneOf(() => usable.map((metric) => metric.name)));
  state.declare("scale", () => "shared", state.oneOf(() => ["shared", "own"]));
  const area = element("div");
  const legend = element("div");
  const said = element("p", { class: "small", role: "status" });

  const draw = kvscope.latest(async () => {
    const metric = usable.find((each) => each.name === state.get("metric"));
    const run = page.run();
    const map = data.maps[run.id];
    const packed = map && map.values[metric.name];
    said.textContent = packed ? "" : `${run.name}: ${map ? "no values, since nothing was evicted or the metric was not computed." : "the page does not contain its map."}`;
    if (!packed) { area.replaceChildren(); legend.replaceChildren(); return; }
    const values = await numbers(packed);
    const [layers, heads] = packed.shape;
    const scale = state.get("scale") === "shared" ? data.scale[metric.name] : [packed.low, packed.high];
    const own = (r) => page.headsOf(map.layers[r]);
    const at = (r, c) => values[r * heads + c];
    legend.replaceChildren(scaleBar(scale, (value) => number(value, metric)));
    heat(area, {
      label: `${metric.title} by layer and query head, ${run.name}`, corner: "layer / head",
      rows: map.layers.map(String), columns: [...Array(heads).keys()].map(String), scale,
      value: (r, c) => (Number.isNaN(at(r, c)) ? null : at(r, c)),
      say: (r, c) => (c < own(r).heads ? `layer ${map.layers[r]}, query head ${c}, key/value head ${Math.floor(c / own(r).group)}: ${number(at(r, c), metric)}` : `layer ${map.layers[r]} has ${own(r).heads} query heads`),
      text: (value) => number(value, metric),
      chosen: (r, c) => map.layers[r] === state.get("layer") && (state.get("head") === "all" ? c < own(r).heads : state.get("head") === c),
      click: (r, c) => c < own(r).heads && state.set({ layer: map.layers[r], head: state.get("layer") === map.layers[r] && state.get("head") === c ? "all" : c }),
    });
    if (layers * heads > 1) area.append(kvscope.tableBehind("The numbers behind this map", ["Layer", ...[...Array(heads).keys()].map((head) => `head ${head}`)],
      () => map.layers.map((layer, r) => [layer, ...[...Array(heads).keys()].map((c) => (c < own(r).heads ? number(at(r, c), metric) : ""))])));
  });

  const metricChoice = select("Metric", usable.map((each) => ({ value: each.name, text: each.title })), state.get("metric"), (name) => state.set({ metric: name }));
  const shared = button("One colour scale for all runs", () => state.set({ scale: state.get("scale") === "shared" ? "own" : "shared" }));
  const show = () => { metricChoice.value = state.get("metric"); shared.setAttribute("aria-pressed", String(state.get("scale") === "shared")); };
  show();
  box.append(element("div", { class: "controls" }, metricChoice.box, shared, legend), said, area);
  state.on(["run", "part", "metric", "scale", "layer", "head"], () => { show(); draw(); });
  kvscope.onTheme(draw);
  await draw();
});

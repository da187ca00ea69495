/* Layer x head map: a heat map in Cividis; a click chooses that head in the raster. */
kvscope.drawing("head-map", (box, data) => {
  const { element, select, button, plain, plot, number } = kvscope;
  const usable = data.metrics.filter((metric) => data.scale[metric.name]);
  if (!usable.length || !data.maps.length) return;
  const hasValues = (map) => usable.some((metric) => (map.values[metric.name] || []).some((row) => row.some((value) => value !== null)));
  const maps = data.maps.filter(hasValues);
  let metric = usable[0];
  let map = maps.find((each) => each.id === data.first) || maps[0];
  let shared = true;
  const area = element("div", { class: "plot map" });
  const behind = element("div");
  const empty = element("p", { class: "small", hidden: true }, "No values: this run evicted nothing, or the metric was not computed.");

  function draw() {
    const values = map.values[metric.name] || map.layers.map(() => Array(map.heads).fill(null));
    const heads = [...Array(map.heads).keys()];
    const own = values.flat().filter((value) => value !== null);
    const scale = shared || !own.length ? data.scale[metric.name] : [Math.min(...own), Math.max(...own)];
    empty.hidden = own.length > 0;
    const dark = (value) => (value - scale[0]) / (scale[1] - scale[0] || 1) < 0.52; // the lower half of Cividis
    const tooMany = map.heads > 16 || map.layers.length > 24;
    area.style.height = `${Math.min(760, 130 + Math.max(24, Math.min(44, 620 / map.layers.length)) * map.layers.length)}px`;
    plot(area, [{
      type: "heatmap", z: values, x: heads, y: map.layers.map(String), colorscale: "Cividis", zmin: scale[0], zmax: scale[1] > scale[0] ? scale[1] : scale[0] + 1e-6,
      xgap: 2, ygap: 2, colorbar: { title: { text: plain(metric.title), side: "right" }, thickness: 14 },
      customdata: values.map((row, layer) => row.map((value, head) =>
        `layer ${map.layers[layer]}, head ${head} (key/value head ${Math.floor(head / map.group)}): ${number(value, metric)}`)),
      hovertemplate: "%{customdata}<extra></extra>",
    }], {
      xaxis: { title: { text: "query head" }, dtick: map.heads > 16 ? 4 : 1, showgrid: false, zeroline: false },
      yaxis: { title: { text: "layer" }, type: "category", autorange: "reversed", showgrid: false },
      annotations: tooMany ? [] : values.flatMap((row, layer) => row.map((value, head) => ({
        x: head, y: String(map.layers[layer]), text: value === null ? "" : number(value, metric), showarrow: false, captureevents: false,
        font: { size: 12, color: value !== null && dark(value) ? "#ffffff" : "#111111" },
      }))),
    });
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this map", ["Layer", ...heads.map((head) => `head ${head}`)],
      map.layers.map((layer, row) => [layer, ...values[row].map((value) => number(value, metric))])));
  }

  const runChoice = select("Policy and budget", maps.map((each) => ({ value: each.id, text: each.name })), map.id, (value) => {
    map = maps.find((each) => each.id === value);
    draw();
  });
  const metricChoice = select("Metric", usable.map((each) => ({ value: each.name, text: each.title })), metric.name, (value) => {
    metric = usable.find((each) => each.name === value);
    draw();
  });
  const scaleButton = button("One colour scale for all runs", () => {
    shared = !shared;
    scaleButton.setAttribute("aria-pressed", String(shared));
    draw();
  }, { "aria-pressed": "true" });
  box.append(element("div", { class: "controls" }, runChoice.box, metricChoice.box, scaleButton), empty, area, behind);
  draw();
  area.on("plotly_click", (event) => {
    const point = event.points[0];
    kvscope.emit("head", { run: map.id, layer: map.layers[point.pointIndex[0]], kvHead: Math.floor(point.pointIndex[1] / map.group) });
  });
  kvscope.onTheme(draw);
});

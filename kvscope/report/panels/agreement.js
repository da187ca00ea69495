/* Agreement: a matrix of policies; choosing a cell compares its two. */
kvscope.drawing("agreement", async (box, data, page) => {
  const { element, state, numbers, percent, heat, scaleBar } = kvscope;
  const area = element("div");
  const said = element("p", { class: "small", role: "status" });
  const behind = element("div");
  const loops = element("div");
  const draw = kvscope.latest(async () => {
    const { budget } = page.run();
    const group = data.groups.find((each) => each.runs.includes(state.get("run")));
    const runs = group ? group.runs.map((id) => page.byId.get(id)) : [];
    said.textContent = group ? `Budget ${budget}.` : `${page.run().name} is not compared with another run: ${budget === null ? "it has no budget" : "no other run has its budget"}.`;
    area.hidden = behind.hidden = !group;
    if (!group) return;
    const values = await numbers(group.values);
    const at = (r, c) => values[r * runs.length + c];
    const name = (run) => (runs.filter((other) => other.label === run.label).length > 1 ? run.title : run.label);
    const others = [...values].filter((_, place) => Math.floor(place / runs.length) !== place % runs.length);
    const shown = others.filter((value) => !Number.isNaN(value));
    const scale = [Math.min(...shown), Math.max(...shown)]; // every run agrees with itself: the diagonal has no colour
    heat(area, {
      full: true, label: `Agreement of held keys, budget ${budget}`, corner: "", rows: runs.map(name), columns: runs.map(name), scale, upright: true,
      value: (r, c) => (r === c || Number.isNaN(at(r, c)) ? null : at(r, c)), text: (value) => value.toFixed(2),
      say: (r, c) => r === c ? name(runs[r]) : `${name(runs[r])} and ${name(runs[c])}: ${percent(at(r, c))} of the keys that either holds`,
      chosen: (r, c) => runs[r].id === state.get("run") && (state.get("other") === "none" ? r === c : runs[c].id === state.get("other")),
      click: (r, c) => state.set({ run: runs[r].id, other: r === c ? "none" : runs[c].id }),
    });
    if (shown.length) area.prepend(scaleBar(scale, percent));
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this matrix", ["Policy", ...runs.map(name)], () => runs.map((run, r) => [name(run), ...runs.map((_, c) => at(r, c).toFixed(3))])));
  });
  /* Open and closed loop: keys that the policies of one budget hold in both. */
  function drawLoops() {
    const rows = data.loops.map((each) => ({ ...each, run: page.byId.get(each.run) })).filter(({ run }) => run.budget === page.run().budget && run.parts.includes(state.get("part")));
    loops.hidden = !rows.length;
    if (!rows.length) return;
    const { layers } = page.part();
    const values = rows.map((row) => [row.all, ...row.layers]);
    const scale = [Math.min(...values.flat()), 1];
    const grid = element("div");
    heat(grid, {
      label: "Keys held in both loops", corner: "policy / layer", rows: rows.map(({ run }) => run.label), columns: ["all", ...layers.map(String)], scale,
      value: (r, c) => values[r][c], text: (value) => value.toFixed(2),
      say: (r, c) => `${rows[r].run.label}, ${c ? `layer ${layers[c - 1]}` : "all layers"}: open and closed loop share ${percent(values[r][c])} of the keys that either holds`,
      chosen: (r) => rows[r].run.id === state.get("run"), click: (r) => state.set({ run: rows[r].run.id }),
    });
    loops.replaceChildren(element("h3", {}, "Open and closed loop"),
      element("p", { class: "small" }, "Keys held in both loops, as a share of those held in either. Above the first layer, the closed loop includes the effect of evictions in earlier layers; where the overlap is small, the open loop predicts little."), scaleBar(scale, percent), grid);
  }
  box.append(said, area, behind, loops);
  state.on(["run", "part"], drawLoops);
  drawLoops();
  state.on(["run", "other"], draw);
  await draw();
});

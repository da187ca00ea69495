/* Agreement: a matrix of policies; choosing a cell compares its two. */
kvscope.drawing("agreement", async (box, data, page) => {
  const { element, state, numbers, percent, heat, scaleBar } = kvscope;
  const area = element("div");
  const said = element("p", { class: "small", role: "status" });
  const behind = element("div");
  const draw = kvscope.latest(async () => {
    const { budget } = page.run();
    const group = data.groups.find((each) => each.runs.includes(state.get("run")));
    const runs = group ? group.runs.map((id) => page.byId.get(id)) : [];
    said.textContent = group ? `Budget ${budget}.` : `${page.run().name} is compared with no other run: ${budget === null ? "it has no budget" : "no other was replayed under its budget"}.`;
    area.hidden = behind.hidden = !group;
    if (!group) return;
    const values = await numbers(group.values);
    const at = (r, c) => values[r * runs.length + c];
    const name = (run) => (runs.filter((other) => other.label === run.label).length > 1 ? run.title : run.label);
    const others = [...values].filter((_, place) => Math.floor(place / runs.length) !== place % runs.length);
    const scale = [Math.min(...others), 1];
    heat(area, {
      label: `Agreement of held keys, budget ${budget}`, corner: "", rows: runs.map(name), columns: runs.map(name), scale, upright: true,
      value: (r, c) => (Number.isNaN(at(r, c)) ? null : at(r, c)), text: (value) => value.toFixed(2),
      say: (r, c) => `${name(runs[r])} and ${name(runs[c])}: ${percent(at(r, c))} of the keys that either holds`,
      chosen: (r, c) => runs[r].id === state.get("run") && (state.get("other") === "none" ? r === c : runs[c].id === state.get("other")),
      click: (r, c) => state.set({ run: runs[r].id, other: r === c ? "none" : runs[c].id }),
    });
    area.prepend(scaleBar(scale, percent));
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this matrix", ["Policy", ...runs.map(name)], () => runs.map((run, r) => [name(run), ...runs.map((_, c) => at(r, c).toFixed(3))])));
  });
  box.append(said, area, behind);
  state.on(["run", "other"], draw);
  await draw();
});

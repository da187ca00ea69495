/* Spans by head: the step at which each head lost a span; a cell leads to its residency and to the text. */
kvscope.drawing("spans", async (box, data, page) => {
  const { element, select, button, state, numbers, heat, scaleBar, options } = kvscope;
  const part = () => data.parts[state.get("part")];
  state.declare("span", () => 0, state.whole(() => 0, () => (part() ? part().spans.length - 1 : 0)));
  state.declare("lost", () => 1, state.whole(() => 0, () => data.when.length - 1));
  const area = element("div");
  const legend = element("div");
  const said = element("p", { class: "small", role: "status" });
  const links = element("div", { class: "controls" });
  const tokens = ({ start, stop }) => { const { tokens: texts } = page.part(); return texts ? texts.slice(start, stop).join("").replace(/␣/g, " ").trim() : `tokens ${start} to ${stop - 1}`; };
  const lead = (panel) => { state.go(panel); kvscope.sections.land(panel); };

  const draw = kvscope.latest(async () => {
    const here = part();
    const steps = here && here.runs[state.get("run")] ? await numbers(here.runs[state.get("run")]) : null;
    spanChoice.fill(here ? here.spans.map((span, value) => ({ value, text: `${span.name}: ${tokens(span).slice(0, 40)}` })) : [], state.get("span"));
    spanChoice.box.hidden = whenChoice.box.hidden = !steps;
    if (!steps) {
      said.textContent = here ? `${page.run().name}: the page does not contain its map.` : "This sequence has no spans.";
      area.replaceChildren(); legend.replaceChildren(); links.replaceChildren();
      return;
    }
    const [, , layers, heads] = here.runs[state.get("run")].shape;
    const span = here.spans[state.get("span")];
    const at = (r, c) => steps[((state.get("span") * data.when.length + state.get("lost")) * layers + r) * heads + c];
    const { length } = page.part();
    const value = (r, c) => (at(r, c) === -2 ? null : at(r, c) === -1 ? length : at(r, c));
    const found = here.layers.flatMap((_, r) => [...Array(heads).keys()].map((c) => value(r, c))).filter((step) => step !== null);
    const kept = found.filter((step) => step === length).length;
    const what = { 0: "the first token", 1: "half", 2: "all" }[state.get("lost")];
    said.textContent = `${page.run().name}: ${found.length - kept} of ${found.length} heads lost ${what} of “${tokens(span)}” (${span.name}, tokens ${span.start} to ${span.stop - 1}), ${kept} hold it to the end.`;
    const scale = [Math.min(...found), length];
    legend.replaceChildren(scaleBar(scale, (step) => (step >= length ? "held to the end" : `step ${step}`)));
    const choose = (r, c) => state.set({ layer: here.layers[r], head: c * page.headsOf(here.layers[r]).group, token: span.start, ...(value(r, c) < length ? { step: value(r, c) } : {}) });
    const chosen = (r, c) => here.layers[r] === state.get("layer") && state.get("head") !== "all" && Math.floor(state.get("head") / page.headsOf().group) === c;
    heat(area, {
      label: `Step at which each head lost ${span.name}`, corner: "layer / kv head", rows: here.layers.map(String), columns: [...Array(heads).keys()].map(String), scale, value,
      text: (step) => (step >= length ? "held" : String(step)),
      say: (r, c) => (value(r, c) === null ? `layer ${here.layers[r]} has fewer key/value heads` : `layer ${here.layers[r]}, key/value head ${c}: ${value(r, c) >= length ? "holds it to the end" : `lost ${what} of it at step ${value(r, c)}`}`),
      chosen, click: (r, c) => value(r, c) !== null && choose(r, c),
    });
    const picked = here.layers.some((_, r) => [...Array(heads).keys()].some((c) => chosen(r, c)));
    links.replaceChildren(...(picked ? [button("Show in residency", () => lead("residency")), button("Show in the text", () => lead("text"))] : [element("p", { class: "small" }, "Choose a cell to follow it to residency and text.")]));
  });

  const spanChoice = select("Span", [], null, (value) => state.set({ span: Number(value) }));
  const whenChoice = select("Lost", options([...data.when.keys()], (place) => data.when[place]), state.get("lost"), (value) => state.set({ lost: Number(value) }));
  box.append(element("div", { class: "controls" }, spanChoice.box, whenChoice.box, legend), said, area, links);
  state.on(["run", "part", "span", "lost", "layer", "head"], () => { whenChoice.value = state.get("lost"); draw(); });
  kvscope.onTheme(draw);
  await draw();
});

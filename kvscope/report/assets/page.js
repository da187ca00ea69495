/* The page of replays: its selection bar and its panels. */
kvscope.show = (() => {
  const { element, select, slider, options, unique, state } = kvscope;
  const NONE = "none";

  /* The rules of the shared selection: a run, another to compare with, a sequence, a layer, a query head, a step, a token. */
  function declareChoice(page) {
    const ids = page.runs.map((run) => run.id);
    page.run = (id = state.get("run")) => page.byId.get(id);
    page.kindOf = Object.fromEntries(page.kinds.map((kind, place) => [kind.name, { ...kind, place }]));
    page.byId = new Map(page.runs.map((run) => [run.id, run]));
    const ways = unique([...page.runs].sort((a, b) => a.loop.localeCompare(b.loop)).map((run) => `${run.replay} ${run.loop}`)); // closed before open
    page.style = (run) => (run.kind === "bound"
      ? { color: kvscope.colour("muted"), symbol: "circle", dash: run.policy === "ideal" ? "dot" : "dash" }
      : kvscope.lineStyle(page.labels.indexOf(run.label), ways.indexOf(`${run.replay} ${run.loop}`))); // a dash for each way of replaying
    page.part = () => page.parts[state.get("part")];
    /* How many query heads a layer has, and how many of them share a key/value head. */
    page.headsOf = (layer = state.get("layer")) => { const part = page.part(); return (part.own && part.own[layer]) || { heads: part.heads, group: part.group }; };
    const { oneOf, whole } = state;
    state.declare("run", () => page.first, oneOf(() => ids));
    state.declare("part", () => page.run().parts[0] || "", oneOf(() => page.run().parts));
    const sameParts = () => [NONE, ...ids.filter((id) => id !== state.get("run") && page.byId.get(id).parts.includes(state.get("part")))];
    state.declare("other", () => NONE, oneOf(sameParts));
    const layers = () => (page.part() ? page.part().layers : [0]);
    state.declare("layer", () => (page.part() ? page.part().layer : 0), oneOf(layers)); // the one in the page, if it has only one
    state.declare("head", () => "all", (value) => (value === "all" ? value : whole(() => 0, () => (page.part() ? page.headsOf().heads - 1 : 0))(value)));
    /* The lines of the budget curves, which other panels show too. */
    const curves = page.panels.find((panel) => panel.name === "budget-curve");
    const lines = (curves && curves.data && curves.data.lines) || [];
    const usual = lines.length ? curves.data.usual.join(".") : "";
    state.declare("lines", () => usual, (text) => (text === "" || String(text).split(".").every((at) => Object.hasOwn(lines, at)) ? String(text) : undefined));
    const last = () => (page.part() ? page.part().length - 1 : 0);
    state.declare("step", last, whole(() => 0, last));
    state.declare("token", () => -1, whole(() => -1, last));
    page.token = (at) => {
      const { tokens } = page.part();
      return tokens ? `“${tokens[at]}”` : "";
    };
  }

  /* One bar for all panels below it. */
  function bar(page) {
    const key = (run) => JSON.stringify([run.label, run.replay, run.loop]);
    const byPolicy = new Map();
    for (const run of page.runs) byPolicy.set(key(run), [...(byPolicy.get(key(run)) || []), run]);
    const policies = [...byPolicy.values()].map(([run]) => ({ value: key(run), text: run.title, group: run.kind }));
    policies.sort((a, b) => page.kindOf[a.group].place - page.kindOf[b.group].place || a.text.localeCompare(b.text));
    const near = (runs, keys) => runs.reduce((best, run) => (Math.abs(run.keys - keys) < Math.abs(best.keys - keys) ? run : best));
    const current = () => page.run();
    /* another policy at the same budget, or the nearest that it has */
    const withPolicy = (value) => byPolicy.get(value).find((run) => run.budget === current().budget) || near(byPolicy.get(value), current().keys);

    const policy = select("Policy", policies, null, (value) => state.set({ run: withPolicy(value).id }));
    const budget = select("Budget", [], null, (value) => {
      const other = page.byId.get(state.get("other"));
      const paired = other && page.runs.find((run) => key(run) === key(other) && run.budget === page.byId.get(value).budget);
      state.set({ run: value, ...(paired ? { other: paired.id } : {}) });
    });
    const other = select("Compare with", [], null, (value) => state.set({ other: value === NONE ? NONE : withPolicy(value).id }));
    const part = select("Sequence", [], null, (value) => state.set({ part: value }));
    const layer = select("Layer", [], null, (value) => state.set({ layer: value }));
    const head = select("Query head", [], null, (value) => state.set({ head: value }));
    const step = slider("Step", (value) => `${value} ${page.part() ? page.token(value) : ""}`, (value) => state.set({ step: value }));
    const token = element("div", { class: "control" });

    function fill() {
      const run = current();
      const own = byPolicy.get(key(run));
      const shape = page.part();
      policy.value = key(run);
      budget.fill(own.map((each) => ({ value: each.id, text: each.budget === null ? "none" : each.budget })), run.id);
      const rivals = policies.filter(({ value }) => value !== key(run) && byPolicy.get(value).some((each) => each.parts.includes(state.get("part"))));
      const chosen = page.byId.get(state.get("other"));
      other.fill([{ value: NONE, text: "nothing" }, ...rivals], chosen ? key(chosen) : NONE);
      part.fill(options(run.parts, (name) => `${page.parts[name].number}: ${page.parts[name].length} tokens`), state.get("part"));
      part.box.hidden = run.parts.length < 2;
      if (!shape) return;
      layer.fill(options(shape.layers), state.get("layer"));
      head.fill([{ value: "all", text: "all" }, ...options([...Array(page.headsOf().heads).keys()])], state.get("head"));
      step.set(0, shape.length - 1, state.get("step"));
      const at = state.get("token");
      token.replaceChildren(...(at < 0 ? [] : [element("span", { class: "small" }, "Token"), element("span", { class: "chosen" },
        element("bdi", {}, `${at} ${page.token(at)} `), kvscope.button("×", () => state.set({ token: -1 }), { "aria-label": "choose no token", class: "close" }))]));
    }
    fill();
    state.on(["run", "other", "part", "layer", "head", "step", "token"], fill);
    return element("section", { class: "choice", "aria-label": "What the panels below show" },
      element("div", { class: "controls" }, policy.box, budget.box, other.box, part.box, layer.box, head.box, step.box, token));
  }

  /* The selection bar comes before the first panel that follows it, after the notes on such panels. */
  function beforeDetails(page) {
    const first = page.panels.findIndex((panel) => panel.detail);
    const notes = page.notes.length ? [element("ul", { class: "notes" }, page.notes.map((note) => element("li", {}, note)))] : [];
    return first < 0 ? new Map() : new Map([[first, [...notes, bar(page)]]]);
  }

  return async function show() {
    const page = JSON.parse(document.getElementById("data").textContent);
    const named = state.read();
    declareChoice(page);
    const sections = page.panels.map(kvscope.sections.section);
    kvscope.sections.frame(page, sections, beforeDetails(page));
    await kvscope.sections.drawAll(page, sections, named);
  };
})();

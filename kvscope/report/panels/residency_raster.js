/* Residency raster on canvases: one run, two side by side, or their difference, with a shared view and cursor. */
kvscope.drawing("residency", async (box, data, page) => {
  const { element, select, button, clamp, raster, state, unique } = kvscope;
  if (!data.rasters.length) return;
  const regrets = page.panels.find((panel) => panel.name === "regrets");
  const MODES = { two: "side by side", difference: "difference" };
  const index = new Map(data.rasters.map((each) => [JSON.stringify([each.run, each.part, each.layer]), each]));
  const rasterOf = (run, layer = state.get("layer")) => index.get(JSON.stringify([run, state.get("part"), layer]));
  state.declare("mode", () => "two", state.oneOf(() => Object.keys(MODES)));
  state.declare("view", () => "", (text) => (/^\d+(\.\d+){3}$/.test(text) ? text : undefined));

  const frames = element("div", { class: "rasters" });
  const scaleNote = element("p", { class: "small" });
  const readout = element("p", { class: "readout", id: "residency-readout", "aria-live": "polite" });
  const missing = element("p", { class: "small", role: "status" });
  let views = [];

  const part = () => page.part();
  const chosenHeads = (intervals) => (state.get("head") === "all" ? intervals.heads : [intervals.heads[Math.floor(state.get("head") / page.headsOf().group)]]);

  /* keys k0..k1, steps t0..t1, half open; after a full prefill nothing changes within the prompt, so the first view starts at its end */
  function view() {
    const { length, prompt } = part();
    const text = state.get("view");
    if (text) {
      const [k0, k1, t0, t1] = text.split(".").map(Number);
      if (k0 < k1 && k1 <= length && t0 < t1 && t1 <= length) return { k0, k1, t0, t1 };
    }
    return { k0: 0, k1: length, t0: page.run().prefill === "full" && prompt < length ? clamp(prompt - 1, 0, Math.max(0, length - 4)) : 0, t1: length };
  }
  function zoom(k0, k1, t0, t1) {
    const { length } = part();
    const fit = (low, high) => {
      const size = Math.min(length, Math.max(4, Math.round(high) - Math.round(low)));
      const from = clamp(Math.round(low), 0, length - size);
      return [from, from + size];
    };
    state.set({ view: [...fit(k0, k1), ...fit(t0, t1)].join(".") });
  }
  function zoomBy(factor) {
    const now = view();
    const token = state.get("token");
    const middle = token >= now.k0 && token < now.k1 ? [token, state.get("step")] : [(now.k0 + now.k1) / 2, (now.t0 + now.t1) / 2];
    const around = (low, high, at) => [at - (at - low) * factor, at + (high - at) * factor];
    zoom(...around(now.k0, now.k1, middle[0]), ...around(now.t0, now.t1, middle[1]));
  }
  const whole = () => zoom(0, part().length, 0, part().length);
  const generated = () => zoom(0, part().length, Math.max(0, Math.min(part().prompt - 1, part().length - 4)), part().length);

  /* Residency of one key under one run, in words. */
  function life(run, intervals, key, step) {
    const chosen = intervals.oneForAll ? intervals.heads.slice(0, 1) : chosenHeads(intervals);
    const verb = page.byId.get(run).kind === "reads a part" ? ["read", "reads", "not read"] : ["held", "hold", "evicted"];
    if (step < key) return "not generated yet";
    if (chosen.length > 1) return `${verb[0]} by ${chosen.filter((head) => raster.holds(head, key, step)).length} of ${chosen.length} key/value heads`;
    const spans = raster.intervalsOf(chosen[0], key);
    const now = spans.find(([from, to]) => from <= step && step < to);
    if (now) return `${verb[0]} since step ${now[0]}, ${now[1] >= part().length ? "to the end" : `until step ${now[1]}`}`;
    const before = spans.filter(([, to]) => to <= step).pop();
    return before ? `${verb[2]} at step ${before[1]}, ${verb[0]} since step ${before[0]}; ${why(page.byId.get(run), before[1])}${cost(run, key, before[1])}` : `never ${verb[0]}`;
  }
  /* Why a key was evicted: the event at that step, and the rule by which this key was chosen. */
  function why(run, left) {
    const { prompt, length } = part();
    if (run.kind === "reads a part") return `${run.label} read other keys at that step`;
    if (run.kind === "own size") return `${run.label} decided not to retain it`;
    if (run.prefill === "full" && left < prompt) return `at the end of the prompt, ${run.label} retained others of its ${prompt} keys`;
    if (run.kind === "every N steps") return `${run.label} compressed the cache at that step, and its score was too low`;
    if (run.kind === "bound") return "the best schedule for the following rows evicts it there";
    return left < length ? `token ${left} ${page.token(left)} needed its place, and ${run.label} scored it lowest of the unprotected keys` : "";
  }
  /* What it cost, where this is among the worst evictions of the run. */
  function cost(run, key, left) {
    const worst = regrets?.data.parts[state.get("part")]?.worst[run] || [];
    const found = state.get("head") === "all" ? null : worst.find(([layer, head, one, evicted]) => layer === state.get("layer") && head === Math.floor(state.get("head") / page.headsOf().group) && one === key && evicted === left);
    return found ? `; it would still have received ${found[4].toPrecision(3)} of attention${found[5] < 0 ? "" : `, most of it at step ${found[5]}`}` : "";
  }
  function words(shown, key, step) {
    const { prompt } = part();
    return [
      `token ${key} ${page.token(key)}, ${key < prompt ? "prompt" : "generated"}`, `step ${step} ${page.token(step)}`,
      ...shown.map(([run, intervals]) => (shown.length > 1 ? `${page.byId.get(run).name}: ` : "") + life(run, intervals, key, step)),
    ];
  }
  /* One more line where the page contains the attention row of the step. */
  async function looked(key, step) {
    const weight = kvscope.weightAt ? await kvscope.weightAt(step, key) : null;
    return weight === null ? [] : [`attention of query head ${state.get("head")}: ${weight.toPrecision(3)}`];
  }
  function point(token, step) { state.set({ token, step }); }

  const layout = kvscope.latest(async () => {
    const runs = [state.get("run"), state.get("other")].filter((id) => page.byId.has(id));
    const there = runs.filter((id) => rasterOf(id));
    const layers = unique(data.rasters.filter((each) => each.run === runs[0] && each.part === state.get("part")).map((each) => each.layer)).sort((a, b) => a - b);
    missing.textContent = there.length === runs.length ? "" : `The page does not contain the raster of ${runs.filter((id) => !there.includes(id)).map((id) => page.byId.get(id).name).join(" and ")} in layer ${state.get("layer")}${layers.length ? `; layers in the page: ${layers.join(", ")}` : ""}.`;
    const intervals = await Promise.all(there.map((id) => raster.open(rasterOf(id), part().length)));
    const shown = there.map((id, at) => [id, intervals[at]]);
    const sets = shown.length === 2 && state.get("mode") === "difference" ? [shown] : shown.map((each) => [each]);
    if (sets.length !== views.length) {
      views = sets.map(() => kvscope.rasterView({ page, view, zoom, zoomBy, whole, point, words, looked, chosenHeads, describedBy: readout.id }));
      frames.replaceChildren(...views.map((each) => each.frame));
    }
    frames.classList.toggle("two", sets.length === 2);
    views.forEach((each, at) => each.show(sets[at]));
    modes.box.hidden = runs.length < 2;
    legendOne.hidden = sets.some((set) => set.length > 1);
    legendTwo.hidden = !legendOne.hidden;
    if (!legendTwo.hidden) legendNames.forEach((name, at) => { name.textContent = `only ${page.byId.get(shown[at][0]).name}`; });
    scaleNote.textContent = views.length ? views[0].note() : "";
    const [token, step] = [state.get("token"), state.get("step")];
    readout.textContent = token >= 0 && shown.length ? [...words(shown, token, step), ...await looked(token, step)].join("; ") : "";
  });

  const modes = select("Two policies", Object.entries(MODES).map(([value, text]) => ({ value, text })), state.get("mode"), (mode) => state.set({ mode }));
  const legendNames = [element("bdi"), element("bdi")];
  const sign = (name, ...text) => element("span", {}, element("i", { class: name }), ...text);
  const legendOne = element("span", { class: "legend" }, sign("kept", "held"), sign("evicted", "evicted"), sign("future", "not generated yet"));
  const legendTwo = element("span", { class: "legend" }, sign("mine", legendNames[0]), sign("only", legendNames[1]), sign("both", "both hold it"), sign("neither", "neither"));
  box.append(
    element("div", { class: "controls" }, modes.box, button("Whole sequence", whole), button("After the prompt", generated),
      button("Zoom in", () => zoomBy(0.5)), button("Zoom out", () => zoomBy(2)), legendOne, legendTwo),
    missing, frames, scaleNote, readout,
    element("p", { class: "small" }, "Drag to zoom, double-click to show the whole sequence, click to choose token and step for all panels. Keyboard: arrows move the cursor (with shift, by ten), + and − zoom, Escape shows the whole sequence."));
  state.on(["run", "other", "part", "layer", "head", "step", "token", "mode", "view"], (changed) => {
    if (changed.has("part") && !changed.has("view")) state.set({ view: "" });
    modes.value = state.get("mode");
    layout();
  });
  kvscope.onTheme(layout);
  await layout();
});

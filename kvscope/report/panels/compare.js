/* Side by side: facts of the replays, then a metric of every policy and budget in each; what differs is marked. */
kvscope.drawing("compare", (box, data, page) => {
  const { element, select, checkbox, button, number, state } = kvscope;
  const runs = new Map(page.runs.map((run) => [run.id, run]));
  const value = (id, metric) => (id === null ? [null, null, null] : runs.get(id).values[metric.name] || [null, null, null]);
  const usable = page.metrics.filter((metric) => data.rows.some((row) => row.runs.filter((id) => value(id, metric)[0] !== null).length > 1));
  const sign = (differs) => element("td", { class: "mark" }, differs ? element("span", { title: "differs" }, "≠") : "");
  const table = (label, head, body) => element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    element("table", {}, element("thead", {}, element("tr", {}, head.map((text, at) => element("th", { scope: "col", class: at > 1 && label !== "Facts" ? "number" : null }, text)))), body));

  box.append(table("Facts", ["", element("span", { class: "unseen" }, "differs"), ...page.replays.map((name) => element("bdi", {}, name))],
    element("tbody", {}, data.facts.map((row) => element("tr", { class: row.differs ? "differs" : null }, element("th", { scope: "row" }, row.name), sign(row.differs),
      row.values.map((text) => element("td", {}, element("bdi", {}, text === null ? "–" : text))))))));
  if (!usable.length) return;
  state.declare("beside", () => (usable.find((metric) => metric.direction !== "none") || usable[0]).name, state.oneOf(() => usable.map((metric) => metric.name)));
  state.declare("differing", () => "no", state.oneOf(() => ["no", "yes"]));
  const body = element("tbody");
  const said = element("p", { class: "small", role: "status" });

  /* the best of each replay, budget and kind; bounds and runs of other protocols aside */
  function best(metric) {
    const found = new Map();
    for (const id of data.rows.flatMap((row) => row.runs)) {
      if (id === null || metric.direction === "none") continue;
      const run = runs.get(id);
      const [mean] = value(id, metric);
      const key = [run.replay, run.budget, run.kind, run.loop].join();
      if (mean === null || run.budget === null || run.kind === "bound") continue;
      const now = found.get(key);
      if (now === undefined || (metric.direction === "higher" ? mean > now.mean : mean < now.mean)) found.set(key, { id, mean });
    }
    return new Set([...found.values()].map((one) => one.id));
  }
  function apart(row, metric) {
    const known = row.runs.filter((id) => id !== null).map((id) => value(id, metric)).filter(([mean]) => mean !== null);
    if (known.length < 2) return null;
    const means = known.map(([mean]) => mean);
    const [low, high] = [known.reduce((a, b) => (a[0] <= b[0] ? a : b)), known.reduce((a, b) => (a[0] >= b[0] ? a : b))];
    const intervals = low[2] !== null && high[1] !== null;
    return { by: row.runs.length === 2 ? means[1] - means[0] : high[0] - low[0], differs: intervals ? low[2] < high[1] : Math.abs(high[0] - low[0]) >= 0.5e-4 };
  }
  function fill() {
    const metric = usable.find((each) => each.name === state.get("beside"));
    const firsts = best(metric);
    const rows = data.rows.map((row) => ({ row, apart: apart(row, metric) })).filter((each) => each.apart !== null);
    const shown = rows.filter((each) => state.get("differing") === "no" || each.apart.differs);
    const most = Math.max(...rows.map((each) => Math.abs(each.apart.by)), 1e-12);
    said.textContent = `${rows.filter((each) => each.apart.differs).length} of ${rows.length} rows differ in ${metric.title}.`;
    body.replaceChildren(...shown.map(({ row, apart: { by, differs } }) => {
      const run = runs.get(row.runs.find((id) => id !== null));
      const bar = element("i", { class: "gap" });
      bar.style.width = `${Math.round((60 * Math.abs(by)) / most)}px`;
      return element("tr", { class: differs ? "differs" : null }, element("th", { scope: "row" }, button(element("bdi", {}, run.label), () => state.set({ run: run.id }), { class: "plain", title: "show this run in the panels below" }), " ", element("small", {}, run.budget === null ? "" : run.budget)), sign(differs),
        row.runs.map((id) => { const [mean, low, high] = value(id, metric); return element("td", { class: `number${firsts.has(id) ? " best" : ""}` }, number(mean, metric), element("span", { class: "mark" }, firsts.has(id) ? "★" : ""), low === null ? null : element("small", {}, `${number(low, metric)} to ${number(high, metric)}`)); }),
        element("td", { class: "number" }, `${row.runs.length === 2 && by > 0 ? "+" : ""}${number(by, metric)} `, bar));
    }));
  }
  const metricChoice = select("Metric", usable.map((metric) => ({ value: metric.name, text: metric.title })), state.get("beside"), (name) => state.set({ beside: name }));
  const only = checkbox("only what differs", state.get("differing") === "yes", (on) => state.set({ differing: on ? "yes" : "no" }));
  box.append(element("h3", {}, "The same policy and budget"), element("div", { class: "controls" }, metricChoice.box, only.box), said,
    table("Runs side by side", ["Policy and budget", element("span", { class: "unseen" }, "differs"), ...page.replays.map((name) => element("bdi", {}, name)), page.replays.length === 2 ? "second − first" : "most − least"], body));
  fill();
  state.on(["beside", "differing"], () => { metricChoice.value = state.get("beside"); only.control.checked = state.get("differing") === "yes"; fill(); });
});

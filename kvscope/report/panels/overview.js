/* Overview: the best of each kind at each budget, then a table of all runs that sorts by any column. */
kvscope.drawing("overview", (box, data, page) => {
  const { element, select, button, checkbox, number, percent, state } = kvscope;
  const ALL = "all";
  const metricOf = Object.fromEntries(page.metrics.map((metric) => [metric.name, metric]));
  const runs = Object.fromEntries(page.runs.map((run) => [run.id, run]));
  const several = page.replays.length > 1;
  const cost = (keys) => number(keys, { name: "keys" });
  const span = (pair) => (pair === null ? "–" : pair[0] === pair[1] ? cost(pair[0]) : `${cost(pair[0])} to ${cost(pair[1])}`);
  const isBound = (row) => runs[row.run].kind === "bound";

  /* "20% 103 keys", or "103 keys" where the budget was given in keys. */
  function budgetText({ budget, keys }) {
    if (budget === null) return ["none"];
    const text = `${cost(keys)} keys`;
    return text === `${budget} keys` ? [text] : [budget, element("small", {}, ` ${text}`)];
  }
  const kindChip = (kind) => element("span", { class: `chip kind k-${page.kindOf[kind].place}`, title: page.kindOf[kind].meaning }, kind);

  /* Loop and prefill that all rows share are shown once; a column shows those that differ. */
  const parts = [["loop", (run) => `${run.loop} loop`], ["prefill", (run) => `${run.prefill} prefill`]];
  const differs = ([name]) => new Set(data.rows.map((row) => runs[row.run][name])).size > 1;
  const [varying, common] = [parts.filter(differs), parts.filter((part) => !differs(part))];
  const protocol = (run, chosen) => chosen.map(([, text]) => text(run));
  const ofGroup = (run) => run.marks.filter((text) => /^(cache in|merges by) /.test(text)); // such runs are ranked among themselves
  const chips = (texts) => texts.map((text) => element("span", { class: "chip" }, text));

  function bestTable() {
    const shown = data.headlines.filter((name) => data.best.some((line) => line.best[name] && line.best[name].value !== null));
    const winner = (found) => {
      if (!found || found.value === null) return "–";
      const names = found.runs.slice(0, 2).map((id) => runs[id].label).join(", ") + (found.runs.length > 2 ? ", …" : "");
      return [button(element("bdi", {}, names), () => { state.set({ run: found.runs[0] }); mark(); }, { class: "plain", title: "show this run in the panels below" }), element("span", { class: "value" }, found.value.toFixed(3)),
        found.near ? element("small", { title: "policies whose mean is inside the 95 % interval of the best" }, ` +${found.near} within its interval`) : null];
    };
    const ideal = data.best.some((line) => line.ideal !== null);
    const head = ["Budget", "Kind", ...shown.map((name) => ["best by", element("br"), metricOf[name].title]), ...(ideal ? [["ideal", element("br"), "mass"]] : []), ["Keys", element("br"), "read"], ["Keys held,", element("br"), "of all"]];
    const apart = varying.filter(([name]) => new Set(data.best.map((line) => runs[line.run][name])).size > 1);
    let last = null;
    const lines = data.best.map((line) => {
      const run = runs[line.run];
      const first = last !== `${run.budget} ${run.loop} ${run.prefill} ${run.replay}`;
      last = `${run.budget} ${run.loop} ${run.prefill} ${run.replay}`;
      return element("tr", { class: first ? "starts" : null },
        element("th", { scope: "row", class: "budget" }, first ? [budgetText(run), several ? element("small", { class: "below" }, element("bdi", {}, run.replay)) : null, apart.length ? element("div", {}, chips(protocol(run, apart))) : null] : element("span", { class: "unseen" }, run.budget)),
        element("td", {}, kindChip(run.kind), chips(ofGroup(run)), element("small", {}, line.of > 1 ? `best of ${line.of}` : "the only one"),
          line.agree ? null : [" ", element("small", { class: "apart", title: "no policy is the best by all of these metrics" }, "they disagree")]),
        shown.map((name) => element("td", { class: "winner" }, winner(line.best[name]))),
        ideal ? element("td", { class: "number spare" }, line.ideal === null ? "–" : line.ideal.toFixed(3)) : null,
        element("td", { class: "number" }, span(line.read)),
        element("td", { class: "number" }, span(line.held), line.held && line.full ? element("span", { class: "value" }, percent(line.held[0] / line.full)) : null));
    });
    return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Best of each kind at each budget" },
      element("table", { class: "bests" }, element("thead", {}, element("tr", {}, head.map((text, index) => element("th", { scope: "col", class: index > 1 + shown.length ? `number ${ideal && index === 2 + shown.length ? "spare" : ""}` : null }, text)))), element("tbody", {}, lines)));
  }

  const budgets = [...new Set(data.rows.map((row) => runs[row.run].budget).filter((each) => each !== null))];
  const kinds = page.kinds.map((kind) => kind.name).filter((kind) => data.rows.some((row) => runs[row.run].kind === kind));
  const columnsAll = [
    { id: "policy", title: "Policy", key: (row) => runs[row.run].label, text: true },
    { id: "budget", title: "Budget", key: (row) => runs[row.run].keys },
    { id: "kind", title: "Kind", key: (row) => runs[row.run].kind, text: true },
    ...(several ? [{ id: "replay", title: "Replay", key: (row) => runs[row.run].replay, text: true }] : []),
    ...(varying.length ? [{ id: "protocol", title: "Protocol", key: (row) => protocol(runs[row.run], varying).join(), text: true }] : []),
    ...page.metrics.map((metric) => ({ id: metric.name, title: metric.title, metric, key: (row) => (runs[row.run].values[metric.name] || [null])[0] })),
  ];
  state.declare("sort", () => "", (value) => (columnsAll.some((column) => value === column.id || value === `-${column.id}`) ? value : undefined));
  state.declare("budget", () => ALL, state.oneOf(() => [ALL, ...budgets]));
  state.declare("kind", () => ALL, state.oneOf(() => [ALL, ...kinds]));
  state.declare("columns", () => "usual", state.oneOf(() => ["usual", ALL]));

  const columns = () => columnsAll.filter((column) => !column.metric || state.get("columns") === ALL || data.usual.includes(column.id));

  function cell(row, column) {
    const run = runs[row.run];
    if (column.metric) return metricCell(row, column.metric);
    if (column.id === "policy") {
      return element("th", { scope: "row", class: "policy" },
        button(element("bdi", {}, run.label), () => { state.set({ run: run.id }); mark(); }, { class: "plain", title: "show this run in the panels below" }));
    }
    if (column.id === "budget") return element("td", { class: "budget" }, budgetText(run));
    if (column.id === "kind") return element("td", { class: "chips" }, kindChip(run.kind), chips(run.marks));
    if (column.id === "replay") return element("td", {}, element("bdi", {}, run.replay));
    return element("td", { class: "chips" }, chips(protocol(run, varying)));
  }
  function metricCell(row, metric) {
    const value = runs[row.run].values[metric.name];
    const mark = row.marks[metric.name];
    if (!value || value[0] === null) return element("td", { class: "number none", title: "no value: nothing was evicted, or the metric was not computed" }, "–");
    const sign = { best: ["★", "best of its kind"], last: ["▽", "last of its kind"] }[mark];
    return element("td", { class: `number ${mark || ""}`, title: value[3] ? `over ${value[3]} values` : null },
      number(value[0], metric),
      element("span", sign ? { class: "mark", role: "img", "aria-label": sign[1] } : { class: "mark", "aria-hidden": "true" }, sign ? sign[0] : ""),
      value[1] !== null && value[2] !== null ? element("small", {}, `${number(value[1], metric)} to ${number(value[2], metric)}`) : null);
  }

  function sorted(rows) {
    const sort = state.get("sort");
    if (!sort) return rows;
    const down = sort.startsWith("-");
    const column = columnsAll.find((each) => each.id === sort.replace(/^-/, ""));
    const order = (a, b) => (column.text ? a.localeCompare(b) : a - b);
    return [...rows].sort((a, b) => {
      const [x, y] = [column.key(a), column.key(b)];
      if (x === null || y === null) return (x === null) - (y === null); // no value: always at the end
      return down ? order(y, x) : order(x, y);
    });
  }
  function sortBy(column) {
    const sort = state.get("sort");
    const first = column.metric && column.metric.direction !== "lower" ? `-${column.id}` : column.id;
    const second = first.startsWith("-") ? column.id : `-${column.id}`;
    state.set({ sort: sort === first ? second : first });
  }

  const body = element("tbody");
  const boundsBody = element("tbody", { class: "bounds" });
  const headRow = element("tr");
  const warning = element("p", { class: "warning", role: "status" });
  function fill() {
    const sort = state.get("sort");
    headRow.replaceChildren(...columns().map((column) => {
      const active = sort.replace(/^-/, "") === column.id;
      const better = column.metric && column.metric.direction !== "none" ? ` (${column.metric.direction} is better)` : "";
      return element("th", { scope: "col", class: column.metric ? "number" : null, "aria-sort": active ? (sort.startsWith("-") ? "descending" : "ascending") : null },
        button([column.title, element("span", { "aria-hidden": "true" }, active ? (sort.startsWith("-") ? " ↓" : " ↑") : "")], () => sortBy(column), { title: column.metric ? `${column.metric.summary}${better}` : null }));
    }));
    const fits = (row) => (state.get("budget") === ALL || runs[row.run].budget === state.get("budget")) && (state.get("kind") === ALL || runs[row.run].kind === state.get("kind"));
    const rows = sorted(data.rows.filter(fits));
    let last = null;
    const line = (row) => {
      const { budget, keys } = runs[row.run];
      const starts = !sort && last !== null && last !== `${budget} ${keys}`;
      last = `${budget} ${keys}`;
      return element("tr", { class: starts ? "starts" : null, "data-run": row.run }, columns().map((column) => cell(row, column)));
    };
    body.replaceChildren(...rows.filter((row) => !isBound(row)).map(line));
    last = null;
    const bounds = rows.filter(isBound);
    boundsBody.replaceChildren(...(bounds.length ? [element("tr", {}, element("th", { class: "group", colspan: columns().length, scope: "rowgroup" }, "Bounds: these use the future, which no policy can"))] : []), ...bounds.map(line));
    const mixed = new Set(rows.filter((row) => !isBound(row)).map((row) => runs[row.run].kind).filter((kind) => kind !== "no eviction"));
    warning.textContent = mixed.size > 1
      ? `The rows are of ${mixed.size} kinds, which hold and read different numbers of keys: compare only within a kind.` : "";
    mark();
  }
  function mark() {
    for (const row of box.querySelectorAll("tr[data-run]")) row.classList.toggle("shown", row.dataset.run === state.get("run"));
  }

  const all = (text) => ({ value: ALL, text });
  const pick = (values) => values.map((value) => ({ value, text: value }));
  const budgetChoice = select("Budget", [all("all budgets"), ...pick(budgets)], state.get("budget"), (value) => state.set({ budget: value }));
  const kindChoice = select("Kind", [all("all kinds"), ...pick(kinds)], state.get("kind"), (value) => state.set({ kind: value }));
  const more = checkbox("all metrics", state.get("columns") === ALL, (on) => state.set({ columns: on ? ALL : "usual" }));
  box.append(
    data.best.length ? bestTable() : "",
    element("div", { class: "controls" },
      budgets.length > 1 ? budgetChoice.box : null, kinds.length > 1 ? kindChoice.box : null,
      data.usual.length < page.metrics.length ? more.box : null,
      button("Default order", () => state.set({ sort: "" })),
      common.length ? element("p", { class: "common" }, "All rows: ", chips(protocol(page.runs[0], common))) : null),
    warning,
    element("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "All runs" },
      element("table", { class: "summary" }, element("thead", {}, headRow), body, boundsBody)),
    element("details", { class: "behind" }, element("summary", {}, "What the kinds and metrics mean"),
      element("dl", { class: "meanings" },
        kinds.map((kind) => [element("dt", {}, kind), element("dd", {}, page.kindOf[kind].meaning)]),
        page.metrics.map((metric) => [
          element("dt", {}, metric.title),
          element("dd", {}, metric.summary, metric.direction === "none" ? "" : ` (${metric.direction} is better)`)]))));
  fill();
  state.on(["sort", "budget", "kind", "columns"], () => {
    budgetChoice.value = state.get("budget");
    kindChoice.value = state.get("kind");
    more.control.checked = state.get("columns") === ALL;
    fill();
  });
  state.on(["run"], mark);
});

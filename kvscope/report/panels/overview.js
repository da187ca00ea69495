/* Summary: the best of each budget as cards, then a table that sorts by any column. */
kvscope.drawing("summary", (box, data) => {
  const { element, select, button, number } = kvscope;
  const ALL = "all";
  let sort = null;
  let budget = ALL;
  let scope = ALL;

  /* "20% 103 keys", or "103 keys" where the budget was given in keys. */
  function budgetText({ budget, budget_keys: keys }) {
    const text = `${number(keys, { name: "budget_keys" })} keys`;
    return text === `${budget} keys` ? [text] : [budget, element("small", {}, ` ${text}`)];
  }

  const cards = data.headlines.map((line) => element("article", { class: "card" },
    element("h3", {}, budgetText(line)),
    element("p", { class: "small" }, `best of ${line.of}, ${line.protocol}`, data.several ? `, ${line.replay}` : ""),
    element("dl", {}, line.best.map((best) => [
      element("dt", {}, `${best.metric} `),
      element("dd", {}, `${number(best.value, { range: [0, 1] })} `, element("b", {}, best.labels.slice(0, 3).join(", ") + (best.labels.length > 3 ? ", …" : "")))]))));

  /* What all rows share of loop, prefill and phase is said once; a column shows the rest. A run that decides nothing has no phase. */
  const parts = [["loop", (row) => `${row.loop} loop`], ["prefill", (row) => `${row.prefill} prefill`], ["phase", (row) => `phase: ${row.phase}`]];
  const differs = ([name]) => new Set(data.rows.map((row) => row[name]).filter((value) => value !== "none")).size > 1;
  const [varying, common] = [parts.filter(differs), parts.filter((part) => !differs(part))];
  const protocol = (row, chosen) => chosen.filter(([name]) => row[name] !== "none").map(([, text]) => text(row));
  const chips = (texts) => texts.map((text) => element("span", { class: "chip" }, text));
  const columns = [
    { title: "Policy", key: (row) => row.label, text: true },
    { title: "Budget", key: (row) => row.budget_keys },
    ...(data.several ? [{ title: "Replay", key: (row) => row.replay, text: true }] : []),
    ...(varying.length ? [{ title: "Protocol", key: (row) => protocol(row, varying).join(), text: true }] : []),
    ...data.metrics.map((metric) => ({
      title: metric.title, metric, key: (row) => (row.values[metric.name] ? row.values[metric.name].mean : null),
    })),
  ];

  function policyCell(row) {
    return element("th", { scope: "row", class: "policy" }, element("bdi", {}, row.label));
  }
  function budgetCell(row) {
    if (row.budget === null) return element("td", { class: "budget" }, "none");
    return element("td", { class: "budget" }, budgetText(row));
  }
  function protocolCell(row) {
    return element("td", { class: "chips" }, chips(protocol(row, varying)));
  }
  function metricCell(row, metric) {
    const value = row.values[metric.name];
    const mark = row.marks[metric.name];
    if (!value || value.mean === null) {
      return element("td", { class: "number none", title: "no value: nothing was evicted, or the metric was not computed" }, "–");
    }
    const shown = [number(value.mean, metric)];
    if (mark === "best") shown.push(element("span", { class: "mark", role: "img", "aria-label": "best" }, "★"));
    else if (mark === "last") shown.push(element("span", { class: "mark", role: "img", "aria-label": "last" }, "▽"));
    else shown.push(element("span", { class: "mark", "aria-hidden": "true" }, ""));
    if (value.low !== null && value.high !== null) {
      shown.push(element("small", {}, `${number(value.low, metric)} to ${number(value.high, metric)}`));
    }
    return element("td", { class: `number ${mark || ""}`, title: value.count === null ? null : `over ${value.count} values` }, shown);
  }

  function rows() {
    const chosen = data.rows.filter((row) => (budget === ALL || row.budget === budget) && (scope === ALL || row.replay === scope));
    if (!sort) return chosen;
    const { column, down } = sort;
    const order = (a, b) => (column.text ? a.localeCompare(b) : a - b);
    return [...chosen].sort((a, b) => {
      const [x, y] = [column.key(a), column.key(b)];
      if (x === null || y === null) return (x === null) - (y === null); // no value: always at the end
      return down ? order(y, x) : order(x, y);
    });
  }

  const body = element("tbody");
  const heads = columns.map((column) => {
    const sign = element("span", { class: "sign", "aria-hidden": "true" }, "");
    const better = column.metric && column.metric.direction !== "none" ? ` (${column.metric.direction} is better)` : "";
    const head = element("th", { scope: "col", class: column.text || !column.metric ? "" : "number" },
      button([column.title, sign], () => sortBy(column), { title: column.metric ? `${column.metric.summary}${better}` : null }));
    return { column, head, sign };
  });

  function sortBy(column) {
    const first = Boolean(column.metric && column.metric.direction !== "lower");
    sort = sort && sort.column === column ? { column, down: !sort.down } : { column, down: first };
    fill();
  }
  function fill() {
    for (const { column, head, sign } of heads) {
      const active = sort && sort.column === column;
      if (active) head.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
      sign.textContent = active ? (sort.down ? " ↓" : " ↑") : "";
    }
    let last = null;
    body.replaceChildren(...rows().map((row) => {
      const starts = !sort && last !== null && last !== `${row.budget} ${row.budget_keys}`;
      last = `${row.budget} ${row.budget_keys}`;
      return element("tr", { class: starts ? "starts" : null }, columns.map((column) => {
        if (column.metric) return metricCell(row, column.metric);
        if (column.title === "Policy") return policyCell(row);
        if (column.title === "Budget") return budgetCell(row);
        if (column.title === "Replay") return element("td", {}, element("bdi", {}, row.replay));
        return protocolCell(row);
      }));
    }));
  }

  const budgets = [...new Set(data.rows.map((row) => row.budget).filter((each) => each !== null))];
  const replays = [...new Set(data.rows.map((row) => row.replay))];
  const all = (text) => ({ value: ALL, text });
  const pick = (values) => values.map((value) => ({ value, text: value }));
  const controls = element("div", { class: "controls" },
    budgets.length > 1 ? select("Budget", [all("all budgets"), ...pick(budgets)], ALL, (value) => { budget = value; fill(); }).box : null,
    replays.length > 1 ? select("Replay", [all("all replays"), ...pick(replays)], ALL, (value) => { scope = value; fill(); }).box : null,
    button("Default order", () => { sort = null; fill(); }),
    common.length ? element("p", { class: "common" }, "All rows: ", chips([...new Set(data.rows.flatMap((row) => protocol(row, common)))])) : null);
  box.append(element("div", { class: "cards" }, cards), controls,
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Summary table" },
      element("table", { class: "summary" }, element("thead", {}, element("tr", {}, heads.map((each) => each.head))), body)),
    element("details", { class: "behind" }, element("summary", {}, "What the metrics mean"),
      element("dl", { class: "meanings" }, data.metrics.map((metric) => [
        element("dt", {}, metric.title),
        element("dd", {}, metric.summary, metric.direction === "none" ? "" : ` (${metric.direction} is better)`)]))));
  fill();
});

/* Quantised caches: a table of policies and formats of the cache; a cell chooses its run. */
kvscope.drawing("caches", (box, data, page) => {
  const { element, button, state } = kvscope;
  const size = (bytes) => (bytes >= 2 ** 20 ? `${(bytes / 2 ** 20).toPrecision(3)} MiB` : `${Math.round(bytes / 1024) || (bytes / 1024).toPrecision(2)} KiB`);
  const words = { perplexity_ratio: (value) => `×${value.toFixed(3)}`, answer_score: (value) => `${Math.round(100 * value)} % right` };
  const cell = (one) => (one === null ? element("td", { class: "number none" }, "–") : element("td", { class: "number", "data-run": one.run },
    button(size(one.bytes), () => state.set({ run: one.run }), { class: "plain", title: "show this run in the panels below" }),
    element("small", {}, data.metrics.map((name) => one.values[name]).map((value, at) => (value === null ? "" : words[data.metrics[at]](value))).filter(Boolean).join(", "))));
  let last = null;
  const rows = data.rows.map((row) => {
    const starts = last !== null && last !== row.policy;
    last = row.policy;
    return element("tr", { class: starts ? "starts" : null }, element("th", { scope: "row", class: "policy" }, element("bdi", {}, row.policy)), element("td", { class: "budget" }, row.budget === null ? "–" : row.budget), row.cells.map(cell));
  });
  const body = element("tbody", {}, rows);
  box.append(element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Policies and caches" },
    element("table", { class: "summary" }, element("thead", {}, element("tr", {}, ["Policy", "Budget", ...data.caches].map((text, at) => element("th", { scope: "col", class: at > 1 ? "number" : null }, element("bdi", {}, text))))), body)));
  const mark = () => { for (const each of body.querySelectorAll("[data-run]")) each.classList.toggle("best", each.dataset.run === state.get("run")); };
  mark();
  state.on(["run"], mark);
});

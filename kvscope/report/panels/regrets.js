/* Regrets: a table of evictions; choosing a row chooses head, token and step for all panels. */
kvscope.drawing("regrets", (box, data, page) => {
  const { element, button, state } = kvscope;
  const said = element("p", { class: "small", role: "status" });
  const body = element("tbody");
  const headers = ["Token", "Position", "Layer", "kv head", "Evicted at step", "Regret", "Missed most at step", "Weight there"];
  const table = element("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "Worst evictions" },
    element("table", {}, element("thead", {}, element("tr", {}, headers.map((text, at) => element("th", { scope: "col", class: at ? "number" : null }, text)))), body));

  function draw() {
    const part = data.parts[state.get("part")];
    const rows = part ? part.worst[state.get("run")] || [] : [];
    table.hidden = !rows.length;
    const { name, kind, loop } = page.run();
    said.textContent = !part ? "Unknown: the trace of this sequence was not found."
      : rows.length ? `The ${rows.length} worst of ${name}${loop === "open" ? "" : ", measured on the recorded full-cache rows"}${kind === "reads a part" ? "; it holds these keys, but did not read them" : ""}.`
        : `${name} evicted no key that was attended to later, in the layers that were read.`;
    const { group } = page.part();
    const spanOf = (key) => (part.spans || []).filter(([, start, stop]) => key >= start && key < stop).map(([name]) => name).join(", ");
    body.replaceChildren(...rows.map(([layer, head, key, gone, mass, missed, weight]) => {
      const here = state.get("token") === key && state.get("layer") === layer && state.get("head") !== "all" && Math.floor(state.get("head") / group) === head;
      const choose = () => state.set({ layer, head: head * group, token: key, step: missed < 0 ? gone : missed });
      return element("tr", { class: here ? "shown" : null },
        element("th", { scope: "row" }, button(element("bdi", {}, page.token(key) || `token ${key}`), choose, { class: "plain", title: "show this head, token and step in all panels" }), spanOf(key) ? element("span", { class: "chip" }, element("bdi", {}, spanOf(key))) : null),
        [key, layer, head, gone, mass.toPrecision(3), missed < 0 ? "–" : missed, missed < 0 ? "–" : weight.toPrecision(3)].map((value) => element("td", { class: "number" }, String(value))));
    }));
  }
  box.append(said, table);
  state.on(["run", "part", "layer", "head", "token"], draw);
  draw();
});

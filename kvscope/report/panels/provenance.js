/* Provenance: facts as lists, approximations first. */
kvscope.drawing("provenance", (box, data) => {
  const { element } = kvscope;
  const long = (value) => /^[0-9a-f]{40,}$/.test(value);
  const facts = (rows) => element("dl", { class: "facts" }, rows.map(([name, value]) => [
    element("dt", {}, name),
    element("dd", { class: name === "command" || long(value.replace("sha256 ", "")) ? "code" : null }, element("bdi", {}, value))]));
  const source = (each) => element("article", { class: "source" },
    element("h3", {}, `${each.kind} `, element("bdi", {}, each.name)),
    facts(each.facts),
    each.prompts.length ? element("details", { open: each.prompts.length <= 3 },
      element("summary", {}, each.prompts.length === 1 ? "1 prompt" : `${each.prompts.length} prompts`),
      facts(each.prompts.map((prompt) => [prompt.file, prompt.sha256 ? `sha256 ${prompt.sha256}` : "no hash"]))) : null);
  box.append(
    element("h3", {}, "Approximations"),
    element("ul", {}, data.approximate.map((text) => element("li", {}, text))),
    element("div", { class: "sources" }, data.sources.map(source)));
});

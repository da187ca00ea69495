/* Text: tokens in reading order as spans; the shade changes with the step, a click chooses the token for all panels. */
kvscope.drawing("text", async (box, data, page) => {
  const { element, select, state, numbers, number, percent, raster, clamp } = kvscope;
  const LEVELS = 10;
  const regrets = page.panels.find((panel) => panel.name === "regrets");
  const COLOURINGS = {
    held: "share of heads that hold it", loss: "loss change in the closed loop", regret: "attention it would still have received", surprise: "loss under the full cache",
  };
  const part = () => data.parts[state.get("part")];
  const byToken = () => regrets && regrets.data && regrets.data.parts[state.get("part")]?.tokens[state.get("run")];
  const there = () => Object.keys(COLOURINGS).filter((name) => ({ held: true, loss: part()?.loss[state.get("run")], regret: byToken(), surprise: part()?.surprise })[name]);
  state.declare("shade", () => "held", state.oneOf(() => Object.keys(COLOURINGS)));

  const text = element("div", { class: "text", tabindex: "0", role: "group", "aria-label": "The text; arrow keys choose a token" });
  const said = element("p", { class: "small", role: "status" });
  const legend = element("span", { class: "legend" });
  const life = element("div", { class: "life" });
  const listed = element("ul", { class: "images small", "aria-label": "Images of the prompt" });
  let spans = [];
  let drawnPart = null;
  let shaded = null;

  /* A token as it is read: its spaces are spaces again, a line break breaks the line after its sign. */
  function build() {
    const { tokens, prompt, images } = page.part();
    const imageOf = (at) => images.find((image) => image.start <= at && at < image.stop);
    spans = tokens.map((token, at) => (imageOf(at)
      ? element("span", { "data-at": at, "data-image": imageOf(at).number, title: token }, "▦")
      : element("span", { "data-at": at }, token === "" ? "·" : token.replace(/␣/g, " "))));
    const pieces = spans.flatMap((span, at) => [
      ...(at === prompt ? [element("span", { class: "end" }, "the prompt ends here")] : []), ...(imageOf(at)?.start === at ? [element("span", { class: "end image" }, `image ${imageOf(at).number}`)] : []), span, ...(tokens[at].endsWith("↵") ? ["\n"] : []),
    ]);
    text.replaceChildren(...pieces);
    listed.hidden = !images.length;
    listed.replaceChildren(...images.map((image) => element("li", {}, element("i", {}, "▦"), ` image ${image.number}: tokens ${image.start} to ${image.stop - 1} (${image.stop - image.start} of ${tokens.length}), `, element("bdi", {}, image.file), `, ${image.width} × ${image.height} pixels`)));
    drawnPart = state.get("part");
  }
  const near = (steps, step) => steps.reduce((best, each, at) => (Math.abs(each - step) < Math.abs(steps[best] - step) ? at : best), 0);

  /* Values of all tokens, with the share of the darkest shade that each gets; null where a token has none. */
  async function colouring(step) {
    const { length } = page.part();
    if (state.get("shade") === "held") {
      const packed = part().runs[state.get("run")];
      const at = near(part().steps, step);
      const shares = (await numbers(packed)).subarray(at * length, (at + 1) * length);
      return { value: (token) => (token > part().steps[at] ? null : shares[token] / 255), share: (value) => value, hue: "share", at: part().steps[at] };
    }
    const packed = { loss: part().loss[state.get("run")], regret: byToken(), surprise: part().surprise }[state.get("shade")];
    const values = await numbers(packed);
    const most = Math.max(...[...values].filter((value) => !Number.isNaN(value)).map(Math.abs), 1e-9);
    return { value: (token) => (Number.isNaN(values[token]) ? null : values[token]), share: (value) => Math.sqrt(Math.abs(value) / most), hue: "loss", signed: true, most };
  }
  function paint({ value, share, hue, signed }) {
    const held = hue === "share";
    const [token, step] = [state.get("token"), state.get("step")];
    spans.forEach((span, at) => {
      const found = value(at);
      const level = found === null ? 0 : Math.ceil(LEVELS * share(found) - 1e-9);
      const name = `${signed && found < 0 ? "share" : hue}-${level}`;
      span.className = [level ? name : "", held && found === 0 ? "none" : "", found === null && held ? "later" : "", at === token ? "picked" : "", at === step ? "now" : ""].filter(Boolean).join(" ");
    });
  }
  function sayLegend(how) {
    const ramp = (name) => element("i", { class: `bar ramp-${name}` });
    legend.replaceChildren(...(how.hue === "share"
      ? ["held by no head: ", element("s", {}, "token"), ramp("share"), "by all heads"]
      : [how.signed && state.get("shade") === "loss" ? ["falls ", ramp("down")] : [], "0", ramp("loss"), `${how.most.toPrecision(3)} (square-root scale)`].flat()));
  }

  const draw = kvscope.latest(async () => {
    if (!part()) { said.textContent = "The text of this sequence is unknown: its trace was not found."; text.hidden = listed.hidden = true; legend.replaceChildren(); life.replaceChildren(); return; }
    const usable = there();
    choice.fill(usable.map((name) => ({ value: name, text: COLOURINGS[name] })), state.get("shade"));
    if (drawnPart !== state.get("part")) build();
    const known = usable.includes(state.get("shade")) && (state.get("shade") !== "held" || part().runs[state.get("run")]);
    said.textContent = known ? "" : "The page does not contain the chosen run.";
    if (known) {
      const how = await colouring(state.get("step"));
      paint(how);
      sayLegend(how);
      if (shaded !== state.get("shade") && state.get("shade") === "loss") text.scrollTop = spans[Math.min(page.part().prompt, spans.length - 1)].offsetTop - 120; // the prompt has none
      shaded = state.get("shade");
      if (how.at !== undefined && how.at !== state.get("step")) said.textContent = `Step ${how.at}, the nearest of the ${part().steps.length} steps in this page.`;
      await drawLife(how);
    } else paint({ value: () => null, share: () => 0, hue: "loss" });
  });

  /* When each head of each layer evicted the chosen token. */
  async function drawLife(how) {
    const token = state.get("token");
    if (token < 0) { life.replaceChildren(element("p", { class: "small" }, "Choose a token to see when each head evicts it.")); return; }
    const residency = page.panels.find((panel) => panel.name === "residency")?.data;
    const { length, layers } = page.part();
    const rasters = (residency ? residency.rasters : []).filter((each) => each.run === state.get("run") && each.part === state.get("part")).sort((a, b) => a.layer - b.layer);
    const rows = await Promise.all(rasters.map((each) => raster.open(each, length)));
    const found = how.value(token);
    const heading = element("h3", {}, `Token ${token} `, element("bdi", {}, page.token(token)), found === null ? "" : `: ${state.get("shade") === "held" ? `held by ${percent(found)} of the heads after step ${how.at}` : `${COLOURINGS[state.get("shade")]} ${number(found)}`}`);
    const grid = element("div");
    const heads = Math.max(0, ...rows.map((row) => row.heads.length));
    const there = (r, c) => c < rows[r].heads.length;
    const last = (r, c) => !there(r, c) ? -1 : raster.intervalsOf(rows[r].heads[c], token).reduce((most, [, to]) => Math.max(most, to), -1);
    const ends = rows.flatMap((_, r) => [...Array(heads).keys()].map((c) => last(r, c))).filter((step) => step >= 0);
    if (ends.length) {
      kvscope.heat(grid, {
        label: `Step at which each key/value head evicts token ${token}`, corner: "layer / kv head", rows: rasters.map((each) => String(each.layer)), columns: [...Array(heads).keys()].map(String), scale: [Math.min(...ends), Math.max(...ends)],
        value: (r, c) => (last(r, c) < 0 ? null : last(r, c)), text: (value) => (value >= length ? "held" : String(value)),
        say: (r, c) => !there(r, c) ? `layer ${rasters[r].layer} has ${rows[r].heads.length} key/value heads` : `layer ${rasters[r].layer}, key/value head ${c}: ${last(r, c) < 0 ? "never held" : last(r, c) >= length ? "held to the end" : `evicted at step ${last(r, c)}`}${raster.intervalsOf(rows[r].heads[c], token).length > 1 ? ", with earlier absences" : ""}`,
        chosen: (r, c) => rasters[r].layer === state.get("layer") && state.get("head") !== "all" && Math.floor(state.get("head") / page.headsOf().group) === c,
        click: (r, c) => there(r, c) && state.set({ layer: rasters[r].layer, head: c * page.headsOf(rasters[r].layer).group }),
      });
    }
    life.replaceChildren(heading,
      heads ? element("p", { class: "small" }, "The step at which each head evicted it; the lighter, the later.", rasters.length < layers.length ? ` The page contains ${rasters.length} of ${layers.length} layers.` : "") : element("p", { class: "small" }, "The page does not contain the raster of this run."),
      grid);
  }

  text.addEventListener("click", (event) => {
    const span = event.target.closest("[data-at]");
    if (span) state.set({ token: Number(span.dataset.at) });
  });
  text.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 };
    if (!(event.key in moves)) return;
    const token = clamp(Math.max(state.get("token"), 0) + moves[event.key], 0, spans.length - 1);
    state.set({ token });
    spans[token].scrollIntoView({ block: "nearest" });
    event.preventDefault();
  });
  const choice = select("Shade by", [], null, (shade) => state.set({ shade }));
  box.append(element("div", { class: "controls" }, choice.box, legend), said, listed, text, life);
  state.on(["run", "part", "step", "token", "shade", "layer", "head"], draw);
  await draw();
});

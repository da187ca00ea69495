/* Residency raster on a canvas: stays are counted per pixel, so any zoom costs the same and shows true shares. */
kvscope.drawing("residency", (box, data) => {
  const { element, select, button, colour } = kvscope;
  if (!data.rasters.length) return;
  const GUTTER = 150;
  const FOOT = 44;
  const ROW = 13; // from this many pixels on, a row has its token's text beside it
  const ALL = "all";
  let raster = null;
  let stays = null; // stays[head] = {first: offset of each key, enter, leave}
  let head = ALL;
  let view = null; // keys k0..k1, steps t0..t1, half open
  let cursor = null;
  let tall = 600; // of the canvas, in CSS pixels: one for each token where that is a sensible height

  const canvas = element("canvas", { tabindex: "0", role: "img", "aria-describedby": "residency-readout" });
  const band = element("div", { class: "band", hidden: true });
  const mark = element("div", { class: "cross", hidden: true });
  const tip = element("div", { class: "tip", hidden: true });
  const readout = element("p", { class: "readout", id: "residency-readout", "aria-live": "polite" });
  const scaleNote = element("p", { class: "small" });
  const frame = element("div", { class: "raster" }, canvas, band, mark, tip);

  const sequence = () => data.sequences[raster.sequence];
  const heads = () => (head === ALL ? stays.map((_, index) => index) : [Math.min(Number(head), stays.length - 1)]);

  function pixels(context, width, height) {
    return kvscope.raster.image(context, heads().map((index) => stays[index]), view, width, height, colour("kept"), colour("gone"));
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    const wide = Math.max(320, frame.clientWidth);
    canvas.style.height = `${tall}px`;
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(tall * ratio);
    const context = canvas.getContext("2d");
    const [width, height] = [Math.round((wide - GUTTER - 8) * ratio), Math.round((tall - FOOT) * ratio)];
    context.putImageData(pixels(context, width, height), Math.round(GUTTER * ratio), 0);
    context.scale(ratio, ratio);
    drawAxes(context, width / ratio, height / ratio);
    placeMark();
    const perRow = (view.k1 - view.k0) / height;
    const perColumn = (view.t1 - view.t0) / width;
    const parts = [];
    if (perRow > 1) parts.push(`each pixel row is the mean of about ${perRow.toFixed(1)} tokens`);
    if (perColumn > 1) parts.push(`each pixel column is ${perColumn.toFixed(1)} steps`);
    if (head === ALL && stays.length > 1) parts.push(`the shade is the share of ${stays.length} key/value heads that hold the token`);
    if (stays.length < raster.heads) parts.push(`all ${raster.heads} key/value heads of this layer hold the same keys`);
    scaleNote.textContent = parts.length ? `In this view ${parts.join("; ")}.` : "";
    canvas.setAttribute("aria-label", `Tokens ${view.k0} to ${view.k1 - 1} down, steps ${view.t0} to ${view.t1 - 1} across. Arrow keys move a cursor.`);
  }

  function ticks(from, to, room) {
    const raw = ((to - from) / room) * 70;
    const power = 10 ** Math.floor(Math.log10(Math.max(1, raw)));
    const step = Math.max(1, [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= raw) || 10 * power);
    const made = [];
    for (let at = Math.ceil(from / step) * step; at < to; at += step) made.push(at);
    return made;
  }

  function drawAxes(context, width, height) {
    const { k0, k1, t0, t1 } = view;
    const { prompt, tokens } = sequence();
    const x = (step) => GUTTER + ((step - t0) / (t1 - t0)) * width;
    const y = (key) => ((key - k0) / (k1 - k0)) * height;
    const family = getComputedStyle(document.body).fontFamily;
    context.fillStyle = colour("muted");
    context.strokeStyle = colour("line");
    context.font = `12px ${family}`;
    context.strokeRect(GUTTER - 0.5, 0.5, width + 1, height - 1);
    context.textAlign = "center";
    for (const step of ticks(t0, t1, width)) context.fillText(String(step), x(step + 0.5), height + 16);
    context.fillText("step", GUTTER + width / 2, height + 36);
    context.textAlign = "right";
    context.textBaseline = "middle";
    if (height / (k1 - k0) >= ROW && tokens) {
      context.fillStyle = colour("text");
      for (let key = k0; key < k1; key += 1) {
        context.fillText(String(key), GUTTER - 8, y(key + 0.5));
        context.fillText(tokens[key].slice(0, 14), GUTTER - 46, y(key + 0.5)); // apart, or a right-to-left token would move the number
      }
    } else for (const key of ticks(k0, k1, height)) context.fillText(`token ${key}`, GUTTER - 8, Math.max(7, y(key + 0.5)));
    context.textBaseline = "alphabetic";
    if (prompt > t0 && prompt < t1) {
      context.setLineDash([5, 4]);
      context.strokeStyle = colour("text");
      context.beginPath();
      context.moveTo(x(prompt), 0);
      context.lineTo(x(prompt), height);
      context.stroke();
      context.setLineDash([]);
      const right = x(prompt) > GUTTER + width / 2;
      context.textAlign = right ? "right" : "left";
      const wide = context.measureText("prompt ends").width + 10;
      context.fillStyle = colour("raised");
      context.fillRect(x(prompt) + (right ? -4 - wide : 4), 4, wide, 18);
      context.fillStyle = colour("text");
      context.fillText("prompt ends", x(prompt) + (right ? -9 : 9), 17);
    }
  }

  /* What one key lives through, in words. */
  function life(key, step) {
    const { tokens, prompt } = sequence();
    const name = (at) => (tokens ? `“${tokens[at]}”` : "text not known");
    const lines = [`token ${key} ${name(key)}${key < prompt ? ", prompt" : ", generated"}`, `step ${step} ${name(step)}`];
    if (step < key) return [...lines, "not there yet"];
    const chosen = heads();
    const holding = chosen.filter((index) => staysOf(index, key).some(([from, to]) => from <= step && (to < 0 || step < to)));
    if (chosen.length > 1) return [...lines, `held by ${holding.length} of ${chosen.length} key/value heads`];
    const spans = staysOf(chosen[0], key);
    const now = spans.find(([from, to]) => from <= step && (to < 0 || step < to));
    const gone = spans.filter(([, to]) => to >= 0 && to <= step).map(([, to]) => to).pop();
    if (now) return [...lines, now[1] < 0 ? `held since step ${now[0]}, to the end` : `held since step ${now[0]}, leaves at step ${now[1]}`];
    return [...lines, gone === undefined ? "never held" : `gone: left at step ${gone}${spans.length ? `, held since step ${spans[spans.length - 1][0]}` : ""}`];
  }
  function staysOf(index, key) {
    const { first, enter, leave } = stays[index];
    const made = [];
    for (let stay = first[key]; stay < first[key + 1]; stay += 1) made.push([enter[stay], leave[stay]]);
    return made;
  }

  /* Place of a pointer on the canvas, as key and step; null beside the plot. */
  function place(event, clamp) {
    const bounds = canvas.getBoundingClientRect();
    let [x, y] = [(event.clientX - bounds.left - GUTTER) / (bounds.width - GUTTER - 8), (event.clientY - bounds.top) / (bounds.height - FOOT)];
    if (!clamp && (x < 0 || x >= 1 || y < 0 || y >= 1)) return null;
    x = Math.min(Math.max(x, 0), 0.999999);
    y = Math.min(Math.max(y, 0), 0.999999);
    return { key: Math.floor(view.k0 + y * (view.k1 - view.k0)), step: Math.floor(view.t0 + x * (view.t1 - view.t0)), x: event.clientX - bounds.left, y: event.clientY - bounds.top };
  }

  function zoom(k0, k1, t0, t1) {
    const { length } = sequence();
    const fit = (low, high) => {
      const size = Math.min(length, Math.max(4, high - low));
      const from = Math.min(Math.max(0, low), length - size);
      return [from, from + size];
    };
    const [[a, b], [c, d]] = [fit(Math.round(k0), Math.round(k1)), fit(Math.round(t0), Math.round(t1))];
    view = { k0: a, k1: b, t0: c, t1: d };
    draw();
  }
  function zoomBy(factor) {
    const at = cursor || { key: (view.k0 + view.k1) / 2, step: (view.t0 + view.t1) / 2 };
    const around = (low, high, middle) => [middle - (middle - low) * factor, middle + (high - middle) * factor];
    zoom(...around(view.k0, view.k1, at.key), ...around(view.t0, view.t1, at.step));
  }
  function whole() {
    const { length } = sequence();
    zoom(0, length, 0, length);
  }
  function generated() {
    const { length, prompt } = sequence();
    zoom(0, length, Math.max(0, Math.min(prompt - 1, length - 4)), length);
  }

  let start = null;
  canvas.addEventListener("pointerdown", (event) => {
    start = place(event, false);
    if (start) canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const at = place(event, Boolean(start));
    tip.hidden = !at;
    if (!at) return;
    tip.replaceChildren(...life(at.key, at.step).map((line) => element("div", {}, element("bdi", {}, line))));
    const left = at.x > canvas.clientWidth / 2;
    tip.style.left = left ? "" : `${at.x + 14}px`;
    tip.style.right = left ? `${canvas.clientWidth - at.x + 14}px` : "";
    tip.style.top = `${Math.min(at.y + 10, tall - 110)}px`;
    if (!start) return;
    band.hidden = Math.abs(at.x - start.x) < 4 && Math.abs(at.y - start.y) < 4;
    Object.assign(band.style, {
      left: `${Math.min(at.x, start.x)}px`, top: `${Math.min(at.y, start.y)}px`,
      width: `${Math.abs(at.x - start.x)}px`, height: `${Math.abs(at.y - start.y)}px`,
    });
  });
  canvas.addEventListener("pointerup", (event) => {
    const at = place(event, true);
    if (start && !band.hidden) zoom(Math.min(at.key, start.key), Math.max(at.key, start.key) + 1, Math.min(at.step, start.step), Math.max(at.step, start.step) + 1);
    else if (start) point(at.key, at.step);
    start = null;
    band.hidden = true;
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("dblclick", whole);
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key in moves) {
      const far = event.shiftKey ? 10 : 1;
      const at = cursor || { key: view.k0, step: view.t0 };
      const inside = (value) => Math.min(Math.max(0, value), sequence().length - 1);
      point(inside(at.key + far * moves[event.key][0]), inside(at.step + far * moves[event.key][1]));
    } else if (event.key === "+") zoomBy(0.5);
    else if (event.key === "-") zoomBy(2);
    else if (event.key === "Escape") whole();
    else return;
    event.preventDefault();
  });
  function point(key, step) {
    cursor = { key, step };
    placeMark();
    readout.textContent = life(key, step).join("; ");
  }

  /* After a full prefill everything happens behind the prompt: that is the first view. */
  function usual() {
    const { length, prompt } = sequence();
    const full = data.runs.find((run) => run.id === state.run).prefill === "full";
    if (full && prompt < length) generated();
    else whole();
  }

  /* A cross over the cell that the cursor is on. */
  function placeMark() {
    const inside = cursor && cursor.key >= view.k0 && cursor.key < view.k1 && cursor.step >= view.t0 && cursor.step < view.t1;
    mark.hidden = !inside;
    if (!inside) return;
    const bounds = canvas.getBoundingClientRect();
    mark.style.left = `${GUTTER + ((cursor.step + 0.5 - view.t0) / (view.t1 - view.t0)) * (bounds.width - GUTTER - 8)}px`;
    mark.style.top = `${((cursor.key + 0.5 - view.k0) / (view.k1 - view.k0)) * (tall - FOOT)}px`;
  }

  const named = Object.fromEntries(data.runs.map((run) => [run.id, run.name]));
  const unique = (values) => [...new Set(values)];
  const options = (values, text) => values.map((value) => ({ value, text: text(value) }));
  const state = { run: data.rasters[0].run, sequence: data.rasters[0].sequence, layer: data.rasters[0].layer };
  if (data.rasters.some((each) => each.run === data.first)) state.run = data.first;
  const runChoice = select("Policy and budget", options(unique(data.rasters.map((each) => each.run)), (id) => named[id]), state.run, (value) => choose({ run: value }));
  const sequenceChoice = select("Sequence", [], null, (value) => choose({ sequence: value }));
  const layerChoice = select("Layer", [], null, (value) => choose({ layer: Number(value) }));
  const headChoice = select("Key/value head", [], null, (value) => { head = value; draw(); });

  function choose(change) {
    Object.assign(state, change);
    const ofRun = data.rasters.filter((each) => each.run === state.run);
    const sequences = unique(ofRun.map((each) => each.sequence));
    if (!sequences.includes(state.sequence)) [state.sequence] = sequences;
    const layers = unique(ofRun.filter((each) => each.sequence === state.sequence).map((each) => each.layer)).sort((a, b) => a - b);
    if (!layers.includes(state.layer)) [state.layer] = layers;
    const before = raster && raster.sequence;
    raster = ofRun.find((each) => each.sequence === state.sequence && each.layer === state.layer);
    stays = kvscope.raster.open(raster, sequence().length);
    tall = FOOT + Math.min(800, Math.max(420, sequence().length));
    sequenceChoice.fill(options(sequences, (id) => `sequence ${id.split(".")[1]}`), state.sequence);
    sequenceChoice.box.hidden = sequences.length < 2;
    layerChoice.fill(options(layers, String), state.layer);
    if (head !== ALL && Number(head) >= raster.heads) head = ALL;
    headChoice.fill([{ value: ALL, text: "all (share of heads)" }, ...options([...Array(raster.heads).keys()], String)], head);
    runChoice.value = state.run;
    if (before !== raster.sequence || !view) usual();
    else draw();
  }

  box.append(
    element("div", { class: "controls" }, runChoice.box, sequenceChoice.box, layerChoice.box, headChoice.box),
    element("div", { class: "controls" }, button("Whole sequence", whole), button("After the prompt", generated),
      button("Zoom in", () => zoomBy(0.5)), button("Zoom out", () => zoomBy(2)),
      element("span", { class: "legend" }, element("i", { class: "kept" }), "held", element("i", { class: "gone" }), "evicted", element("i", { class: "future" }), "not there yet")),
    frame, scaleNote, readout,
    element("p", { class: "small" }, "Drag to zoom, double-click for the whole. With the keyboard: arrows move a cursor (shift: ten at a time), + and − zoom, Escape shows the whole."));
  choose({});
  kvscope.onTheme(draw);
  kvscope.on("head", ({ run, layer, kvHead }) => {
    if (!data.rasters.some((each) => each.run === run && each.layer === layer)) return;
    head = String(kvHead);
    choose({ run, layer });
    document.getElementById("residency").scrollIntoView({ behavior: "smooth" });
  });
  new ResizeObserver(() => { if (canvas.clientWidth && Math.abs(canvas.width / (window.devicePixelRatio || 1) - frame.clientWidth) > 1) draw(); }).observe(frame);
});

/* One canvas of residency intervals with axes, pointer and keyboard; `show` sets the runs. */
kvscope.rasterView = ({ page, view, zoom, zoomBy, whole, point, words, looked, chosenHeads, describedBy }) => {
  const { element, colour, clamp, raster, state } = kvscope;
  const FOOT = 60;
  const ROW = 13; // from this many pixels on, a row has its token's text beside it
  let sets = []; // [run, intervals] of one run, or of two to be compared
  let gutter = 150;
  let tall = 600;
  let drawn = 0; // width in which it is drawn

  const canvas = element("canvas", { tabindex: "0", role: "img", "aria-describedby": describedBy });
  const band = element("div", { class: "band", hidden: true });
  const mark = element("div", { class: "cross", hidden: true });
  const tip = element("div", { class: "tip", hidden: true });
  const title = element("h3");
  const plane = element("div", { class: "raster" }, canvas, band, mark, tip);
  const frame = element("div", { class: "raster" }, title, plane);

  function show(next) {
    sets = next;
    title.textContent = `${sets.map(([run]) => page.byId.get(run).name).join(" and ")}, layer ${state.get("layer")}, ${headWords()}`;
    draw();
  }
  function headWords() {
    const [head, { group }] = [state.get("head"), page.headsOf()];
    return head === "all" ? "all key/value heads" : `query head ${head} (key/value head ${Math.floor(head / group)})`;
  }
  function draw() {
    if (!sets.length || !plane.clientWidth) return;
    const ratio = window.devicePixelRatio || 1;
    drawn = plane.clientWidth;
    const wide = Math.max(280, drawn);
    gutter = wide < 520 ? 96 : 150;
    tall = FOOT + clamp(page.part().length, 380, 680);
    canvas.style.height = `${tall}px`;
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(tall * ratio);
    const context = canvas.getContext("2d");
    const [width, height] = [Math.round((wide - gutter - 8) * ratio), Math.round((tall - FOOT) * ratio)];
    const shares = sets.map(([, intervals]) => raster.shares(chosenHeads(intervals), view(), width, height));
    const picture = shares.length === 1
      ? raster.image(context, shares[0], width, height, colour("kept"), colour("evicted"))
      : raster.difference(context, ...shares, width, height, ["mine", "only", "both", "neither"].map(colour));
    context.putImageData(picture, Math.round(gutter * ratio), 0);
    context.scale(ratio, ratio);
    drawAxes(context, width / ratio, height / ratio);
    placeMark();
    const now = view();
    canvas.setAttribute("aria-label", `Tokens ${now.k0} to ${now.k1 - 1} down, steps ${now.t0} to ${now.t1 - 1} across. Arrow keys move a cursor.`);
  }
  /* What a pixel is the mean of. */
  function note() {
    const now = view();
    const [perRow, perColumn] = [(now.k1 - now.k0) / (tall - FOOT), (now.t1 - now.t0) / Math.max(1, plane.clientWidth - gutter - 8)];
    const [, intervals] = sets[0] || [];
    const parts = [];
    if (perRow > 1) parts.push(`each pixel row is the mean of about ${perRow.toFixed(1)} tokens`);
    if (perColumn > 1) parts.push(`each pixel column is ${perColumn.toFixed(1)} steps`);
    if (intervals && chosenHeads(intervals).length > 1) parts.push(intervals.oneForAll ? `all ${intervals.heads.length} key/value heads of this layer hold the same keys` : `the shade is the share of ${intervals.heads.length} key/value heads that hold the token`);
    return parts.length ? `In this view ${parts.join("; ")}.` : "";
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
    const { k0, k1, t0, t1 } = view();
    const { prompt, tokens } = page.part();
    const x = (step) => gutter + ((step - t0) / (t1 - t0)) * width;
    const y = (key) => ((key - k0) / (k1 - k0)) * height;
    context.fillStyle = colour("muted");
    context.strokeStyle = colour("line");
    context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    context.strokeRect(gutter - 0.5, 0.5, width + 1, height - 1);
    context.textAlign = "center";
    for (const step of ticks(t0, t1, width)) {
      context.fillText(String(step), x(step + 0.5), height + 16);
      if (tokens) context.fillText(tokens[step].slice(0, 8), x(step + 0.5), height + 32);
    }
    context.fillText(tokens ? "step, and its token" : "step", gutter + width / 2, height + 52);
    context.textAlign = "right";
    context.textBaseline = "middle";
    if (height / (k1 - k0) >= ROW && tokens) {
      context.fillStyle = colour("text");
      for (let key = k0; key < k1; key += 1) {
        context.fillText(String(key), gutter - 8, y(key + 0.5));
        context.fillText(tokens[key].slice(0, gutter > 120 ? 14 : 6), gutter - 46, y(key + 0.5)); // drawn separately: a right-to-left token would move the number
      }
    } else {
      for (const key of ticks(k0, k1, 2.6 * height)) { // a word needs a line, not the width of a number
        const at = clamp(y(key + 0.5), 7, height - 7);
        context.fillText(String(key), gutter - 8, at);
        if (tokens) context.fillText(tokens[key].slice(0, gutter > 120 ? 14 : 6), gutter - 46, at);
      }
    }
    context.textBaseline = "alphabetic";
    if (prompt > Math.max(1, t0) && prompt < t1) drawPrompt(context, x(prompt), width, height);
  }
  function drawPrompt(context, at, width, height) {
    context.setLineDash([5, 4]);
    context.strokeStyle = colour("text");
    context.beginPath();
    context.moveTo(at, 0);
    context.lineTo(at, height);
    context.stroke();
    context.setLineDash([]);
    const right = at > gutter + width / 2;
    const wide = context.measureText("prompt ends").width + 10;
    context.textAlign = right ? "right" : "left";
    context.fillStyle = colour("raised");
    context.fillRect(at + (right ? -4 - wide : 4), 4, wide, 18);
    context.fillStyle = colour("text");
    context.fillText("prompt ends", at + (right ? -9 : 9), 17);
  }
  /* A ring over the cell of the chosen token and step. */
  function placeMark() {
    const { k0, k1, t0, t1 } = view();
    const [key, step] = [state.get("token"), state.get("step")];
    mark.hidden = !(key >= k0 && key < k1 && step >= t0 && step < t1);
    if (mark.hidden) return;
    mark.style.left = `${gutter + ((step + 0.5 - t0) / (t1 - t0)) * (canvas.getBoundingClientRect().width - gutter - 8)}px`;
    mark.style.top = `${((key + 0.5 - k0) / (k1 - k0)) * (tall - FOOT)}px`;
  }

  /* Place of a pointer on the canvas, as key and step; null beside the plot. */
  function place(event, clamped) {
    const bounds = canvas.getBoundingClientRect();
    let [x, y] = [(event.clientX - bounds.left - gutter) / (bounds.width - gutter - 8), (event.clientY - bounds.top) / (bounds.height - FOOT)];
    if (!clamped && (x < 0 || x >= 1 || y < 0 || y >= 1)) return null;
    [x, y] = [clamp(x, 0, 0.999999), clamp(y, 0, 0.999999)];
    const { k0, k1, t0, t1 } = view();
    return { key: Math.floor(k0 + y * (k1 - k0)), step: Math.floor(t0 + x * (t1 - t0)), x: event.clientX - bounds.left, y: event.clientY - bounds.top };
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
    const line = (text) => element("div", {}, element("bdi", {}, text));
    const lines = words(sets, at.key, at.step).map(line);
    tip.replaceChildren(...lines);
    looked(at.key, at.step).then((more) => { if (lines[0].parentElement) tip.append(...more.map(line)); });
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
  canvas.addEventListener("pointercancel", () => { start = null; band.hidden = true; });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("dblclick", whole);
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key in moves) {
      const far = event.shiftKey ? 10 : 1;
      const now = view();
      const from = state.get("token") < 0 ? [now.k0, now.t0] : [state.get("token") + far * moves[event.key][0], state.get("step") + far * moves[event.key][1]];
      const inside = (value) => clamp(value, 0, page.part().length - 1);
      point(...from.map(inside));
    } else if (event.key === "+") zoomBy(0.5);
    else if (event.key === "-") zoomBy(2);
    else if (event.key === "Escape") whole();
    else return;
    event.preventDefault();
  });
  new ResizeObserver(() => { if (plane.clientWidth !== drawn) draw(); }).observe(plane);

  return { frame, note, show };
};

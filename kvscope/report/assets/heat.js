/* Tables with a colour and a number in every cell: maps that work by keyboard and in print. */
Object.assign(kvscope, (() => {
  const STOPS = [[0, 34, 78], [18, 53, 112], [59, 73, 109], [87, 92, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]]; // Cividis

  function cividis(share) {
    const at = kvscope.clamp(share, 0, 1) * (STOPS.length - 1);
    const low = Math.min(STOPS.length - 2, Math.floor(at));
    return STOPS[low].map((from, channel) => Math.round(from + (STOPS[low + 1][channel] - from) * (at - low)));
  }
  const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
  const inkOn = ([r, g, b]) => (0.2126 * r + 0.7152 * g + 0.0722 * b > 125 ? "#111111" : "#ffffff");

  function scaleBar(scale, say) {
    const stops = STOPS.map((stop, index) => `${css(stop)} ${(100 * index) / (STOPS.length - 1)}%`).join(", ");
    const bar = kvscope.element("i", { class: "bar" });
    bar.style.background = `linear-gradient(to right, ${stops})`;
    return kvscope.element("span", { class: "legend scale" }, say(scale[0]), bar, say(scale[1]));
  }

  /*
   * `rows` and `columns` are names; `value(r, c)` a number or null; `say(r, c)` the description of a cell; `text(value)` its content
   * where there is room, or everywhere in a table of the `full` width. `chosen(r, c)` marks cells, `click(r, c)` is optional. Arrow keys walk, Enter chooses.
   */
  function heat(box, { label, corner, rows, columns, value, say, text, scale, chosen = () => false, click = null, upright = false, full = false }) {
    const { element } = kvscope;
    const roomy = text && (full || columns.length <= 16);
    const span = scale[1] - scale[0] || 1;
    const cells = rows.map((_, r) => columns.map((_name, c) => {
      const found = value(r, c);
      const picked = chosen(r, c);
      const cell = element("td", { tabindex: "-1", role: "gridcell", title: say(r, c), "aria-label": say(r, c), "aria-selected": click ? String(picked) : null, class: picked ? "picked" : null },
        roomy ? (found === null ? "–" : text(found)) : "");
      if (found !== null) {
        const fill = cividis((found - scale[0]) / span);
        cell.style.background = css(fill);
        cell.style.color = inkOn(fill);
      }
      return cell;
    }));
    const head = element("tr", {}, element("th", { scope: "col", class: "corner" }, corner),
      columns.map((name) => element("th", { scope: "col", class: upright ? "upright" : null }, element("bdi", {}, name))));
    const body = rows.map((name, r) => element("tr", {}, element("th", { scope: "row" }, element("bdi", {}, name)), cells[r]));
    const table = element("table", { class: `heat${roomy ? "" : " tight"}${full ? " full" : ""}${full && columns.length > 16 ? " many" : ""}${click ? " live" : ""}${rows.some((name) => name.length > 16) ? " long" : ""}`, role: "grid", "aria-label": label }, element("thead", {}, head), element("tbody", {}, body));
    if (!full) table.style.width = `min(100%, ${corner.length / 2 + 4 + columns.length * (roomy ? 6 : 2)}em)`; // no wider than can be read across
    const focused = box.contains(document.activeElement) && document.activeElement.tagName === "TD";
    const scrolled = element("div", { class: "scroll plain" }, table);
    box.replaceChildren(scrolled);
    kvscope.scrollHint(scrolled, `all ${columns.length} columns`);

    let at = [0, 0];
    rows.forEach((_, r) => columns.forEach((_name, c) => { if (chosen(r, c)) at = [r, c]; }));
    if (cells[at[0]] && cells[at[0]][at[1]]) {
      cells[at[0]][at[1]].tabIndex = 0;
      if (focused) cells[at[0]][at[1]].focus();
    }
    const place = (cell) => [cell.parentElement.rowIndex - 1, cell.cellIndex - 1];
    table.addEventListener("click", (event) => { const cell = event.target.closest("td"); if (cell && click) click(...place(cell)); });
    table.addEventListener("keydown", (event) => {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const cell = event.target.closest("td");
      if (!cell) return;
      const [r, c] = place(cell);
      if (event.key in moves) {
        const next = cells[kvscope.clamp(r + moves[event.key][0], 0, rows.length - 1)][kvscope.clamp(c + moves[event.key][1], 0, columns.length - 1)];
        cell.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      } else if ((event.key === "Enter" || event.key === " ") && click) click(r, c);
      else return;
      event.preventDefault();
    });
  }

  return { heat, scaleBar };
})());

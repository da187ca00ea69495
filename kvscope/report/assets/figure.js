/* Saves the figures of a panel as SVG for a paper: in light colours, with a size in inches and a font size in points. */
kvscope.figure = (() => {
  const { element, button } = kvscope;
  const size = { width: 3.3, height: 2.6, font: 8 }; // shared by all panels
  const LIMITS = { width: [1, 40], height: [1, 40], font: [4, 48] };
  const FAMILY = "DejaVu Sans, Arial, sans-serif";
  const NAMESPACE = new DOMParser().parseFromString("<svg></svg>", "text/html").body.firstChild.namespaceURI;

  const pixels = () => ({ width: size.width * 96, height: size.height * 96, font: (size.font * 96) / 72 });
  function node(tag, attributes, ...children) {
    const made = document.createElementNS(NAMESPACE, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
    made.append(...children);
    return made;
  }
  function sheet(height, children) {
    const { width, font } = pixels();
    return node("svg", { xmlns: NAMESPACE, width: `${size.width}in`, height: `${height / 96}in`, viewBox: `0 0 ${width} ${height}`, "font-family": FAMILY, "font-size": font },
      node("rect", { width, height, fill: "#ffffff" }), ...children);
  }

  /* Names without the parts, such as the loop, that most of them have in common: a legend of a paper has little room. */
  function shortened(names) {
    const parts = names.map((name) => name.split(" · "));
    const common = (part) => 2 * parts.filter((own) => own.slice(1).includes(part)).length > parts.length;
    const short = parts.map(([first, ...rest]) => [first, ...rest.filter((part) => !common(part))].join(" · "));
    return new Set(short).size === short.length ? short : names;
  }

  /* The legend, below the plot, in as many columns as fit: Plotly's own would cut off what has no room. */
  function legendOf(box) {
    const { width, font } = pixels();
    const lines = box.data.filter((trace) => trace.type === "scatter" && trace.name);
    if (lines.length < 2) return { height: 0, parts: () => [] };
    const names = shortened(lines.map((trace) => trace.name.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&")));
    const columns = Math.max(1, Math.floor(width / (Math.max(...names.map((name) => name.length)) * 0.6 * font + 4 * font)));
    const high = 1.35 * font;
    const parts = (top) => names.flatMap((name, place) => {
      const [trace, x, y] = [lines[place], ((place % columns) * width) / columns + font, top + (Math.floor(place / columns) + 0.5) * high];
      const color = (trace.line && trace.line.color) || (trace.marker && trace.marker.color);
      const dash = { dash: "9 4", dot: "2 3", dashdot: "8 3 2 3", longdash: "13 4", longdashdot: "13 3 2 3" }[trace.line && trace.line.dash] || "none";
      return [
        trace.mode.includes("lines") ? node("line", { x1: x, x2: x + 2 * font, y1: y, y2: y, stroke: color, "stroke-width": font / 8, "stroke-dasharray": dash }) : "",
        trace.mode.includes("markers") ? node("text", { x: x + font, y, fill: color, "text-anchor": "middle", "dominant-baseline": "central" }, kvscope.GLYPHS[[trace.marker.symbol].flat()[0]] || "●") : "",
        node("text", { x: x + 2.5 * font, y, "dominant-baseline": "central" }, name),
      ];
    });
    return { height: Math.ceil(names.length / columns) * high, parts };
  }
  const short = (title) => (title || "").replace(" (higher is better)", " ↑").replace(" (lower is better)", " ↓");

  async function ofPlot(box) {
    const { width, height, font } = pixels();
    const legend = legendOf(box);
    const text = { family: FAMILY, size: font, color: "#000000" };
    const small = font / 17; // lines and markers shrink with the text
    const data = box.data.map((trace) => ({
      ...trace, showlegend: false, ...(trace.line ? { line: { ...trace.line, width: 2 * small } } : {}), ...(trace.marker ? { marker: { ...trace.marker, size: 9 * small } } : {}),
    }));
    const high = height - legend.height;
    const layout = structuredClone({ ...box.layout, width, height: high, autosize: false, showlegend: false, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", font: text, margin: { l: 8, r: 8, t: 8, b: 8 } });
    for (const [name, own] of Object.entries(layout)) if (/^[xy]axis/.test(name)) Object.assign(own, { automargin: true, tickfont: text, title: { ...own.title, text: short(own.title && own.title.text), font: text, standoff: font / 2 } });
    const address = await Plotly.toImage({ data, layout, config: { plotlyServerURL: "" } }, { format: "svg", width, height: high });
    const plotted = new DOMParser().parseFromString(decodeURIComponent(address.slice(address.indexOf(",") + 1)), "image/svg+xml").documentElement;
    return sheet(height, [plotted, ...legend.parts(high)]);
  }
  /* A table of colours, as rectangles and texts; a row is as high as its text. */
  function ofHeat(table) {
    const { width, font } = pixels();
    const rows = [...table.tBodies[0].rows];
    const columns = [...table.tHead.rows[0].cells].slice(1).map((cell) => cell.textContent);
    const wide = (text) => text.length * font * 0.58;
    const left = Math.max(...rows.map((row) => wide(row.cells[0].textContent)), wide(table.tHead.rows[0].cells[0].textContent)) + font;
    const upright = Math.max(...columns.map(wide)) > (width - left) / columns.length;
    const top = font + (upright ? Math.max(...columns.map(wide)) : font);
    const [cell, high] = [(width - left) / columns.length, 1.7 * font];
    const write = (text, x, y, more = {}) => node("text", { x, y, "dominant-baseline": "central", ...more }, text);
    const body = rows.flatMap((row, r) => [
      write(row.cells[0].textContent, left - font / 2, top + (r + 0.5) * high, { "text-anchor": "end" }),
      ...[...row.cells].slice(1).flatMap((each, c) => {
        const [x, y] = [left + c * cell, top + r * high];
        const fits = wide(each.textContent) < cell;
        return [node("rect", { x, y, width: cell - 1, height: high - 1, fill: each.style.background || each.style.backgroundColor || "#eeeeee" }),
          ...(each.textContent && fits ? [write(each.textContent, x + cell / 2, y + high / 2, { "text-anchor": "middle", fill: each.style.color || "#000000" })] : [])];
      }),
    ]);
    const head = columns.map((text, c) => {
      const [x, y] = [left + (c + 0.5) * cell, top - font / 2];
      return upright ? write(text, x, y, { transform: `rotate(-90 ${x} ${y})` }) : write(text, x, y - font / 4, { "text-anchor": "middle" });
    });
    return sheet(top + rows.length * high, [write(table.tHead.rows[0].cells[0].textContent, 0, top - font), ...head, ...body]);
  }
  /* A raster is an image inside of the file, under its title. */
  function ofRaster(canvas) {
    const { width, font } = pixels();
    const high = (width * canvas.height) / canvas.width;
    const title = canvas.closest(".body .raster:has(h3)")?.querySelector("h3")?.textContent || "";
    return sheet(high + 2 * font, [node("text", { x: 0, y: 1.2 * font }, title), node("image", { href: canvas.toDataURL(), y: 2 * font, width, height: high })]);
  }

  function download(svg, name) {
    const text = new XMLSerializer().serializeToString(svg);
    const address = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    const link = element("a", { href: address, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  }
  const found = (box) => [...box.querySelectorAll(".plot.js-plotly-plot, table.heat, .raster canvas")].filter((each) => each.offsetParent !== null);

  /* Draws the page in light colours, makes the files, and draws it again as it was. */
  async function save(name, box) {
    const root = document.documentElement;
    const before = root.dataset.theme;
    if (kvscope.isDark()) { root.dataset.theme = "light"; kvscope.redrawAll(); await kvscope.settled(); }
    const figures = found(box);
    for (const [place, each] of figures.entries()) {
      const svg = each.matches("canvas") ? ofRaster(each) : each.matches("table") ? ofHeat(each) : await ofPlot(each);
      download(svg, figures.length > 1 ? `${name}-${place + 1}.svg` : `${name}.svg`);
    }
    if (before) root.dataset.theme = before; else delete root.dataset.theme;
    if (kvscope.isDark()) { kvscope.redrawAll(); await kvscope.settled(); }
  }

  function field(name, text) {
    const [min, max] = LIMITS[name];
    const input = element("input", { type: "number", min, max, step: name === "font" ? 0.5 : 0.1, value: size[name], on: { change: () => {
      size[name] = Math.min(max, Math.max(min, Number(input.value) || size[name]));
      for (const each of document.querySelectorAll(`.save input[data-size="${name}"]`)) each.value = size[name];
    } } });
    input.dataset.size = name;
    return element("label", {}, text, input);
  }
  /* The control beside the title of a panel; hidden while the panel has no figure. */
  function control(name, box) {
    const made = element("details", { class: "save" }, element("summary", {}, "Save as SVG"),
      element("div", { class: "sizes" }, field("width", "width, inches"), field("height", "height, inches"), field("font", "font, points"), button("Save", () => save(name, box))));
    made.hidden = true;
    made.show = () => { made.hidden = !found(box).length; };
    return made;
  }
  return { control };
})();

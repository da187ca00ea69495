/* What every drawing uses: elements, controls, numbers, colours, plots. Text enters the page as text, never as HTML. */
const kvscope = (() => {
  const drawings = {};
  const listeners = {};
  const redraws = [];

  /* Colours that stay apart for colour-blind readers (Okabe and Ito, darkened where they are too pale for lines). */
  const PALETTE = {
    light: ["#0072b2", "#c44e00", "#00805e", "#b5478d", "#9a6a00", "#2a93cf", "#6a4fb3", "#4d4d4d"],
    dark: ["#56b4e9", "#f08a4b", "#2fc795", "#e59ac6", "#e6b23c", "#9fd3f5", "#b7a3f0", "#c9c9c9"],
  };
  const MARKERS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) made.append(child); // strings become text nodes
    return made;
  }

  /* A labelled native select. `options` is a list of {value, text, group?}. */
  let counter = 0;
  function select(label, options, chosen, changed) {
    const id = `control-${(counter += 1)}`;
    const control = element("select", { id, on: { change: () => changed(control.value) } });
    const fill = (list, value) => {
      const groups = new Map();
      control.replaceChildren();
      for (const option of list) {
        const made = element("option", { value: option.value }, option.text);
        if (option.group === undefined) control.append(made);
        else {
          if (!groups.has(option.group)) {
            groups.set(option.group, element("optgroup", { label: option.group }));
            control.append(groups.get(option.group));
          }
          groups.get(option.group).append(made);
        }
      }
      if (list.some((option) => String(option.value) === String(value))) control.value = String(value);
    };
    fill(options, chosen);
    const box = element("div", { class: "control" }, element("label", { for: id }, label), control);
    return { box, fill, control, get value() { return control.value; }, set value(value) { control.value = String(value); } };
  }

  function button(text, clicked, attributes = {}) {
    return element("button", { type: "button", ...attributes, on: { click: clicked } }, text);
  }

  /* A table of plain cells behind a plot, closed at first. */
  function tableBehind(summary, headers, rows) {
    const head = element("tr", {}, headers.map((text) => element("th", { scope: "col" }, text)));
    const body = rows.map((cells) => element("tr", {}, cells.map((cell, index) =>
      element(index ? "td" : "th", index ? {} : { scope: "row" }, cell === null ? "–" : String(cell)))));
    return element("details", { class: "behind" }, element("summary", {}, summary),
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": summary },
        element("table", {}, element("thead", {}, head), element("tbody", {}, body))));
  }

  function number(value, metric) {
    if (value === null || value === undefined) return "–";
    const range = (metric && metric.range) || [];
    if (range[0] === 0 && range[1] === 1) return value.toFixed(4);
    if (metric && /_keys$/.test(metric.name)) return value.toFixed(1).replace(/\.0$/, "");
    return Math.abs(value) < 100 ? value.toFixed(4) : String(Number(value.toPrecision(6)));
  }

  function integers(packed) {
    const raw = atob(packed.data);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
    const view = new DataView(bytes.buffer);
    const size = packed.dtype === "int16" ? 2 : 4;
    const made = new Int32Array(raw.length / size);
    for (let i = 0; i < made.length; i += 1) made[i] = size === 2 ? view.getInt16(2 * i, true) : view.getInt32(4 * i, true);
    return made;
  }

  function isDark() {
    const forced = document.documentElement.dataset.theme;
    return forced ? forced === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  /* Colour and marker by policy; the dash changes with the replay, and when the colours begin again. */
  function lineStyle(index, replay = 0) {
    const palette = PALETTE[isDark() ? "dark" : "light"];
    const at = index < 0 ? 0 : index;
    return {
      color: palette[at % palette.length],
      symbol: MARKERS[at % MARKERS.length],
      dash: DASHES[(Math.floor(at / palette.length) + replay) % DASHES.length],
    };
  }

  /* Plotly reads a little HTML in its texts: whatever comes from outside is escaped before it goes there. */
  function plain(text) {
    return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function plot(box, traces, layout) {
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("text") },
      margin: { l: 64, r: 16, t: 36, b: 52 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("accent") },
      hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("text") } },
      ...layout,
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
    return Plotly.react(box, traces, base, {
      responsive: true, displaylogo: false,
      // the buttons are named one by one: by default there is one that uploads the chart
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], showSendToCloud: false, plotlyServerURL: "",
    });
  }

  function on(event, handler) { (listeners[event] = listeners[event] || []).push(handler); }
  function emit(event, value) { for (const handler of listeners[event] || []) handler(value); }
  function onTheme(redraw) { redraws.push(redraw); }
  function redrawAll() { for (const redraw of redraws) redraw(); }
  function drawing(name, draw) { drawings[name] = draw; }

  function watchTheme() {
    const root = document.documentElement;
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
    let before;
    window.addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; redrawAll(); });
    window.addEventListener("afterprint", () => {
      if (before) root.dataset.theme = before; else delete root.dataset.theme;
      redrawAll();
    });
  }

  function themeSelect() {
    const root = document.documentElement;
    const options = [["", "as the system"], ["light", "light"], ["dark", "dark"]].map(([value, text]) => ({ value, text }));
    return select("Colours", options, "", (value) => {
      if (value) root.dataset.theme = value; else delete root.dataset.theme;
      redrawAll();
    }).box;
  }

  function section(panel, page) {
    const box = element("div", { class: "body" });
    const made = element("section", { class: "panel", id: panel.name, "aria-labelledby": `${panel.name}-title` },
      element("h2", { id: `${panel.name}-title` }, panel.title),
      element("details", { class: "how", open: true }, element("summary", {}, "How to read this"), element("p", {}, panel.help)),
      panel.notes.length ? element("ul", { class: "notes" }, panel.notes.map((note) => element("li", {}, note))) : null,
      box);
    return { made, draw: () => { if (panel.data && drawings[panel.name]) drawings[panel.name](box, panel.data, page); } };
  }

  function show() {
    const page = JSON.parse(document.getElementById("data").textContent);
    const sections = page.panels.map((panel) => section(panel, page));
    const links = page.panels.map((panel) => element("a", { href: `#${panel.name}` }, panel.title));
    document.getElementById("page").append(
      element("header", {},
        element("div", {}, element("h1", {}, page.title), element("p", { class: "facts" }, page.facts.map((fact) => element("span", {}, fact)))),
        themeSelect()),
      element("nav", { "aria-label": "Panels" }, links),
      element("main", {}, sections.map((each) => each.made)),
      element("footer", {}, `Made by ${page.generator}. This page is complete in itself and fetches nothing.`));
    watchTheme();
    for (const each of sections) each.draw();
    if (location.hash.length > 1) {
      const target = document.getElementById(location.hash.slice(1));
      if (target) target.scrollIntoView();
    }
  }

  return { button, colour, drawing, element, emit, integers, isDark, lineStyle, number, on, onTheme, plain, plot, select, show, tableBehind };
})();

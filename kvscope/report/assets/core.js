/* Elements, controls, texts and colours for all drawings. Text is added to the page as text, never as HTML. */
const kvscope = (() => {
  const drawings = {};
  const redraws = [];

  /* Colours that colour-blind readers can distinguish: near those of Okabe and Ito, moved apart as they see them. */
  const PALETTE = {
    light: ["#0e5998", "#b13d00", "#148360", "#b74e8c", "#bb8524", "#3298d4", "#6d56c6", "#404749"],
    dark: ["#2192c5", "#ed8c4f", "#06bf8c", "#da9cc9", "#e5b137", "#a0d5fb", "#b4adff", "#dad5d7"],
  };
  const MARKERS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star"];
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) made.append(child); // strings become text nodes
    return made;
  }

  let counter = 0;
  const fresh = () => `control-${(counter += 1)}`;

  /* A labelled native select. `options` is a list of {value, text, group?}. */
  function select(label, options, chosen, changed) {
    const id = fresh();
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

  /* A labelled slider over whole numbers; `say` puts the value into words. */
  function slider(label, say, changed) {
    const id = fresh();
    const words = element("output", { for: id });
    const control = element("input", { id, type: "range", on: { input: () => { show(); changed(Number(control.value)); } } });
    const show = () => {
      words.replaceChildren(element("bdi", {}, say(Number(control.value))));
      control.setAttribute("aria-valuetext", say(Number(control.value)));
    };
    const set = (low, high, value) => { Object.assign(control, { min: low, max: high, step: 1 }); control.value = value; show(); };
    return { box: element("div", { class: "control wide" }, element("label", { for: id }, label, " ", words), control), control, set };
  }

  function checkbox(text, checked, changed) {
    const id = fresh();
    const control = element("input", { id, type: "checkbox", on: { change: () => changed(control.checked) } });
    control.checked = checked;
    return { box: element("div", { class: "check" }, control, element("label", { for: id }, text)), control };
  }

  function button(text, clicked, attributes = {}) {
    return element("button", { type: "button", ...attributes, on: { click: clicked } }, text);
  }

  /* Words with an explanation, shown under the pointer and where the keyboard is; Escape closes it. */
  function explained(text, how) {
    const id = fresh();
    const words = element("span", { class: "explained", tabindex: "0", "aria-describedby": id }, element("bdi", {}, text));
    const tip = element("span", { class: "tip how-so", role: "tooltip", id, hidden: true }, how);
    const box = element("span", { class: "explains" }, words, tip);
    const show = (on) => {
      tip.hidden = !on;
      if (!on) return;
      tip.style.left = "0px";
      const over = tip.getBoundingClientRect().right - document.documentElement.clientWidth + 8;
      if (over > 0) tip.style.left = `${-over}px`;
    };
    for (const [event, on] of [["mouseenter", true], ["focusin", true], ["mouseleave", false], ["focusout", false]]) box.addEventListener(event, () => show(on));
    words.addEventListener("keydown", (event) => { if (event.key === "Escape") show(false); });
    return box;
  }

  const options = (values, text = String) => values.map((value) => ({ value, text: text(value) }));
  const unique = (values) => [...new Set(values)];
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  /* A sentence above an area that is wider than its place, as long as it is; it is hidden in print. */
  function scrollHint(area, columns = "every column") {
    const hint = element("p", { class: "hint", hidden: true }, `Scroll sideways to see ${columns} →`);
    area.dataset.hinted = "yes";
    area.before(hint);
    const sizes = new ResizeObserver(() => { hint.hidden = area.scrollWidth <= area.clientWidth + 1; });
    for (const each of [area, area.firstElementChild]) sizes.observe(each);
    return hint;
  }

  /* A table of the values of a plot, closed at first; its rows are made when it is opened. */
  function tableBehind(summary, headers, rows) {
    const body = element("tbody");
    const fill = () => body.replaceChildren(...(typeof rows === "function" ? rows() : rows).map((cells) => element("tr", {}, cells.map((cell, index) =>
      element(index ? "td" : "th", index ? {} : { scope: "row" }, cell === null ? "–" : cell instanceof Node ? cell : element("bdi", {}, String(cell)))))));
    const made = element("details", { class: "behind" }, element("summary", {}, summary),
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": summary },
        element("table", {}, element("thead", {}, element("tr", {}, headers.map((text) => element("th", { scope: "col" }, text)))), body)));
    scrollHint(made.querySelector(".scroll"));
    made.addEventListener("toggle", () => { if (made.open && !body.firstChild) fill(); });
    return made;
  }

  function number(value, metric) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const range = (metric && metric.range) || [];
    if (range[0] === 0 && range[1] === 1) return value.toFixed(4);
    if (metric && /keys$/.test(metric.name)) return value.toFixed(1).replace(/\.0$/, "");
    return Math.abs(value) < 100 ? value.toFixed(4) : String(Number(value.toPrecision(6)));
  }
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.095 ? 1 : 0)} %`;

  function isDark() {
    const forced = document.documentElement.dataset.theme;
    return forced ? forced === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  }
  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  /* Colour and marker by policy; the dash changes with replay and loop, and by two when the colours repeat. */
  function lineStyle(index, way = 0) {
    const palette = PALETTE[isDark() ? "dark" : "light"];
    const at = index < 0 ? 0 : index;
    const round = Math.floor(at / palette.length);
    return { color: palette[at % palette.length], symbol: MARKERS[(at + round) % MARKERS.length], dash: DASHES[(2 * round + way) % DASHES.length] };
  }

  /* An asynchronous drawing, one at a time: of the requests made meanwhile, only the last is drawn. */
  const pending = new Set();
  function latest(draw) {
    let running = null;
    let again = false;
    return function go() {
      again = true;
      if (!running) {
        running = (async () => {
          while (again) { again = false; await draw(); }
        })().finally(() => { pending.delete(running); running = null; });
        pending.add(running);
      }
      return running;
    };
  }
  async function settled() { while (pending.size) await Promise.all(pending); }

  function onTheme(redraw) { redraws.push(redraw); }
  function redrawAll() { for (const redraw of redraws) redraw(); }
  function drawing(name, draw) { drawings[name] = draw; }

  return { button, checkbox, clamp, colour, drawing, drawings, element, explained, isDark, latest, lineStyle, number, onTheme, options, percent, redrawAll, scrollHint, select, settled, slider, tableBehind, unique };
})();

/* The parts that every page has: heading, links, panels one below the other, and the choice of colours. */
kvscope.sections = (() => {
  const { element, select, state } = kvscope;

  function watchTheme() {
    const root = document.documentElement;
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", kvscope.redrawAll);
    let before;
    window.addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; kvscope.redrawAll(); });
    window.addEventListener("afterprint", () => {
      if (before) root.dataset.theme = before; else delete root.dataset.theme;
      kvscope.redrawAll();
    });
  }
  function themeSelect() {
    const root = document.documentElement;
    return select("Colours", [["", "as the system"], ["light", "light"], ["dark", "dark"]].map(([value, text]) => ({ value, text })), "", (value) => {
      if (value) root.dataset.theme = value; else delete root.dataset.theme;
      kvscope.redrawAll();
    }).box;
  }

  function section(panel) {
    const box = element("div", { class: "body" });
    const save = kvscope.figure.control(panel.name, box);
    const made = element("section", { class: "panel", id: panel.name, "aria-labelledby": `${panel.name}-title` }, save,
      element("h2", { id: `${panel.name}-title` }, panel.title),
      element("details", { class: "how", open: window.innerWidth > 700 }, element("summary", {}, "How to read this"), element("p", {}, panel.help)),
      panel.notes.length ? element("ul", { class: "notes" }, panel.notes.map((note) => element("li", {}, note))) : null,
      box);
    const draw = async (page) => {
      if (!panel.data || !kvscope.drawings[panel.name]) return;
      try {
        await kvscope.drawings[panel.name](box, panel.data, page);
        save.show();
        for (const area of box.querySelectorAll(".scroll:not([data-hinted])")) kvscope.scrollHint(area);
      } catch (error) {
        box.append(element("p", { class: "failed", role: "alert" }, `This panel cannot be drawn: ${error.message}`));
        throw error;
      }
    };
    return { made, panel, draw };
  }

  /*
   * A jump to a panel. While panels above it still grow, it is repeated, until the reader scrolls: a smooth movement would end
   * where the panel was when it began, so it is used only on a page that is complete.
   */
  let landed = null;
  function land(name) {
    const complete = "ready" in document.documentElement.dataset;
    const smooth = complete && !window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    landed = complete ? null : name;
    document.getElementById(name)?.scrollIntoView({ behavior: smooth ? "smooth" : "auto" });
  }
  function keepLanded() {
    const again = () => { if (landed !== null) document.getElementById(landed)?.scrollIntoView(); };
    const leave = () => { landed = null; };
    for (const event of ["wheel", "touchmove", "keydown", "pointerdown"]) window.addEventListener(event, leave, { passive: true, capture: true });
    new ResizeObserver(again).observe(document.querySelector("main"));
    return again;
  }

  /* A piece of the first sentence: a name that chooses its run, words with an explanation, or words. */
  function piece({ text, how, run }) {
    if (run) return kvscope.button(element("bdi", {}, text), () => state.set({ run }), { class: "plain", title: "show this run in the panels below" });
    return how ? kvscope.explained(text, how) : element("bdi", {}, text);
  }

  /* Heading, links and panels of a page; `between` are nodes that come before the panel of that number. */
  function frame(page, sections, between = new Map()) {
    const links = page.panels.map((panel) => element("a", { href: `#${panel.name}` }, panel.title));
    const inMain = sections.flatMap((each, place) => [...(between.get(place) || []), each.made]);
    const nav = element("nav", { "aria-label": "Panels" }, links);
    nav.addEventListener("click", (event) => {
      const link = event.target.closest("a");
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      state.go(link.getAttribute("href").slice(1));
      land(link.getAttribute("href").slice(1));
    });
    const answers = [page.answer || []].flat();
    document.getElementById("page").append(
      element("header", {},
        element("div", {}, element("h1", {}, page.title), element("p", { class: "facts" }, page.facts.map((fact) => element("span", {}, fact))),
          answers.map((answer) => element("p", { class: "answer" }, answer)),
          (page.headline || []).map((pieces) => element("p", { class: "answer" }, pieces.map(piece)))),
        themeSelect()),
      nav,
      element("main", {}, inMain),
      element("footer", {}, `Made by ${page.generator}; plots by plotly.js (MIT licence). This page is self-contained and fetches nothing.`));
    const measure = () => {
      const chosen = document.querySelector(".choice");
      const stuck = (each) => (each && getComputedStyle(each).position === "sticky" ? each.offsetHeight : 0);
      document.documentElement.style.setProperty("--top", `${stuck(nav)}px`);
      document.documentElement.style.setProperty("--under", `${stuck(nav) + stuck(chosen)}px`);
    };
    measure();
    const sizes = new ResizeObserver(measure);
    for (const each of [nav, document.querySelector(".choice")]) if (each) sizes.observe(each);
  }

  /*
   * Draws the panels: first the one that was jumped to, then those in the window, those within a window of it, and the others in order while nothing else is
   * to do, so that the page answers meanwhile. All are drawn without scrolling: search and print need them.
   * The page is marked as shown when the first screen is drawn, and has been painted before the next panel begins, which may take
   * long; and as ready when it is complete: tests wait for that.
   */
  const idle = () => new Promise((go) => { if (window.requestIdleCallback) requestIdleCallback(go, { timeout: 1000 }); else setTimeout(go, 50); });
  const within = (each, windows) => {
    const { top, bottom } = each.made.getBoundingClientRect();
    return bottom > -windows * window.innerHeight && top < (1 + windows) * window.innerHeight;
  };
  const painted = () => new Promise((go) => { requestAnimationFrame(() => requestAnimationFrame(go)); });
  async function drawAll(page, sections, named) {
    watchTheme();
    const again = keepLanded();
    if (named) land(named);
    const root = document.documentElement;
    let faults = 0;
    const waiting = [...sections];
    for (const each of waiting) each.made.classList.add("waiting");
    while (waiting.length) {
      if (!waiting.some((one) => within(one, 1))) await idle(); // and see then where the reader is
      const each = waiting.find((one) => one.panel.name === landed) || waiting.find((one) => within(one, 0)) || waiting.find((one) => within(one, 1)) || waiting[0];
      waiting.splice(waiting.indexOf(each), 1);
      try {
        await each.draw(page);
      } catch (error) {
        faults += 1;
        console.error(error);
      }
      each.made.classList.remove("waiting");
      if (!("shown" in root.dataset) && !waiting.some((one) => within(one, 0))) {
        await painted();
        root.dataset.shown = "yes";
      }
      await new Promise((go) => { setTimeout(go); }); // lets the browser show the panels drawn so far
    }
    await painted(); // the sizes of the last panel
    again();
    landed = null;
    window.addEventListener("hashchange", () => land(state.follow()));
    root.dataset.ready = faults ? "with faults" : "yes";
  }

  return { drawAll, frame, land, section };
})();

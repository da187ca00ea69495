/* The page of an experiment: a table of policies and budgets, figures over cache size, tasks side by side, what failed. */
kvscope.show = (() => {
  const { element, select, state, plot, plain, number, heat, scaleBar, axisTitle, options, unique, sample, lineStyle } = kvscope;

  /* Model, prefill and tasks are chosen once for all panels; `rows()` are the runs of that choice. */
  function declareChoice(page) {
    page.metricOf = (name) => page.metrics.find((metric) => metric.name === name);
    page.value = (run, name) => run.values[name] || [null, null, null, 0];
    page.style = (policy) => lineStyle(page.policies.indexOf(policy));
    state.declare("model", () => page.models[0], state.oneOf(() => page.models));
    state.declare("prefill", () => page.prefills[0], state.oneOf(() => page.prefills));
    state.declare("part", () => page.parts.length - 1, state.whole(() => 0, () => page.parts.length - 1));
    state.declare("metric", () => page.ranked[0], state.oneOf(() => page.metrics.map((metric) => metric.name)));
    state.declare("budget", () => page.budgets[0], state.oneOf(() => page.budgets));
    page.chosen = (run) => run.model === state.get("model") && run.prefill === state.get("prefill");
    page.rows = (part = state.get("part")) => page.runs.filter((run) => page.chosen(run) && run.part === part);
  }

  function control(label, name, list) {
    const made = select(label, list, state.get(name), (value) => state.set({ [name]: value }));
    state.on([name], () => { made.value = state.get(name); });
    made.box.hidden = list.length < 2;
    return made.box;
  }
  function bar(page) {
    return element("section", { class: "choice", "aria-label": "What the panels below show" }, element("div", { class: "controls" },
      control("Model", "model", options(page.models)),
      control("Prefill", "prefill", options(page.prefills)),
      control("Tasks", "part", page.parts.map((text, value) => ({ value, text }))),
      control("Metric", "metric", page.metrics.map((metric) => ({ value: metric.name, text: metric.title }))),
      control("Budget", "budget", options(page.budgets))));
  }
  const always = (redraw) => { state.on(["model", "prefill", "part", "metric", "budget"], redraw); kvscope.onTheme(redraw); };

  kvscope.drawing("results", async (box, data, page) => {
    const shown = data.metrics.map(page.metricOf);
    const area = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Results" });
    box.append(area);
    const draw = () => {
      const rows = page.rows();
      const better = (metric, values) => (metric.direction === "lower" ? Math.min(...values) : Math.max(...values));
      /* the best of each budget, bounds and readers aside */
      const best = new Map(shown.filter((metric) => metric.direction !== "none").flatMap((metric) => page.budgets.map((budget) => {
        const values = rows.filter((run) => run.budget === budget && run.ranked).map((run) => page.value(run, metric.name)[0]).filter((value) => value !== null);
        return [`${metric.name} ${budget}`, values.length > 1 ? better(metric, values) : null];
      })));
      const cell = (run, metric) => {
        const [mean, low, high] = page.value(run, metric.name);
        const first = run.ranked && mean !== null && best.get(`${metric.name} ${run.budget}`) === mean;
        return element("td", { class: `number${first ? " best" : ""}` }, number(mean, metric), low === null ? null : element("small", {}, `${number(low, metric)} to ${number(high, metric)}`));
      };
      area.replaceChildren(element("table", { class: "summary" },
        element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Policy"), element("th", { scope: "col" }, "Budget"),
          shown.map((metric) => element("th", { scope: "col", class: "number", title: metric.summary }, axisTitle(metric))), element("th", { scope: "col", class: "number" }, "Sequences"))),
        element("tbody", {}, rows.map((run, place) => element("tr", { class: place && rows[place - 1].policy !== run.policy ? "starts" : null },
          element("th", { scope: "row", class: "policy" }, element("bdi", {}, run.policy), run.kind ? element("span", { class: "chip" }, run.kind) : null), element("td", {}, run.budget === null ? "–" : run.budget),
          shown.map((metric) => cell(run, metric)), element("td", { class: "number" }, run.clusters === run.sequences ? String(run.sequences) : `${run.sequences} (count as ${run.clusters})`))))));
    };
    draw();
    always(draw);
  });

  kvscope.drawing("curves", async (box, data, page) => {
    const area = element("div", { class: "plot curve" });
    const legend = element("div", { class: "legend" });
    const behind = element("div");
    box.append(legend, area, behind);
    const draw = kvscope.latest(async () => {
      const metric = page.metricOf(state.get("metric"));
      const lines = unique(page.rows().map((run) => run.policy)).map((policy) => page.rows().filter((run) => run.policy === policy && page.value(run, metric.name)[0] !== null)).filter((line) => line.length);
      legend.replaceChildren(...lines.map(([run]) => element("span", {}, sample(page.style(run.policy), run.budget !== null), element("bdi", {}, run.policy))));
      behind.replaceChildren(kvscope.tableBehind("The numbers behind this plot", ["Policy", "Budget", metric.title, "low", "high"],
        () => lines.flat().map((run) => [run.policy, run.budget === null ? "–" : run.budget, ...page.value(run, metric.name).slice(0, 3).map((value) => number(value, metric))])));
      const traces = lines.map((line) => {
        const style = page.style(line[0].policy);
        const flat = line[0].budget === null;
        const found = line.map((run) => page.value(run, metric.name));
        const ends = (at, sign) => found.map((value) => (value[at] === null ? 0 : sign * (value[at] - value[0])));
        return {
          type: "scatter", mode: flat ? "lines" : "lines+markers", name: plain(line[0].policy), showlegend: false,
          x: flat ? page.budgets : line.map((run) => run.budget), y: flat ? page.budgets.map(() => found[0][0]) : found.map((value) => value[0]),
          line: { color: style.color, dash: flat ? "dot" : style.dash, width: 2 }, marker: { symbol: style.symbol, size: 9, color: style.color },
          error_y: flat || found.every((value) => value[1] === null) ? undefined : { type: "data", symmetric: false, thickness: 1, width: 4, color: style.color, array: ends(2, 1), arrayminus: ends(1, -1) },
          text: (flat ? page.budgets : line).map((_, at) => plain(`${line[0].policy}: ${number(found[flat ? 0 : at][0], metric)}`)), hovertemplate: "%{text}<extra></extra>",
        };
      });
      await plot(area, traces, { xaxis: { title: { text: "budget" }, type: "category", categoryorder: "array", categoryarray: page.budgets }, yaxis: { title: { text: axisTitle(metric) } }, hovermode: "closest" });
    });
    always(draw);
    await draw();
  });

  kvscope.drawing("tasks", async (box, data, page) => {
    const area = element("div");
    const legend = element("div");
    box.append(area, legend);
    const draw = () => {
      const metric = page.metricOf(state.get("metric"));
      const at = (part) => page.rows(part).filter((run) => run.budget === state.get("budget") || run.budget === null);
      const rows = unique(page.parts.flatMap((_, part) => at(part).map((run) => run.policy)));
      const value = (r, c) => { const run = at(c).find((each) => each.policy === rows[r]); return run ? page.value(run, metric.name)[0] : null; };
      const values = rows.flatMap((_, r) => page.parts.map((_name, c) => value(r, c))).filter((found) => found !== null);
      const scale = metric.range[0] === 0 && metric.range[1] === 1 ? [0, 1] : [Math.min(...values), Math.max(...values)];
      const say = (found) => number(found, metric);
      heat(area, { label: metric.title, corner: "policy", rows, columns: page.parts, value, say: (r, c) => `${rows[r]}, ${page.parts[c]}: ${say(value(r, c))}`, text: (found) => (metric.range[1] === 1 ? found.toFixed(2) : String(Number(found.toPrecision(3)))), scale });
      legend.replaceChildren(...(values.length ? [scaleBar(scale, say)] : []));
    };
    draw();
    always(draw);
  });

  kvscope.drawing("missing", async (box, data) => {
    box.append(element("div", { class: "scroll" }, element("table", {},
      element("thead", {}, element("tr", {}, ["What", "Why", "What to do"].map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, data.rows.map((cells) => element("tr", {}, cells.map((text, place) => element(place ? "td" : "th", place ? {} : { scope: "row" }, element("bdi", {}, text)))))))));
  });

  return async function show() {
    const page = JSON.parse(document.getElementById("data").textContent);
    const named = state.read();
    declareChoice(page);
    const sections = page.panels.map(kvscope.sections.section);
    kvscope.sections.frame(page, sections, new Map([[0, [bar(page)]]]));
    await kvscope.sections.drawAll(page, sections, named);
  };
})();

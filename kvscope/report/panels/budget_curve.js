/* Budget curves: one colour, marker and dash for each line; a list selects the lines that are shown. */
kvscope.drawing("budget-curve", async (box, data, page) => {
  const { element, select, button, checkbox, plain, plot, number, colour, options, sample, state, axisTitle, unique } = kvscope;
  const AXES = { held: ["held_keys", "keys held, mean over the steps"], share: ["held_keys", "share of the keys held, mean over the steps"], read: ["read_keys", "keys read, mean over the steps"], budget: [null, "budget, keys per key/value head"], bytes: ["cache_bytes", "bytes of a key/value head's cache, mean over the steps"] };
  const value = (id, name) => (page.byId.get(id).values[name] || [null, null, null]);
  const usable = page.metrics.filter((metric) => data.lines.some((line) => line.runs.some((id) => value(id, metric.name)[0] !== null)));
  if (!usable.length) return;
  const axes = Object.keys(AXES).filter((axis) => AXES[axis][0] === null || data.lines.some((line) => line.runs.some((id) => value(id, AXES[axis][0])[0] !== null)));
  state.declare("curve", () => usable[0].name, state.oneOf(() => usable.map((metric) => metric.name)));
  state.declare("axis", () => (axes.includes("bytes") ? "bytes" : axes[0]), state.oneOf(() => axes));
  const usual = data.usual.join(".");
  const chosen = () => new Set(state.get("lines").split(".").filter(Boolean).map(Number));

  const area = element("div", { class: "plot curve" });
  const legend = element("div", { class: "legend" });
  const behind = element("div");
  /* A bound is drawn at its budget, not at the keys that it holds: the ideal set is chosen anew from all keys. */
  const place = (id) => {
    const run = page.byId.get(id);
    const at = AXES[state.get("axis")][0] && run.kind !== "bound" ? value(id, AXES[state.get("axis")][0])[0] : run.keys;
    return state.get("axis") === "share" && at !== null ? at / run.full : at;
  };
  /* Readers hold every key whatever their budget: over what is held they get a strip beside the axis, in order of budget. */
  const inStrip = (line) => line.all && ["held", "share", "bytes"].includes(state.get("axis"));
  const way = (id) => { const run = page.byId.get(id); return [run.replay, run.loop, run.prefill].join(); };
  const styleOf = (line) => page.style(page.byId.get(line.runs[0]));

  function lineTrace(line, metric) {
    const style = styleOf(line);
    const bound = line.kind === "bound";
    const values = line.runs.map((id) => value(id, metric.name));
    const bars = values.some((each) => each[1] !== null);
    const { color } = style;
    return {
      type: "scatter", mode: bound ? "lines" : "lines+markers", name: plain(line.name), ...(inStrip(line) ? { x: line.runs.map((id) => page.byId.get(id).budget), xaxis: "x2" } : { x: line.runs.map(place) }), y: values.map((each) => each[0]), showlegend: false,
      line: { color, dash: style.dash, width: 2 },
      marker: { symbol: style.symbol, size: 9, color },
      error_y: bars ? {
        type: "data", symmetric: false, thickness: 1, width: 4, color,
        array: values.map((each) => (each[2] === null ? 0 : each[2] - each[0])),
        arrayminus: values.map((each) => (each[1] === null ? 0 : each[0] - each[1])),
      } : undefined,
      text: line.runs.map((id, index) => plain(`${line.name}, budget ${page.byId.get(id).budget}: ${number(values[index][0], metric)}`)),
      customdata: line.runs,
      hovertemplate: "%{text}<extra></extra>",
    };
  }
  function referenceTrace(reference, metric) {
    const y = reference.runs.map((id) => value(id, reference.values)[0]);
    return {
      type: "scatter", mode: "lines", name: plain(reference.name), x: reference.runs.map(place), y, showlegend: false,
      line: { color: colour("muted"), dash: "dash", width: 2 },
      text: y.map((each) => plain(`${reference.name}: ${number(each, metric)}`)),
      hovertemplate: "%{text}<extra></extra>",
    };
  }
  /* The name of a reference is written at its end: the list of lines does not contain it. */
  function names(traces) {
    return traces.filter((trace) => !trace.customdata && trace.x.length).map((trace) => ({
      x: trace.x[trace.x.length - 1], y: trace.y[trace.y.length - 1], text: trace.name, showarrow: false, xanchor: "right", yanchor: "bottom", font: { color: colour("muted"), size: 12 },
    }));
  }
  const draw = kvscope.latest(async () => {
    const metric = usable.find((each) => each.name === state.get("curve"));
    /* runs without a budget differ in the size of their caches alone */
    const shown = data.lines.filter((line, index) => chosen().has(index) && (!line.sizes || state.get("axis") === "bytes") && line.runs.some((id) => value(id, metric.name)[0] !== null));
    const traces = [...shown.map((line) => lineTrace(line, metric)), ...data.references.filter((each) => each.metric === metric.name && shown.some((line) => way(line.runs[0]) === way(each.runs[0]))).map((each) => referenceTrace(each, metric))];
    legend.replaceChildren(...shown.map((line) => element("span", {}, sample(styleOf(line), line.kind !== "bound"), element("bdi", {}, line.name))));
    behind.replaceChildren(kvscope.tableBehind("The numbers behind this plot", ["Policy", "Kind", "Budget", "Keys held", "Keys read", metric.title, "low", "high"],
      () => shown.flatMap((line) => line.runs.map((id) => [line.name, line.kind, page.byId.get(id).budget, number(value(id, "held_keys")[0], { name: "keys" }), number(value(id, "read_keys")[0], { name: "keys" }), ...value(id, metric.name).slice(0, 3).map((each) => number(each, metric))]))));
    const drawn = traces.flatMap((trace) => trace.y).filter((each) => each !== null);
    const wide = metric.range[1] === null && Math.min(...drawn) > 0 && Math.max(...drawn) > 10 * Math.min(...drawn); // a policy that breaks the model would flatten all others
    const strip = unique(shown.filter(inStrip).flatMap((line) => line.runs).sort((a, b) => page.byId.get(a).keys - page.byId.get(b).keys).map((id) => page.byId.get(id).budget));
    const only = strip.length && shown.every(inStrip);
    const narrow = area.clientWidth < 500;
    const [until, from] = strip.length ? (narrow ? [0.68, 0.78] : [0.8, 0.84]) : [1, 1];
    const title = AXES[state.get("axis")][1];
    await plot(area, traces, {
      xaxis: { title: { text: narrow ? title.split(",")[0] : title }, rangemode: "tozero", domain: [0, until], visible: !only, ...(state.get("axis") === "share" ? { tickformat: ".0%" } : {}) },
      ...(strip.length ? { xaxis2: { title: { text: "all held,<br>by budget" }, type: "category", categoryorder: "array", categoryarray: strip, range: [-0.4, strip.length - 0.6], tickangle: 0, domain: [only ? 0 : from, 1], anchor: "y", linecolor: colour("muted"), showline: true } } : {}),
      yaxis: { title: { text: axisTitle(metric) }, ...(wide ? { type: "log", dtick: 1, tickformat: "~g" } : {}) },
      annotations: names(traces),
    });
  });

  const list = element("div", { class: "lines", role: "group", "aria-label": "Lines shown" });
  const search = element("input", { type: "search", placeholder: "find a policy", "aria-label": "Find a policy", on: { input: () => fillList() } });
  const count = element("span", { class: "small", role: "status" });
  function fillList() {
    const wanted = search.value.trim().toLowerCase();
    const now = chosen();
    const rows = data.lines.map((line, index) => ({ line, index })).filter(({ line }) => `${line.name} ${line.kind}`.toLowerCase().includes(wanted));
    rows.sort((a, b) => page.kindOf[a.line.kind].place - page.kindOf[b.line.kind].place || a.line.name.localeCompare(b.line.name));
    let kind = null;
    list.replaceChildren(...rows.flatMap(({ line, index }) => {
      const heading = line.kind === kind ? [] : [element("h4", { title: page.kindOf[line.kind].meaning }, line.kind)];
      kind = line.kind;
      const row = checkbox([sample(styleOf(line), line.kind !== "bound"), " ", element("bdi", {}, line.name)], now.has(index), (on) => {
        const next = chosen();
        if (on) next.add(index); else next.delete(index);
        state.set({ lines: [...next].sort((a, b) => a - b).join(".") });
      });
      row.control.dataset.line = index;
      return [...heading, row.box];
    }));
    count.textContent = `${now.size} of ${data.lines.length} shown`;
  }
  const some = (indices) => state.set({ lines: indices.join(".") });

  const metricChoice = select("Metric", usable.map((each) => ({ value: each.name, text: each.title })), state.get("curve"), (name) => state.set({ curve: name }));
  const axisChoice = select("Against", options(axes, (axis) => AXES[axis][1].split(",")[0]), state.get("axis"), (axis) => state.set({ axis }));
  box.append(element("div", { class: "controls" }, metricChoice.box, axisChoice.box),
    element("div", { class: "beside" }, element("div", {}, legend, area),
      element("div", { class: "picker" },
        element("div", { class: "controls" }, search),
        element("div", { class: "controls" }, button("Usual", () => state.set({ lines: usual })), button("All", () => some(data.lines.map((_, index) => index))), button("None", () => some([])), count),
        list)),
    behind);
  fillList();
  state.on(["curve", "axis", "lines"], (changed) => {
    metricChoice.value = state.get("curve");
    axisChoice.value = state.get("axis");
    if (changed.has("lines")) {
      const focus = document.activeElement?.dataset?.line;
      fillList();
      if (focus !== undefined) list.querySelector(`[data-line="${Number(focus)}"]`)?.focus();
    }
    draw();
  });
  kvscope.onTheme(() => { fillList(); draw(); });
  await draw();
  area.on("plotly_click", ({ points: [point] }) => { if (point.customdata) state.set({ run: point.customdata }); });
});

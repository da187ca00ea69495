/* Plots by Plotly, whose script is inflated when the first one is drawn. */
Object.assign(kvscope, (() => {
  let loading = null;

  function library() {
    if (!loading) {
      loading = (async () => {
        const packed = document.getElementById("plotly");
        const script = document.createElement("script");
        script.textContent = await kvscope.inflateText(packed.textContent); // the security policy knows its hash
        document.head.append(script);
        packed.remove();
        if (!window.Plotly) throw new Error("the drawing library did not start");
      })();
    }
    return loading;
  }

  /* Plotly reads a little HTML in its texts: whatever comes from outside is escaped before it goes there. */
  function plain(text) {
    return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  async function plot(box, traces, layout) {
    await library();
    if (Plotly.registerCharts && traces.some(({ type }) => type && type !== "scatter")) { // see template.py
      Plotly.registerCharts();
      delete Plotly.registerCharts;
    }
    const { colour } = kvscope;
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
    const axes = Object.fromEntries(Object.entries(layout).filter(([name]) => /^[xy]axis/.test(name)).map(([name, own]) => [name, { ...axis, ...own }]));
    return Plotly.react(box, traces, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("text") },
      margin: { l: 64, r: 16, t: 38, b: 52 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("accent") },
      hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("text") } },
      xaxis: axis,
      yaxis: axis,
      ...layout,
      ...axes,
    }, {
      responsive: true, displaylogo: false, displayModeBar: true, // hidden buttons are out of reach of the keyboard
      // the buttons are named one by one: by default there is one that uploads the chart
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], showSendToCloud: false, plotlyServerURL: "",
    });
  }

  /* Metric title with the better end: "retained mass (higher is better)". */
  function axisTitle(metric) {
    return plain(metric.title) + (metric.direction === "none" ? "" : ` (${metric.direction} is better)`);
  }

  const GLYPHS = { circle: "●", square: "■", diamond: "◆", "triangle-up": "▲", "triangle-down": "▼", cross: "✚", x: "✖", star: "★", "circle-open": "○", "x-thin-open": "×", "line-ew-open": "–" };

  /* The kinds of points of a plot, above it: the legend of Plotly would lie under the buttons where the page is narrow. */
  function pointLegend(traces) {
    const { element } = kvscope;
    return traces.filter((trace) => trace.name).map(({ name, marker }) => element("span", {}, sample({ symbol: marker.symbol, color: marker.color, dash: "solid" }), element("bdi", {}, name)));
  }

  /* A line as it is drawn, for lists beside a plot: its dash, its marker, its colour. */
  function sample(style, marker = true) {
    const { element } = kvscope;
    const glyph = GLYPHS[style.symbol];
    const drawn = { solid: ["solid", "solid"], dash: ["dashed", "dashed"], dot: ["dotted", "dotted"], dashdot: ["dashed", "dotted"], longdash: ["solid", "dashed"], longdashdot: ["solid", "dotted"] };
    const halves = drawn[style.dash].map((dash) => {
      const half = element("i");
      half.style.borderTopStyle = dash;
      return half;
    });
    const made = element("span", { class: "sample", "aria-hidden": "true" }, halves[0], marker ? glyph : "", halves[1]);
    made.style.color = style.color;
    return made;
  }

  return { GLYPHS, axisTitle, plain, plot, pointLegend, sample };
})());

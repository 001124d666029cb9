"use strict";
// Charts, drawn when they come into view and again when what is shown changes.
(() => {
  const { data, shown, valueOf, natural, onChange } = report;
  const byId = (id) => document.getElementById(id);
  const PALETTE = ["#2f6fb7", "#d9822b", "#2f9e6e", "#c2417c", "#7a5cc7", "#8a6d3b", "#1a9bb0", "#b5483a", "#6b8e23", "#6d7686"];
  const EARLY = 0.05; // of a curve's points, where the loss falls from its start
  const min = (values) => values.reduce((a, b) => (b !== null && b < a ? b : a), Infinity);
  const max = (values) => values.reduce((a, b) => (b !== null && b > a ? b : a), -Infinity);
  const MANY = 24; // lines above which raw curves are not drawn behind smoothed ones
  const safe = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const brief = (text, most = 48) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  let printing = false;

  const fill = (select, options) => select?.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  const curves = Object.keys(data.curves), figures = Object.keys(data.quality);
  fill(byId("metric"), curves.map((name) => [name, name.replaceAll("_", " ")]));
  fill(byId("figure"), figures.map((name) => [name, data.titles[name]]));
  const timed = Object.values(data.curves).some((runs) => Object.values(runs).some((line) => line.t !== undefined));
  fill(byId("axis"), [["steps", "steps"], ["samples", "samples"], ...(timed ? [["time", data.wall ? "wall time" : "time of steps"]] : [])]);
  const labels = [...new Set(data.runs.map((run) => run.label))];
  fill(byId("colour"), [["label", "setting"], ...data.keys.map((key) => [key, key]), ["seed", "seed"]]);
  if (byId("figure") && data.main) byId("figure").value = data.main;
  if (byId("colour") && labels.length > PALETTE.length && data.keys.length) byId("colour").value = data.keys[0];
  if (byId("smooth")) byId("smooth").value = data.runs.length <= MANY ? 0.8 : 0;

  const look = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    return { ink: of("--ink"), quiet: of("--quiet"), line: of("--line"), ground: of("--ground") };
  };

  const colours = () => {
    const key = byId("colour").value;
    const of = (run) => (key === "label" ? run.label : valueOf(run, key));
    const values = [...new Set(data.runs.map(of))];
    if (key !== "label") values.sort(natural);
    const colour = new Map(values.map((value, i) =>
      [value, values.length <= PALETTE.length ? PALETTE[i] : `hsl(${Math.round((300 * i) / values.length)} 60% 48%)`]));
    return { of, colour };
  };

  const timesOf = (line) => (line.t === undefined ? [] : data.axes[line.t]);
  const longest = Math.max(0, ...Object.values(data.curves).flatMap((runs) => Object.values(runs).map((line) => timesOf(line).at(-1) ?? 0)));
  const scale = longest > 7200 ? { by: 3600, unit: "h" } : longest > 300 ? { by: 60, unit: "min" } : { by: 1, unit: "s" };
  const axisOf = (run, line) => {
    const axis = byId("axis").value;
    return axis === "samples" ? data.axes[line.s].map((s) => s * run.batch) : axis === "time" ? timesOf(line).map((t) => t / scale.by) : data.axes[line.s];
  };
  const axisTitle = () => {
    const axis = byId("axis").value;
    return axis === "time" ? `${data.wall ? "wall time" : "time of steps"} [${scale.unit}]` : axis;
  };

  // Exponential mean without the pull of its start: m_i / (1 - a^i).
  const smoothed = (values, a) => {
    let m = 0, weight = 0;
    return values.map((y) => {
      if (y === null) return null;
      m = a * m + (1 - a) * y;
      weight = a * weight + (1 - a);
      return m / weight;
    });
  };

  const layout = (more) => {
    const { ink, quiet, line } = look();
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: { color: quiet, size: 11 }, automargin: true, exponentformat: "SI" };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 12 },
      margin: { l: 56, r: 12, t: 12, b: 44 },
      hoverlabel: { namelength: -1 }, modebar: { bgcolor: "rgba(0,0,0,0)", color: quiet, activecolor: ink },
      ...more,
      xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
    };
  };
  // Compiling plotly.js takes longer than reading the page: it waits until a chart is in view.
  const plotly = () => {
    if (!globalThis.Plotly) {
      const script = document.createElement("script");
      script.textContent = byId("plotly").textContent;
      document.head.append(script);
    }
    return globalThis.Plotly;
  };
  const draw = (box, traces, more) => {
    // On paper a chart has the width of the page, which a script cannot ask for.
    const size = printing ? { width: box.closest(".panels") ? 220 : 680, height: box.closest(".panels") ? 200 : 300 } : { autosize: true };
    return plotly().react(box, traces, layout({ ...more, ...size }), {
      displaylogo: false, displayModeBar: printing ? false : "hover", responsive: !printing, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
  };

  const drawLegend = ({ of, colour }) => {
    const now = shown();
    const values = [...colour].filter(([value]) => data.runs.some((run, i) => now[i] && of(run) === value));
    byId("legend").replaceChildren(...values.slice(0, 40).map(([value, tint]) => {
      const entry = document.createElement("span"), swatch = document.createElement("i");
      swatch.style.background = tint;
      entry.append(swatch, brief(value, 60));
      entry.title = value;
      return entry;
    }), ...(values.length > 40 ? [`and ${values.length - 40} more`] : []));
  };

  const drawCurves = () => {
    const name = byId("metric").value, now = shown(), { of, colour } = colours();
    const a = +byId("smooth").value, band = byId("band")?.checked;
    const lines = Object.entries(data.curves[name] ?? {}).filter(([place]) => now[place]);
    const raw = a > 0 && lines.length <= MANY;
    const traces = [];
    for (const [place, line] of lines) {
      const run = data.runs[place], x = axisOf(run, line), tint = colour.get(of(run));
      const common = { x, mode: "lines", type: "scatter", hoverinfo: "skip" };
      if (band && line.lo) {
        traces.push({ ...common, y: line.lo, line: { width: 0 } });
        traces.push({ ...common, y: line.hi, line: { width: 0 }, fill: "tonexty", fillcolor: tint, opacity: 0.15 });
      }
      if (raw) traces.push({ ...common, y: line.y, line: { color: tint, width: 1 }, opacity: 0.25 });
      traces.push({
        ...common, y: a > 0 ? smoothed(line.y, a) : line.y, name: safe(brief(run.name)), hoverinfo: "all",
        line: { color: tint, width: lines.length > MANY ? 1.2 : 2, dash: run.status === "finished" ? "solid" : "dot" },
        hovertemplate: `%{y:.5g}<br>${safe(brief(run.label, 60))}<br>seed ${safe(run.seed)}<extra>%{fullData.name}</extra>`,
      });
    }
    // The first steps would squeeze all others: a linear axis begins without them, and says so.
    const kept = lines.flatMap(([, line]) => line.y.slice(Math.ceil(line.y.length * EARLY)));
    const everything = lines.flatMap(([, line]) => line.y);
    const [low, high, top] = [min(kept), max(kept), max(everything)];
    const cut = !byId("logy").checked && kept.length > 20 && top - low > 2 * (high - low);
    const room = 0.05 * (high - low);
    byId("smoothed").textContent = a > 0 ? a.toFixed(2) : "off";
    byId("curve-words").textContent =
      (a > 0 ? `Smoothed: exponential mean with weight ${a.toFixed(2)}${raw ? ", the curve itself pale behind it" : ""}. ` : "Not smoothed. ") +
      (cut ? `The axis leaves out the first ${100 * EARLY} % of the points; a double click shows all. ` : "") +
      (lines.some(([place]) => data.runs[place].status !== "finished") ? "Dotted: not finished. " : "") + (axisTitle().startsWith("time of steps") ? "Time of steps leaves saving and evaluation out." : "");
    draw(byId("curve"), traces, {
      xaxis: { title: { text: axisTitle() }, type: byId("logx").checked ? "log" : "linear" },
      yaxis: {
        title: { text: name.replaceAll("_", " ") }, type: byId("logy").checked ? "log" : "linear",
        ...(cut ? { range: [low - room, high + room] } : { autorange: true }),
      },
    });
    drawLegend({ of, colour });
  };

  const drawQuality = () => {
    const name = byId("figure").value, now = shown(), { of, colour } = colours();
    const traces = Object.entries(data.quality[name] ?? {}).filter(([place]) => now[place]).map(([place, line]) => {
      const run = data.runs[place], tint = colour.get(of(run));
      return {
        x: axisOf(run, line), y: line.y, type: "scatter", mode: "lines+markers", name: safe(brief(run.name)),
        line: { color: tint, width: 1.6, dash: run.status === "finished" ? "solid" : "dot" }, marker: { color: tint, size: 6 },
        hovertemplate: `%{y:.5g}<br>${safe(brief(run.label, 60))}<br>seed ${safe(run.seed)}<extra>%{fullData.name}</extra>`,
      };
    });
    draw(byId("quality"), traces, {
      xaxis: { title: { text: axisTitle() }, type: byId("logx").checked ? "log" : "linear" },
      yaxis: { title: { text: safe(brief(data.titles[name] ?? "", 44)) }, type: byId("logy").checked ? "log" : "linear" },
    });
  };

  const drawPanels = () => {
    const box = byId("panels"), { ink, quiet } = look();
    if (!box.children.length) {
      for (const panel of data.panels) {
        const figure = document.createElement("figure"), chart = document.createElement("div"), words = document.createElement("figcaption");
        words.textContent = panel.said ? `${panel.title}: ${panel.said}` : panel.title;
        figure.append(chart, words);
        box.append(figure);
      }
    }
    data.panels.forEach((panel, i) => {
      const { points } = panel;
      const encoders = [...new Set(points.map((point) => point.encoder))];
      const arm = (end) => points.map((p) => (p[end] === null ? 0 : Math.abs(p[end] - p.x)));
      const trace = {
        x: points.map((p) => p.x), y: points.map((p) => p.y), type: "scatter", mode: points.length <= 8 ? "markers+text" : "markers",
        text: points.map((p) => safe(brief(p.encoder, 16))), textposition: "top center", textfont: { size: 10, color: quiet }, cliponaxis: false,
        customdata: points.map((p) => `${safe(brief(p.label, 60))}<br>${safe(p.text)}${p.biased ? "<br>biased" : ""}${p.enlarged ? `<br>${safe(p.enlarged)}: alike by construction` : ""}`),
        hovertemplate: "%{customdata}<br>%{x:.4g}<extra></extra>",
        error_x: { type: "data", symmetric: false, array: arm("high"), arrayminus: arm("low"), thickness: 1, width: 3, color: quiet },
        error_y: { type: "data", array: points.map((p) => p.spread ?? 0), thickness: 1, width: 3, color: quiet },
        marker: {
          size: 9, symbol: points.map((p) => (p.enlarged ? "square" : "circle")), line: { width: 1.5, color: points.map((p) => PALETTE[encoders.indexOf(p.encoder) % PALETTE.length]) },
          color: points.map((p) => (p.biased ? look().ground : PALETTE[encoders.indexOf(p.encoder) % PALETTE.length])),
        },
      };
      draw(box.children[i].firstElementChild, [trace], {
        margin: { l: 52, r: 14, t: 18, b: 30 }, xaxis: { nticks: 5 }, yaxis: { nticks: 6 }, font: { size: 11, color: ink },
      });
    });
  };

  const drawers = { curve: drawCurves, quality: drawQuality, panels: drawPanels };
  const seen = new Set();
  const redraw = () => { for (const id of seen) drawers[id](); };
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries)
      if (isIntersecting && !seen.has(target.id)) { seen.add(target.id); setTimeout(drawers[target.id]); }
  }, { rootMargin: "300px" });
  const boxes = [...document.querySelectorAll("[data-chart]")];
  for (const box of boxes) watcher.observe(box);
  for (const id of ["metric", "axis", "colour", "logx", "logy", "smooth", "band", "figure"])
    byId(id)?.addEventListener("input", redraw);
  onChange(redraw);

  let opened = [], theme = "";
  addEventListener("beforeprint", () => {
    printing = true;
    theme = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    for (const box of boxes) seen.add(box.id);
    redraw();
    const details = [...document.querySelectorAll("details.run")];
    opened = details.length <= 40 ? details.filter((one) => !one.open) : [];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => {
    printing = false;
    document.documentElement.dataset.theme = theme;
    redraw();
    for (const one of opened) one.open = false;
  });
})();

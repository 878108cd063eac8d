"use strict";
(() => {
  let data = JSON.parse(document.getElementById("plot-data").textContent);
  let plots = [];
  const kept = { log: new Set(), hidden: new Set() }; // choices that outlive an update
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 4], [4, 2, 1, 2]];

  const make = (tag, parent, attributes = {}, text = null) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    parent.append(element);
    return element;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const shown = (value) => {
    if (value === null || value === undefined) return "–";
    if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e6)) return Number(value.toPrecision(3)).toExponential();
    return String(Number(value.toPrecision(4)));
  };

  // One line of a chart for each number of each run: [label, colour, dash, run, values].
  function linesOf(chart) {
    const lines = [];
    const several = data.runs.length > 1;
    for (const table of chart.tables) {
      table.lines.forEach((line, place) => {
        const number = several ? table.run : place;
        const only = table.lines.length === 1;
        const label = several ? (only ? data.runs[table.run] : `${data.runs[table.run]}: ${line.label}`) : line.label;
        const turn = several && only ? number : place; // told apart without colour, and where they lie on each other
        lines.push({ label, stroke: colour(`--s${number % 8}`), dash: DASHES[turn % DASHES.length], run: table.run });
      });
    }
    return lines;
  }

  function joined(chart) {
    const tables = chart.tables.map((table) => [table.x, ...table.lines.map((line) => line.values)]);
    return tables.length === 1 ? tables[0] : uPlot.join(tables);
  }

  function stepsAt(chart, x) {
    for (const table of chart.tables) {
      const place = table.x.indexOf(x);
      if (place >= 0) return table.steps[place];
    }
    return null;
  }

  // Lines across a chart: the switch of stages of each run, and the level of chance.
  function marks(chart, u) {
    const { ctx, bbox } = u;
    const across = (style, dash, from, to) => {
      ctx.save();
      ctx.strokeStyle = style;
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash(dash.map((d) => d * devicePixelRatio));
      ctx.beginPath();
      ctx.moveTo(...from);
      ctx.lineTo(...to);
      ctx.stroke();
      ctx.restore();
    };
    data.switches.forEach((x, run) => {
      if (x === null || x < u.scales.x.min || x > u.scales.x.max) return;
      const left = u.valToPos(x, "x", true);
      const style = data.runs.length > 1 ? colour(`--s${run % 8}`) : colour("--dim");
      across(style, [6, 4], [left, bbox.top], [left, bbox.top + bbox.height]);
    });
    if (chart.chance !== null && chart.chance >= u.scales.y.min && chart.chance <= u.scales.y.max) {
      const top = u.valToPos(chart.chance, "y", true);
      across(colour("--dim"), [1, 4], [bbox.left, top], [bbox.left + bbox.width, top]);
    }
  }

  // Room above and below; the level of chance is always in sight, and small changes do not look large.
  function rangeOf(chart, low, high) {
    if (low === null) return [0, 1];
    if (chart.chance !== null) [low, high] = [Math.min(low, chart.chance), Math.max(high, chart.chance)];
    const room = high > low ? (high - low) * 0.08 : Math.abs(high) * 0.1 || 1;
    return [low >= 0 && low < (high - low) * 0.6 ? 0 : low - room, high + room];
  }

  function build(holder) {
    const chart = data.charts.find((one) => one.key === holder.dataset.chart);
    if (!chart) return;
    const lines = linesOf(chart);
    const values = joined(chart);
    const whole = [0, data.x_end || 1]; // the same for all charts
    holder.replaceChildren();
    const tools = make("div", holder, { class: "tools" });
    const at = make("span", tools, { class: "at" });
    const positive = values.slice(1).every((line) => line.every((value) => value === null || value > 0));
    const log = positive && kept.log.has(chart.key);
    if (positive) {
      const button = make("button", tools, { type: "button", "aria-pressed": String(log), id: `log-${chart.key}` }, "log scale");
      make("span", button, { class: "sr" }, ` of ${chart.title}`);
      button.addEventListener("click", () => {
        kept.log.has(chart.key) ? kept.log.delete(chart.key) : kept.log.add(chart.key);
        rebuild(holder);
        document.getElementById(button.id).focus();
      });
    }
    const canvas = make("div", holder, {
      class: "canvas", tabindex: "0", role: "slider", id: `plot-${chart.key}`, "aria-label": `${chart.title} by ${chart.x_name}`,
      "aria-valuemin": whole[0], "aria-valuemax": whole[1], "aria-valuenow": whole[1], "aria-orientation": "horizontal",
    });
    const legend = make("ul", holder, { class: "legend", "aria-label": `Lines of ${chart.title}` });
    const outputs = [];
    let current = values[0].length - 1;

    function tell(u, index) {
      current = index;
      const x = values[0][index];
      const step = chart.x_name === "epoch" ? stepsAt(chart, x) : null;
      at.textContent = `${chart.x_name} ${shown(x)}${step === null ? "" : `, step ${step}`}`;
      const words = [];
      lines.forEach((line, place) => {
        const value = values[place + 1][index];
        outputs[place].textContent = shown(value);
        if (value !== null && value !== undefined && u.series[place + 1].show) words.push(`${line.label} ${shown(value)}`);
      });
      canvas.setAttribute("aria-valuenow", x);
      canvas.setAttribute("aria-valuetext", `${at.textContent}: ${words.join(", ") || "no value"}${chart.unit ? ` ${chart.unit}` : ""}`);
    }

    const numbers = (_, ticks) => ticks.map((tick) => (tick === null ? "" : shown(tick)));
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1, size: 5 }, font: "12px system-ui, sans-serif" };
    const u = new uPlot({
      width: Math.max(200, holder.clientWidth), height: 240,
      legend: { show: false },
      scales: {
        x: { time: false },
        y: { distr: log ? 3 : 1, ...(log ? {} : { range: (_, low, high) => rangeOf(chart, low, high) }) },
      },
      axes: [
        { ...axis, label: chart.x_name, labelSize: 18, labelFont: axis.font, size: 34, values: numbers },
        { ...axis, size: 66, values: numbers },
      ],
      series: [{}, ...lines.map((line) => ({
        label: line.label, stroke: line.stroke, dash: line.dash, width: 2, spanGaps: true, show: !kept.hidden.has(`${chart.key}/${line.label}`),
        points: { show: values[0].length <= 25, size: 6, fill: line.stroke },
      }))],
      cursor: { bind: { dblclick: (u) => () => u.setScale("x", { min: whole[0], max: whole[1] }) }, sync: { key: "runs" }, drag: { x: true, y: false }, focus: { prox: -1 } },
      hooks: {
        setCursor: [(u) => tell(u, u.cursor.idx ?? values[0].length - 1)],
        draw: [(u) => marks(chart, u)],
      },
    }, values, canvas);
    u.root.setAttribute("aria-hidden", "true");

    lines.forEach((line, place) => {
      const name = `${chart.key}/${line.label}`;
      const button = make("button", make("li", legend), { type: "button", "aria-pressed": String(!kept.hidden.has(name)), id: `line-${chart.key}-${place}` });
      const sign = button.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
      sign.setAttribute("viewBox", "0 0 32 10");
      sign.setAttribute("aria-hidden", "true");
      const stroke = sign.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "line"));
      for (const [key, value] of Object.entries({ x1: 0, x2: 32, y1: 5, y2: 5, stroke: line.stroke, "stroke-width": 4, "stroke-dasharray": line.dash.join(" ") })) stroke.setAttribute(key, value);
      button.append(line.label);
      outputs.push(make("output", button, { "aria-live": "off" }));
      button.addEventListener("click", () => {
        const show = kept.hidden.delete(name);
        if (!show) kept.hidden.add(name);
        u.setSeries(place + 1, { show });
        button.setAttribute("aria-pressed", String(show));
      });
    });
    u.setScale("x", { min: whole[0], max: whole[1] });
    tell(u, values[0].length - 1);
    canvas.addEventListener("keydown", (event) => keyed(event, u, values, whole, () => current));
    plots.push({ u, holder, chart, whole });
  }

  function keyed(event, u, values, whole, where) {
    const xs = values[0];
    const last = xs.length - 1;
    const stride = event.shiftKey ? Math.max(1, Math.round(xs.length / 10)) : 1;
    const moves = { ArrowRight: where() + stride, ArrowUp: where() + stride, ArrowLeft: where() - stride, ArrowDown: where() - stride, Home: 0, End: last, PageUp: where() + 10, PageDown: where() - 10 };
    const { min, max } = u.scales.x;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) {
      const place = Math.min(last, Math.max(0, moves[event.key]));
      if (xs[place] < min || xs[place] > max) u.setScale("x", { min: whole[0], max: whole[1] });
      u.setCursor({ left: u.valToPos(xs[place], "x"), top: u.bbox.height / 2 / devicePixelRatio }, true, true); // and the others
    } else if (event.key === "Escape") {
      u.setScale("x", { min: whole[0], max: whole[1] });
    } else if ("+-=".includes(event.key) && last > 0) {
      const half = ((max - min) / 2) * (event.key === "-" ? 2 : 0.5);
      const middle = xs[where()];
      u.setScale("x", { min: Math.max(whole[0], middle - half), max: Math.min(whole[1], middle + half) });
    } else return;
    event.preventDefault();
  }

  function rebuild(holder) {
    const place = plots.findIndex((plot) => plot.holder === holder);
    if (place >= 0) plots.splice(place, 1)[0].u.destroy();
    build(holder);
  }

  function rebuildAll() {
    for (const plot of plots) plot.u.destroy();
    plots = [];
    document.querySelectorAll(".plot").forEach(build);
  }

  // Pictures at one scale: as large as their files say, all smaller together where the widest does not fit.
  function scaleAll() {
    const pictures = [...document.querySelectorAll(".pictures img")];
    const widest = Math.max(1, ...pictures.map((one) => Number(one.getAttribute("width"))));
    const room = document.querySelector(".pictures")?.clientWidth ?? widest;
    for (const one of pictures) one.style.width = `${Number(one.getAttribute("width")) * Math.min(1, (room - 2) / widest)}px`;
    for (const one of document.querySelectorAll(".scroll")) one.classList.toggle("wide", one.scrollWidth > one.clientWidth + 1);
  }

  rebuildAll();
  scaleAll();
  document.addEventListener("toggle", scaleAll, true); // a table that is unfolded has a width only then
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuildAll);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    scaleAll();
    for (const plot of plots) plot.u.setSize({ width: Math.max(200, plot.holder.clientWidth), height: 240 });
  });

  const dialog = document.getElementById("large");
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".enlarge");
    if (!button) return;
    const [large, small] = [dialog.querySelector("img"), button.querySelector("img")];
    large.src = small.src;
    large.alt = small.alt;
    dialog.showModal();
  });

  // --- watch: the server says when something has changed -------------------------------------
  let stamp = document.documentElement.dataset.live; // of the files that this page was made from
  if (!stamp) return;
  const state = document.getElementById("live-state");
  const news = document.getElementById("live-news");

  function takeOver(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const open = new Set([...document.querySelectorAll("details[open]")].map((one) => one.id));
    const closed = new Set([...document.querySelectorAll("details:not([open])")].map((one) => one.id));
    const focused = document.activeElement?.id;
    const before = document.querySelector(".line strong")?.textContent;
    const zooms = new Map(plots.filter((p) => p.u.scales.x.min > p.whole[0] || p.u.scales.x.max < p.whole[1]).map((p) => [p.chart.key, { min: p.u.scales.x.min, max: p.u.scales.x.max }]));
    for (const plot of plots) plot.u.destroy();
    plots = [];
    document.getElementById("main").replaceWith(fresh.getElementById("main"));
    data = JSON.parse(fresh.getElementById("plot-data").textContent);
    document.title = fresh.title;
    stamp = fresh.documentElement.dataset.live;
    for (const one of document.querySelectorAll("details")) {
      if (open.has(one.id)) one.open = true;
      else if (closed.has(one.id)) one.open = false;
    }
    rebuildAll();
    scaleAll();
    for (const plot of plots) if (zooms.has(plot.chart.key)) plot.u.setScale("x", zooms.get(plot.chart.key));
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
    // read aloud where the verdict is another one, not with every step
    if (document.querySelector(".line strong")?.textContent !== before) news.textContent = document.querySelector(".line").textContent;
  }

  async function look() {
    try {
      const answer = await fetch("/stamp", { cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      const now = (await answer.json()).stamp;
      if (now !== stamp && !dialog.open) {
        const page = await fetch("/", { cache: "no-store" });
        if (!page.ok) throw new Error(String(page.status));
        takeOver(await page.text());
        state.textContent = `updated ${new Date().toLocaleTimeString()}`;
      } else if (state.dataset.lost) {
        state.textContent = "connected again";
      }
      delete state.dataset.lost;
    } catch {
      if (!state.dataset.lost) state.textContent = "no answer from cmt-mae watch: the page shows what was known last";
      state.dataset.lost = "yes";
    }
    setTimeout(look, 2000);
  }
  look();
})();

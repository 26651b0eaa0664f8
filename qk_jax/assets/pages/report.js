const runs = JSON.parse(document.getElementById("runs").textContent);
const charts = JSON.parse(document.getElementById("charts").textContent);
const several = runs.length > 1;
const hiddenRuns = new Set();
const redraws = []; // of all charts

function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function told(value) {
  if (value === undefined || value === null) return "none";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

// Round numbers from low to high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-6; n++) {
    found.push(Number((n * step).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const lead of high / low > 100 ? [1] : [1, 2, 5]) found.push(lead * 10 ** power);
  }
  const inside = found.filter((x) => x >= low && x <= high);
  return inside.length > 1 ? inside : ticks(low, high, 4).filter((x) => x > 0);
}

// The index of the number of a rising list that is nearest to x.
function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] <= x) low = middle;
    else high = middle;
  }
  return Math.abs(list[high] - x) < Math.abs(list[low] - x) ? high : low;
}

function drawChart(figure) {
  const chart = charts[figure.dataset.chart];
  const plot = figure.querySelector(".plot");
  const legend = figure.querySelector(".legend");
  const logButton = figure.querySelector(".log");
  const byRun = several && chart.byRun;
  const colour = (line) => `c${(byRun ? line.run : line.part) % 8}`;
  const dash = (line) => `d${(byRun ? line.part : line.run) % 8}`;
  const hidden = new Set(); // parts
  let scale = null; // of what is drawn
  let at = null; // the step that is pointed at

  const visible = () =>
    chart.lines.filter((line) => !hidden.has(line.part) && !hiddenRuns.has(line.run));
  const isLog = () => logButton.getAttribute("aria-pressed") === "true";

  function limits(lines) {
    let left = Infinity, right = -Infinity, low = Infinity, high = -Infinity;
    for (const line of lines) {
      left = Math.min(left, line.x[0]);
      right = Math.max(right, line.x[line.x.length - 1]);
      for (const y of line.y) {
        if (y === null || (isLog() && y <= 0)) continue;
        low = Math.min(low, y);
        high = Math.max(high, y);
      }
    }
    if (low > high) return null;
    if (left === right) right = left + 1;
    if (isLog()) return { left, right, low: low / 1.05, high: high * 1.05 };
    const room = (high - low || Math.abs(high) || 1) * 0.05;
    return { left, right, low: low - room, high: high + room };
  }

  function draw() {
    const lines = visible();
    const limit = limits(lines);
    scale = null;
    plot.replaceChildren();
    if (!limit) {
      plot.textContent = lines.length ? "Nothing above 0 to draw." : "All lines are hidden.";
      readout();
      return;
    }
    const width = Math.max(plot.clientWidth, 200), height = 220;
    const edge = { left: 52, right: 10, top: 8, bottom: 20 };
    const span = isLog() ? Math.log(limit.high / limit.low) : limit.high - limit.low;
    const x = (step) =>
      edge.left + ((step - limit.left) / (limit.right - limit.left)) * (width - edge.left - edge.right);
    const y = (value) => {
      const part = (isLog() ? Math.log(value / limit.low) : value - limit.low) / span;
      return height - edge.bottom - part * (height - edge.top - edge.bottom);
    };
    const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": true });
    for (const tick of isLog() ? logTicks(limit.low, limit.high) : ticks(limit.low, limit.high, 6)) {
      drawn.append(svg("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(tick), y2: y(tick) }));
      drawn.append(svg("text", { x: edge.left - 6, y: y(tick) + 4, class: "end" }, told(tick)));
    }
    for (const tick of ticks(limit.left, limit.right, width / 90)) {
      if (tick !== Math.round(tick)) continue;
      drawn.append(svg("text", { x: x(tick), y: height - 5, class: "middle" }, tick.toLocaleString("en")));
    }
    for (const mark of chart.marks) {
      if (hiddenRuns.has(mark.run)) continue;
      const line = svg("line", { class: "mark", x1: x(mark.step), x2: x(mark.step), y1: edge.top, y2: height - edge.bottom });
      const run = several ? `${runs[mark.run]}: ` : "";
      line.append(svg("title", {}, `${run}step ${mark.step}: back to the state of step ${mark.to}`));
      drawn.append(line);
    }
    for (const line of lines) {
      let path = "", pen = false, count = 0;
      line.x.forEach((step, n) => {
        const value = line.y[n];
        if (value === null || (isLog() && value <= 0)) {
          pen = false;
          return;
        }
        path += `${pen ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = true;
        count++;
      });
      drawn.append(svg("path", { class: `line ${colour(line)} ${dash(line)}`, d: path }));
      if (count > 12) continue;
      line.x.forEach((step, n) => {
        const value = line.y[n];
        if (value === null || (isLog() && value <= 0)) return;
        drawn.append(svg("circle", { class: `dot ${colour(line)}`, cx: x(step), cy: y(value), r: 2.5 }));
      });
    }
    const cursor = svg("g", { class: "cursor" });
    drawn.append(cursor);
    plot.append(drawn);
    scale = { x, y, limit, width, edge, height, cursor };
    point(at);
  }

  // Points at a step of the chart, or at none; the legend tells the values there.
  function point(step) {
    at = step;
    if (scale) {
      scale.cursor.replaceChildren();
      if (at !== null) {
        const place = scale.x(at);
        scale.cursor.append(svg("line", { x1: place, x2: place, y1: scale.edge.top, y2: scale.height - scale.edge.bottom }));
        for (const line of visible()) {
          const n = nearest(line.x, at), value = line.y[n];
          if (value === null || (isLog() && value <= 0)) continue;
          scale.cursor.append(svg("circle", { class: `dot ${colour(line)}`, cx: scale.x(line.x[n]), cy: scale.y(value), r: 4 }));
        }
      }
    }
    readout();
  }

  function readout() {
    figure.querySelector(".step").textContent =
      at === null ? "last values" : `step ${at.toLocaleString("en")}`;
    legend.querySelectorAll("button").forEach((button) => {
      const part = Number(button.dataset.part);
      const values = chart.lines
        .filter((line) => line.part === part && !hiddenRuns.has(line.run))
        .map((line) => {
          const shown = document.createElement("span");
          const finite = line.y.filter((y) => y !== null);
          shown.textContent = told(at === null ? finite[finite.length - 1] : line.y[nearest(line.x, at)]);
          if (byRun) shown.className = colour(line);
          if (several) shown.title = runs[line.run];
          return shown;
        });
      button.querySelector(".values").replaceChildren(...values);
    });
  }

  const steps = () => [...new Set(visible().flatMap((line) => line.x))].sort((a, b) => a - b);

  plot.addEventListener("pointermove", (event) => {
    if (!scale) return;
    const { limit, width, edge } = scale;
    const part = (event.clientX - plot.getBoundingClientRect().left - edge.left) / (width - edge.left - edge.right);
    const known = steps();
    point(known[nearest(known, limit.left + part * (limit.right - limit.left))]);
  });
  plot.addEventListener("pointerleave", () => point(null));
  plot.addEventListener("blur", () => point(null));
  plot.addEventListener("keydown", (event) => {
    const known = steps();
    const here = at === null ? known.length - 1 : nearest(known, at);
    const next = { ArrowLeft: here - (at !== null), ArrowRight: here + 1, Home: 0, End: known.length - 1 }[event.key];
    if (event.key === "Escape") point(null);
    if (next === undefined || !known.length) return;
    event.preventDefault();
    point(known[Math.min(Math.max(next, 0), known.length - 1)]);
    plot.setAttribute("aria-label", `${chart.title}, step ${at}: ` + [...legend.querySelectorAll("button[aria-pressed=true]")].map((x) => x.innerText.replace(/\s+/g, " ")).join(", "));
  });
  logButton.addEventListener("click", () => {
    logButton.setAttribute("aria-pressed", String(!isLog()));
    draw();
  });

  chart.parts.forEach((part, number) => {
    if (!chart.lines.some((line) => line.part === number)) return;
    const item = document.createElement("li");
    const button = document.createElement("button");
    const swatch = svg("svg", { viewBox: "0 0 22 8", width: 22, height: 8, "aria-hidden": true });
    const look = byRun ? `plain d${number % 8}` : `c${number % 8}`;
    swatch.append(svg("path", { class: `line ${look}`, d: "M0 4H22" }));
    const values = document.createElement("span");
    values.className = "values";
    button.type = "button";
    button.dataset.part = number;
    button.setAttribute("aria-pressed", "true");
    button.append(swatch, part, values);
    button.addEventListener("click", () => {
      const shows = hidden.has(number);
      if (shows) hidden.delete(number);
      else hidden.add(number);
      button.setAttribute("aria-pressed", String(shows));
      draw();
    });
    item.append(button);
    legend.append(item);
  });

  let width = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth === width) return;
    width = plot.clientWidth;
    if (width) draw();
  }).observe(plot);
  redraws.push(draw);
}

document.querySelectorAll("[data-chart]").forEach(drawChart);

document.querySelectorAll("#legend button").forEach((button) => {
  button.addEventListener("click", () => {
    const run = Number(button.dataset.run);
    const shows = hiddenRuns.has(run);
    if (shows) hiddenRuns.delete(run);
    else hiddenRuns.add(run);
    button.setAttribute("aria-pressed", String(shows));
    document.querySelectorAll(`[data-of-run="${run}"]`).forEach((x) => (x.hidden = !shows));
    redraws.forEach((draw) => draw());
  });
});

document.getElementById("logs")?.addEventListener("click", (event) => {
  const on = event.target.getAttribute("aria-pressed") !== "true";
  event.target.setAttribute("aria-pressed", String(on));
  document.querySelectorAll(".log").forEach((button) => button.setAttribute("aria-pressed", String(on)));
  redraws.forEach((draw) => draw());
});

// Before and after: the later picture over the earlier one, cut where the slider stands.
document.querySelectorAll(".slider").forEach((slider) => {
  const [before, after] = slider.querySelectorAll("img");
  const range = slider.querySelector("input");
  const choice = slider.querySelector("select");
  function show() {
    for (const [shown, id] of [[before, slider.dataset.before], [after, choice.value]]) {
      const of = document.getElementById(id).querySelector("img");
      shown.src = of.src;
      shown.className = of.className;
      shown.alt = of.alt;
    }
    move();
  }
  function move() {
    after.style.clipPath = `inset(0 0 0 ${range.value}%)`;
    slider.querySelector(".rule").style.left = `${range.value}%`;
  }
  range.addEventListener("input", move);
  choice.addEventListener("change", show);
  show();
});

function filter(form, items, hit) {
  const count = form.querySelector("[role=status]");
  function apply() {
    let shown = 0;
    for (const item of items) {
      item.hidden = !hit(item, form.elements);
      shown += !item.hidden;
    }
    count.textContent = `${shown} of ${items.length} shown`;
  }
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();
}

const has = (item, field) => item.textContent.toLowerCase().includes(field.value.trim().toLowerCase());
const pictures = document.querySelector("form.pictures-of");
if (pictures) {
  filter(pictures, [...document.querySelectorAll(".record")], (item, { set, task, most, words }) =>
    (!most.value || Number(item.dataset.number) <= Number(most.value)) &&
    (!set.value || item.dataset.set === set.value) &&
    (!task.value || item.dataset.task === task.value) &&
    (!words.value.trim() || has(item.querySelector("h3"), words)));
}
const settings = document.querySelector("form.settings-of");
if (settings) {
  filter(settings, [...document.querySelectorAll("#settings tbody tr")], (item, { words, differing }) =>
    (!differing.checked || item.hasAttribute("data-differs")) &&
    (!words.value.trim() || has(item, words)));
}


"use strict";
const report = JSON.parse(document.getElementById("data").textContent);

// All text of the page goes through here: textContent, never markup.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function fixed(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.0005 || size >= 1e6)) return value.toExponential(1);
  if (size >= 1000) return String(Math.round(value));
  return value.toFixed(size >= 100 ? 1 : digits);
}

const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "±") + fixed(Math.abs(value));

const tip = document.getElementById("tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - box.height - 6))}px`;
}
const hideTip = () => { tip.hidden = true; };

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const found = [];
  for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + unit * 1e-9; i++) found.push(Number((i * unit).toPrecision(12)));
  return found;
}

function smoothed(points) {
  let mean = null;
  return points.map(([step, value]) => {
    mean = mean === null ? value : 0.75 * mean + 0.25 * value;
    return [step, mean];
  });
}

const WIDTH = 340, HEIGHT = 170, LEFT = 42, RIGHT = 8, TOP = 8, BOTTOM = 22;

function range(values, padding) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) {
    const half = Math.abs(low) * 0.1 || 0.5;
    return [low - half, high + half];
  }
  return [low - (high - low) * padding, high + (high - low) * padding];
}

function drawChart(chart, smooth) {
  const all = chart.series.flatMap((series) => [...series.points, ...(series.low || []), ...(series.high || [])]);
  const steps = [...new Set(all.map((point) => point[0]))].sort((a, b) => a - b);
  const [x0, x1] = steps.length > 1 ? [steps[0], steps[steps.length - 1]] : [steps[0] - 1, steps[0] + 1];
  const [y0, y1] = range(all.map((point) => point[1]), 0.06);
  const x = (step) => LEFT + ((step - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const line = (points) => points.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("");
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${chart.title}, by step` });
  for (const value of ticks(y0, y1, 6)) {
    svg.append(make("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    const label = Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-4) ? value.toExponential(0) : String(value);
    svg.append(make("text", { x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end" }, label));
  }
  for (const step of ticks(x0, x1, 5).filter(Number.isInteger)) {
    if (steps.length > 1 || step === steps[0]) svg.append(make("text", { x: x(step), y: HEIGHT - 6, "text-anchor": "middle" }, String(step)));
  }
  chart.series.forEach((series, index) => {
    const colour = `var(--c${index % 8})`;
    if (series.low && series.high && steps.length > 1) {
      svg.append(make("path", { d: `${line(series.high)}${line([...series.low].reverse()).replace("M", "L")}Z`, fill: colour, opacity: 0.14 }));
    }
    const few = series.points.length <= 15;
    const bold = smooth && !few ? smoothed(series.points) : series.points;
    if (bold !== series.points) svg.append(make("path", { d: line(series.points), fill: "none", stroke: colour, opacity: 0.25 }));
    svg.append(make("path", { d: line(bold), fill: "none", stroke: colour, "stroke-width": 1.8, "stroke-linejoin": "round" }));
    if (few) for (const [step, value] of series.points) svg.append(make("circle", { cx: x(step), cy: y(value), r: 2.6, fill: colour }));
  });
  const cross = make("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cross, make("rect", { x: LEFT, y: 0, width: WIDTH - LEFT - RIGHT, height: HEIGHT, fill: "transparent" }));
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    const wanted = x0 + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (x1 - x0);
    const step = steps.reduce((best, candidate) => (Math.abs(candidate - wanted) < Math.abs(best - wanted) ? candidate : best));
    cross.setAttribute("x1", x(step));
    cross.setAttribute("x2", x(step));
    cross.setAttribute("visibility", "visible");
    const rows = chart.series.map((series) => {
      const at = (points) => { const hit = (points || []).find((point) => point[0] === step); return hit ? fixed(hit[1], 4) : "–"; };
      return `${series.name}: ${at(series.points)}${series.low ? `  (${at(series.low)} to ${at(series.high)})` : ""}`;
    });
    showTip(event, [`step ${step}`, ...rows].join("\n"));
  });
  svg.addEventListener("mouseleave", () => { cross.setAttribute("visibility", "hidden"); hideTip(); });
  const last = chart.series.length === 1 ? fixed(chart.series[0].points[chart.series[0].points.length - 1][1]) : "";
  const figure = make("figure", {}, make("figcaption", {}, make("span", {}, chart.title), make("span", { class: "last" }, last)));
  if (chart.series.length > 1) {
    figure.append(make("div", { class: "legend" }, ...chart.series.map((series, index) =>
      make("span", {}, make("i", { style: `background:var(--c${index % 8})` }), series.name))));
  }
  figure.append(svg);
  return figure;
}

const SECTIONS = {
  "charts-main": [["validation", "Validation"], ["rewards", "Training rewards (mean, band of one standard deviation)"]],
  "charts-more": [["monitors", "Monitors"], ["scopes", "Scopes"], ["responses", "Responses"], ["learning", "Learning"], ["speed", "Time and speed"], ["other", "Other"]],
};

function drawCharts(smooth) {
  for (const [id, sections] of Object.entries(SECTIONS)) {
    const place = document.getElementById(id);
    place.replaceChildren();
    for (const [section, title] of sections) {
      const charts = report.charts.filter((chart) => chart.section === section);
      if (charts.length) place.append(make("h3", {}, title), make("div", { class: "charts" }, ...charts.map((chart) => drawChart(chart, smooth))));
    }
    if (!place.children.length) place.append(make("p", { class: "empty" }, "No metrics here yet: the run has not finished a step that reports any."));
  }
}

function drawHead() {
  document.title = `${report.name} · RS-GRPO run report`;
  document.getElementById("name").textContent = report.name;
  document.getElementById("facts").textContent = [report.generated, ...report.facts.map(([what, value]) => `${what}: ${value}`)].join("  ·  ");
  const tone = (change) => (Math.abs(change) < 0.0005 ? "" : change > 0 ? "good" : "bad");
  document.getElementById("cards").append(...report.headline.map(({ label, before, after, lower_is_better }) =>
    make("div", { class: "card" }, make("div", { class: "label" }, label), make("div", { class: "value" }, fixed(after)),
      make("div", { class: "change" }, `from ${fixed(before)}  `, make("span", { class: tone(lower_is_better ? before - after : after - before) }, signed(after - before))))));
  if (!report.headline.length) document.getElementById("cards").append(make("p", { class: "empty" }, "No scores yet: no step has been finished and no validation was run."));
  const { modes, rows } = report.table;
  if (!rows.length) return;
  const head = make("tr", {}, make("th", {}, "validation score"), ...modes.flatMap((mode) => [`${mode || "score"}, before`, "after", "change"].map((text) => make("th", {}, text))));
  const cells = (cell) => cell
    ? [make("td", {}, fixed(cell[0])), make("td", {}, fixed(cell[1])), make("td", { class: "quiet" }, signed(cell[1] - cell[0]))]
    : [make("td", {}, "–"), make("td", {}, "–"), make("td", {}, "–")];
  const body = rows.map((row) => make("tr", {}, make("td", {}, row.name), ...row.cells.flatMap(cells)));
  document.getElementById("score-table").append(make("details", { open: "" }, make("summary", {}, "All validation scores, first and last"),
    make("div", { class: "sheet" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)))));
}

function drawConfig() {
  const place = document.getElementById("config-table");
  if (!report.config_text) {
    place.append(make("p", { class: "empty" }, "The run folder has no config.yaml."));
    return;
  }
  const rows = report.config.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell))));
  const head = make("tr", {}, ...["setting", "this run", "default"].map((text) => make("th", {}, text)));
  if (rows.length) place.append(make("p", { class: "lead" }, "Settings that differ from their defaults."), make("div", { class: "sheet text-table" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
  place.append(make("details", {}, make("summary", {}, "The whole configuration"), make("pre", {}, report.config_text)));
}

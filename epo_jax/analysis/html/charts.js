"use strict";
// Charts in SVG: lines with bands over RL steps, and maps of coloured cells. They know nothing of runs.

// Text goes to the screen through textContent and attributes alone, so what a run wrote stays text.
function make(space, tag, attributes, children) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);

// Okabe and Ito's colours without yellow, told apart with any colour vision; the dash and the letter say it again.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a"];
const DASHES = ["", "8 3", "2 2.5", "10 3 2 3", "5 2", "14 4", "1 3"];
const styleOf = (n) => ({
  colour: COLOURS[n % COLOURS.length],
  dash: DASHES[(n + Math.floor(n / COLOURS.length)) % DASHES.length],
  letter: n < 26 ? String.fromCharCode(65 + n) : String(n + 1),
});

// Cividis, which is the same to most colour-blind eyes and rises in lightness.
const CIVIDIS = [[0, 32, 77], [49, 68, 107], [102, 105, 112], [149, 143, 120], [203, 186, 105], [255, 234, 70]];
function cividis(share) {
  const at = Math.min(1, Math.max(0, share)) * (CIVIDIS.length - 1);
  const i = Math.min(CIVIDIS.length - 2, Math.floor(at));
  return CIVIDIS[i].map((low, channel) => Math.round(low + (at - i) * (CIVIDIS[i + 1][channel] - low)));
}

function format(value, percent) {
  if (value === null || value === undefined) return "–";
  if (percent) return `${(100 * value).toFixed(1)} %`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function caption(title, unit) {
  return el("figcaption", {}, title, unit ? el("span", { class: "unit" }, ` ${unit}`) : null);
}

// A line chart. series: {x, y, low, high, name, colour, dash, letter, faint, marks, whiskers}; edges: {x, y, colour}, two of
// them with the space between shaded. The horizontal axis reaches over `across`, the vertical one holds the values of `reach` too.
function lineChart({ title, unit, percent, across, series, edges = [], reach = [], note }) {
  const width = 440, height = 210, left = 46, right = 18, top = 8, bottom = 26;
  const xs = [...across], ys = percent ? [0, 1] : [...reach];
  for (const s of [...series, ...edges]) {
    for (const x of s.x) xs.push(x);
    for (const list of s.faint || !s.low ? [s.y] : [s.y, s.low, s.high]) for (const y of list) if (y !== null) ys.push(y);
  }
  const figure = el("figure", {}, caption(title, unit));
  if (series.every((s) => !s.x.length)) {
    figure.append(el("p", { class: "note" }, note || "No run has it."));
    return figure;
  }
  const least = (list) => list.reduce((a, b) => Math.min(a, b)), most = (list) => list.reduce((a, b) => Math.max(a, b));
  let x0 = least(xs), x1 = most(xs), y0 = least(ys), y1 = most(ys);
  if (x0 === x1) x1 = x0 + 1;
  if (y0 >= 0 && y0 < 0.5 * y1) y0 = 0;
  if (y0 === y1) [y0, y1] = [y0 - (Math.abs(y0) / 10 || 1), y1 + (Math.abs(y1) / 10 || 1)];
  if (!percent) y1 += 0.04 * (y1 - y0);
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const py = (y) => top + (1 - (y - y0) / (y1 - y0)) * (height - top - bottom);
  const path = (x, y) => {
    let text = "", pen = "M";
    x.forEach((each, i) => {
      if (y[i] === null) pen = "M";
      else { text += `${pen}${px(each).toFixed(1)} ${py(y[i]).toFixed(1)}`; pen = "L"; }
    });
    return text;
  };
  const area = (x, low, high) => `${path(x, low)}L${path([...x].reverse(), [...high].reverse()).slice(1)}Z`;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const y of ticks(y0, y1, 5)) {
    drawing.append(
      svg("line", { class: "rule", x1: left, x2: width - right, y1: py(y), y2: py(y) }),
      svg("text", { class: "tick", x: left - 6, y: py(y) + 4, "text-anchor": "end" }, percent ? `${Math.round(100 * y)} %` : format(y)),
    );
  }
  for (const x of ticks(x0, x1, 6).filter(Number.isInteger)) {
    drawing.append(svg("text", { class: "tick", x: px(x), y: height - bottom + 15, "text-anchor": "middle" }, format(x)));
  }
  drawing.append(svg("text", { class: "tick", x: width - right, y: height - 1, "text-anchor": "end" }, "RL step"));
  if (edges.length === 2) {
    drawing.append(svg("path", { d: area(edges[0].x, edges[0].y, edges[1].y), fill: edges[0].colour, "fill-opacity": 0.12 }));
  }
  for (const e of edges) {
    drawing.append(svg("path", { d: path(e.x, e.y), fill: "none", stroke: e.colour, "stroke-dasharray": "5 4", "stroke-width": 1.2 }));
  }
  for (const s of series.filter((each) => each.faint)) drawing.append(svg("path", { class: "faint", d: path(s.x, s.y) }));
  const shown = series.filter((each) => !each.faint);
  for (const s of shown) {
    if (s.whiskers) s.x.forEach((x, i) => drawing.append(svg("line", { x1: px(x), x2: px(x), y1: py(s.low[i]), y2: py(s.high[i]), stroke: s.colour, "stroke-opacity": 0.6 })));
    else if (s.low) drawing.append(svg("path", { d: area(s.x, s.low, s.high), fill: s.colour, "fill-opacity": shown.length > 3 ? 0.08 : 0.15 }));
  }
  const labels = [];
  for (const s of shown) {
    drawing.append(svg("path", { d: path(s.x, s.y), fill: "none", stroke: s.colour, "stroke-width": 2, "stroke-dasharray": s.dash, "stroke-linejoin": "round" }));
    if (s.marks) s.x.forEach((x, i) => drawing.append(svg("circle", { cx: px(x), cy: py(s.y[i]), r: 3, fill: s.colour })));
    const end = s.y.findLastIndex((y) => y !== null);
    if (end >= 0 && s.letter) labels.push({ text: s.letter, x: px(s.x[end]) + 5, y: py(s.y[end]) + 4 });
  }
  // Labels that would cover each other move apart, downwards first and then up from the axis.
  const near = (a, b) => Math.abs(a.x - b.x) < 10;
  labels.sort((a, b) => a.y - b.y).forEach((label, i) => {
    for (const above of labels.slice(0, i).filter((other) => near(other, label))) label.y = Math.max(label.y, above.y + 11);
  });
  labels.reverse().forEach((label, i) => {
    label.y = Math.min(label.y, height - bottom + 4);
    for (const below of labels.slice(0, i).filter((other) => near(other, label))) label.y = Math.min(label.y, below.y - 11);
    drawing.append(svg("text", { x: label.x, y: label.y, "font-weight": 700 }, label.text));
  });
  const cursor = svg("line", { class: "rule", y1: top, y2: height - bottom, visibility: "hidden" });
  drawing.append(cursor);
  const steps = [...new Set(shown.flatMap((s) => s.x))].sort((a, b) => a - b);
  hover(drawing, (event, box) => {
    const x = x0 + (((event.clientX - box.left) / box.width * width - left) / (width - left - right)) * (x1 - x0);
    const nearest = steps.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a), steps[0]);
    if (nearest === undefined) return null;
    cursor.setAttribute("x1", px(nearest));
    cursor.setAttribute("x2", px(nearest));
    cursor.setAttribute("visibility", "visible");
    const lines = shown.filter((s) => s.x.includes(nearest)).map((s) => {
      const i = s.x.indexOf(nearest);
      const span = s.low && s.low[i] !== s.high[i] ? ` [${format(s.low[i], percent)}, ${format(s.high[i], percent)}]` : "";
      return `${s.letter ? s.letter + " " : ""}${format(s.y[i], percent)}${span}  ${s.name}`;
    });
    return [`step ${format(nearest)}`, ...lines].join("\n");
  }, () => cursor.setAttribute("visibility", "hidden"));
  figure.append(drawing);
  if (note) figure.append(el("p", { class: "note" }, note));
  return figure;
}

// A map of steps (across) by turns (up). columns[i][j] is the value at the j-th of `turns`; a pixel a cell.
function turnMap({ title, across, first, width: bin, turns, entropy, low, high }) {
  const width = 440, height = 230, left = 34, right = 18, top = 8, bottom = 28;
  const canvas = el("canvas", { width: entropy.length, height: turns.length });
  const pixels = new ImageData(entropy.length, turns.length);
  entropy.forEach((column, i) => column.forEach((value, j) => {
    if (value === null) return;
    pixels.data.set([...cividis((value - low) / (high - low || 1)), 255], 4 * ((turns.length - 1 - j) * entropy.length + i));
  }));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const inner = { x: left, y: top, width: width - left - right, height: height - top - bottom };
  const px = (step) => left + ((step - across[0]) / (across[1] - across[0])) * inner.width;
  const last = Math.min(across[1], first + bin * entropy.length);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: entropy by RL step and turn` },
    svg("rect", { ...inner, fill: "var(--faint)" }),
    svg("image", { ...inner, x: px(first), width: px(last) - px(first), href: canvas.toDataURL(), preserveAspectRatio: "none", style: "image-rendering: pixelated" }));
  for (const x of ticks(...across, 5).filter(Number.isInteger)) {
    drawing.append(svg("text", { class: "tick", x: px(x), y: height - bottom + 14, "text-anchor": "middle" }, format(x)));
  }
  for (const turn of ticks(1, turns.length, 4).filter((t) => t >= 1 && Number.isInteger(t))) {
    drawing.append(svg("text", { class: "tick", x: left - 5, y: top + (1 - (turn - 0.5) / turns.length) * inner.height + 4, "text-anchor": "end" }, turn));
  }
  drawing.append(svg("text", { class: "tick", x: width - right, y: height - 1, "text-anchor": "end" }, "RL step; turns upwards"));
  hover(drawing, (event, box) => {
    const i = Math.floor((((event.clientX - box.left) / box.width) * width - px(first)) / (px(last) - px(first)) * entropy.length);
    const j = turns.length - 1 - Math.floor((((event.clientY - box.top) / box.height) * height - top) / inner.height * turns.length);
    if (!entropy[i] || turns[j] === undefined) return null;
    const steps = bin === 1 ? `step ${first + i}` : `steps ${first + i * bin} to ${first + (i + 1) * bin - 1}`;
    return `${steps}, turn ${turns[j] + 1}\n${format(entropy[i][j])} nats per token`;
  });
  return el("figure", {}, caption(title), drawing);
}

// Differences by seed, a row each: {dots, mean, low, high, name, colour, letter}; the interval's bounds may be null.
function differencePlot({ title, percent, rows }) {
  const width = 440, left = 34, right = 24, top = 8, bottom = 30, row = 30, height = top + bottom + row * Math.max(1, rows.length);
  const all = [0, ...rows.flatMap((r) => [...r.dots, r.mean, r.low, r.high])].filter((v) => v !== null);
  const span = Math.max(...all) - Math.min(...all) || 1;
  const low = Math.min(...all) - 0.05 * span, high = Math.max(...all) + 0.05 * span;
  const px = (v) => left + ((v - low) / (high - low)) * (width - left - right);
  const text = (v) => (percent ? String(Number((100 * v).toPrecision(3))) : format(v));
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const v of ticks(low, high, 5)) {
    drawing.append(svg("line", { class: v === 0 ? "zero" : "rule", x1: px(v), x2: px(v), y1: top, y2: height - bottom }),
      svg("text", { class: "tick", x: px(v), y: height - bottom + 14, "text-anchor": "middle" }, text(v)));
  }
  drawing.append(svg("text", { class: "tick", x: width - right, y: height - 2, "text-anchor": "end" }, percent ? "percentage points" : ""));
  rows.forEach((r, i) => {
    const y = top + row * (i + 0.5), tip = `${r.letter}  ${r.name}\n${text(r.mean)}${r.low === null ? "" : ` [${text(r.low)}, ${text(r.high)}]`}; seeds: ${r.dots.map(text).join(", ")}`;
    drawing.append(svg("text", { x: left - 20, y: y + 4, "font-weight": 700 }, r.letter));
    if (r.low !== null) drawing.append(svg("line", { x1: px(r.low), x2: px(r.high), y1: y, y2: y, stroke: r.colour, "stroke-width": 2.5 }));
    drawing.append(svg("rect", { x: px(r.mean) - 2, y: y - 8, width: 4, height: 16, fill: r.colour }));
    for (const v of r.dots) drawing.append(svg("circle", { cx: px(v), cy: y + 9, r: 2.6, fill: r.colour, "fill-opacity": 0.6 }));
    const band = svg("rect", { x: 0, y: y - row / 2, width, height: row, fill: "transparent" });
    hover(band, () => tip);
    drawing.append(band);
  });
  const figure = el("figure", {}, caption(title), drawing);
  if (!rows.length) figure.append(el("p", { class: "note" }, "No arm that is shown has a seed in common with the reference."));
  return figure;
}

// Points {x, y, name, colour}; y is a share.
function scatterPlot({ title, across, note, points }) {
  const width = 440, height = 230, left = 46, right = 18, top = 8, bottom = 34;
  const xs = points.map((point) => point.x), low = Math.min(0, ...xs), high = Math.max(...xs) * 1.03 || 1;
  const px = (x) => left + ((x - low) / (high - low)) * (width - left - right), py = (y) => top + (1 - y) * (height - top - bottom);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const y of ticks(0, 1, 5)) {
    drawing.append(svg("line", { class: "rule", x1: left, x2: width - right, y1: py(y), y2: py(y) }),
      svg("text", { class: "tick", x: left - 6, y: py(y) + 4, "text-anchor": "end" }, `${Math.round(100 * y)} %`));
  }
  for (const x of ticks(low, high, 5)) drawing.append(svg("text", { class: "tick", x: px(x), y: height - bottom + 14, "text-anchor": "middle" }, format(x)));
  drawing.append(svg("text", { class: "tick", x: width - right, y: height - 2, "text-anchor": "end" }, across));
  for (const point of points) {
    const circle = svg("circle", { cx: px(point.x), cy: py(point.y), r: 4, fill: point.colour, "fill-opacity": 0.75 });
    hover(circle, () => `${point.name}\n${format(point.x)}, ${format(point.y, true)}`);
    drawing.append(circle);
  }
  return el("figure", {}, caption(title), drawing, el("p", { class: "note" }, note));
}

function colourBar(low, high, unit) {
  const stops = [...Array(11).keys()].map((i) => `rgb(${cividis(i / 10)})`).join(", ");
  return el("p", { class: "note" }, format(low), el("span", { class: "ramp", style: `background: linear-gradient(to right, ${stops})` }), `${format(high)} ${unit}`);
}

// A table of coloured cells with their numbers; cells[row][column] is a number or null.
function cellMap({ across, down, columns, rows, cells, percent }) {
  const values = cells.flat().filter((v) => v !== null);
  const low = Math.min(...values), high = Math.max(...values);
  const paint = (value) => {
    if (value === null) return {};
    const colour = cividis((value - low) / (high - low || 1));
    const dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 115;
    return { style: `background: rgb(${colour}); color: ${dark ? "#fff" : "#000"}` };
  };
  return el("table", { class: "cells" },
    el("thead", {}, el("tr", {}, el("th", {}, [down && `${down} ↓`, across && `${across} →`].filter(Boolean).join("  ")), columns.map((name) => el("th", {}, name)))),
    el("tbody", {}, rows.map((name, i) => el("tr", {}, el("th", {}, name), cells[i].map((v) => el("td", paint(v), format(v, percent)))))));
}

// Calls `tell` while a pointer is over `node`; what it returns is shown beside the pointer.
function hover(node, tell, leave) {
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; if (leave) leave(); };
  node.addEventListener("pointermove", (event) => {
    const text = tell(event, node.getBoundingClientRect());
    if (text === null) return hide();
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.pageX + 14, document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${event.pageY + 16}px`;
  });
  node.addEventListener("pointerleave", hide);
}

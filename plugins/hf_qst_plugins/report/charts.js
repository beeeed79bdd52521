"use strict";
// Lines and bars as SVG, drawn to the width of the page, with the values under the pointer.
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 260, LEFT = 62, RIGHT = 12, TOP = 10, BOTTOM = 36;
const tip = document.getElementById("tip");

function element(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

function color(index) { return `var(--s${index % 8})`; }

function short(value) {
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= limit) return +(value / limit).toPrecision(3) + letter;
  return String(+value.toPrecision(3));
}

function exact(value) { return Number.isInteger(value) ? value.toLocaleString("en") : String(+value.toPrecision(6)); }

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(value);
  return found;
}

function frame(box, chart, width, low, high) {
  const svg = element(box, "svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": chart.title });
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low || 1));
  for (const value of ticks(low, high, 5)) {
    element(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), stroke: "var(--line)" });
    element(svg, "text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value));
  }
  element(svg, "text", { x: 12, y: HEIGHT / 2, transform: `rotate(-90 12 ${HEIGHT / 2})`, "text-anchor": "middle" }, chart.y);
  return { svg, y };
}

function hover(svg, describe, marker) {
  svg.addEventListener("pointermove", (event) => {
    const place = svg.getBoundingClientRect();
    const found = describe(((event.clientX - place.left) * svg.viewBox.baseVal.width) / place.width);
    marker.setAttribute("x1", found.x);
    marker.setAttribute("x2", found.x);
    marker.setAttribute("visibility", "visible");
    tip.hidden = false;
    tip.textContent = found.text;
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6);
    tip.style.left = Math.max(6, left) + "px";
    tip.style.top = Math.max(6, event.clientY - tip.offsetHeight - 10) + "px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    marker.setAttribute("visibility", "hidden");
  });
}

function lines(box, chart, width) {
  const points = chart.series.flatMap((one) => one.points);
  const xs = [...new Set(points.map((point) => point[0]))].sort((a, b) => a - b);
  const values = points.map((point) => point[1]);
  const least = Math.min(...values), most = Math.max(...values), space = (most - least || Math.abs(most) || 1) * 0.05;
  const { svg, y } = frame(box, chart, width, least - space, most + space);
  const x = (value) => LEFT + ((width - LEFT - RIGHT) * (value - xs[0])) / (xs[xs.length - 1] - xs[0] || 1);
  for (const value of ticks(xs[0], xs[xs.length - 1], Math.max(2, Math.floor(width / 90))).filter(Number.isInteger))
    element(svg, "text", { x: x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, short(value));
  element(svg, "text", { x: (LEFT + width) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, chart.x);
  chart.series.forEach((one, index) => {
    const path = one.points.map((point) => `${x(point[0])},${y(point[1])}`).join(" ");
    element(svg, "polyline", { points: path, fill: "none", stroke: color(index), "stroke-width": 2 });
    if (one.points.length <= 60)
      for (const point of one.points) element(svg, "circle", { cx: x(point[0]), cy: y(point[1]), r: 3, fill: color(index) });
  });
  const marker = element(svg, "line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "var(--soft)", visibility: "hidden" });
  hover(svg, (at) => {
    const nearest = xs.reduce((best, value) => (Math.abs(x(value) - at) < Math.abs(x(best) - at) ? value : best), xs[0]);
    const found = chart.series.flatMap((one) =>
      one.points.filter((point) => point[0] === nearest).map((point) => `${one.name}: ${exact(point[1])}`));
    return { x: x(nearest), text: `${chart.x} ${exact(nearest)}\n${found.join("\n")}` };
  }, marker);
}

function bars(box, chart, width) {
  const most = Math.max(...chart.series.flatMap((one) => one.values), 0);
  const { svg, y } = frame(box, chart, width, 0, most || 1);
  const group = (width - LEFT - RIGHT) / chart.categories.length, bar = (group * 0.8) / chart.series.length;
  chart.series.forEach((one, index) => one.values.forEach((value, i) =>
    element(svg, "rect", {
      x: LEFT + i * group + group * 0.1 + index * bar, y: y(value), width: bar, height: y(0) - y(value), fill: color(index),
    })));
  if (group > 60)
    chart.categories.forEach((name, i) =>
      element(svg, "text", { x: LEFT + (i + 0.5) * group, y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, name.split(".").slice(-2).join(".")));
  const marker = element(svg, "line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "var(--soft)", visibility: "hidden" });
  hover(svg, (at) => {
    const i = Math.max(0, Math.min(chart.categories.length - 1, Math.floor((at - LEFT) / group)));
    const found = chart.series.map((one) => `${one.name}: ${exact(one.values[i])}`);
    return { x: LEFT + (i + 0.5) * group, text: `${chart.categories[i]}\n${found.join("\n")}` };
  }, marker);
}

function legend(box, chart) {
  if (chart.series.length < 2) return;
  const list = document.createElement("div");
  list.className = "legend";
  chart.series.forEach((one, index) => {
    const entry = document.createElement("span"), square = document.createElement("i");
    square.style.background = color(index);
    entry.append(square, one.name);
    list.append(entry);
  });
  box.append(list);
}

const charts = JSON.parse(document.getElementById("charts").textContent);

function draw() {
  for (const box of document.querySelectorAll(".chart")) {
    const chart = charts[box.dataset.chart];
    box.replaceChildren();
    ({ lines, bars })[chart.kind](box, chart, Math.max(280, box.clientWidth));
    legend(box, chart);
  }
}

draw();
addEventListener("resize", draw);

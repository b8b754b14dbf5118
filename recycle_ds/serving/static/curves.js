// The run's curves, drawn as SVG: losses over the steps, and the acceptance that the evaluations measured.

import { call } from "./api.js";
import { $, draw, make, number, percent } from "./dom.js";

const HEIGHT = 300;
const EDGE = { left: 52, right: 16, top: 12, bottom: 40 };
const DASHES = [null, "7 3", "2 3", "9 3 2 3", "12 4", "4 4"];

// Fetches /run.json again each time, so that a run that is still training shows its newest steps
export async function showRun() {
  let run;
  try {
    run = await (await call("run.json")).json();
  } catch (error) {
    $("run-summary").textContent = error.message;
    $("charts").replaceChildren();
    return;
  }
  const charts = [lossChart(run), acceptanceChart(run)].filter((chart) => chart.series.length > 0);
  $("run-summary").textContent = summary(run);
  $("charts").replaceChildren(...charts.map(figure));
}

function summary(run) {
  const last = run.steps.at(-1);
  if (last === undefined) return "No step has been logged yet.";
  const parts = [`${last.toLocaleString("en")} steps`, `backbone loss ${number(run.backbone_loss.at(-1), 3)}`];
  if (run.eval.steps.length) parts.push(`${number(run.eval.loss.at(-1), 3)} on validation data`);
  if (run.resumed?.length) parts.push(`resumed at step ${run.resumed.join(", ")}`);
  return parts.join(" · ");
}

function lossChart(run) {
  const series = [curve("backbone", 0, run.steps, run.backbone_loss)];
  run.recycle_loss.forEach((values, i) => series.push(curve(`recycle, depth ${i + 1}`, i + 1, run.steps, values)));
  series.push({ ...curve("backbone, validation", 0, run.eval.steps, run.eval.loss), dots: true });
  return chart("Loss, nats per token", series, (value, digits = 3) => number(value, digits), null, run.resumed);
}

function acceptanceChart(run) {
  const series = run.eval.acceptance.map((values, i) => ({ ...curve(`draft ${i + 1}`, i + 1, run.eval.steps, values), line: true, dots: true }));
  return chart("Acceptance by draft position, validation", series, (value) => percent(value), [0, 1], run.resumed, run.steps);
}

function curve(name, colour, steps, values) {
  const points = steps.map((step, i) => [step, values[i]]);
  return { name, colour, points, line: true, dots: false };
}

function chart(title, all, format, range, resumed, steps = []) {
  const series = all.filter((each) => each.points.some(([, value]) => value !== null));
  series.forEach((each) => {
    if (each.dots && each.name.includes("validation")) each.line = false;
  });
  const xs = [...series.flatMap((each) => each.points.map(([step]) => step)), ...steps.slice(-1)];
  const ys = series.flatMap((each) => each.points.map(([, value]) => value)).filter((value) => value !== null);
  const low = Math.min(...ys);
  const high = Math.max(...ys);
  const room = Math.max((high - low) * 0.06, 1e-3);
  return { title, series, format, x: [0, Math.max(1, ...xs)], y: range ?? [low - room, high + room], resumed: resumed ?? [] };
}

function figure(data) {
  const plot = make("div", { class: "plot" });
  const readout = make("p", { class: "readout soft", "aria-live": "off" }, hint(data));
  const table = make("details", { class: "numbers" }, make("summary", {}, "Numbers"));
  table.addEventListener("toggle", () => table.open && table.children.length === 1 && table.append(numbers(data)));
  const element = make("figure", {}, make("figcaption", {}, data.title), plot, legend(data), readout, table);
  let width = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth === width || plot.clientWidth === 0) return;
    width = plot.clientWidth;
    plot.replaceChildren(svg(data, width, readout));
  }).observe(plot);
  return element;
}

function hint(data) {
  return data.series.some((each) => each.points.length > 1) ? "Point at the curves to read their values." : "";
}

function legend({ series }) {
  return make(
    "ul",
    { class: "keys-list" },
    ...series.map((each) => {
      const sample = draw("svg", { width: 26, height: 12, viewBox: "0 0 26 12", "aria-hidden": "true", focusable: "false" });
      sample.append(...mark(each, [[2, 6], [24, 6]], [[13, 6]]));
      return make("li", {}, sample, each.name);
    }),
  );
}

function mark(each, ends, dots) {
  const colour = `curve-${each.colour % 7}`;
  const parts = [];
  if (each.line) parts.push(draw("path", { class: `curve ${colour}`, d: path(ends), "stroke-dasharray": DASHES[each.colour % DASHES.length] }));
  if (each.dots) parts.push(...dots.map(([x, y]) => draw("circle", { class: `dot ${colour}`, cx: x, cy: y, r: 3.5 })));
  return parts;
}

function svg(data, width, readout) {
  const [x, y] = scales(data, width);
  const image = draw("svg", { class: "chart", width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": description(data) });
  const levels = ticks(data.y, 5);
  const digits = levels.length > 1 ? Math.max(0, -Math.floor(Math.log10(levels[1] - levels[0]) + 1e-9)) : 2;
  for (const value of levels) {
    image.append(draw("line", { class: "grid-line", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }));
    image.append(draw("text", { class: "tick", x: EDGE.left - 8, y: y(value) + 4, "text-anchor": "end" }, data.format(value, digits)));
  }
  for (const value of ticks(data.x, Math.max(2, Math.floor(width / 110)))) {
    image.append(draw("text", { class: "tick", x: x(value), y: HEIGHT - EDGE.bottom + 18, "text-anchor": "middle" }, value.toLocaleString("en")));
  }
  image.append(draw("text", { class: "tick", x: width - EDGE.right, y: HEIGHT - 4, "text-anchor": "end" }, "step"));
  image.append(draw("line", { class: "axis", x1: EDGE.left, x2: width - EDGE.right, y1: HEIGHT - EDGE.bottom, y2: HEIGHT - EDGE.bottom }));
  for (const step of data.resumed) image.append(draw("line", { class: "resumed", x1: x(step), x2: x(step), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }));
  for (const each of data.series) {
    const places = each.points.map(([step, value]) => (value === null ? null : [x(step), y(value)]));
    image.append(...mark(each, places, places.filter(Boolean)));
  }
  follow(image, data, x, readout);
  return image;
}

function scales(data, width) {
  const scale = ([from, to], start, end) => (value) => start + ((value - from) / (to - from)) * (end - start);
  return [scale(data.x, EDGE.left, width - EDGE.right), scale(data.y, HEIGHT - EDGE.bottom, EDGE.top)];
}

// Values that are missing leave a gap
function path(places) {
  let pen = "M";
  return places
    .map((place) => {
      const step = place && `${pen}${place[0].toFixed(1)} ${place[1].toFixed(1)}`;
      pen = place ? "L" : "M";
      return step;
    })
    .filter(Boolean)
    .join("");
}

function ticks([from, to], number) {
  const raw = (to - from) / number;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= raw);
  const found = [];
  for (let i = Math.ceil(from / step); i * step <= to + step * 1e-6; i += 1) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// A vertical line at the pointer, and the values there below the chart
function follow(image, data, x, readout) {
  const line = draw("line", { class: "cursor", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
  image.append(line);
  image.addEventListener("pointermove", (event) => {
    const at = event.clientX - image.getBoundingClientRect().left;
    const nearest = (points) => points.reduce((best, point) => (Math.abs(x(point[0]) - at) < Math.abs(x(best[0]) - at) ? point : best));
    const all = data.series.map((each) => [each.name, nearest(each.points)]);
    const step = nearest(all.map(([, point]) => point))[0];
    line.setAttribute("x1", x(step));
    line.setAttribute("x2", x(step));
    line.setAttribute("visibility", "visible");
    const here = all.filter(([, point]) => point[0] === step && point[1] !== null);
    readout.textContent = [`step ${step.toLocaleString("en")}`, ...here.map(([name, point]) => `${name} ${data.format(point[1])}`)].join(" · ");
  });
  image.addEventListener("pointerleave", () => {
    line.setAttribute("visibility", "hidden");
    readout.textContent = hint(data);
  });
}

function description(data) {
  const each = data.series.map(({ name, points }) => {
    const known = points.filter(([, value]) => value !== null);
    const [first, last] = [known[0], known.at(-1)];
    const end = `${data.format(last[1])} at step ${last[0]}`;
    return known.length === 1 ? `${name}: ${end}` : `${name}: from ${data.format(first[1])} at step ${first[0]} to ${end}`;
  });
  return `${data.title}. ${each.join("; ")}.`;
}

// A dozen steps as a table: the text alternative of the drawing
function numbers(data) {
  const steps = [...new Set(data.series.flatMap((each) => each.points.map(([step]) => step)))].sort((a, b) => a - b);
  const shown = steps.filter((_, i) => i === steps.length - 1 || i % Math.ceil(steps.length / 12) === 0);
  const head = make("tr", {}, make("th", { scope: "col" }, "step"), ...data.series.map(({ name }) => make("th", { scope: "col" }, name)));
  const rows = shown.map((step) => {
    const cells = data.series.map(({ points }) => points.find((point) => point[0] === step)?.[1] ?? null);
    return make("tr", {}, make("th", { scope: "row" }, step.toLocaleString("en")), ...cells.map((value) => make("td", {}, value === null ? "" : data.format(value))));
  });
  const caption = make("caption", { class: "unseen" }, data.title);
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `Numbers: ${data.title}` }, make("table", {}, caption, make("thead", {}, head), make("tbody", {}, ...rows)));
}

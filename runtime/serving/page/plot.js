// The schedule as a plot: the level of every step, and below it the figures that decided.

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 52; // pixels, for the numbers of the axis
const RIGHT = 12;
const UPPER = { top: 22, bottom: 92 };
const LOWER = { top: 120, bottom: 240 };
const HEIGHT = 274;

/** A trace as an SVG, as wide as told in pixels, and the key of its curves. */
export function plotSchedule(trace, width) {
  const svg = make("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img" });
  const figures = figuresOf(trace);
  svg.append(make("title", {}, `level and ${figures.name} of every step`));
  const count = trace.steps.length;
  const x = (step) => LEFT + ((step + 0.5) / count) * (width - LEFT - RIGHT);
  const frame = ({ top, bottom }) =>
    svg.append(make("rect", { x: LEFT, y: top, width: width - LEFT - RIGHT, height: bottom - top, class: "frame" }));
  frame(UPPER);
  frame(LOWER);
  drawLevels(svg, trace, x);
  drawFigures(svg, figures, x);
  for (let step = 0; step < count; step += Math.max(1, 5 * Math.ceil(count / 50)))
    svg.append(make("text", { x: x(step), y: LOWER.bottom + 14, class: "middle" }, step + 1));
  svg.append(make("text", { x: (LEFT + width - RIGHT) / 2, y: LOWER.bottom + 30, class: "middle" }, "step"));
  return [svg, keyOf(figures)];
}

function drawLevels(svg, trace, x) {
  const computed = trace.steps.map(({ level }) => level).filter((level) => level !== null);
  const levels = [...new Set(computed)].sort((one, other) => one - other);
  const place = (index) => UPPER.bottom - ((index + 1) / (levels.length + 1)) * (UPPER.bottom - UPPER.top);
  svg.append(make("text", { x: LEFT, y: UPPER.top - 8 }, "level; hollow: predicted"));
  levels.forEach((level, index) => svg.append(make("text", { x: LEFT - 6, y: place(index) + 4, class: "end" }, level)));
  let last = computed[0]; // a predicted step stands on the level of the computed one before it
  for (const { step, level } of trace.steps) {
    last = level ?? last;
    const at = { cx: x(step), cy: place(levels.indexOf(last)), r: Math.min(3, (x(1) - x(0)) * 0.4) };
    svg.append(make("circle", { ...at, class: level === null ? "hollow" : "filled" }));
  }
}

/** The curves of the lower panel: name of the axis, and [label, class, [[step, value]]]. */
function figuresOf({ steps, schedule }) {
  const curve = (value) => steps.map((one) => [one.step, value(one)]).filter(([, found]) => found > 0);
  const flat = (value) => steps.map(({ step }) => [step, value]);
  const expected = curve(({ figures }) => figures?.expected_error);
  if (expected.length) {
    const curves = [["expected error", "curve-0", expected]];
    if (schedule.reuse?.tolerance) curves.push(["tolerance", "limit", flat(schedule.reuse.tolerance)]);
    return { name: "error of the picture, if predicted", curves };
  }
  const patches = [...new Set(steps.flatMap(({ statistic }) => Object.keys(statistic)))];
  const curves = patches.map((patch, index) => {
    return [`σ of level ${patch}`, `curve-${index % 3}`, curve(({ statistic }) => statistic[patch])];
  });
  if (schedule.tau && !schedule.smooth) curves.push(["τ", "limit", flat(schedule.tau)]);
  for (const [patch, smooth] of Object.entries((schedule.tau && schedule.smooth) || {}))
    curves.push([`τ of level ${patch}`, `limit curve-${patches.indexOf(patch) % 3}`, smooth.map((value, step) => [step, schedule.tau * value])]);
  return { name: "third difference", curves: curves.filter(([, , points]) => points.length) };
}

function drawFigures(svg, { name, curves }, x) {
  const values = curves.flatMap(([, , points]) => points.map(([, value]) => Math.log10(value)));
  const [low, high] = values.length ? [Math.min(...values) - 0.05, Math.max(...values) + 0.05] : [-1, 0];
  const y = (value) => LOWER.bottom - ((Math.log10(value) - low) / (high - low)) * (LOWER.bottom - LOWER.top);
  svg.append(make("text", { x: LEFT, y: LOWER.top - 8 }, values.length ? name : "the run was too short for figures"));
  for (const tick of ticks(low, high)) {
    svg.append(make("line", { x1: LEFT - 4, x2: LEFT, y1: y(tick), y2: y(tick), class: "tick" }));
    svg.append(make("text", { x: LEFT - 6, y: y(tick) + 4, class: "end" }, label(tick)));
  }
  for (const [, look, points] of curves)
    svg.append(make("polyline", { points: points.map(([step, value]) => `${x(step)},${y(value)}`).join(" "), class: look }));
}

/** What the curves mean, as a list that wraps where the screen is narrow. */
function keyOf({ curves }) {
  const list = document.createElement("ul");
  for (const [text, look] of curves) {
    const entry = document.createElement("li");
    const sample = make("svg", { width: 20, height: 10, "aria-hidden": true });
    sample.append(make("line", { x1: 0, x2: 20, y1: 5, y2: 5, class: look }));
    entry.append(sample, ` ${text}`);
    list.append(entry);
  }
  return list;
}

/** Round numbers between two powers of ten: 1, 2 and 5 times a power, or powers alone where that is many. */
function ticks(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= high; power += 1)
    for (const part of high - low > 1.5 ? [1] : [1, 2, 5]) found.push(part * 10 ** power);
  return found.filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high);
}

function label(value) {
  return value >= 0.001 ? String(Number(value.toPrecision(2))) : value.toExponential(0);
}

function make(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

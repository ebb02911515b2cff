// The two charts: a rocket's speed over time, and the messages per second of the whole fleet.

import {byId} from "./dom.js";
import {describe} from "./messages.js";
import {duration, exact, local, number} from "./format.js";

const HEIGHT = 200;  // CSS pixels
const MARKS = {  // by what is marked: its colour's name in the style sheet, and its dashes
  gap: ["--warn", [2, 4]],
  mission: ["--soft", [6, 4]],
  explosion: ["--danger", []],
};

let plot = null;
let entries = [];  // what the plot shows

/** Return what is marked at an entry: "gap", "mission", "explosion" or "". */
function markOf({type, missing, mission, number: place}) {
  if (type === "RocketExploded") return "explosion";
  if (missing > 0) return "gap";
  return mission !== null && place > 1 ? "mission" : "";
}

/** Return a colour of the style sheet as a canvas takes it. */
function colour(name) {
  const node = byId("readout");
  node.style.color = `var(${name})`;
  const found = getComputedStyle(node).color;
  node.style.color = "";
  return found;
}

/** Return the labels of the time axis, as exact as the seconds between them ask for. */
function timeLabels(plotted, times, axis, space, step) {
  const [first, end] = step < 60 ? [11, 19] : step < 86400 ? [11, 16] : [0, 10];
  return times.map((time) => local(new Date(time * 1000)).slice(first, end));
}

function drawMarks({ctx, bbox, valToPos}) {
  ctx.save();
  for (const entry of entries) {
    const mark = markOf(entry);
    if (!mark) continue;
    const x = Math.round(valToPos(Date.parse(entry.time) / 1000, "x", true));
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    const [name, dashes] = MARKS[mark];
    ctx.strokeStyle = colour(name);
    ctx.setLineDash(dashes);
    ctx.globalAlpha = mark === "explosion" ? 1 : 0.5;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

/** Say what the pointer is at, or what the whole chart shows. */
function showReadout(place) {
  const entry = entries[place];
  const readout = byId("readout");
  if (!entry) {
    readout.textContent = entries.length ? "Point at the chart to read it; drag to zoom." : "";
    return;
  }
  const speed = entry.speed === null ? "unknown" : number(entry.speed);
  const missing = entry.missing ? `, ${number(entry.missing)} missing before it` : "";
  readout.textContent = `${exact(entry.time)}: speed ${speed}; message `
    + `${number(entry.number)}${missing}: ${describe(entry)}`;
}

function makePlot(node, data) {
  const axis = {stroke: colour("--soft"), grid: {stroke: colour("--line"), width: 1}};
  const options = {
    width: node.clientWidth,
    height: HEIGHT,
    legend: {show: false},
    cursor: {y: false},
    axes: [{...axis, values: timeLabels}, {...axis, size: 70, values: (_, values) => values.map((value) => number(value))}],
    series: [{}, {
      stroke: colour("--accent"),
      width: 2,
      points: {show: data[0].length < 60},
      paths: uPlot.paths.stepped({align: 1}),
    }],
    hooks: {
      draw: [drawMarks],
      setCursor: [({cursor}) => showReadout(cursor.idx)],
      setScale: [({scales, data: [times]}) => {
        const {min, max} = scales.x;
        byId("unzoom").hidden = !times.length || (min <= times[0] && max >= times.at(-1));
      }],
    },
  };
  return new uPlot(options, data, node);
}

/** Return in words what the chart shows. */
function describeChart() {
  const known = entries.filter(({speed}) => speed !== null);
  if (!known.length) return "Speed over time: not known yet";
  const speeds = known.map(({speed}) => speed);
  const least = number(Math.min(...speeds.slice(-5000)));
  const most = number(Math.max(...speeds.slice(-5000)));
  const span = duration(Date.parse(known.at(-1).time) - Date.parse(known[0].time));
  const gaps = entries.filter((entry) => markOf(entry) === "gap").length;
  return `Speed over time: from ${least} to ${most} within ${span}, now ${number(speeds.at(-1))}; `
    + `${gaps} gaps`;
}

/** Show a rocket's trace. A zoom is kept while the same rocket gets news. */
export function showSpeeds(trace, isOther) {
  const node = byId("chart");
  entries = [...trace].sort((a, b) => Date.parse(a.time) - Date.parse(b.time));
  const times = entries.map(({time}) => Date.parse(time) / 1000);
  const data = [times, entries.map(({speed}) => speed)];
  node.ariaLabel = describeChart();
  if (isOther || !plot) {
    plot?.destroy();
    plot = makePlot(node, data);
    showReadout(null);
    return;
  }
  const isZoomed = !byId("unzoom").hidden;
  plot.setData(data, !isZoomed);
  if (isZoomed) plot.redraw();
}

export function startCharts() {
  byId("unzoom").addEventListener("click", () => plot.setData(plot.data));
  new ResizeObserver(([{contentRect: {width}}]) => {
    if (width) plot?.setSize({width, height: HEIGHT});
  }).observe(byId("chart"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (plot) showSpeeds(entries, true);
  });
}

const MOST_RATES = 90;  // polls
let rates = [];  // [time in s, messages a second or null in an outage]
let before = null;  // the total of the poll before, and when it was
let ratePlot = null;

function drawRates() {
  const node = byId("rates");
  const data = [rates.map(([time]) => time), rates.map(([, rate]) => rate)];
  if (ratePlot) {
    ratePlot.setData(data);
    return;
  }
  const options = {
    width: node.clientWidth || 200, height: 40, legend: {show: false}, cursor: {show: false},
    axes: [{show: false}, {show: false}],
    series: [{}, {stroke: colour("--accent"), width: 1.5, points: {show: false}}],
  };
  ratePlot = new uPlot(options, data, node);
}

/** Add the rate since the poll before. Without an answer there is none: the curve has a gap. */
export function addRate(messages) {
  const time = Date.now() / 1000;
  const isKnown = before !== null && messages !== null && messages >= before.messages;
  const rate = isKnown ? (messages - before.messages) / (time - before.time) : null;
  before = messages === null ? null : {messages, time};
  rates = [...rates, [time, rate]].slice(-MOST_RATES);
  byId("rate").textContent = rate === null ? "–" : number(Math.round(rate * 10) / 10);
  drawRates();
}

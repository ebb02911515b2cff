// The two charts, drawn by uPlot; what is marked in them is drawn by hand on its canvas.

import {local, nameOf, number} from "./format.js";

/* global uPlot */

const colour = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
const pixels = (count) => count * devicePixelRatio;
const sizeOf = ({clientWidth, clientHeight}) => ({width: clientWidth, height: clientHeight});

const axis = {
  font: "11px system-ui, sans-serif",
  stroke: () => colour("--soft"),
  grid: {stroke: () => colour("--line"), width: 1},
  ticks: {show: false},
  values: (plot, levels) => levels.map(number),
};
const line = {width: 1.5, stroke: () => colour("--accent"), fill: () => colour("--wash")};

/** Make a chart that keeps to the size of its holder, and to the colours of the page. */
function makeChart(holder, options) {
  const plot = new uPlot({...sizeOf(holder), legend: {show: false}, ...options}, [[], []], holder);
  new ResizeObserver(() => plot.setSize(sizeOf(holder))).observe(holder);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plot.redraw());
  for (const event of ["beforeprint", "afterprint"]) {
    addEventListener(event, () => {
      document.documentElement.classList.toggle("printing", event === "beforeprint");
      plot.redraw();
    });
  }
  return plot;
}

/** Make the chart of rates; where one is null, the curve has a gap. */
export function rateChart(holder) {
  let range = [0, 1];
  const plot = makeChart(holder, {
    cursor: {show: false},
    padding: [4, 4, 4, 0],
    scales: {x: {range: () => range}, y: {range: (_, low, high) => [0, Math.max(1, high) * 1.1]}},
    axes: [{show: false}, {...axis, size: 34, space: 20}],
    series: [{}, {...line, points: {show: false}}],
  });
  return {
    show(samples, from, to) {
      range = [from / 1000, to / 1000];
      plot.setData([samples.map(({at}) => at / 1000), samples.map(({rate}) => rate)]);
    },
  };
}

// Speed over time /////////////////////////////////////////////////////////////////////////////////

/** Return the labels of a time axis: the time, and the date below it. */
function timeLabels(plot, times) {
  return times.map((seconds) => local(seconds * 1000).split(" ").reverse().join("\n"));
}

/** Return a time for each entry, in seconds; one that runs backwards counts as the one before. */
function timesOf(entries) {
  let last = -Infinity;
  return entries.map(({time}) => (last = Math.max(last, Date.parse(time) / 1000)));
}

const xRange = (plot, low, high) => (low < high ? [low, high] : [(low ?? 0) - 1, (high ?? 0) + 1]);

const yRange = (plot, low, high) => [Math.min(0, low * 1.1), Math.max(1, high * 1.1)];

/** Make the chart of a rocket's speed; read() is called with the entry at the pointer, or null. */
export function speedChart(holder, read) {
  let entries = [];
  const plot = makeChart(holder, {
    padding: [18, 30, 0, 0],
    cursor: {y: false, drag: {x: true, y: false}},
    scales: {x: {range: xRange}, y: {range: yRange}},
    axes: [{...axis, size: 40, space: 84, values: timeLabels}, {...axis, size: 66}],
    series: [{}, {...line, paths: uPlot.paths.stepped({align: 1})}],
    hooks: {
      drawAxes: [(drawn) => inside(drawn, entries, drawGaps)],
      draw: [drawMissions, drawExplosion].map((draw) => (drawn) => inside(drawn, entries, draw)),
      setCursor: [({cursor}) => read(entries[cursor.idx] ?? null)],
    },
  });
  return {
    /** Show entries; if they are of the same rocket, what is zoomed to and what is read stay. */
    show(shown, isOther) {
      const {min, max} = plot.scales.x;
      const before = plot.data[0];
      const stays = !isOther && (min > before[0] || max < before.at(-1));
      const read = isOther ? null : entries[plot.cursor.idx]?.number;
      entries = shown;
      const times = timesOf(entries);
      plot.batch(() => {
        plot.setData([times, entries.map(({speed}) => speed)], !stays);
        if (stays) plot.setScale("x", {min, max});
      });
      const place = entries.findIndex((entry) => entry.number === read);
      if (place < 0) return;
      plot.setCursor({left: plot.valToPos(times[place], "x"), top: plot.cursor.top});
    },
  };
}

/** Draw within the plot and above it; the function gets the box and the place of an entry. */
function inside(plot, entries, draw) {
  const {ctx, bbox} = plot;
  const {left, top} = bbox;
  const box = {left, top, right: left + bbox.width, bottom: top + bbox.height};
  ctx.save();
  ctx.font = `${pixels(11)}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  ctx.lineWidth = pixels(1);
  ctx.beginPath();
  ctx.rect(left, 0, bbox.width, box.bottom);
  ctx.clip();
  ctx.beginPath();
  draw(ctx, entries, box, (place) => plot.valToPos(plot.data[0][place], "x", true));
  ctx.restore();
}

/** Hatch the times in which messages are missing. */
function drawGaps(ctx, entries, box, x) {
  ctx.strokeStyle = colour("--warn");
  entries.forEach(({missing}, place) => {
    if (!missing) return;
    const right = Math.min(x(place), box.right);
    const left = Math.max(Math.min(place ? x(place - 1) : box.left, right - pixels(3)), box.left);
    for (let y = box.top; y < box.bottom && left < right; y += pixels(6)) {
      ctx.moveTo(left, y + pixels(3));
      ctx.lineTo(right, y);
    }
  });
  ctx.stroke();
}

/** Mark where missions begin whose name has room until the next. */
function drawMissions(ctx, entries, box, x) {
  const named = entries.flatMap(({mission}, place) => (mission ? [{mission, at: x(place)}] : []));
  ctx.strokeStyle = colour("--edge");
  ctx.fillStyle = colour("--soft");
  ctx.setLineDash([pixels(2), pixels(3)]);
  named.forEach(({mission, at}, place) => {
    const name = nameOf(mission);
    const left = Math.max(at, box.left) + pixels(4);  // it may begin before what is shown
    const end = Math.min(named[place + 1]?.at ?? box.right, box.right);
    if (left + ctx.measureText(name).width + pixels(4) > end) return;
    ctx.fillText(name, left, box.top - pixels(6));
    ctx.moveTo(at, 0);
    ctx.lineTo(at, box.bottom);
  });
  ctx.stroke();
}

function drawExplosion(ctx, entries, box, x) {
  const place = entries.findIndex(({type}) => type === "RocketExploded");
  if (place < 0) return;
  const at = x(place);
  const isRight = at > (box.left + box.right) / 2;  // the word is where there is more room
  ctx.strokeStyle = ctx.fillStyle = colour("--bad");
  ctx.textAlign = isRight ? "right" : "left";
  ctx.font = `bold ${ctx.font}`;
  ctx.moveTo(at, 0);
  ctx.lineTo(at, box.bottom);
  ctx.stroke();
  ctx.fillText("✖ Exploded", at + pixels(isRight ? -5 : 5), box.top + pixels(10));
}

// One rocket: its facts, its speed over time, and its history.

import {go, view} from "./address.js";
import {get, getPages} from "./api.js";
import {speedChart} from "./charts.js";
import {byId, element, setText} from "./dom.js";
import {exact, local, nameOf, number, plural, titleOf} from "./format.js";
import {findRocket, showAge, showStatus, speedOf} from "./list.js";
import {describe, missingRanges, tell, trace} from "./messages.js";
import {PAGE, addPager, showPager} from "./pager.js";

let opened = null;  // {channel, rocket, messages (by number), entries, from (in the history)}
let chart = null;

/** Open the rocket that the view names, or close the one that is open. */
export function openRocket() {
  if ((opened?.channel ?? "") === view.rocket) return;
  const closed = opened?.channel;
  opened = null;
  byId("detail").hidden = !view.rocket;
  document.body.classList.toggle("split", view.rocket !== "");
  const row = document.querySelector(`[data-channel="${CSS.escape(view.rocket || closed)}"]`);
  row?.scrollIntoView({block: "nearest"});
  if (!view.rocket) return (row?.querySelector("a") ?? byId("q")).focus({preventScroll: true});
  opened = {channel: view.rocket, rocket: null, messages: new Map(), entries: [], from: 0};
  setText(byId("detail-title"), "Rocket");
  setText(byId("detail-channel"), view.rocket);
  byId("detail").scrollTop = 0;
  byId("detail-title").focus();
  showFacts(opened, findRocket(view.rocket), "No answer about this rocket yet.");
  showMessages(opened);
}

export const titleOfOpened = () => (opened?.rocket ? titleOf(opened.rocket) : "");

/** Show what is new of the rocket that is open. Raise Failure. */
export async function refreshDetail(signal) {
  const mine = opened;
  const path = `rockets/${mine.channel}`;
  try {
    showFacts(mine, findRocket(mine.channel) ?? await get(path, signal));
    await readMessages(mine, path, signal);
  } catch (error) {
    if (error.status !== 404) throw error;
    mine.messages.clear();
    showFacts(mine, null, "No message has come on this channel yet.");
  }
}

/** Read the messages that are not held: behind the last, then in the ranges that miss some. */
async function readMessages(mine, path, signal) {
  const {rocket: {lastMessageNumber, missingMessages}, messages} = mine;
  const count = lastMessageNumber - missingMessages;
  if (messages.size === count) return;
  if (messages.size > count) messages.clear();  // the service began anew
  const last = trace(messages.values()).at(-1)?.number ?? 0;
  const read = async (range) => {
    const pages = await getPages(`${path}/messages?${new URLSearchParams(range)}`, signal);
    for (const message of pages.flatMap((page) => page.messages)) {
      messages.set(message.metadata.messageNumber, message);
    }
  };
  if (last < lastMessageNumber) await read({after: last});
  for (const range of missingRanges(trace(messages.values()))) {
    if (messages.size >= count) break;
    await read(range);
  }
  showMessages(mine);
}

function showMessages(mine) {
  const before = mine.entries.length;
  mine.entries = trace(mine.messages.values());
  if (mine !== opened) return;
  if (mine.from) mine.from += mine.entries.length - before;  // the lines that are read stay
  byId("chart").hidden = !mine.entries.length;
  byId("chart").ariaLabel = summary(mine.entries);
  if (mine.entries.length) chart ??= speedChart(byId("chart"), showReading);
  chart?.show(mine.entries, before === 0);
  if (!byId("chart").matches(":hover")) showReading(null);
  showHistory();
}

/** Show a rocket, or say why there is none to show. */
function showFacts(mine, rocket, problem = "") {
  mine.rocket = rocket;
  if (mine !== opened) return;
  byId("detail-body").hidden = !rocket;
  setText(byId("detail-problem"), rocket ? "" : problem);
  if (!rocket) return;
  const missing = rocket.missingMessages;
  setText(byId("detail-title"), nameOf(rocket.type));
  setText(byId("now-speed"), speedOf(rocket));
  setText(byId("now-doubt"), missing ? `${number(missing)} missing` : "");
  showStatus(byId("now-status"), rocket);
  setText(byId("fact-mission"), nameOf(rocket.mission));
  for (const key of ["launchedAt", "updatedAt"]) {
    const time = rocket[key];
    setText(byId(`fact-${key}`), time ? local(time) : "unknown");
    byId(`fact-${key}`).title = time ? `${exact(time)}; as sent: ${time}` : "";
  }
  setText(byId("fact-lastMessageNumber"), number(rocket.lastMessageNumber));
  showAge(byId("now-age"), rocket);
}

function showReading(entry) {
  const isKnown = opened?.entries.some(({speed}) => speed !== null);
  const how = "Point at the curve to read it; drag to look closer, click twice to see all.";
  const hint = isKnown ? how : "There is nothing to draw yet.";
  const told = entry && `${exact(entry.time)} · ${number(entry.number)}: ${describe(entry)}`;
  setText(byId("readout"), entry ? `${told} → speed ${speedText(entry)}` : hint);
}

const speedText = ({speed}) => (speed === null ? "unknown" : number(speed));

function summary(entries) {
  const speeds = entries.map(({speed}) => speed).filter((speed) => speed !== null);
  const most = speeds.reduce((high, speed) => Math.max(high, speed), -Infinity);
  const missing = entries.reduce((sum, entry) => sum + entry.missing, 0);
  const [first, last, peak] = [speeds[0], speeds.at(-1), most].map((speed) => number(speed ?? 0));
  const flight = `Speed from ${first} to ${last}, at most ${peak}`;
  const gaps = missing ? `${plural(missing, "message")} not received` : "none missing";
  return `${speeds.length ? flight : "Speed unknown"}; ${gaps}. The history has every value.`;
}

function showHistory() {
  const {entries, from} = opened;
  showPager(byId("history-pages"), from, entries.length);
  byId("history").replaceChildren();
  for (const entry of entries.toReversed().slice(from, from + PAGE)) {
    byId("history").append(messageLine(entry), ...(entry.missing ? [gapLine(entry)] : []));
  }
}

function messageLine(entry) {
  const [text, name] = tell(entry);
  const event = element("td", `event ${entry.type === "RocketExploded" ? "bad" : ""}`, text);
  if (name !== null) event.append(" ", element("bdi", "", nameOf(name)));
  const [day, clock] = local(entry.time).split(" ");
  const time = element("td", "time", element("span", "day", `${day} `), clock);
  time.title = `${exact(entry.time)}; as sent: ${entry.time}`;
  const place = element("td", "number", number(entry.number));
  return element("tr", "", place, event, element("td", "speed", speedText(entry)), time);
}

function gapLine({number: after, missing}) {
  const [first, last] = [number(after - missing), number(after - 1)];
  const numbers = missing === 1 ? `number ${first}` : `numbers ${first} to ${last}`;
  const cell = element("td", "", `${plural(missing, "message")} not received: ${numbers}`);
  cell.colSpan = 4;
  return element("tr", "gap", cell);
}

export function startDetail() {
  byId("close").addEventListener("click", () => go({rocket: ""}));
  document.addEventListener("keydown", ({key, target}) => {
    if (key === "Escape" && opened && !target.matches("input, select")) go({rocket: ""});
  });
  addPager(byId("history-pages"), (from) => {
    opened.from = from;
    showHistory();
  });
}

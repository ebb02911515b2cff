// The rocket that is open: its state, its speed over time, and its history.

import {go, view} from "./address.js";
import {Failure, get, getPages} from "./api.js";
import {showSpeeds, startCharts} from "./charts.js";
import {byId, element, setText} from "./dom.js";
import {STATUSES, exact, local, nameOf, number, titleOf} from "./format.js";
import {silenceOf, speedOf} from "./list.js";
import {missingRanges, tell, trace} from "./messages.js";
import {PAGE, addPager, showPager} from "./pager.js";

let channel = "";  // of the rocket that is shown
let messages = new Map();  // by number, as far as they are known
let from = 0;  // the place of the first line of the history that is shown

const path = () => `rockets/${channel}`;

function keep(pages) {
  for (const page of pages) {
    for (const message of page.messages) messages.set(message.metadata.messageNumber, message);
  }
}

/** Read what is new: what is behind the last message, and what has come late in the gaps. */
async function readNews(rocket, signal) {
  const stored = rocket.lastMessageNumber - rocket.missingMessages;
  const last = Math.max(0, ...[...messages.keys()].slice(-1));
  keep(await getPages(`${path()}/messages?after=${last}`, signal));
  if (messages.size >= stored) return;
  for (const {after, before} of missingRanges(trace([...messages.values()]))) {
    keep(await getPages(`${path()}/messages?after=${after}&before=${before}`, signal));
    if (messages.size >= stored) break;
  }
  messages = new Map([...messages].sort(([a], [b]) => a - b));
}

function showFacts(rocket) {
  setText(byId("detail-title"), titleOf(rocket));
  setText(byId("detail-channel"), rocket.channel);
  setText(byId("now-speed"), speedOf(rocket));
  const {missingMessages: missing} = rocket;
  setText(byId("now-doubt"), missing ? `in doubt: ${number(missing)} missing` : "");
  byId("now-status").dataset.status = rocket.status;
  const why = rocket.explosionReason === null ? silenceOf(rocket) : nameOf(rocket.explosionReason);
  setText(byId("now-status"), STATUSES[rocket.status] + (why ? `: \u2068${why}\u2069` : ""));
  const time = (value) => (value === null ? "–" : exact(value));
  const facts = {
    mission: nameOf(rocket.mission),
    launchedAt: time(rocket.launchedAt),
    updatedAt: time(rocket.updatedAt),
    lastMessageNumber: number(rocket.lastMessageNumber),
    missingMessages: number(missing),
  };
  for (const [name, text] of Object.entries(facts)) setText(byId(`fact-${name}`), text);
}

function makeLine(entry) {
  const {sign, text, name} = tell(entry);
  const what = element("td", "what", element("span", "sign", sign), ` ${text} `);
  if (name !== null) what.append(element("bdi", "", nameOf(name)));
  if (entry.missing) what.append(element("small", "", ` ${number(entry.missing)} missing before`));
  const speed = entry.speed === null ? "–" : number(entry.speed);
  const place = element("td", "number", number(entry.number));
  const after = element("td", "speed", speed);
  const time = element("td", "time", local(new Date(entry.time)));
  return element("tr", entry.missing ? "doubtful" : "", place, what, after, time);
}

function showHistory(entries) {
  const newest = entries.toReversed();
  byId("history").replaceChildren(...newest.slice(from, from + PAGE).map(makeLine));
  showPager(byId("history-pages"), from, entries.length);
}

function showProblem(text) {
  byId("detail-problem").hidden = !text;
  setText(byId("detail-problem"), text);
  byId("detail-body").hidden = Boolean(text);
}

/** Read and show the rocket that the address names. Raise Failure if there is no answer. */
export async function showDetail(signal) {
  const isOther = view.rocket !== channel;
  byId("detail").hidden = !view.rocket;
  document.body.classList.toggle("open", Boolean(view.rocket));
  if (isOther) {
    channel = view.rocket;
    messages = new Map();
    from = 0;
    if (channel) showProblem("Reading…");
  }
  if (!channel) return;
  try {
    const rocket = await get(path(), signal);
    const stored = rocket.lastMessageNumber - rocket.missingMessages;
    const hasNews = messages.size !== stored;
    if (hasNews) await readNews(rocket, signal);
    showProblem("");
    showFacts(rocket);
    if (!hasNews && !isOther) return;
    const entries = trace([...messages.values()]);
    showSpeeds(entries, isOther);
    showHistory(entries);
  } catch (error) {
    if (!(error instanceof Failure) || error.status !== 404) throw error;
    setText(byId("detail-title"), "Rocket");
    setText(byId("detail-channel"), channel);
    showProblem("No message has come from this rocket yet. It will appear here by itself.");
  }
}

export function startDetail() {
  startCharts();
  addPager(byId("history-pages"), (place) => {
    from = place;
    showHistory(trace([...messages.values()]));
  });
  byId("close").addEventListener("click", () => {
    const row = document.querySelector(`[data-channel="${view.rocket}"] a`);
    go({rocket: ""});
    row?.focus();
  });
  addEventListener("keydown", ({key}) => {
    if (key === "Escape" && view.rocket) byId("close").click();
  });
}

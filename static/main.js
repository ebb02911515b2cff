// The page asks the service every two seconds, and shows what it answers.

import {listPath, view, watchAddress, wrong} from "./address.js";
import {Failure, get} from "./api.js";
import {addRate} from "./charts.js";
import {showDetail, startDetail} from "./detail.js";
import {announce, byId, element, setText} from "./dom.js";
import {startExport} from "./export.js";
import {duration, nameOf, titleOf} from "./format.js";
import {showMenus, showRockets, showTotals, showView, startList} from "./list.js";

const POLL_EVERY = 2000;  // ms
const COMMAND = "python3 tools/launch.py";

let asking = new AbortController();
let timer = 0;
let answeredAt = 0;  // when the last answer came, in ms; 0 before the first
let shownPath = "";  // of the list that is shown
let knownExploded = null;  // channels; null until a list was read
const told = new Map();  // explosions that were not dismissed, by channel

/** Tell of explosions among the rockets that were not known before. */
function watchExplosions(rockets, statuses) {
  const exploded = rockets.filter(({status}) => status === "exploded");
  const isFirst = knownExploded === null;
  knownExploded ??= new Set();
  for (const rocket of exploded) {
    const isNew = !isFirst && !knownExploded.has(rocket.channel);
    knownExploded.add(rocket.channel);
    if (isNew) told.set(rocket.channel, rocket);
    if (isNew) announce(`${titleOf(rocket)} exploded: ${nameOf(rocket.explosionReason)}`);
  }
  told.delete(view.rocket);
  showExplosions();
  return statuses.exploded;
}

function showExplosions() {
  byId("explosions").hidden = told.size === 0;
  const links = [...told.values()].slice(0, 5).map((rocket) => {
    const link = element("a", "", titleOf(rocket));
    link.href = `#${new URLSearchParams({rocket: rocket.channel})}`;
    return element("span", "", link, ` exploded: \u2068${nameOf(rocket.explosionReason)}\u2069 `);
  });
  const more = told.size > 5 ? [`and ${told.size - 5} more`] : [];
  byId("explosions-list").replaceChildren(...links, ...more);
  const name = view.rocket ? `${byId("detail-title").textContent} · Rockets` : "Rockets";
  document.title = told.size ? `✖ ${told.size} exploded · ${name}` : name;
}

/** Show whether the service answers. Old values keep their place, but not their full colour. */
function showPulse(error) {
  const isOut = error !== null;
  document.body.classList.toggle("out", isOut);
  byId("outage").hidden = !isOut;
  if (!isOut) {
    answeredAt = Date.now();
    setText(byId("pulse"), "Live");
    return;
  }
  const what = error.status === 0
    ? "The service does not answer"
    : `The service answers with an error: ${error.message}`;
  const since = answeredAt ? `; these values are ${duration(Date.now() - answeredAt)} old` : "";
  setText(byId("outage"), `${what}${since}. Trying again.`);
  setText(byId("pulse"), "Out of touch");
}

async function askExploded(signal) {
  const query = new URLSearchParams({status: "exploded", sort: "updatedAt", order: "desc"});
  return (await get(`rockets?${query}&limit=100`, signal)).rockets;
}

let explodedCount = -1;  // at the last poll

async function poll() {
  clearTimeout(timer);
  asking.abort();
  asking = new AbortController();
  const {signal} = asking;
  try {
    const path = listPath();
    const [fleet, list] = await Promise.all([get("fleet", signal), get(path, signal)]);
    showTotals(fleet);
    showMenus(fleet);
    showRockets(list, path !== shownPath);
    shownPath = path;
    showView();
    addRate(fleet.messages);
    if (fleet.statuses.exploded !== explodedCount) {
      explodedCount = watchExplosions(await askExploded(signal), fleet.statuses);
    }
    await showDetail(signal);
    showPulse(null);
    showExplosions();
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Failure)) throw error;
    addRate(null);
    showPulse(error);
  } finally {
    if (!signal.aborted) timer = setTimeout(poll, POLL_EVERY);
  }
}

function showNotice(text) {
  setText(byId("notice"), text);
}

function onView() {
  const faults = wrong.map(([key, value]) => `${key} cannot be “${value}”.`);
  showNotice(faults.join(" "));
  told.delete(view.rocket);
  showView();
  showExplosions();
  poll();
}

byId("command").textContent = `${COMMAND} ${new URL("messages", location.href)}`;
byId("explosions-dismiss").addEventListener("click", () => {
  told.clear();
  showExplosions();
});
startList();
startDetail();
startExport(showNotice);
watchAddress(onView);
onView();

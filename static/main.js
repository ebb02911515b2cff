// The loop: ask the service each second, and show what it says, or that it says nothing.

import {listPath, view, watchAddress} from "./address.js";
import {Failure, get} from "./api.js";
import {openRocket, refreshDetail, startDetail, titleOfOpened} from "./detail.js";
import {announce, byId, save, setText} from "./dom.js";
import {countNews, settle, startExplosions, watchExplosions} from "./explosions.js";
import {makeFile} from "./export.js";
import {duration} from "./format.js";
import {showChoices, showList, startList} from "./list.js";
import {addSample, showTotals} from "./totals.js";

const POLL = 1000;  // ms from the end of a poll to the next
const TYPING = 200;  // ms without a key, after which a search begins
const SILENCE = 3000;  // ms without an answer, after which the page says so

let timer = 0;
let controller = new AbortController();  // of the poll under way
let lastGood = 0;  // ms from the opening of the page to the last answer; 0 before the first
let failure = null;  // of the last poll
let listed = "";  // the path of the list that is shown
let wasStale = false;
let unsaved = "";  // why the last file was not saved

/** Show what the service has, then again in a second. A newer poll ends the one under way. */
async function poll() {
  clearTimeout(timer);
  controller.abort();
  controller = new AbortController();
  const {signal} = controller;
  try {
    await refresh(signal);
    failure = null;
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Failure)) reportError(error);  // of this page, in its console
    else failure = error;
  }
  if (signal.aborted) return;
  if (failure) addSample(null);
  showConnection();
  timer = setTimeout(poll, POLL);
}

/** Ask for the fleet and the list, and for what is new of the rocket that is open. */
async function refresh(signal) {
  const path = listPath();
  const [fleet, list] = await Promise.all([
    get("fleet", signal),
    document.hidden ? null : get(path, signal),
  ]);
  if (signal.aborted) return;
  lastGood = performance.now();
  showTotals(fleet);
  await watchExplosions(fleet.statuses, signal);
  if (!list || signal.aborted) return;
  showList(list, fleet, path !== listed);
  listed = path;
  showChoices();
  if (view.rocket) await refreshDetail(signal);
}

/** Follow the view, which the watcher has changed. */
function follow() {
  unsaved = "";
  settle(view.rocket);
  showChoices();
  openRocket();
  showConnection();
  clearTimeout(timer);
  timer = setTimeout(poll, document.activeElement === byId("q") ? TYPING : 0);
}

function showConnection() {
  const passed = performance.now() - lastGood;
  const long = duration(passed);
  const isRefused = failure?.status === 400;  // the notice tells
  const isStale = (failure !== null && !isRefused) || (passed > SILENCE && !document.hidden);
  const what = failure?.status ? `answers with an error: ${failure.message}` : "does not answer";
  const picture = lastGood ? ` What you see is ${long} old.` : "";
  byId("pulse").dataset.state = isStale ? "stale" : "live";
  setText(byId("pulse"), isStale ? `Stale for ${long}` : lastGood ? "Live" : "Connecting");
  byId("outage").hidden = !isStale;
  setText(byId("outage"), `The service ${what}.${picture} This page asks again every second.`);
  setText(byId("notice"), notice());
  document.body.classList.toggle("stale", isStale);
  if (isStale && !wasStale) announce(byId("outage").textContent);
  if (!isStale && wasStale) announce("The service answers again.");
  wasStale = isStale;
  const news = countNews();
  const parts = [news && `✖ ${news} exploded`, isStale && "No answer", titleOfOpened()];
  setText(document.querySelector("title"), [...parts, "Rockets"].filter(Boolean).join(" – "));
}

function notice() {
  if (unsaved) return unsaved;
  if (failure?.status === 400) return `The service says: ${failure.message}.`;
  const isOther = failure && listed && listPath() !== listed;
  return isOther ? "Your choice has had no answer: the list is as before." : "";
}

async function saveAs(kind) {
  unsaved = "";
  try {
    const {name, type, text} = await makeFile(kind, AbortSignal.timeout(60000));
    save(name, type, text);
  } catch (error) {
    unsaved = `Nothing was saved: ${error.message}`;
  }
  showConnection();
}

byId("as-csv").addEventListener("click", () => saveAs("csv"));
byId("as-json").addEventListener("click", () => saveAs("json"));
byId("explosions-dismiss").addEventListener("click", follow);
setText(byId("command"), `python3 tools/launch.py launch "${new URL("messages", location.href)}"`
  + " --message-delay=500ms --concurrency-level=1");
document.addEventListener("visibilitychange", poll);
setInterval(showConnection, 1000);
startList();
startDetail();
startExplosions();
watchAddress(follow);
follow();

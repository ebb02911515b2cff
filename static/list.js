// The list of rockets: rows that keep their place under the pointer, and their values current.

import {FILTERS, addressOf, go, view} from "./address.js";
import {byId, element, setText} from "./dom.js";
import {STATUSES, duration, exact, isolated, nameOf, number, plural} from "./format.js";
import {PAGE, addPager, showPager} from "./pager.js";

const SILENT = 5 * 60000;  // ms without a message after which a rocket is marked
const KEYS_HOLD = 5000;  // ms after a key was pressed in the list
const LOWEST_FIRST = ["channel", "type", "mission", "status"];  // of the columns sorted by
const COLUMNS = ["channel", "type", "mission", "speed", "status", "last", "missing", "updated"];

const rows = new Map();  // by channel: {row, link, cells}
const names = {mission: [], type: []};  // that occur
let latest = [];  // the rockets of the last answer
let lastKey = -Infinity;  // ms, of performance.now()
let isPointedAt = false;

export const findRocket = (channel) => latest.find((rocket) => rocket.channel === channel);

function makeRow(channel) {
  const link = element("a", "", channel);
  const cells = Object.fromEntries(COLUMNS.map((name) => [name, element("td", name)]));
  cells.channel.append(link);
  cells.channel.title = channel;
  for (const name of ["type", "mission"]) cells[name].append(element("bdi"));
  cells.status.append(element("span"), " ", element("bdi"));
  link.tabIndex = -1;
  link.href = addressOf({rocket: channel});
  const row = element("tr", "", ...Object.values(cells));
  row.dataset.channel = channel;
  return {row, link, cells};
}

/** Show a name in a cell that has a <bdi>, so that it cannot turn what is beside it. */
function showName(cell, name) {
  const shown = nameOf(name);
  setText(cell.querySelector("bdi"), shown);
  cell.title = shown;
  cell.classList.toggle("unknown", shown !== name);
}

export function speedOf({speed, missingMessages}) {
  if (speed === null) return "unknown";
  return `${missingMessages ? "≈ " : ""}${number(speed)}`;
}

export function showStatus(holder, {status, explosionReason}) {
  const name = STATUSES[status] ?? status;
  holder.dataset.status = status;
  setText(holder.querySelector("span"), explosionReason === null ? name : `${name}:`);
  setText(holder.querySelector("bdi"), explosionReason === null ? "" : nameOf(explosionReason));
  holder.title = explosionReason ?? "";
}

/** Tell how long ago the last message was; a rocket in flight that is silent is marked. */
export function showAge(holder, {updatedAt, status}) {
  const passed = Date.now() - Date.parse(updatedAt);
  const isSilent = status !== "exploded" && passed > SILENT;
  setText(holder, isSilent ? `silent for ${duration(passed)}` : `${duration(passed)} ago`);
  holder.classList.toggle("doubt", isSilent);
}

function showRocket(rocket) {
  const {cells} = rows.get(rocket.channel);
  showName(cells.type, rocket.type);
  showName(cells.mission, rocket.mission);
  setText(cells.speed, speedOf(rocket));
  cells.speed.classList.toggle("unknown", rocket.speed === null);
  cells.speed.title = rocket.missingMessages ? `${number(rocket.missingMessages)} missing` : "";
  showStatus(cells.status, rocket);
  setText(cells.last, number(rocket.lastMessageNumber));
  setText(cells.missing, number(rocket.missingMessages));
  for (const cell of [cells.speed, cells.missing]) {
    cell.classList.toggle("doubt", rocket.missingMessages > 0);
  }
  cells.updated.title = `${exact(rocket.updatedAt)}; as sent: ${rocket.updatedAt}`;
  showAge(cells.updated, rocket);
}

/** Show the last answer. While the order is held, what is new comes at the end. */
function showRows(isOther = false) {
  const wanted = latest.map(({channel}) => channel);
  const isHeld = isPointedAt || performance.now() - lastKey < KEYS_HOLD;
  const held = isHeld && !isOther ? [...rows.keys()] : [];
  const channels = new Set([...held, ...wanted].slice(0, Math.max(held.length, PAGE)));
  for (const [channel, {row}] of rows) if (!channels.has(channel)) row.remove();
  const before = new Map(rows);
  rows.clear();
  for (const channel of channels) rows.set(channel, before.get(channel) ?? makeRow(channel));
  const focused = document.activeElement;
  [...rows.values()].forEach(({row}, place) => {
    const there = byId("rows").children[place];
    if (there !== row) byId("rows").insertBefore(row, there ?? null);
  });
  if (focused.isConnected) focused.focus({preventScroll: true});  // it may have been moved
  for (const rocket of latest) if (rows.has(rocket.channel)) showRocket(rocket);
  byId("table").classList.toggle("held", [...rows.keys()].join() !== wanted.join());
  chooseTabStop();
}

/** Let the Tab key stop at one row only. */
function chooseTabStop(link = document.activeElement.closest?.("#rows a")) {
  const chosen = link ?? rows.get(view.rocket)?.link ?? rows.values().next().value?.link;
  for (const row of rows.values()) row.link.tabIndex = row.link === chosen ? 0 : -1;
}

/** Show an answer to the list's path; it is another list if the watcher chose anew. */
export function showList({rockets, total}, fleet, isOther) {
  latest = rockets;
  showRows(isOther);
  names.mission = fleet.missions.map(({mission}) => mission);
  names.type = fleet.types.map(({type}) => type);
  byId("table").hidden = !rockets.length;
  byId("empty").hidden = fleet.rockets > 0;
  byId("unmatched").hidden = fleet.rockets === 0 || rockets.length > 0;
  showPager(byId("pages"), view.offset, total);
  const set = FILTERS.filter((key) => view[key]).map((key) => {
    const value = key === "status" ? STATUSES[view.status] : isolated(view[key]);
    return `${key === "q" ? "search" : key} ${value}`;
  });
  const all = plural(fleet.rockets, "rocket");
  setText(byId("matches"), set.length ? `${number(total)} of ${all}: ${set.join(", ")}` : all);
}

/** Show what follows from the view. */
export function showChoices() {
  for (const key of FILTERS) {
    const control = byId(key);
    if (key in names) showNames(key);
    if (control.value !== view[key]) control.value = view[key];
    control.classList.toggle("set", view[key] !== "");
  }
  byId("clear").hidden = !FILTERS.some((key) => view[key]);
  for (const button of document.querySelectorAll("[data-sort]")) {
    button.parentNode.ariaSort = button.dataset.sort === view.sort ? `${view.order}ending` : null;
  }
  for (const [channel, {row, link}] of rows) {
    link.href = addressOf({rocket: channel});
    row.classList.toggle("open", channel === view.rocket);
  }
}

/** Offer the names that occur; the list of options is touched only when these change. */
function showNames(key) {
  const wanted = [...new Set(["", ...names[key], view[key]])];
  const offered = [...byId(key).options].map(({value}) => value);
  if (wanted.join("\0") === offered.join("\0")) return;
  const options = wanted.map((name) => new Option(name ? nameOf(name) : "Any", name));
  byId(key).replaceChildren(...options);
}

function openRow(event) {
  const channel = event.target.closest("tr")?.dataset.channel;
  const isDragged = event.detail > 0 && !getSelection().isCollapsed;
  if (!channel || isDragged || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go({rocket: channel});
}

function moveFocus(event) {
  const links = [...rows.values()].map(({link}) => link);
  const place = links.indexOf(document.activeElement);
  const steps = {ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: links.length - 1};
  lastKey = performance.now();
  if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  links[steps[event.key]]?.focus();
}

function sortBy(key) {
  const [first, second] = LOWEST_FIRST.includes(key) ? ["asc", "desc"] : ["desc", "asc"];
  go({sort: key, order: view.sort === key && view.order === first ? second : first});
}

export function startList() {
  for (const status in STATUSES) byId("status").add(new Option(STATUSES[status], status));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", ({target}) => go({[target.id]: target.value}));
  byId("clear").addEventListener("click", () => {
    go(Object.fromEntries(FILTERS.map((key) => [key, ""])));
    byId("q").focus();
  });
  byId("table").querySelector("thead").addEventListener("click", ({target}) => {
    if (target.dataset.sort) sortBy(target.dataset.sort);
  });
  const list = byId("rows");
  list.addEventListener("click", openRow);
  list.addEventListener("keydown", moveFocus);
  list.addEventListener("focusin", ({target}) => chooseTabStop(target));
  list.addEventListener("pointerover", () => (isPointedAt = true));
  list.addEventListener("pointerleave", () => {
    isPointedAt = false;
    showRows();
  });
  addPager(byId("pages"), (offset) => go({offset}));
}

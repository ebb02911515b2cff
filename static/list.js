// The totals, the filters and the list of rockets.

import {FILTERS, SORTS, go, view} from "./address.js";
import {byId, element, setText} from "./dom.js";
import {STATUSES, age, duration, exact, nameOf, number, plural} from "./format.js";
import {addPager, showPager} from "./pager.js";

const SILENT = 5 * 60e3;  // ms after which an active rocket is called silent
const HOLD = 1500;  // ms for which the order holds after the pointer or a key moved in the list

let shown = [];  // the rockets of the list, in the order of its rows
let heldUntil = 0;

/** Tell whether the watcher is about to use a row, so that none may move. */
const isHeld = () => performance.now() < heldUntil;

function hold() {
  heldUntil = performance.now() + HOLD;
}

export function showTotals({rockets, messages, missingMessages, statuses}) {
  setText(byId("total-rockets"), number(rockets));
  setText(byId("total-messages"), number(messages));
  setText(byId("total-missing"), number(missingMessages));
  for (const status of Object.keys(STATUSES)) {
    setText(byId(`total-${status}`), number(statuses[status]));
  }
}

/** Fill a menu with names and how many rockets have each; what is chosen stays in it. */
function fillMenu(key, counts) {
  const menu = byId(key);
  const names = counts.map((count) => count[key]);
  if (view[key] && !names.includes(view[key])) counts = [...counts, {[key]: view[key]}];
  const options = counts.map(({[key]: name, rockets}) => {
    const label = key === "status" ? STATUSES[name] : nameOf(name);
    const option = element("option", "", rockets === undefined ? label : `${label} (${rockets})`);
    option.value = name;
    return option;
  });
  const labels = options.map((option) => option.textContent).join("\n");
  if (menu.dataset.labels !== labels && document.activeElement !== menu) {
    menu.replaceChildren(menu.options[0], ...options);
    menu.dataset.labels = labels;
  }
  menu.value = view[key];
}

export function showMenus({statuses, types, missions}) {
  const counts = Object.entries(statuses).map(([status, rockets]) => ({status, rockets}));
  fillMenu("status", counts);
  fillMenu("type", types);
  fillMenu("mission", missions);
}

/** Return what to say of a rocket's speed; while messages are missing, it is in doubt. */
export function speedOf({speed, missingMessages}) {
  if (speed === null) return "–";
  return missingMessages > 0 ? `≈ ${number(speed)}` : number(speed);
}

export function silenceOf({status, updatedAt}) {
  const silence = age(updatedAt);
  return status === "active" && silence >= SILENT ? `silent for ${duration(silence)}` : "";
}

const CELLS = {  // by class of a cell: its text, and another one below it
  type: (rocket) => [nameOf(rocket.type), ""],
  mission: (rocket) => [nameOf(rocket.mission), ""],
  speed: (rocket) => [speedOf(rocket), ""],
  status: (rocket) => [STATUSES[rocket.status], rocket.explosionReason ?? silenceOf(rocket)],
  last: (rocket) => [number(rocket.lastMessageNumber), ""],
  missing: (rocket) => [number(rocket.missingMessages), ""],
  updated: (rocket) => [`${duration(age(rocket.updatedAt))} ago`, ""],
};

function makeRow() {
  const row = element("tr");
  row.append(element("td", "channel", element("a")));
  for (const name of Object.keys(CELLS)) {
    row.append(element("td", name, element("bdi"), element("small")));
  }
  return row;
}

function fillRow(row, rocket) {
  const link = row.querySelector("a");
  row.dataset.channel = rocket.channel;
  row.dataset.status = rocket.status;
  row.classList.toggle("doubtful", rocket.missingMessages > 0);
  row.classList.toggle("silent", silenceOf(rocket) !== "");
  row.ariaSelected = String(rocket.channel === view.rocket);
  link.href = `#${new URLSearchParams({rocket: rocket.channel})}`;
  link.title = rocket.channel;
  setText(link, rocket.channel.slice(0, 8));
  for (const [name, read] of Object.entries(CELLS)) {
    const [text, below] = read(rocket);
    const cell = row.querySelector(`.${name}`);
    setText(cell.firstChild, text);
    setText(cell.lastChild, below);
  }
  row.querySelector(".updated").title = exact(rocket.updatedAt);
}

/** Put the rockets into the order of the rows that are there, and new ones behind them. */
function inHeldOrder(rockets) {
  const news = new Map(rockets.map((rocket) => [rocket.channel, rocket]));
  const kept = shown.map((rocket) => news.get(rocket.channel) ?? rocket);
  const known = new Set(shown.map(({channel}) => channel));
  return [...kept, ...rockets.filter(({channel}) => !known.has(channel))].slice(0, rockets.length);
}

/** Show rockets in the rows; their order holds while the watcher is about to use one. */
export function showRockets({rockets, total}, isOtherView) {
  shown = isHeld() && !isOtherView ? inHeldOrder(rockets) : rockets;
  const body = byId("rows");
  while (body.rows.length < shown.length) body.append(makeRow());
  while (body.rows.length > shown.length) body.lastChild.remove();
  shown.forEach((rocket, place) => fillRow(body.rows[place], rocket));
  const isFiltered = FILTERS.some((key) => view[key]);
  byId("table").hidden = !rockets.length;
  byId("empty").hidden = rockets.length > 0 || isFiltered;
  byId("unmatched").hidden = rockets.length > 0 || !isFiltered;
  byId("clear").hidden = !isFiltered;
  const of = isFiltered ? " match" : "";
  setText(byId("matches"), rockets.length ? `${plural(total, "rocket")}${of}` : "");
  showPager(byId("pages"), Number(view.offset), total);
}

/** Show what the address asks for in the filters and in the heads of the columns. */
export function showView() {
  if (document.activeElement !== byId("q")) byId("q").value = view.q;
  byId("sort").value = `${view.sort} ${view.order}`;
  for (const button of document.querySelectorAll("[data-sort]")) {
    const isSorted = button.dataset.sort === view.sort;
    const word = view.order === "asc" ? "ascending" : "descending";
    button.parentElement.ariaSort = isSorted ? word : "none";
  }
  for (const row of byId("rows").rows) {
    row.ariaSelected = String(row.dataset.channel === view.rocket);
  }
}

function moveFocus(event) {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  const row = event.target.closest("tr");
  if (!step || !row) return;
  const next = byId("rows").rows[row.sectionRowIndex + step];
  next?.querySelector("a").focus();
  event.preventDefault();
}

export function startList() {
  for (const key of FILTERS) {
    byId(key).addEventListener("input", ({target}) => go({[key]: target.value}));
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("clear").addEventListener("click", () => go({q: "", status: "", mission: "", type: ""}));
  for (const [key, [name]] of Object.entries(SORTS)) {
    for (const order of ["asc", "desc"]) {
      const option = element("option", "", `${name} ${order === "asc" ? "↑" : "↓"}`);
      option.value = `${key} ${order}`;
      byId("sort").append(option);
    }
  }
  byId("sort").addEventListener("input", ({target}) => {
    const [sort, order] = target.value.split(" ");
    go({sort, order});
  });
  for (const button of document.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => {
      const {sort} = button.dataset;
      const first = SORTS[sort][1];
      const other = view.order === "asc" ? "desc" : "asc";
      go({sort, order: sort === view.sort ? other : first});
    });
  }
  const body = byId("rows");
  for (const event of ["pointermove", "pointerdown", "keydown"]) body.addEventListener(event, hold);
  body.addEventListener("keydown", moveFocus);
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!row || event.ctrlKey || event.metaKey || String(getSelection())) return;
    event.preventDefault();
    go({rocket: row.dataset.channel});
  });
  addPager(byId("pages"), (offset) => go({offset}));
}

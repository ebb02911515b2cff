// What the watcher chose stands in the address, so that it can be sent to somebody else.

import {STATUSES} from "./format.js";
import {PAGE} from "./pager.js";

export const SORTS = {  // by key: its name, and the order that comes first
  __proto__: null,
  channel: ["Rocket", "asc"],
  type: ["Type", "asc"],
  mission: ["Mission", "asc"],
  speed: ["Speed", "desc"],
  status: ["Status", "asc"],
  lastMessageNumber: ["Last message", "desc"],
  missingMessages: ["Missing messages", "desc"],
  updatedAt: ["Updated", "desc"],
};
export const FILTERS = ["q", "status", "mission", "type"];
const DEFAULTS = {
  q: "", status: "", mission: "", type: "", sort: "channel", order: "asc", offset: 0, rocket: "",
};
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
const VALID = {
  q: (value) => value.length <= 64,
  status: (value) => value in STATUSES,
  mission: () => true,
  type: () => true,
  sort: (value) => value in SORTS,
  order: (value) => value === "asc" || value === "desc",
  offset: (value) => /^\d{1,7}$/.test(value),
  rocket: (value) => UUID.test(value),
};

export const view = {...DEFAULTS};
export const wrong = [];  // what the address asks for that cannot be
let onChange = () => {};

/** Return the address of a view, without what is as it is at first. */
export function addressOf(changes) {
  const chosen = Object.entries({...view, ...changes});
  const query = new URLSearchParams(chosen.filter(([key, value]) => value !== DEFAULTS[key]));
  return `#${query}`;
}

/** Return the path of the list that a view shows. */
export function listPath(limit = PAGE, offset = view.offset) {
  const query = new URLSearchParams({sort: view.sort, order: view.order, limit, offset});
  for (const key of FILTERS) if (view[key]) query.set(key, view[key]);
  return `rockets?${query}`;
}

/** Change the view. A rocket is a place of its own, to come back to; a filter is none. */
export function go(changes) {
  const step = "rocket" in changes && changes.rocket !== view.rocket ? "pushState" : "replaceState";
  if (!("rocket" in changes || "offset" in changes)) changes = {...changes, offset: 0};
  Object.assign(view, changes);
  wrong.length = 0;
  history[step]({isOurs: true}, "", addressOf({}));
  onChange();
}

function readAddress() {
  wrong.length = 0;
  const found = {};
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    if (!(key in DEFAULTS)) continue;
    if (value && !VALID[key](value)) wrong.push([key, value]);
    else found[key] = value;
  }
  found.offset = Math.floor((found.offset ?? 0) / PAGE) * PAGE;
  found.rocket = (found.rocket ?? "").toLowerCase();
  return {...DEFAULTS, ...found};
}

/** Call a function after each change of the view. */
export function watchAddress(changed) {
  onChange = changed;
  Object.assign(view, readAddress());
  history.replaceState({isOurs: true}, "");
  addEventListener("popstate", ({state}) => {
    const found = readAddress();
    // Back and forward lead to another rocket, and leave the filters as they are.
    Object.assign(view, state?.isOurs ? {rocket: found.rocket} : found);
    history.replaceState({isOurs: true}, "", wrong.length ? location.hash : addressOf({}));
    onChange();
  });
}

// What the watcher chose stands in the address, so that it can be sent to somebody else.

import {PAGE} from "./pager.js";

export const FILTERS = ["q", "status", "mission", "type"];
const DEFAULTS = {
  __proto__: null,
  q: "", status: "", mission: "", type: "", sort: "channel", order: "asc", offset: 0, rocket: "",
};

export const view = {...DEFAULTS};
let onChange = () => {};

/** Return the address of a view, without what is as it is at first. */
export function addressOf(changes) {
  const chosen = Object.entries({...view, ...changes});
  return `#${new URLSearchParams(chosen.filter(([key, value]) => value !== DEFAULTS[key]))}`;
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
  history[step]({isOurs: true}, "", addressOf({}));
  onChange();
}

/** Return the view that the address names; what is wrong in it the service tells. */
function readAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const known = Object.entries(given).filter(([key]) => key in DEFAULTS);
  const found = {...DEFAULTS, ...Object.fromEntries(known)};
  return {...found, offset: Number(found.offset), rocket: found.rocket.toLowerCase()};
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
    history.replaceState({isOurs: true}, "", addressOf({}));
    onChange();
  });
}

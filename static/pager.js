// A pager has four buttons that lead through pages of PAGE lines, and says which lines these are.

import {element, setText} from "./dom.js";
import {number} from "./format.js";

export const PAGE = 100;  // lines
const STEPS = {
  First: () => 0,
  Previous: (from) => Math.max(0, from - PAGE),
  Next: (from, total) => (from + PAGE < total ? from + PAGE : from),
  Last: (from, total) => Math.floor((total - 1) / PAGE) * PAGE,
};

/** Make the buttons; go(from) is called with the place of the first line to show. */
export function addPager(nav, go) {
  const where = element("span");
  const buttons = Object.entries(STEPS).map(([name, step]) => {
    const button = element("button", "", name);
    button.type = "button";
    button.addEventListener("click", () => go(step(+nav.dataset.from, +nav.dataset.total)));
    return button;
  });
  nav.append(...buttons.slice(0, 2), where, ...buttons.slice(2));
}

export function showPager(nav, from, total) {
  Object.assign(nav.dataset, {from, total});
  nav.hidden = total <= PAGE && from === 0;
  const to = Math.min(from + PAGE, total);
  setText(nav.querySelector("span"), `${number(from + 1)}–${number(to)} of ${number(total)}`);
  for (const button of nav.querySelectorAll("button")) {
    // A disabled button would lose the focus.
    button.ariaDisabled = STEPS[button.textContent](from, total) === from;
  }
}

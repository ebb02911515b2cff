// Explosions that happened while the page was open: told until they are seen or dismissed.

import {addressOf, go, view} from "./address.js";
import {get} from "./api.js";
import {announce, byId, element} from "./dom.js";
import {isolated, nameOf, plural, titleOf} from "./format.js";

const NEWEST = "rockets?status=exploded&sort=updatedAt&order=desc&limit=100";
const NAMED = 2;  // explosions told by name; the rest is counted
const ALL = {q: "", type: "", mission: "", status: "exploded", sort: "updatedAt", order: "desc"};

const known = new Set();  // channels of rockets that are known to have exploded
const news = new Map();  // by channel: a rocket that exploded since
let counted = null;  // exploded rockets, by the last answer; null before the first
let unnamed = 0;  // explosions that are not among the newest, by the times in their messages

export const countNews = () => news.size + unnamed;

/** Look which rockets exploded, if there are more than there were. Raise Failure. */
export async function watchExplosions({exploded}, signal) {
  if (exploded === counted) return;
  const {rockets} = await get(NEWEST, signal);
  const risen = counted === null ? 0 : Math.max(0, exploded - counted);
  const found = rockets.filter(({channel}) => !known.has(channel));
  const told = found.slice(0, risen);
  for (const {channel} of found) known.add(channel);
  for (const rocket of told) news.set(rocket.channel, rocket);
  unnamed += risen - told.length;
  counted = exploded;
  if (!risen) return;
  const names = told.map((each) => `${titleOf(each)}: ${isolated(each.explosionReason)}`);
  announce(`${plural(risen, "rocket")} exploded. ${names.slice(0, NAMED).join(". ")}`);
  settle(view.rocket);
}

function linkTo(rocket, ...content) {
  const link = element("a", "", ...content);
  link.href = addressOf(rocket ? {rocket} : ALL);
  link.dataset.rocket = rocket;
  return link;
}

/** Take a rocket that was opened off the news, and show the rest. */
export function settle(channel) {
  news.delete(channel);
  const links = [...news.values()].slice(-NAMED).reverse().map((rocket) => {
    const names = [rocket.type, rocket.explosionReason].map((it) => element("bdi", "", nameOf(it)));
    return linkTo(rocket.channel, names[0], ` ${rocket.channel.slice(0, 8)} exploded: `, names[1]);
  });
  const rest = countNews() - links.length;
  if (rest) links.push(linkTo("", `${rest} more`));
  byId("explosions").hidden = !links.length;
  byId("explosions-list").replaceChildren(...links);
}

export function startExplosions() {
  byId("explosions-list").addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link) return;
    event.preventDefault();
    const {rocket} = link.dataset;
    go(rocket ? {rocket} : {...ALL, offset: 0});
  });
  byId("explosions-dismiss").addEventListener("click", () => {
    news.clear();
    unnamed = 0;
    settle(view.rocket);
  });
}

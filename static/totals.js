// The numbers of the whole fleet, and how many messages come a second.

import {rateChart} from "./charts.js";
import {byId, setText} from "./dom.js";
import {STATUSES, duration, number} from "./format.js";

const AVERAGED = 5000;  // ms over which messages are counted for a rate
const SHOWN = 5 * 60000;  // ms that the curve goes back

const samples = [];  // {at, messages, rate}; the last two are null where no answer came
let chart = null;

export function showTotals(fleet) {
  setText(byId("total-rockets"), number(fleet.rockets));
  for (const status of Object.keys(STATUSES)) {
    setText(byId(`total-${status}`), number(fleet.statuses[status]));
  }
  setText(byId("total-messages"), number(fleet.messages));
  setText(byId("total-missing"), number(fleet.missingMessages));
  byId("total-missing").classList.toggle("doubt", fleet.missingMessages > 0);
  if (fleet.messages < samples.at(-1)?.messages) addSample(null);  // the service began anew
  addSample(fleet.messages);
}

/** Note how many messages there are, or null where that is not known: a gap in the curve. */
export function addSample(messages) {
  const at = Date.now();
  const known = samples.slice(samples.findLastIndex((sample) => sample.messages === null) + 1);
  const base = known.findLast((sample) => sample.at <= at - AVERAGED) ?? known[0];
  const isKnown = messages !== null && base !== undefined;
  const rate = isKnown ? ((messages - base.messages) / (at - base.at)) * 1000 : null;
  samples.push({at, messages, rate});
  while (samples[0].at < at - SHOWN - AVERAGED) samples.shift();
  const shown = rate === null ? "–" : number(Number(rate.toFixed(rate < 10 ? 1 : 0)));
  setText(byId("rate"), shown);
  byId("rates").ariaLabel = `Messages per second over the last ${duration(SHOWN)}: now ${shown}`;
  chart ??= rateChart(byId("rates"));
  chart.show(samples, at - SHOWN, at);
}

// The list as a file: all rockets that match, in the order of the list.

import {listPath} from "./address.js";
import {getPages} from "./api.js";
import {local} from "./format.js";

// A spreadsheet takes a text for a formula if it begins with one of these signs. The columns may
// also be separated by semicolons, tabs or line breaks there, as its settings have it; blanks and
// quotation marks before the sign don't keep it from being one.
const FORMULA = /(^|[,;|\t\r\n])(?=[\s"']*[=+\-@＝＋－＠])/g;

function csvField(value) {
  if (value === null) return "";
  if (typeof value === "number") return String(value);
  const text = value.replace(FORMULA, "$1'");
  return /[",;|\s]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Return rockets as CSV (RFC 4180), with a mark by which spreadsheets know that it is UTF-8. */
export function csv(rockets) {
  const fields = Object.keys(rockets[0] ?? {});
  const lines = rockets.map((rocket) => fields.map((field) => csvField(rocket[field])).join(","));
  return `\ufeff${[fields.join(","), ...lines].join("\r\n")}\r\n`;
}

const KINDS = {  // by ending: the type, and what writes it
  csv: ["text/csv;charset=utf-8", csv],
  json: ["application/json", (rockets) => `${JSON.stringify(rockets, null, 2)}\n`],
};

/** Return {name, type, text} of a file with all rockets that match. Raise Failure. */
export async function makeFile(kind, signal) {
  const pages = await getPages(listPath(1000, 0), signal);
  const all = new Map(pages.flatMap(({rockets}) => rockets).map((each) => [each.channel, each]));
  const now = local(Date.now()).replaceAll(":", "").replace(" ", "T");
  const [type, write] = KINDS[kind];
  return {name: `rockets-${now}.${kind}`, type, text: write([...all.values()])};
}

// Saving all rockets that match, as JSON or for a spreadsheet.

import {listPath} from "./address.js";
import {getPages} from "./api.js";
import {byId, save} from "./dom.js";

const COLUMNS = [
  "channel", "type", "speed", "mission", "status", "explosionReason", "launchedAt", "updatedAt",
  "lastMessageNumber", "missingMessages",
];
const PAGE = 1000;  // rockets in one answer, at most

/**
 * Return a cell of a CSV file (RFC 4180). A text that a spreadsheet could take for a formula, at
 * its start or after any separator within it, gets an apostrophe there.
 */
export function csvCell(value) {
  if (value === null) return "";
  if (typeof value === "number") return String(value);
  const harmless = value.replace(/(^|[;,\t\r\n|])(\s*)([=+\-@])/g, "$1$2'$3");
  return `"${harmless.replaceAll('"', '""')}"`;
}

export function toCsv(rockets) {
  const lines = rockets.map((rocket) => COLUMNS.map((name) => csvCell(rocket[name])).join(","));
  return `\ufeff${[COLUMNS.join(","), ...lines].join("\r\n")}\r\n`;
}

async function saveAs(ending, type, write) {
  const pages = await getPages(listPath(PAGE, 0), AbortSignal.timeout(60e3));
  const rockets = pages.flatMap((page) => page.rockets);
  const date = new Date().toLocaleDateString("sv");
  save(`rockets-${date}.${ending}`, type, write(rockets));
}

/** Make the two buttons save; report(text) says what went wrong. */
export function startExport(report) {
  const kinds = {
    csv: ["text/csv", toCsv],
    json: ["application/json", (rockets) => `${JSON.stringify(rockets, null, 2)}\n`],
  };
  for (const [ending, [type, write]] of Object.entries(kinds)) {
    byId(`as-${ending}`).addEventListener("click", () => {
      saveAs(ending, type, write).catch((error) => report(`Not saved: ${error.message}`));
    });
  }
}

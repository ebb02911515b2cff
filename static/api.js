// Asking the service. The browser's own cache sends If-None-Match, as answers are "no-cache".

const PATIENCE = 5000;  // ms for an answer

/** What keeps an answer from being shown. */
export class Failure extends Error {
  /** The status is 0 if there is no answer. */
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function request(path, signal) {
  const either = AbortSignal.any([signal, AbortSignal.timeout(PATIENCE)]);
  let answer;
  let text;
  try {
    answer = await fetch(path, {signal: either});
    text = await answer.text();
  } catch (error) {
    throw new Failure(0, String(error));
  }
  const isJson = answer.headers.get("Content-Type")?.includes("json");  // a proxy's page is not
  const json = isJson ? JSON.parse(text) : {detail: `${answer.status} ${answer.statusText}`};
  if (!answer.ok || !isJson) throw new Failure(answer.status, json.detail);
  return {json, answer};
}

/** Return a path's JSON. Raise Failure. */
export async function get(path, signal) {
  return (await request(path, signal)).json;
}

/** Return the JSON of a path and of all pages after it. Raise Failure. */
export async function getPages(path, signal) {
  const pages = [];
  for (let next = path; next;) {
    const {json, answer} = await request(next, signal);
    pages.push(json);
    const link = /<([^>]*)>; *rel="next"/.exec(answer.headers.get("Link"))?.[1];
    next = link && new URL(link, answer.url).href;
  }
  return pages;
}

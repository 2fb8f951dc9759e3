// What the page asks of the service.

const KEY = "dino-search-key";

// Why the service did not do what it was asked. message: the problem's detail. code: what stands behind `/problems/`.
export class Problem extends Error {
  constructor(detail, status = 0, code = "") {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

// The answer to a request, a Response that is fine. Rejects with a Problem, or with an AbortError.
export async function ask(path, { method = "GET", parameters = {}, body, signal } = {}) {
  const url = new URL(path, location.origin);
  for (const [name, value] of Object.entries(parameters)) url.searchParams.set(name, value);
  const headers = {};
  if (apiKey.get()) headers["X-API-Key"] = apiKey.get();
  if (body !== undefined && !(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(url, { method, headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service cannot be reached. Is it running?");
  }
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

async function problemOf(answer) {
  let said = {};
  try {
    said = await answer.json();
  } catch {
    // A proxy's page, say.
  }
  const detail = said.detail || said.title || `The service answered ${answer.status} ${answer.statusText}`.trim();
  const code = String(said.type ?? "").replace("/problems/", "");
  // What the service says then is for programs.
  if (answer.status === 401 && !apiKey.get()) return new Problem("This service asks for an API key.", 401, code);
  return new Problem(said.reasons ? [detail, ...said.reasons].join("; ") : detail, answer.status, code);
}

// Asks about a picture: one of the service's by its id, or a file. fields: a list gives the field several times.
export async function askAbout(path, picture, fields, signal) {
  if (picture.id !== undefined) {
    return ask(path, { method: "POST", body: { image_id: picture.id, ...fields }, signal });
  }
  const form = new FormData();
  form.append("image", picture.file, picture.name);
  for (const [name, value] of Object.entries(fields)) for (const each of [value].flat()) form.append(name, each);
  return ask(path, { method: "POST", body: form, signal });
}

// All pages of a list. name: of the list in the answers.
export async function askForAll(path, name, parameters, signal) {
  const found = [];
  let cursor = 0;
  while (cursor !== null) {
    const page = await (await ask(path, { parameters: { ...parameters, cursor, limit: 1000 }, signal })).json();
    found.push(...page[name]);
    cursor = page.next_cursor;
  }
  return found;
}

export const putVerdict = (verdict) => ask("/verdicts", { method: "PUT", body: { verdicts: [verdict] } });

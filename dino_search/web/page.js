// The page: what is asked, when, and where its answer goes.

import { Problem, apiKey, ask, askAbout } from "/web/api.js";
import { shownCopies } from "/web/copies.js";
import { DuplicatesView } from "/web/duplicates.js";
import { baseName, byId, element, plural } from "/web/elements.js";
import { show, showBlob, watched } from "/web/pictures.js";
import { grid, labels } from "/web/results.js";

const PREVIEW_SIDE = 384;
const NUM_TO_BEGIN_WITH = 24;
// As in the style sheet: the answer stands below the question.
const NARROW = matchMedia("(max-width: 760px)");
const RUN = { search: "Search", copies: "Find copies", classify: "Classify", duplicates: "Find duplicates" };
const IDLE = {
  search: ["Search by picture", "Choose, drop or paste a picture to see the images most like it."],
  copies: ["Copies of a picture", "Choose, drop or paste a picture to see which images it is an edited copy of."],
  classify: ["Classify a picture", "Choose, drop or paste a picture to see which label it gets."],
  duplicates: ["Duplicates", "Looks for images that the collection holds more than once. A large one takes a while."],
};

// mode: a key of RUN. picture: {id} of the service or {file, url} of this machine, both with a name; or null.
const state = { mode: "search", collection: "", picture: null, filters: [] };
// Files that were asked about, by the number that the browser's history has of them.
const files = [];
let running = new AbortController();
let looking = new AbortController();
let list = null;

// --- what is said

const say = (text) => { byId("status").textContent = text; };

// Whether the same question may be answered another time.
const mayPass = ({ status }) => !status || status === 429 || status >= 500;

function fail(error, again = null) {
  if (error.name === "AbortError") return;
  const detail = error instanceof Problem ? error.message : `The page failed: ${error.message}`;
  byId("problem").replaceChildren(
    element("p", {}, detail),
    again && mayPass(error) ? element("button", { type: "button", click: again }, "Try again") : "",
  );
  say("");
  if (error.status === 401) {
    byId("access").open = true;
    byId("key").focus();
  }
  if (!(error instanceof Problem)) throw error;
}

function answerIs(title, text, elements) {
  document.title = `${title} – dino-search`;
  byId("results-title").textContent = title;
  byId("found").replaceChildren(...elements.filter(Boolean));
  say(text);
}

function showIdle() {
  running.abort();
  running = new AbortController();
  byId("problem").replaceChildren();
  byId("found").removeAttribute("aria-busy");
  list = null;
  answerIs(...IDLE[state.mode], []);
  showSome();
}

// Begins with some images of the collection, to ask about without having a picture.
async function showSome() {
  const { signal } = running;
  if (!state.collection || state.mode === "duplicates") return;
  const path = `/collections/${encodeURIComponent(state.collection)}/images`;
  try {
    const parameters = { limit: NUM_TO_BEGIN_WITH, filter: "status = ok" };
    const { images } = await (await ask(path, { parameters, signal })).json();
    if (signal.aborted || !images.length) return;
    byId("found").replaceChildren(element("h3", {}, "Or begin with one of the collection"), grid(images, askBy));
  } catch (error) {
    fail(error);
  }
}

// --- asking

// Fields of the mode that are filled in.
function optionsGiven() {
  const given = {};
  for (const field of byId("options").elements) {
    const modes = field.closest("[data-modes]")?.dataset.modes.split(" ") ?? [];
    if (field.name && field.value !== "" && modes.includes(state.mode)) given[field.name] = field.value;
  }
  if (state.collection) given.collection = state.collection;
  if (state.filters.length && ["search", "classify"].includes(state.mode)) given.filter = [...state.filters];
  return given;
}

const ANSWERS = {
  async search(picture, signal) {
    const { results } = await (await askAbout("/search", picture, optionsGiven(), signal)).json();
    return [`Like ${picture.name}`, `${plural(results.length, "image")} found`, [grid(results, searchBy)]];
  },

  async classify(picture, signal) {
    const [found] = (await (await askAbout("/classify", picture, optionsGiven(), signal)).json()).results;
    const title = `${picture.name} is ${found.label}`;
    const text = `${(100 * found.probability).toFixed(1)} %, by ${plural(found.neighbours.length, "labelled image")}`;
    const heading = element("h3", {}, "The nearest labelled images");
    return [title, text, [labels(found), heading, grid(found.neighbours, searchBy)]];
  },

  async copies(picture, signal) {
    const answer = await (await askAbout("/copies", picture, optionsGiven(), signal)).json();
    const [query] = answer.queries;
    if (query.status === "failed") throw new Problem(query.reason);
    const shown = shownCopies(answer, picture, { say, fail, search: searchBy });
    list = shown.list;
    const copies = query.matches.filter((match) => match.decision === "copy").length;
    const text = `${plural(query.matches.length, "candidate")}, ${plural(copies, "copy", "copies")}`;
    return [`Copies of ${picture.name}`, text, shown.elements];
  },

  async duplicates(picture, signal) {
    const view = new DuplicatesView(optionsGiven(), { say, fail, search: searchBy }, signal);
    const { answer, elements } = await view.load();
    list = view.list;
    const text = answer.num_groups
      ? `${plural(answer.num_groups, "group")} among ${plural(answer.images, "image")}`
      : `No duplicates among ${plural(answer.images, "image")}`;
    return ["Duplicates", text, elements];
  },
};

// Asks what the page is set to. Whatever was being asked is given up.
async function run() {
  if (state.mode !== "duplicates" && !state.picture) {
    showIdle();
    return;
  }
  running.abort();
  running = new AbortController();
  const { signal } = running;
  byId("problem").replaceChildren();
  byId("found").setAttribute("aria-busy", "true");
  list = null;
  say(state.mode === "duplicates" ? "Looking for duplicates …" : "Searching …");
  const { mode, picture } = state;
  try {
    const answer = await ANSWERS[mode](picture, signal);
    if (signal.aborted) return;
    answerIs(...answer);
    if (mode === "duplicates") list.focusFirst();
  } catch (error) {
    if (signal.aborted) return;
    byId("found").replaceChildren();
    byId("results-title").textContent = "No answer";
    fail(error, run);
  } finally {
    if (!signal.aborted) byId("found").removeAttribute("aria-busy");
  }
}

// --- the picture

function setPicture(picture) {
  state.picture = picture;
  looking.abort();
  byId("preview").hidden = byId("attention").hidden = !picture;
  setAttention(false);
  if (!picture) return;
  byId("preview-name").textContent = picture.name;
  byId("preview-image").alt = `The picture asked about, ${picture.name}`;
  show(byId("preview-image"), picture, PREVIEW_SIDE);
}

function askAboutFile(given) {
  const file = [...given].find((each) => each.type.startsWith("image/") || !each.type);
  if (!file) {
    fail(new Problem(given.length ? `${given[0].name} is no picture.` : "There is no picture in that."));
    return;
  }
  const picture = { file, name: file.name || "pasted picture", url: URL.createObjectURL(file), number: files.length };
  files.push(picture);
  if (state.mode === "duplicates") setMode("search");
  changeTo(picture);
}

function searchBy(picture) {
  setMode("search");
  askBy(picture);
}

// Asks about what was clicked in the results; as that is gone from the page then, the focus goes to its place.
function askBy(picture) {
  changeTo(picture);
  byId("results").focus({ preventScroll: true });
}

function changeTo(picture) {
  setPicture(picture);
  remember();
  run();
  reveal();
}

// Brings the place of the answer into sight.
function reveal() {
  if (NARROW.matches) byId("results").scrollIntoView();
  else scrollTo({ top: 0 });
}

function setAttention(shown) {
  byId("attention").setAttribute("aria-pressed", shown);
  byId("attention").textContent = shown ? "Hide attention" : "Show attention";
}

async function switchAttention() {
  const { picture } = state;
  if (byId("attention").getAttribute("aria-pressed") === "true") {
    setAttention(false);
    show(byId("preview-image"), picture, PREVIEW_SIDE);
    return;
  }
  looking.abort();
  looking = new AbortController();
  const { signal } = looking;
  try {
    const fields = state.collection ? { collection: state.collection } : {};
    const overlay = await (await askAbout("/attention", picture, fields, signal)).blob();
    if (signal.aborted) return;
    byId("preview-image").alt = `Where the model looks in ${picture.name}: brighter where more`;
    showBlob(byId("preview-image"), overlay);
    setAttention(true);
    say("The preview shows where the model looks.");
  } catch (error) {
    fail(error, switchAttention);
  }
}

// --- mode, collection, filters

function setMode(mode) {
  state.mode = mode;
  document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
  byId("run").textContent = RUN[mode];
  for (const part of document.querySelectorAll("[data-modes]")) {
    part.hidden = !part.dataset.modes.split(" ").includes(mode);
  }
}

async function loadCollections() {
  const select = byId("collection");
  try {
    const { collections } = await (await ask("/collections")).json();
    select.replaceChildren(
      ...collections.map(({ collection, images }) =>
        element("option", { value: collection }, `${collection} (${images.toLocaleString("en")})`)),
    );
    const names = collections.map(({ collection }) => collection);
    state.collection = [state.collection, "default", names[0]].find((name) => names.includes(name)) ?? "";
    select.value = state.collection;
    if (!names.length) answerIs("Nothing is indexed yet", "Index a folder first: dino-search index FOLDER", []);
    return names.length > 0;
  } catch (error) {
    fail(error, start);
    return false;
  }
}

function showFilters() {
  byId("filters").replaceChildren(
    ...state.filters.map((filter, number) =>
      element("li", {}, element("button", { type: "button", click: () => removeFilter(number) },
        element("span", { class: "hidden" }, "Remove filter "), filter, element("span", { "aria-hidden": "true" }, " ×")))),
  );
}

function removeFilter(number) {
  state.filters.splice(number, 1);
  showFilters();
  byId("filter-field").focus();
  run();
}

function addFilter() {
  const [field, operator, value] = ["field", "operator", "value"].map((part) => byId(`filter-${part}`).value.trim());
  if (!field || !value) {
    byId(field ? "filter-value" : "filter-field").focus();
    say("A filter needs a field and a value.");
    return;
  }
  state.filters.push(`${field} ${operator} ${value}`);
  byId("filter-value").value = "";
  showFilters();
  byId("filter-field").focus();
  run();
}

// --- the browser's history

function remember() {
  const place = new URLSearchParams({ mode: state.mode });
  if (state.collection) place.set("collection", state.collection);
  if (state.picture?.id !== undefined) {
    place.set("image", state.picture.id);
    place.set("name", state.picture.name);
  }
  history.pushState({ number: state.picture?.number }, "", `#${place}`);
}

// Sets the page to what its address and the history say.
function recall() {
  const place = new URLSearchParams(location.hash.slice(1));
  state.collection = place.get("collection") ?? state.collection;
  const id = /^[1-9]\d*$/.test(place.get("image") ?? "") ? Number(place.get("image")) : undefined;
  const name = baseName(place.get("name") ?? `image ${id}`);
  setMode(Object.hasOwn(RUN, place.get("mode") ?? "") ? place.get("mode") : "search");
  setPicture(id === undefined ? files[history.state?.number] ?? null : { id, name });
}

function refresh() {
  if (state.mode === "duplicates") showIdle();
  else run();
}

// --- events

async function start() {
  byId("problem").replaceChildren();
  recall();
  answerIs(...IDLE[state.mode], []);
  byId("key-state").textContent = apiKey.get() ? " (in use)" : "";
  if (await loadCollections()) refresh();
}

watched(byId("preview-image"));

document.querySelectorAll("input[name=mode]").forEach((input) => input.addEventListener("change", () => {
  setMode(input.value);
  remember();
  refresh();
}));
byId("collection").addEventListener("change", () => {
  state.collection = byId("collection").value;
  if (state.picture?.id !== undefined) setPicture(null); // it is of the other collection
  setAttention(false);
  if (state.picture) setPicture(state.picture);
  remember();
  refresh();
});
byId("options").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
  if (NARROW.matches) reveal();
});
byId("options").addEventListener("change", () => {
  if (state.mode !== "duplicates") run();
});
byId("filter-form").addEventListener("submit", (event) => {
  event.preventDefault();
  addFilter();
});
byId("attention").addEventListener("click", switchAttention);
byId("file").addEventListener("change", ({ target }) => {
  if (target.files.length) askAboutFile(target.files);
  target.value = ""; // so that the same file can be chosen again
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // its address would be taken for a question
  byId("results").focus();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(byId("key").value.trim());
  byId("key").value = "";
  byId("access").open = false;
  byId("access").querySelector("summary").focus();
  start();
});
byId("forget-key").addEventListener("click", () => {
  apiKey.set("");
  byId("key").value = "";
  start();
});

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  askAboutFile(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    askAboutFile(event.clipboardData.files);
  }
});
addEventListener("keydown", (event) => list?.press(event));
addEventListener("popstate", () => {
  recall();
  byId("collection").value = state.collection;
  refresh();
});

start();

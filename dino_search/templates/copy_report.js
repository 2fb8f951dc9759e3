"use strict";
(() => {
  // Columns of a row, as the page's writer has them.
  const [QUERY, REFERENCE, SCORE, COSINE, RANK, DECISION, PRECISION, REASON, VERDICT, SIMILAR, VERIFIED, VARIANT,
    QUERY_AREA, REFERENCE_AREA] = Array(14).keys();
  const PATH = 0, SHA256 = 1;
  const ORDER = { copy: 0, uncertain: 1, different: 2 };
  const REASONS = {
    identical: "same bytes", score: "by its score",
    burst: "frames of one burst", plain: "blank or text-only page", unverified: "patches do not fit",
  };
  const VARIANTS = { as_is: "", mirror: "query mirrored", rotate_90: "query turned by 90°",
    rotate_180: "query turned by 180°", rotate_270: "query turned by 270°" };
  const NAMES = { copy: "copy", not_copy: "not a copy" };
  const COLUMNS = ["query", "reference", "decision", "query_sha256", "reference_sha256", "note", "decided_at"];
  const OVERSCAN = 4;
  const SVG = "http://www.w3.org/2000/svg";

  const byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent);
  const settings = read("settings"), rows = read("rows"), pictures = read("pictures");
  const list = byId("list"), empty = byId("empty"), status = byId("status");

  // --- marks: a pair of pictures has one, in whichever direction it is listed

  const storageKey = `dino-search report ${settings.id}`;
  const marks = new Map();
  const history = [];
  let justMarked = false;

  const pairOf = (row) => {
    const one = pictures[row[QUERY]][SHA256], other = pictures[row[REFERENCE]][SHA256];
    return one < other ? one + other : other + one;
  };
  const markOf = (row) => marks.get(pairOf(row))?.decision ?? "";

  function loadMarks() {
    try {
      for (const [pair, mark] of JSON.parse(localStorage.getItem(storageKey) ?? "[]")) marks.set(pair, mark);
    } catch { byId("not-kept").hidden = false; }
  }

  function keepMarks() {
    try {
      localStorage.setItem(storageKey, JSON.stringify([...marks]));
    } catch { byId("not-kept").hidden = false; }
  }

  function setMark(position, decision, { remember = true } = {}) {
    const row = rows[view[position]], pair = pairOf(row), before = marks.get(pair);
    if (remember) history.push({ index: view[position], pair, before });
    justMarked = remember;
    if (decision) marks.set(pair, { decision, at: new Date().toISOString() });
    else marks.delete(pair);
    afterMarking(`${decision ? `marked ${NAMES[decision]}` : "mark removed"}: ${nameOf(row)}`);
  }

  // What was just marked is undone, step by step, until somebody moves on; then the mark of the current pair goes.
  function undo() {
    const row = rows[view[current]];
    if (!justMarked && row && marks.has(pairOf(row))) {
      setMark(current, "", { remember: false });
      return;
    }
    const last = history.pop();
    if (!last) {
      say("nothing to undo", { visibly: true });
      return;
    }
    if (last.before) marks.set(last.pair, last.before);
    else marks.delete(last.pair);
    const position = view.indexOf(last.index);
    if (position >= 0) moveTo(position);
    afterMarking("undone");
  }

  function afterMarking(text) {
    keepMarks();
    for (const [position, element] of shown) showMark(element, rows[view[position]]);
    showNumMarks();
    say(`${text}. ${marks.size} marked`);
  }

  function showNumMarks() {
    byId("num-marks").textContent = marks.size ? `(${marks.size})` : "";
    for (const id of ["csv", "json"]) byId(id).disabled = marks.size === 0;
  }

  // --- which rows, in which order

  let view = [], current = 0;
  const filters = { decisions: new Set(Object.keys(ORDER)), text: "", minScore: -Infinity, marked: "all" };
  const texts = rows.map(() => null);
  const textOf = (index) =>
    (texts[index] ??= `${pictures[rows[index][QUERY]][PATH]}\n${pictures[rows[index][REFERENCE]][PATH]}`.toLowerCase());
  const nameOf = (row) => `${baseName(pictures[row[QUERY]][PATH])} and ${baseName(pictures[row[REFERENCE]][PATH])}`;

  const byNumber = (column) => (a, b) => (rows[b][column] ?? -Infinity) - (rows[a][column] ?? -Infinity) || 0;
  const byText = (one, other) => (one < other ? -1 : one > other ? 1 : 0);
  const SORTS = {
    score: byNumber(SCORE),
    precision: (a, b) => byNumber(PRECISION)(a, b) || byNumber(SCORE)(a, b),
    decision: (a, b) => ORDER[rows[a][DECISION]] - ORDER[rows[b][DECISION]] || byNumber(SCORE)(a, b),
    query: (a, b) => byText(pictures[rows[a][QUERY]][PATH], pictures[rows[b][QUERY]][PATH])
      || rows[a][RANK] - rows[b][RANK],
  };

  function passes(index) {
    const row = rows[index], mark = markOf(row);
    return filters.decisions.has(row[DECISION]) && row[SCORE] >= filters.minScore
      && (filters.marked === "all" || (filters.marked === "yes" && mark) || (filters.marked === "no" && !mark)
        || (filters.marked === "decided" && row[VERDICT]))
      && (!filters.text || textOf(index).includes(filters.text));
  }

  function arrange() {
    const kept = view[current];
    view = [...rows.keys()].filter(passes).sort(SORTS[byId("sort").value]);
    if (byId("reverse").getAttribute("aria-pressed") === "true") view.reverse();
    current = Math.max(0, view.indexOf(kept));
    for (const element of shown.values()) element.remove();
    shown.clear();
    empty.hidden = view.length > 0;
    empty.firstElementChild.textContent = rows.length ? "No pair passes the filters." : "No candidate pairs were found.";
    byId("reset").hidden = rows.length === 0;
    const text = `${view.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} pairs`;
    byId("shown").textContent = text;
    say(text);
    layOut();
  }

  // --- rows on the screen: those in view, and the current one, which has the focus

  const shown = new Map();
  let height = 1;

  function layOut() {
    const probe = document.createElement("div");
    probe.style.height = "var(--row)";
    list.append(probe);
    height = probe.getBoundingClientRect().height || 1;
    probe.remove();
    list.style.height = `${view.length * height}px`;
    for (const [position, element] of shown) place(element, position);
    showRows();
  }

  const place = (element, position) => { element.style.transform = `translateY(${position * height}px)`; };

  function showRows() {
    const top = list.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(-top / height) - OVERSCAN);
    const last = Math.min(view.length - 1, Math.ceil((innerHeight - top) / height) + OVERSCAN);
    const wanted = new Set(view.length ? [Math.min(current, view.length - 1)] : []);
    for (let position = first; position <= last; position++) wanted.add(position);
    for (const [position, element] of shown) {
      if (wanted.has(position)) continue;
      element.remove();
      shown.delete(position);
    }
    for (const position of [...wanted].sort((a, b) => a - b)) {
      if (shown.has(position)) continue;
      const element = buildRow(position);
      place(element, position);
      // In reading order: the next one that is there already comes after it.
      const next = Math.min(...[...shown.keys()].filter((other) => other > position));
      list.insertBefore(element, shown.get(next) ?? null);
      shown.set(position, element);
    }
    for (const [position, element] of shown) {
      element.classList.toggle("current", position === current);
      element.tabIndex = position === current ? 0 : -1;
    }
  }

  function stepTo(position) {
    justMarked = false;
    moveTo(position);
  }

  function moveTo(position) {
    if (!view.length) return;
    current = Math.min(Math.max(position, 0), view.length - 1);
    const top = list.getBoundingClientRect().top + current * height;
    const bar = byId("decisions").parentElement;
    const covered = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight + 8 : 8;
    if (top < covered) scrollBy({ top: top - covered, behavior: "instant" });
    else if (top + height > innerHeight) scrollBy({ top: top + height - innerHeight, behavior: "instant" });
    showRows();
    shown.get(current)?.focus({ preventScroll: true });
  }

  // --- one row

  function make(tag, className, ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  }

  function buildRow(position) {
    const row = rows[view[position]];
    const element = make("article", "pair",
      buildPicture(row[QUERY], row[QUERY_AREA], "query"),
      buildPicture(row[REFERENCE], row[REFERENCE_AREA], "reference"),
      buildFacts(row),
      make("div", "marks", buildMark("copy", "Copy", position), buildMark("not_copy", "Not a copy", position)));
    element.setAttribute("role", "listitem");
    element.setAttribute("aria-setsize", view.length);
    element.setAttribute("aria-posinset", position + 1);
    element.addEventListener("focusin", () => {
      if (current === position) return;
      current = position;
      showRows();
    });
    element.addEventListener("click", (event) => {
      if (!event.target.closest("a, button")) stepTo(position);
    });
    showMark(element, row);
    return element;
  }

  function showMark(element, row) {
    const mark = markOf(row);
    element.dataset.mark = mark || (row[VERDICT] ?? "");
    for (const button of element.querySelectorAll(".marks button"))
      button.setAttribute("aria-pressed", String(button.dataset.mark === mark));
    element.setAttribute("aria-label",
      `${row[DECISION]}${row[SIMILAR] ? ", similar" : ""}, precision ${percent(row[PRECISION])}, `
      + `score ${row[SCORE].toFixed(3)}: ${nameOf(row)}${mark ? `, marked ${NAMES[mark]}` : ""}`);
  }

  function buildPicture(number, area, what) {
    const path = pictures[number][PATH], thumbnail = thumbnailOf(number);
    const figure = make("figure");
    if (!thumbnail) {
      figure.append(make("span", "gone", `the ${what} cannot be read any more`));
      return figure;
    }
    const href = linkTo(path);
    const frame = make(href ? "a" : "span", "frame");
    if (href) {
      frame.href = href;
      frame.target = "_blank";
      frame.rel = "noopener noreferrer";
      frame.tabIndex = -1;
      frame.title = `Open ${path}`;
    }
    // In shares of the frame, which is smaller on a phone.
    frame.style.width = `${(100 * thumbnail.width) / settings.side}%`;
    frame.style.aspectRatio = `${thumbnail.width} / ${thumbnail.height}`;
    const image = make("img");
    image.src = `data:image/jpeg;base64,${thumbnail.data}`;
    image.alt = `${what}: ${baseName(path)}`;
    image.decoding = "async";
    frame.append(image);
    if (area) frame.append(buildArea(area));
    figure.append(frame);
    return figure;
  }

  function buildArea(area) {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 1 1");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    for (const className of ["halo", "outline"]) {
      const polygon = document.createElementNS(SVG, "polygon");
      polygon.setAttribute("class", className);
      polygon.setAttribute("points", area.map(([x, y]) => `${x},${y}`).join(" "));
      svg.append(polygon);
    }
    const corner = document.createElementNS(SVG, "line");
    for (const end of ["1", "2"]) {
      corner.setAttribute(`x${end}`, Math.min(Math.max(area[0][0], 0), 1));
      corner.setAttribute(`y${end}`, Math.min(Math.max(area[0][1], 0), 1));
    }
    svg.append(corner);
    return svg;
  }

  function buildFacts(row) {
    const head = make("div", "line", make("span", `badge ${row[DECISION]}`, row[DECISION]));
    if (row[SIMILAR]) head.append(make("span", "badge similar", "similar"));
    const precision = buildNumber("precision", percent(row[PRECISION]));
    if (row[PRECISION] !== null) {
      const fill = make("i");
      fill.style.width = `${100 * row[PRECISION]}%`;
      precision.append(make("span", `meter ${row[DECISION]}`, fill));
    }
    head.append(precision, buildNumber("score", row[SCORE].toFixed(3)),
      buildNumber("cosine", row[COSINE].toFixed(3), "extra"), buildNumber("rank", row[RANK], "extra"));
    const why = [row[VERDICT] && `decided by a person: ${NAMES[row[VERDICT]]}`,
      row[REASON] === "verdict" ? "" : REASONS[row[REASON]] ?? row[REASON], VARIANTS[row[VARIANT]] ?? row[VARIANT].replaceAll("_", " "),
      row[VERIFIED] === true ? "areas fit one transform" : row[VERIFIED] === false ? "no transform fits" : ""];
    return make("div", "facts-column", head,
      make("div", "paths", buildPath("query", row[QUERY]), buildPath("reference", row[REFERENCE])),
      make("div", "why", why.filter(Boolean).join(" · ")));
  }

  function buildNumber(name, value, className = "") {
    return make("span", `number ${className}`, `${name} `, make("b", "", String(value)));
  }

  function buildPath(what, number) {
    const path = pictures[number][PATH], name = baseName(path);
    const line = make("div", "path", make("span", "", what), make("bdi", "name", name),
      make("bdi", "", path.slice(0, path.length - name.length)));
    line.title = path;
    return line;
  }

  function buildMark(decision, text, position) {
    const button = make("button", "", text);
    button.type = "button";
    button.dataset.mark = decision;
    button.addEventListener("click", () => {
      current = position;
      setMark(position, markOf(rows[view[position]]) === decision ? "" : decision);
      showRows();
    });
    return button;
  }

  const baseName = (path) => path.slice(Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\")) + 1) || path;
  const percent = (share) => (share === null ? "not known" : `${(100 * share).toFixed(1)} %`);

  // --- pictures

  const blocks = new Map();

  /** {width, height, data} of a picture; null where it could not be read. */
  function thumbnailOf(number) {
    const block = Math.floor(number / settings.block);
    if (!blocks.has(block)) {
      blocks.set(block, byId(`thumbnails-${block}`).textContent.split("\n"));
      if (blocks.size > 40) blocks.delete(blocks.keys().next().value);
    }
    const line = blocks.get(block)[number % settings.block];
    if (!line) return null;
    const [width, height, data] = line.split(",");
    return { width: Number(width), height: Number(height), data };
  }

  /** Where a browser finds the original; null for members of archives and places it cannot open. */
  function linkTo(path) {
    if (/^https?:\/\//.test(path)) return path;
    if (/\.tar[\\/]/i.test(path) || /^[a-z][a-z0-9+.-]+:\/\//i.test(path)) return null;
    const encoded = path.split(/\\x([0-9a-f]{2})/).map((part, n) => (n % 2 ? `%${part.toUpperCase()}` : encodeURIComponent(
      /^[A-Za-z]:\\/.test(path) ? part.replaceAll("\\", "/") : part).replaceAll("%2F", "/"))).join("");
    return encoded.startsWith("/") ? `file://${encoded}` : `file:///${encoded.replace("%3A", ":")}`;
  }

  // --- download

  function verdicts() {
    const found = new Map();
    for (const row of rows) {
      const pair = pairOf(row), mark = marks.get(pair);
      if (!mark || found.has(pair)) continue;
      const [query, reference] = [pictures[row[QUERY]], pictures[row[REFERENCE]]];
      found.set(pair, { query: query[PATH], reference: reference[PATH], decision: mark.decision,
        query_sha256: query[SHA256], reference_sha256: reference[SHA256], note: "", decided_at: mark.at });
    }
    return [...found.values()];
  }

  const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

  function download(form) {
    const found = verdicts();
    if (!found.length) {
      say("nothing is marked yet", { visibly: true });
      return;
    }
    const text = form === "json" ? JSON.stringify({ verdicts: found }, null, 1)
      : [COLUMNS, ...found.map((verdict) => COLUMNS.map((name) => verdict[name]))]
        .map((cells) => `${cells.map(cell).join(",")}\n`).join("");
    const link = make("a");
    link.download = `verdicts.${form}`;
    link.href = URL.createObjectURL(new Blob([text], { type: form === "json" ? "application/json" : "text/csv" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    say(`${found.length} verdicts in verdicts.${form}. Record them: dino-search verdicts import verdicts.${form}`,
      { visibly: true, for_ms: 10_000 });
  }

  let hiding = 0;

  /** Tells those who listen, and where it is not to be seen elsewhere, those who look. */
  function say(text, { visibly = false, for_ms = 3000 } = {}) {
    status.textContent = text;
    clearTimeout(hiding);
    status.classList.toggle("seen", visibly);
    if (visibly) hiding = setTimeout(() => status.classList.remove("seen"), for_ms);
  }

  // --- what people do

  function mark(decision) {
    if (!view.length) return;
    setMark(current, decision);
    if (current < view.length - 1) moveTo(current + 1);
  }

  const forward = () => stepTo(begun() ? current + 1 : current), back = () => stepTo(current - 1);
  const KEYS = {
    j: forward, ArrowDown: forward, k: back, ArrowUp: back, Home: () => stepTo(0), End: () => stepTo(view.length - 1),
    c: () => mark("copy"), n: () => mark("not_copy"), u: undo,
    s: () => download("csv"), d: () => download("json"), "/": () => byId("text").focus(),
  };
  /** Whether a row has the focus: the first step only gives it to the current one. */
  const begun = () => document.activeElement?.closest?.(".pair") !== null;

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && event.target.id === "text") {
      stepTo(current);
      return;
    }
    if (event.target.closest?.("input, select, summary")) return;
    if (event.target.closest?.(".controls") && event.key.length > 1) return;
    const act = KEYS[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  for (const button of byId("decisions").querySelectorAll("button")) {
    const decision = button.dataset.decision;
    const number = rows.filter((row) => row[DECISION] === decision).length;
    button.querySelector("span").textContent = number.toLocaleString("en");
    button.addEventListener("click", () => {
      if (!filters.decisions.delete(decision)) filters.decisions.add(decision);
      button.setAttribute("aria-pressed", String(filters.decisions.has(decision)));
      arrange();
    });
  }
  byId("text").addEventListener("input", (event) => {
    filters.text = event.target.value.toLowerCase();
    arrange();
  });
  byId("min-score").addEventListener("input", (event) => {
    filters.minScore = event.target.value === "" ? -Infinity : Number(event.target.value);
    arrange();
  });
  byId("marked").addEventListener("change", (event) => {
    filters.marked = event.target.value;
    arrange();
  });
  byId("sort").addEventListener("change", arrange);
  byId("reverse").addEventListener("click", (event) => {
    const button = event.currentTarget;
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    arrange();
  });
  byId("reset").addEventListener("click", () => {
    filters.decisions = new Set(Object.keys(ORDER));
    Object.assign(filters, { text: "", minScore: -Infinity, marked: "all" });
    for (const button of byId("decisions").querySelectorAll("button")) button.setAttribute("aria-pressed", "true");
    for (const id of ["text", "min-score"]) byId(id).value = "";
    byId("marked").value = "all";
    arrange();
  });
  byId("csv").addEventListener("click", () => download("csv"));
  byId("json").addEventListener("click", () => download("json"));
  addEventListener("scroll", () => requestAnimationFrame(showRows), { passive: true });
  addEventListener("resize", layOut);

  loadMarks();
  showNumMarks();
  arrange();
})();

// Pairs of pictures side by side, each to be called a copy or not, by mouse or by keyboard.

import { putVerdict } from "/web/api.js";
import { element } from "/web/elements.js";
import { framed } from "/web/pictures.js";

const SIDE = 384;
const WORDS = { copy: "copy", not_copy: "not a copy", uncertain: "uncertain", different: "different" };

// A list of pairs, to be put on the page piece by piece.
//
// A pair: {left, right: {picture, name, path, area}, decision, facts: texts, verdict, pair: what PUT /verdicts takes,
// or null where there is nothing to decide}. say(text): tells the status. fail(error): tells what went wrong.
// search(picture): searches by a picture.
export class PairList {
  constructor({ say, fail, search }) {
    Object.assign(this, { say, fail, search });
    this.pairs = [];
    this.current = null;
  }

  // The pairs as list items, in their order.
  items(pairs) {
    return pairs.map((pair) => element("li", {}, this.#article(pair)));
  }

  // Keys act on what has the focus in the list, or where nothing has it. Returns whether the key was for the list.
  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.pairs.length) return false;
    const { target } = event;
    const inside = target.closest?.(".pair");
    if (!inside && target !== document.body) return false;
    if (inside) this.#choose(this.pairs.find((pair) => pair.article === inside));
    const act = {
      j: () => this.#step(1), ArrowDown: () => this.#step(1), k: () => this.#step(-1), ArrowUp: () => this.#step(-1),
      c: () => this.#decide("copy"), n: () => this.#decide("not_copy"),
    }[event.key];
    if (!act) return false;
    event.preventDefault();
    act();
    return true;
  }

  focusFirst() {
    this.current ??= this.pairs[0] ?? null;
    this.current?.article.focus({ preventScroll: true });
  }

  #article(pair) {
    pair.buttons = pair.pair
      ? [this.#button(pair, "copy", "Copy", "c"), this.#button(pair, "not_copy", "Not a copy", "n")]
      : [];
    pair.mark = element("span", { class: "mark" });
    const number = this.pairs.push(pair);
    pair.article = element(
      "article",
      { class: "pair", tabindex: number === 1 ? "0" : "-1", focusin: () => this.#choose(pair),
        "aria-label": `Pair ${number}: ${pair.left.name} and ${pair.right.name}` },
      this.#side(pair.left),
      this.#side(pair.right),
      element("div", { class: "about" },
        element("p", {},
          element("span", { class: "decision", "data-decision": pair.decision }, WORDS[pair.decision] ?? pair.decision),
          pair.mark,
        ),
        ...pair.facts.map((fact) => element("p", { class: "fact" }, fact)),
        pair.buttons.length ? element("div", { class: "row" }, ...pair.buttons) : null,
      ),
    );
    this.#mark(pair, pair.verdict);
    return pair.article;
  }

  #side({ picture, name, path, area }) {
    const frame = framed(picture, { side: SIDE, area, alt: area ? `${name}, the matched area is outlined` : name });
    const again = picture.id === undefined
      ? element("span", { class: "name", title: path }, name)
      : element("button", { type: "button", class: "name link", title: path, click: () => this.search({ ...picture, name }) },
          element("span", { class: "hidden" }, "Search by "), name);
    return element("figure", {}, frame, element("figcaption", {}, again));
  }

  #button(pair, decision, text, key) {
    return element(
      "button",
      { type: "button", "data-decision": decision, "aria-pressed": "false", "aria-keyshortcuts": key,
        click: () => { this.#choose(pair); this.#decide(decision, false); } },
      text, element("kbd", { "aria-hidden": "true" }, key),
    );
  }

  #choose(pair) {
    if (!pair || pair === this.current) return;
    (this.current ?? this.pairs[0]).article.tabIndex = -1;
    this.current = pair;
    pair.article.tabIndex = 0;
  }

  #step(by) {
    const visible = this.pairs.filter(({ article }) => article.checkVisibility());
    const at = visible.indexOf(this.current);
    const next = visible[at < 0 ? 0 : Math.min(Math.max(at + by, 0), visible.length - 1)];
    if (!next) return;
    this.#choose(next);
    next.article.focus();
    next.article.scrollIntoView({ block: "nearest" });
  }

  // Goes on at once; where the service refuses, the pair is as before.
  async #decide(decision, goOn = true) {
    const pair = this.current;
    if (!pair?.pair) {
      this.say(pair ? "Both files have the same bytes: there is nothing to decide." : "Choose a pair first.");
      return;
    }
    const before = pair.verdict;
    this.#mark(pair, decision);
    if (goOn) this.#step(1);
    try {
      await putVerdict({ decision, ...pair.pair });
      this.say(`Recorded: ${pair.left.name} and ${pair.right.name}: ${WORDS[decision]}.`);
    } catch (error) {
      this.#mark(pair, before);
      this.fail(error);
    }
  }

  #mark(pair, verdict) {
    pair.verdict = verdict ?? null;
    pair.article.dataset.verdict = verdict ?? "";
    pair.mark.textContent = verdict ? `your verdict: ${WORDS[verdict]}` : "";
    for (const button of pair.buttons) button.setAttribute("aria-pressed", button.dataset.decision === verdict);
  }
}

export const keysHelp = () => element(
  "p",
  { class: "help keys" },
  element("kbd", {}, "j"), element("kbd", {}, "k"), " or arrows: next and previous pair, ",
  element("kbd", {}, "c"), " copy, ", element("kbd", {}, "n"), " not a copy",
);

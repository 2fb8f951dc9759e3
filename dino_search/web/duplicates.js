// What a collection holds more than once: in each group, the file to keep beside each other one.

import { ask, askForAll } from "/web/api.js";
import { baseName, element, inBytes, plural } from "/web/elements.js";
import { PairList, keysHelp } from "/web/pairs.js";

const GROUPS_PER_PAGE = 50;
const PAUSE_MS = 500;

export class DuplicatesView {
  // options: of GET /duplicates, the collection among them. tools: as PairList takes them.
  constructor(options, tools, signal) {
    Object.assign(this, { options, tools, signal });
    this.list = new PairList(tools);
    this.groups = element("div", {});
    this.more = element("button", { type: "button", hidden: true, click: () => this.#showMore() }, "Show more groups");
    this.shown = new Set();
    this.cursor = 0;
  }

  // Elements that show the first groups, and the answer itself.
  async load() {
    const verdicts = await askForAll("/verdicts", "verdicts", { collection: this.options.collection }, this.signal);
    this.verdicts = new Map(verdicts.map((each) => [pairKey(each.query_sha256, each.reference_sha256), each.decision]));
    const answer = await this.#page();
    const remarks = answer.remarks.map((remark) => element("p", { class: "notice" }, remark));
    const help = answer.num_groups ? keysHelp() : null;
    return { answer, elements: [...remarks, help, this.groups, this.more] };
  }

  async #page() {
    const parameters = { ...this.options, cursor: this.cursor, limit: GROUPS_PER_PAGE };
    const answer = await this.#answer(parameters);
    // A verdict may have split a group, and then it stands in the answer anew: of pairs, each is shown once.
    for (const group of answer.groups) this.#add(group);
    this.cursor = answer.next_cursor;
    this.more.hidden = this.cursor === null;
    return answer;
  }

  // The service gives up answering before it gives up looking: then ask again, for as long as anybody wants to know.
  async #answer(parameters) {
    for (;;) {
      try {
        return await (await ask("/duplicates", { parameters, signal: this.signal })).json();
      } catch (error) {
        if (error.code !== "request-timed-out") throw error;
        this.tools.say("Still looking for duplicates …");
        await new Promise((done) => setTimeout(done, PAUSE_MS));
      }
    }
  }

  async #showMore() {
    const before = this.list.pairs.length;
    this.more.disabled = true;
    try {
      // Groups that verdicts dissolved move up those behind them: ask for as many of the pages shown again.
      const dissolved = this.list.pairs.filter((pair) => pair.verdict === "not_copy").length;
      this.cursor = Math.max(0, this.cursor - dissolved);
      await this.#page();
      this.tools.say(`${plural(this.list.pairs.length - before, "more pair")} shown`);
      this.list.pairs[before]?.article.focus();
    } catch (error) {
      this.tools.fail(error);
    } finally {
      this.more.disabled = false;
    }
  }

  #add(group) {
    const kept = group.files.find((file) => file.keep) ?? group.files[0];
    const pairs = group.files
      .filter((file) => file !== kept)
      .map((file) => [pairKey(kept.image_id, file.image_id), file])
      .filter(([key]) => !this.shown.has(key));
    if (!pairs.length) return;
    for (const [key] of pairs) this.shown.add(key);
    const title = `Group ${group.group}`;
    this.groups.append(
      element("section", { class: "group", "aria-label": title },
        element("h3", {}, title, element("span", { class: "help" },
          ` ${plural(group.files.length, "file")}, ${inBytes(group.spare_bytes)} to spare`)),
        element("ol", { class: "pairs" }, ...this.list.items(pairs.map(([, file]) => this.#pair(kept, file)))),
      ),
    );
  }

  #pair(kept, file) {
    return {
      left: { picture: { id: kept.image_id }, name: baseName(kept.path), path: kept.path, area: null },
      right: { picture: { id: file.image_id }, name: baseName(file.path), path: file.path, area: null },
      decision: file.direct ? "copy" : "uncertain",
      facts: [
        `keep ${sizes(kept)}`,
        `spare ${sizes(file)}`,
        file.identical ? "the very same bytes" : `cosine ${file.score.toFixed(3)}`,
        ...(file.direct ? [] : ["connected by others of the group only"]),
      ],
      verdict: this.verdicts.get(pairKey(kept.sha256, file.sha256)) ?? null,
      pair: kept.sha256 === file.sha256 ? null : { query_id: kept.image_id, reference_id: file.image_id },
    };
  }
}

const sizes = (file) => `${file.width} × ${file.height}, ${inBytes(file.size)}`;

const pairKey = (one, other) => [one, other].sort().join(" ");

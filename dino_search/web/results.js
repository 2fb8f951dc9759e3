// What searches and classifications answer, as grids.

import { baseName, element } from "/web/elements.js";
import { framed } from "/web/pictures.js";

// Found images, best first, or those of a collection, which have no score. askBy(picture): is called with the one that
// is clicked.
export function grid(results, askBy) {
  return element("ol", { class: "grid" }, ...results.map((result) => element("li", {}, cell(result, askBy))));
}

function cell(result, askBy) {
  const picture = { id: result.image_id, name: baseName(result.path) };
  return element(
    "button",
    { type: "button", class: "result", title: result.path, "data-image": result.image_id, click: () => askBy(picture) },
    framed(picture),
    element("span", { class: "hidden" }, "Ask about "),
    element("span", { class: "name" }, picture.name),
    element("span", { class: "facts" },
      result.score === undefined
        ? null
        : element("span", { class: "score" }, element("span", { class: "hidden" }, ", score "), result.score.toFixed(3)),
      result.label === null ? null : element("span", { class: "hidden" }, ", label "),
      result.label === null ? null : element("span", { class: "label" }, result.label),
    ),
  );
}

// The labels of a classification, most probable first.
export function labels(classification) {
  const sorted = Object.entries(classification.probabilities).sort(([, one], [, other]) => other - one);
  return element(
    "ol",
    { class: "labels" },
    ...sorted.map(([label, probability]) => {
      const bar = element("span", { class: "bar", "aria-hidden": "true" });
      bar.style.inlineSize = `${100 * probability}%`;
      return element("li", {},
        element("span", { class: "name" }, label),
        element("span", { class: "share" }, `${(100 * probability).toFixed(1)} %`),
        element("span", { class: "track" }, bar),
      );
    }),
  );
}

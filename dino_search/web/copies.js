// What copy detection answers: the picture beside each candidate.

import { baseName, element, plural } from "/web/elements.js";
import { PairList, keysHelp } from "/web/pairs.js";

const DIGITS = 3;

// Elements that show the answer, and the list of its pairs. picture: that was asked about.
export function shownCopies(answer, picture, tools) {
  const list = new PairList(tools);
  const { matches } = answer.queries[0];
  const pairs = matches.map((match) => ({
    left: { picture, name: picture.name, path: match.query, area: match.query_area },
    right: {
      picture: { id: match.image_id },
      name: baseName(match.reference),
      path: match.reference,
      area: match.reference_area,
    },
    decision: match.decision,
    facts: factsOf(match),
    verdict: match.verdict,
    pair: match.query_sha256 === match.reference_sha256
      ? null
      : { query_sha256: match.query_sha256, reference_sha256: match.reference_sha256 },
  }));
  const facts = Object.entries(answer.facts);
  return {
    list,
    elements: [
      pairs.length ? keysHelp() : null,
      ...inTwoParts(pairs, list),
      facts.length
        ? element("details", {}, element("summary", {}, "How this was decided"),
            element("dl", {}, ...facts.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)])))
        : null,
    ],
  };
}

// What differs from the picture is there for those who ask, below the rest.
function inTwoParts(pairs, list) {
  const shown = pairs.filter((pair) => pair.decision !== "different" || pair.verdict);
  const others = pairs.filter((pair) => !shown.includes(pair));
  const items = (part) => element("ol", { class: "pairs" }, ...list.items(part));
  return [
    shown.length ? items(shown) : null,
    others.length
      ? element("details", { class: "different", open: !shown.length },
          element("summary", {}, `${plural(others.length, "nearest image")} that ${others.length === 1 ? "differs" : "differ"}`),
          items(others))
      : null,
  ];
}

function factsOf(match) {
  const facts = [`score ${match.score.toFixed(DIGITS)}, cosine ${match.cosine.toFixed(DIGITS)}`];
  if (match.precision !== null) facts.push(`precision ${(100 * match.precision).toFixed(1)} %`);
  if (match.reason === "identical") facts.push("the very same bytes");
  if (match.verified !== null) facts.push(match.verified ? "parts of both fit one another" : "no parts fit one another");
  if (match.similar) facts.push("frames of one burst");
  return facts;
}

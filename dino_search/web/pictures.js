// Pictures on the page: thumbnails from the service, files of this machine, and areas drawn over both.

import { ask, apiKey } from "/web/api.js";
import { element, svgElement } from "/web/elements.js";

const NOT_SHOWN = "No preview";

// An image that a browser asks for itself carries no key, so with a key they are fetched here: when they come near
// the screen, as the browser does it.
const nearScreen = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      nearScreen.unobserve(target);
      fetchInto(target);
    }
  },
  { rootMargin: "300px" },
);

async function fetchInto(image) {
  try {
    showBlob(image, await (await ask(image.dataset.source)).blob());
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

export function showBlob(image, blob) {
  const url = URL.createObjectURL(blob);
  const release = () => URL.revokeObjectURL(url);
  image.addEventListener("load", release, { once: true });
  image.addEventListener("error", release, { once: true });
  image.src = url;
}

// Puts a picture into an image element: {id} of the service, or {url} of a file. side: pixels.
export function show(image, picture, side) {
  nearScreen.unobserve(image);
  image.closest(".frame")?.classList.remove("missing");
  if (picture.id === undefined) {
    image.src = picture.url;
    return;
  }
  const source = `/images/${picture.id}/thumbnail?side=${side}`;
  if (apiKey.get()) {
    image.removeAttribute("src");
    image.dataset.source = source;
    nearScreen.observe(image);
  } else {
    image.src = source;
  }
}

// Says in the frame around an image that it cannot be shown, whenever that is so.
export function watched(image) {
  image.addEventListener("error", () => {
    const frame = image.closest(".frame");
    frame?.classList.add("missing");
    frame?.setAttribute("data-note", NOT_SHOWN);
  });
  image.addEventListener("load", () => image.closest(".frame")?.classList.remove("missing"));
  return image;
}

// A picture in a frame. area: corners as fractions of its width and height, drawn over it.
export function framed(picture, { side = 192, alt = "", area = null } = {}) {
  const image = watched(element("img", { alt, loading: "lazy", decoding: "async", draggable: "false" }));
  const frame = element("div", { class: "frame" }, image, area ? drawn(area) : null);
  show(image, picture, side);
  return frame;
}

// Lines of one width however large the picture is: bright on dark, to be seen on any picture.
function drawn(area) {
  const points = area.map((point) => point.join(",")).join(" ");
  return svgElement(
    "svg",
    { class: "area", viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" },
    svgElement("polygon", { class: "shadow", points }),
    svgElement("polygon", { class: "outline", points }),
  );
}

"""Edited copies of photographs found among references: this project beside PDQ, pHash and a supervised CNN.

    python tests/benchmarks/bench_copies.py --photos FOLDER [--gallery FOLDER] [--queries 1500] [--input-size SIDE]

600 photographs are the references; with --gallery as many other pictures as that folder has are searched with them.
Of the queries four fifths are edited copies of references, the others of photographs that are not among them.
All methods see the same pixels in one run. Ours is shown part by part, with the same weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from copy_figures import copy_figures
from numpy.typing import NDArray
from PIL import Image

from dino_index.backbones import Backbone
from dino_index.copy_descriptors import CopyDescriptor, shipped_descriptor
from dino_index.copy_detection import CopyDetector, DetectionOptions, Reference, make_query, make_reference
from dino_index.copy_search import CopySearch
from dino_index.edited_queries import draw_edits, edited_copy
from dino_index.edits import EDITS
from dino_index.held_references import HeldReferences
from dino_index.images import load_image
from dino_index.model_files import ModelSpec, resolve_model
from dino_index.query_views import QueryView, query_views
from dino_index.score_normalisation import MAX_BACKGROUND
from dino_index.snapshots import Vectors, normalise
from dino_search.calibrating import mode_of, shipped_calibration
from dino_training.frozen_teacher import prepare_teacher

Found = list[list[tuple[float, int]]]
NUM_REFERENCES = 600
K = 20
DEFAULTS = DetectionOptions(k=K)
WHOLE = DetectionOptions(k=K, variants="none", regions="none")
MIRRORED = DetectionOptions(k=K, variants="mirror", regions="none")
_PICTURE_SIDE = 320
_WITHOUT_MATCH_EVERY = 5


@dataclass(frozen=True)
class Material:
    references: list[Image.Image]
    queries: list[Image.Image]
    truth: list[int | None]
    kinds: list[tuple[str, ...]]


def photographs(folder: Path, number: int | None = None) -> list[Image.Image]:
    """The pictures below a folder, in an order that is random and always the same."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"})
    order = np.random.default_rng(0).permutation(len(paths))[:number]
    return [Image.fromarray(load_image(paths[i], max_short_side=_PICTURE_SIDE).pixels_HWC) for i in order]


def make_material(photos: Sequence[Image.Image], gallery: Sequence[Image.Image], num_queries: int) -> Material:
    references, others = photos[:NUM_REFERENCES], photos[NUM_REFERENCES:]
    assert len(others) >= 100, f"--photos takes {NUM_REFERENCES + 100} pictures or more"
    unseen, backgrounds = others[: len(others) // 2], others[len(others) // 2 :]
    rng = np.random.default_rng(1)
    queries, truth = [], []
    kinds = list(islice(draw_edits(rng), num_queries))
    # The kinds repeat after a while: their order must not decide which queries have no match.
    has_match = rng.permutation(np.arange(num_queries) % _WITHOUT_MATCH_EVERY != 0)
    for edits, matches in zip(kinds, has_match, strict=True):
        own = int(rng.integers(len(references) if matches else len(unseen)))
        original = references[own] if matches else unseen[own]
        queries.append(edited_copy(original, edits, rng, backgrounds))
        truth.append(own if matches else None)
    return Material([*references, *gallery], queries, truth, kinds)


def by_hash(material: Material, bits_of: Callable[[Image.Image], NDArray[np.bool_]]) -> Found:
    """Score: share of equal bits."""
    references = np.stack([bits_of(image) for image in material.references]).astype(np.float32) * 2 - 1
    queries = np.stack([bits_of(image) for image in material.queries]).astype(np.float32) * 2 - 1
    return best(queries @ references.T / references.shape[1])


def best(scores_QN: NDArray[np.float32]) -> Found:
    positions_QK = np.argsort(-scores_QN, axis=1, kind="stable")[:, :K]
    return [[(float(scores[p]), int(p)) for p in row] for scores, row in zip(scores_QN, positions_QK, strict=True)]


def pdq_bits(image: Image.Image) -> NDArray[np.bool_]:
    import pdqhash

    return np.asarray(pdqhash.compute(np.asarray(image))[0], np.bool_)


def phash_bits(image: Image.Image) -> NDArray[np.bool_]:
    import imagehash

    return np.asarray(imagehash.phash(image).hash.ravel(), np.bool_)


def by_cnn(material: Material) -> Found:
    """Pooled features of an EfficientNet-Lite0 that was trained on ImageNet with labels, compared by cosine."""
    with TemporaryDirectory() as folder:
        backbone = Backbone(resolve_model(prepare_teacher("efficientnet_lite0", Path(folder))))

    def features(images: Sequence[Image.Image]) -> NDArray[np.float32]:
        side = backbone.spec.input_size
        return normalise(embed(backbone, [load_image(image, size=(side, side)).pixels_HWC for image in images])[0])

    return best(features(material.queries) @ features(material.references).T)


def embed(backbone: Backbone, squares: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Raw [CLS] and GeM of squares of the model's input size."""
    size = backbone.batch_size
    with backbone.forward_threads() as forward:
        batches = [np.stack(squares[begin : begin + size]) for begin in range(0, len(squares), size)]
        parts = list(forward.map(backbone.embed, batches))
    return np.concatenate([cls for cls, _ in parts]), np.concatenate([gem for _, gem in parts])


class Ours:
    """The bundled model: all views of all queries embedded once, then searched with this part and that."""

    def __init__(self, material: Material, spec: ModelSpec) -> None:
        self.backbone = Backbone(spec)
        self.shipped = shipped_descriptor(spec.weights_path) or CopyDescriptor()
        side = spec.input_size
        squares = [load_image(image, size=(side, side)).pixels_HWC for image in material.references]
        self.reference_vectors = embed(self.backbone, squares)
        self.views: list[list[QueryView]] = []
        self.vectors: list[tuple[NDArray[np.float16], NDArray[np.float16]]] = []
        start = time.perf_counter()
        for image in material.queries:
            square = load_image(image, size=(side, side)).pixels_HWC
            views = query_views(square, np.asarray(image), variants="all", regions=True)
            self.views.append(views)
        made_s = time.perf_counter() - start
        flat = [view.pixels_SSC for views in self.views for view in views]
        cls, gem = embed(self.backbone, flat)
        self.per_view_ms = 1000 * (time.perf_counter() - start) / len(flat)
        ends = np.cumsum([len(views) for views in self.views])[:-1]
        self.vectors = list(zip(np.split(cls, ends), np.split(gem, ends), strict=True))
        print(f"{len(flat)} views of {len(self.views)} queries, {self.per_view_ms:.1f} ms each, "
              f"of which making them {1000 * made_s / len(flat):.1f} ms")  # fmt: skip

    def search(self, descriptor: CopyDescriptor, wanted: Callable[[str], bool], *, cls_only: bool = False) -> Found:
        cls, gem = self.reference_vectors
        if cls_only:
            gem = cls
        references = Vectors(np.arange(len(cls)), descriptor.vectors(cls, gem))
        search = CopySearch(HeldReferences(references), descriptor)
        found = []
        for views, (cls_VD, gem_VD) in zip(self.views, self.vectors, strict=True):
            chosen = [number for number, view in enumerate(views) if wanted(view.name)]
            gems = cls_VD if cls_only else gem_VD
            candidates = search.candidates(cls_VD[chosen], gems[chosen], K)
            found.append([(candidate.score, candidate.image_id) for candidate in candidates])
        return found

    def own_background(self, descriptor: CopyDescriptor) -> CopyDescriptor:
        """The descriptor with a background of the references, as a collection learns it."""
        vectors = CopyDescriptor().vectors(*self.reference_vectors)
        chosen = np.random.default_rng(0).permutation(len(vectors))[:MAX_BACKGROUND]
        return replace(descriptor, background_BC=vectors[chosen])


def detect(
    ours: Ours,
    material: Material,
    descriptor: CopyDescriptor,
    num_synthetic: int = 0,
    options: DetectionOptions = DEFAULTS,
) -> tuple[Found, float]:
    """(found, seconds) of the whole pipeline, verification included, pictures in memory.

    num_synthetic: random vectors that are searched as well, and resemble nothing.
    """
    side = ours.backbone.spec.input_size
    vectors = descriptor.vectors(*ours.reference_vectors)
    noise = np.random.default_rng(0).normal(size=(num_synthetic, vectors.shape[1])).astype(np.float32)
    references = Vectors(np.arange(len(vectors) + num_synthetic), np.concatenate([vectors, normalise(noise)]))

    def load_reference(number: int) -> Reference:
        return make_reference(material.references[number], side=side)

    detector = CopyDetector(ours.backbone, CopySearch(HeldReferences(references), descriptor), load_reference, options)
    queries = (
        make_query(image, path=str(number), sha256=bytes(32), side=side, options=options)
        for number, image in enumerate(material.queries)
    )
    start = time.perf_counter()
    detected = [detections for _, detections in detector.detect(queries)]
    elapsed_s = time.perf_counter() - start
    return [[(detection.score, detection.image_id) for detection in row] for row in detected], elapsed_s


def report_rate(ours: Ours, material: Material, descriptor: CopyDescriptor, num_synthetic: int) -> None:
    """The pipeline's rate against that of the queries' forward passes alone, one after the other in one run."""
    pixels = [view.pixels_SSC for views in ours.views for view in views]
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        embed(ours.backbone, pixels)
        forward_s = time.perf_counter() - start
        ratios.append(forward_s / detect(ours, material, descriptor, num_synthetic)[1])
    print(f"{len(material.queries)} queries against {len(material.references) + num_synthetic} images: "
          f"{np.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) of the rate of their {len(pixels)} "
          f"forward passes alone, those of verified references not counted")  # fmt: skip


def report_decisions(found: Found, material: Material, model: str) -> None:
    """Precision and recall of the pairs that the shipped calibration calls copies, against the best in hindsight."""
    calibration = shipped_calibration(resolve_model(model).weights_path, mode_of(DetectionOptions()))
    if calibration is None:
        print("no calibration ships with this model")
        return
    num_matched = sum(own is not None for own in material.truth)
    pairs = sorted(
        ((score, reference == own) for row, own in zip(found, material.truth, strict=True) for score, reference in row),
        reverse=True,
    )
    share = num_matched / len(material.queries)
    print(f"\n{'decisions':<22}{'score':>10}{'called':>10}{'precision':>11}{'found':>8}{'hindsight':>11}{'share':>8}")
    for target in (0.9, 0.95, 0.99, 0.999):
        threshold = calibration.threshold(target, num_references=len(material.references), match_share=share)
        called = [correct for score, correct in pairs if score >= threshold]
        right = np.cumsum([correct for _, correct in pairs])
        precise = right >= target * np.arange(1, len(pairs) + 1)
        hindsight = int(right[precise].max(initial=0))
        precision = f"{np.mean(called):.4f}" if called else "-"
        print(
            f"target {target:<15}{threshold:>10.4f}{len(called):>10}{precision:>11}{sum(called) / num_matched:>8.3f}"
            f"{hindsight / num_matched:>11.3f}{sum(called) / max(hindsight, 1):>8.2f}"
        )


def table(name: str, found: Found, material: Material, views: float | None = None) -> Found:
    figures = copy_figures(found, material.truth)
    cost = "" if views is None else f"  {views:4.1f} passes"
    print(f"{name:<44}{figures.micro_ap:8.3f}{figures.recall_at_p90:8.3f}{figures.rank1:8.3f}{cost}", flush=True)
    return found


def table_by_kind(columns: dict[str, Found], material: Material) -> None:
    """Share of queries whose own reference comes first, by the kinds of edit that a query went through."""
    print(f"\n{'first, by kind of edit':<26}" + "".join(f"{name:>12}" for name in columns))
    groups = {kind: [kind in edits for edits in material.kinds] for kind in EDITS}
    groups |= {f"{n} edits": [len(edits) == n for edits in material.kinds] for n in (1, 2, 3)}
    for kind, members in groups.items():
        chosen = [i for i, member in enumerate(members) if member and material.truth[i] is not None]
        cells = [
            copy_figures([found[i] for i in chosen], [material.truth[i] for i in chosen]).rank1
            for found in columns.values()
        ]
        print(f"{kind:<18}{len(chosen):>8}" + "".join(f"{cell:>12.2f}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="a folder of 700 photographs or more")
    parser.add_argument("--gallery", type=Path)
    parser.add_argument("--gallery-size", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=1500)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--input-size", type=int, metavar="SIDE", help="in pixels; left out: the model's own")
    parser.add_argument("--synthetic", type=int, default=0, help="time the search among so many vectors more")
    parser.add_argument("--skip-others", action="store_true", help="only this project")
    options = parser.parse_args()
    if options.photos is None:
        print("nothing measured: name a folder of 700 photographs or more with --photos")
        return
    gallery = photographs(options.gallery, options.gallery_size) if options.gallery else []
    material = make_material(photographs(options.photos), gallery, options.queries)
    num_matched = sum(own is not None for own in material.truth)
    print(f"{len(material.queries)} queries, {num_matched} with a match, {len(material.references)} references")
    print(f"{'':<44}{'micro-AP':>8}{'R@P.9':>8}{'rank1':>8}")
    columns: dict[str, Found] = {}
    if not options.skip_others:
        columns["PDQ"] = table("PDQ", by_hash(material, pdq_bits), material)
        columns["pHash"] = table("pHash", by_hash(material, phash_bits), material)
        columns["CNN"] = table("supervised CNN", by_cnn(material), material)
    ours = Ours(material, resolve_model(options.model, input_size=options.input_size))
    plain, whitened = CopyDescriptor(), CopyDescriptor(whitening=ours.shipped.whitening)
    normalised = ours.own_background(whitened)

    def whole(name: str) -> bool:
        return name == "as_is"

    def mirrored(name: str) -> bool:
        return name in ("as_is", "mirror")

    def turned(name: str) -> bool:
        return name.startswith(("as_is", "mirror", "rotate"))

    columns["CLS"] = table("[CLS], cosine", ours.search(plain, whole, cls_only=True), material, 1)
    table("[CLS ‖ GeM]", ours.search(plain, whole), material, 1)
    table("+ whitening", ours.search(whitened, whole), material, 1)
    table("+ normalisation, shipped background", ours.search(ours.shipped, whole), material, 1)
    table("+ normalisation, own background", ours.search(normalised, whole), material, 1)
    table("+ mirror images", ours.search(normalised, mirrored), material, 2)
    table("+ turns and small rotations", ours.search(normalised, turned), material, 10)
    num_views = float(np.mean([len(views) for views in ours.views]))
    regions_only = ours.search(normalised, lambda name: not turned(name) or mirrored(name))
    table("+ regions, mirror images", regions_only, material, num_views - 8)
    table("+ regions, turns", ours.search(normalised, lambda name: True), material, num_views)
    table("verified, as it is", detect(ours, material, normalised, options=WHOLE)[0], material, 1)
    table("verified, mirrored as well", detect(ours, material, normalised, options=MIRRORED)[0], material, 2)
    columns["ours"], elapsed_s = detect(ours, material, normalised)
    table("verified, all views (defaults)", columns["ours"], material, num_views)
    print(f"{len(material.queries) / elapsed_s:.2f} queries/s with the defaults")
    table_by_kind(columns, material)
    report_decisions(columns["ours"], material, options.model)
    if options.synthetic:
        report_rate(ours, material, normalised, options.synthetic)


if __name__ == "__main__":
    main()

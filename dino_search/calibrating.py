"""Learning which scores mean a copy: from edited copies of a collection's own images, or from labelled pairs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sqlalchemy.orm import Session

from dino_index.calibration import (
    MIN_QUERIES,
    CalibratingQuery,
    Calibration,
    fit_calibration,
)
from dino_index.catalog import Catalog
from dino_index.collections import CollectionInfo, model_of
from dino_index.copy_detection import Detection, DetectionOptions, FailedQuery, Query
from dino_index.copy_settings import add_calibration, latest_calibration
from dino_index.edited_queries import draw_edits, edited_copy
from dino_index.errors import CalibrationImpossible, CatalogError, ImageError, LabelFileError
from dino_index.image_bytes import read_file
from dino_index.image_paths import absolute_path
from dino_index.images import load_image
from dino_index.indexing import Progress
from dino_index.verdicts import load_verdicts, ordered_pair
from dino_index.verification import VERIFIED_SCORE
from dino_search.copies import CopyFinder, LocatedImage, located_images

_PRECISIONS = (0.9, 0.95, 0.99, 0.999)
_PICTURE_SIDE = 512
_SEED = 0
_UNEDITED_EVERY = 2
# Copies that a collection holds of its own images have a higher cosine than this.
_ALIKE = 0.4

DUPLICATES_MODE = "duplicates"
"""Whole images by the cosine of their copy vectors alone."""

Modes = dict[str, Calibration]
"""Calibrations by what was compared; see `mode_of`."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """What a target precision asks for. score: None where no score reaches it. found: share of copies found."""

    target_precision: float
    score: float | None
    found: float


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A calibration as people read it."""

    mode: str
    calibration: Calibration
    table: list[TableRow]
    summary: str

    def to_json(self) -> dict[str, Any]:
        check = self.calibration.check
        return {
            "mode": self.mode,
            "origin": self.calibration.origin,
            "queries": self.calibration.num_queries,
            "references": self.calibration.num_references,
            "checked_on_other_images": check is not None,
            "check": self.calibration.to_json()["check"],
            "table": [
                {"target_precision": row.target_precision, "score": row.score, "found": row.found} for row in self.table
            ],
        }


def mode_of(options: DetectionOptions) -> str:
    """What scores depend on besides the pictures: scores of one mode say nothing about another's."""
    off = [name for name in ("whitening", "normalisation") if not getattr(options, name)]
    parts = [options.regions, options.variants, "verified" if options.num_verified else "descriptor"]
    return "/".join([*parts, *(f"no {name}" for name in off)])


def stored_calibration(catalog: Catalog, collection: CollectionInfo, models: Path, mode: str) -> Calibration | None:
    """The calibration of this mode: the collection's own, else the one that ships with its model, else None."""
    with catalog.reading() as session:
        latest = latest_calibration(session, collection)
    if latest is not None and mode in latest[1]:
        return Calibration.from_json(latest[1][mode])
    return shipped_calibration(model_of(collection, models).weights_path, mode)


def shipped_calibration(weights_path: Path, mode: str) -> Calibration | None:
    """What ships beside bundled weights; None for other weights, and for modes that few use."""
    path = weights_path.with_suffix(".calibration.json")
    if not path.is_file():
        return None
    modes = json.loads(path.read_text(encoding="utf-8"))
    return Calibration.from_json(modes[mode]) if mode in modes else None


def calibrate(
    finder: CopyFinder,
    *,
    num_queries: int,
    pairs: Path | None = None,
    on_remark: Callable[[str], None] = lambda remark: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Calibrated:
    """Calibrates the finder's mode, and with verification the same without it; stored as the next version.

    pairs: a CSV file with the columns query and reference; None for edited copies of the collection's own images.
    Raises CalibrationImpossible, LabelFileError, CatalogErrors.
    """
    detection = finder.options.detection
    if pairs is None:
        found, origin = _from_own_copies(finder, num_queries, on_progress)
    else:
        found, origin = _from_pairs(finder, pairs, on_progress)
    num_matching = sum(has_match for _, _, has_match in found)
    if num_matching < MIN_QUERIES:
        raise CalibrationImpossible(
            f"a calibration takes {MIN_QUERIES} copies or more, found {num_matching}: {origin}; index more images, "
            "or say from where on a pair is a copy: --copy-score S"
        )

    def fit(score_of: Callable[[Detection], float]) -> Calibration:
        queries = [
            CalibratingQuery(
                true_score=max((score_of(d) for d in true), default=None),
                false_scores=[score_of(d) for d in false],
                has_match=has_match,
            )
            for true, false, has_match in found
        ]
        return fit_calibration(queries, num_references=len(finder.image_ids), origin=origin)

    mode = mode_of(detection)
    modes = {mode: fit(lambda detection: detection.score)}
    if detection.num_verified:
        modes[mode.replace("verified", "descriptor")] = fit(lambda detection: detection.likeness)
    if (detection.regions, detection.variants) == ("none", "none"):
        modes[DUPLICATES_MODE] = fit(lambda detection: detection.cosine)
    _store(finder, modes, on_remark)
    return describe(mode, modes[mode], len(finder.image_ids))


def describe(mode: str, calibration: Calibration, num_references: int) -> Calibrated:
    """What the calibration means in a collection of that size, for people."""
    table = []
    for target in _PRECISIONS:
        score = calibration.threshold(target, num_references=num_references)
        found = float(np.interp(score, calibration.scores_S, calibration.found_S)) if math.isfinite(score) else 0.0
        table.append(
            TableRow(target_precision=target, score=score if math.isfinite(score) else None, found=found)
        )  # fmt: skip
    return Calibrated(mode=mode, calibration=calibration, table=table, summary=summary_of(calibration))


def summary_of(calibration: Calibration) -> str:
    """Where the estimates come from, and whether they were checked on other images."""
    text = f"estimated from {calibration.origin}"
    check = calibration.check
    if check is None:
        return f"{text}; not checked on other images, as there were too few"
    precision = "no pair was called a copy" if check.precision is None else f"precision was {check.precision:.3f}"
    return (
        f"{text}; checked on images that it was not made from: asked for {check.target_precision}, {precision}, "
        f"and {check.found:.0%} of the copies were found"
    )


_Found = list[tuple[list[Detection], list[Detection], bool]]
"""For each query the candidates that it is a copy of, the others, and whether it has a match at all."""


def _from_own_copies(
    finder: CopyFinder, num_queries: int, on_progress: Callable[[Progress], None]
) -> tuple[_Found, str]:
    images = _choose(finder, num_queries)
    found: _Found = []
    num_left_out = num_unreadable = 0
    for item, detections in finder.detector.detect(_edited_copies(finder, images)):
        if isinstance(item, FailedQuery):
            num_unreadable += 1
        else:
            own, *shown = map(int, item.path.split())
            true, false, left_out = _sort(finder, own, images[own].sha256, shown, detections)
            num_left_out += left_out
            # An image as it is stands for queries without a match: it resembles others more than edited ones do.
            is_edited = own not in shown
            found.append((true if is_edited else [], false, is_edited))
        done = len(found) + num_unreadable
        on_progress(Progress(done=done, total=len(images) + len(images) // _UNEDITED_EVERY, failed=num_unreadable))
    num_edited = sum(has_match for _, _, has_match in found)
    origin = f"edited copies of {num_edited} images of a collection of {len(finder.image_ids)}"
    origin += f", and {len(found) - num_edited} of them as they are, as queries without a match"
    if num_left_out:
        origin += f", {num_left_out} pairs left out that look like copies already in it"
    if num_unreadable:
        origin += f", {num_unreadable} images passed over that cannot be read any more"
    return found, origin


def _choose(finder: CopyFinder, number: int) -> dict[int, LocatedImage]:
    """Images of distinct bytes, by id: those of the lowest sha256, which is as good as random."""
    with finder.catalog.reading() as session:
        located = located_images(session, finder.image_ids)
    distinct = {image.sha256: image_id for image_id, image in sorted(located.items(), reverse=True)}
    return {distinct[sha256]: located[distinct[sha256]] for sha256 in sorted(distinct)[:number]}


def _edited_copies(finder: CopyFinder, images: dict[int, LocatedImage]) -> Iterator[Query | FailedQuery]:
    """Queries whose path is the id of the image that they are made from and, next to it, of one that may lie behind.

    Some of the images come unedited as well, with their own id for both.
    """
    rng = np.random.default_rng(_SEED)
    behind: tuple[int, Image.Image] | None = None
    for number, ((image_id, image), kinds) in enumerate(zip(images.items(), draw_edits(rng), strict=False), 1):
        try:
            picture = load_image(read_file(image.path).data, max_short_side=_PICTURE_SIDE)
            original = Image.fromarray(picture.pixels_HWC)
            edited = edited_copy(original, kinds, rng, [behind[1]] if behind else [])
            yield finder.query_of(edited, path=f"{image_id} {behind[0]}" if behind else str(image_id))
            if number % _UNEDITED_EVERY == 0:
                unedited = finder.query_of(original, path=f"{image_id} {image_id}")
                yield replace(unedited, excluded=frozenset({image_id}))
        except ImageError as error:
            yield FailedQuery(str(image_id), str(error))
        else:
            behind = image_id, original


def _sort(
    finder: CopyFinder, own: int, sha256: bytes, shown: Sequence[int], detections: Sequence[Detection]
) -> tuple[list[Detection], list[Detection], int]:
    """True pairs, false pairs, and how many are neither, as the collection seems to hold copies of its own.

    shown: ids of images that the query may show besides, which count as neither.
    """
    with finder.catalog.reading() as session:
        images = located_images(session, [detection.image_id for detection in detections])
        verdicts = load_verdicts(session, [ordered_pair(sha256, image.sha256) for image in images.values()])
    true, false, num_left_out = [], [], 0
    for detection in detections:
        if detection.image_id not in images:
            continue
        if images[detection.image_id].sha256 == sha256:
            true.append(detection)
            continue
        if detection.image_id in shown:
            continue
        verdict = verdicts.get(ordered_pair(sha256, images[detection.image_id].sha256))
        if verdict == "copy" or (verdict is None and _originals_match(finder, own, detection)):
            num_left_out += 1
        else:
            false.append(detection)
    return true, false, num_left_out


def _originals_match(finder: CopyFinder, own: int, detection: Detection) -> bool:
    """Whether the unedited image is verified to show the same: then the collection holds a copy of it."""
    if detection.verification is None or finder.search.cosine(own, detection.image_id) < _ALIKE:
        return False
    verification = finder.detector.verify_references(own, detection.image_id)
    return verification is not None and verification.score >= VERIFIED_SCORE


def _from_pairs(finder: CopyFinder, path: Path, on_progress: Callable[[Progress], None]) -> tuple[_Found, str]:
    truth = _read_pairs(path)
    with finder.catalog.reading() as session:
        ids_by_path = {image.path: image_id for image_id, image in located_images(session, finder.image_ids).items()}
    unknown = sorted({name for names in truth.values() for name in names if name not in ids_by_path})
    if unknown:
        raise LabelFileError(
            f"{path}: expected references that are in collection {finder.collection.name!r}, found {unknown[0]} "
            f"and {len(unknown) - 1} more that are not; index them first"
        )
    found: _Found = []
    num_failed = 0
    items = (finder.read_query(query) for query in truth)
    for item, detections in finder.detector.detect(items):
        if isinstance(item, FailedQuery):
            num_failed += 1
        else:
            own = {ids_by_path[name] for name in truth[item.path]}
            true = [detection for detection in detections if detection.image_id in own]
            false = [detection for detection in detections if detection.image_id not in own]
            found.append((true, false, bool(own)))
        on_progress(Progress(done=len(found) + num_failed, total=len(truth), failed=num_failed))
    return found, f"{len(found)} labelled queries of {path.name}"


def _read_pairs(path: Path) -> dict[str, list[str]]:
    """References by query, as absolute paths; none for a query without a match. Raises LabelFileError."""
    pairs: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"query", "reference"} <= set(rows.fieldnames or ()):
                raise LabelFileError(
                    f"{path}: expected the columns query and reference, found {', '.join(rows.fieldnames or ())}"
                )
            for row in rows:
                references = pairs.setdefault(absolute_path(path.parent / row["query"]), [])
                if row["reference"]:
                    references.append(absolute_path(path.parent / row["reference"]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelFileError(f"{path} cannot be read as CSV: {error}") from error
    return pairs


def _store(finder: CopyFinder, modes: Modes, on_remark: Callable[[str], None]) -> None:
    """Adds a version that has these modes and those that were there."""
    values = {mode: calibration.to_json() for mode, calibration in modes.items()}

    def add(session: Session) -> None:
        latest = latest_calibration(session, finder.collection)
        version, before = latest if latest is not None else (0, {})
        add_calibration(session, finder.collection, before | values, after=version)

    try:
        finder.catalog.write(add)
    except CatalogError as error:
        on_remark(f"{error}; the calibration is used for this once and not stored")

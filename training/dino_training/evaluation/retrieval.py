"""Retrieval by the cosine of [CLS]: any truth file, revisited Oxford and Paris, INRIA Holidays.

Pictures are squashed to the model's input size, as `index` does, where the papers keep their proportions.

Shapes: Q queries, N references, D channels, S x S pixels, C = 3 colours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_index.catalog.portable_paths import encode_path
from dino_index.errors import EvaluationImpossible, ImageError
from dino_index.image_files import list_images
from dino_index.images import load_image
from dino_index.snapshots import normalise
from dino_training.evaluation.bootstrap import interval_of_mean
from dino_training.evaluation.features import FeatureStore, Pictures, StrPath
from dino_training.evaluation.metrics import mean, trapezoid_average_precision
from dino_training.evaluation.names import PictureNames
from dino_training.evaluation.rankings import judge_by_cosine, truth_figures
from dino_training.evaluation.results import EvaluationResult, Figure
from dino_training.evaluation.revisited import DIFFICULTIES, Box, RevisitedQuery, read_revisited, revisited_figures
from dino_training.evaluation.truth import NamedTruth, QueryTruth, Truth, find_truth, refuse_without_matches

_HOLIDAYS_NAME = re.compile(r"(\d{4})(\d{2})")
_MIN_SCALE, _MAX_SCALE = 0.1, 4.0


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """scales: of the input size; the vectors of several are added up. seed: of the confidence intervals."""

    scales: tuple[float, ...] = (1.0,)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.scales or not all(_MIN_SCALE <= scale <= _MAX_SCALE for scale in self.scales):
            raise ValueError(f"scales must be from {_MIN_SCALE} to {_MAX_SCALE}, found {list(self.scales)}")


class _Scales:
    """The same model at several input sizes. Raises ModelError."""

    def __init__(self, store: FeatureStore, scales: Sequence[float]) -> None:
        self.stores = [store if scale == 1 else store.at_size(_scaled_size(store, scale)) for scale in scales]

    def embed_folder(self, folder: StrPath, only: set[str] | None = None) -> tuple[Pictures, NDArray[np.float32]]:
        """The pictures, and vectors_ND of unit length: the mean of the raw [CLS] over the scales, normalised.

        only: stems of the names that are looked at; None for all.
        """

        def is_wanted(path: str) -> bool:
            return only is None or Path(path).stem in only

        parts = [store.embed_folder(folder, only=is_wanted) for store in self.stores]
        if any(part.paths != parts[0].paths for part in parts):
            raise EvaluationImpossible(
                f"expected the same pictures below {parts[0].folder} for each scale, found files that came or went "
                "meanwhile; try again when nothing changes there"
            )
        return parts[0], _mean_direction([pictures.cls_ND for pictures in parts])

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        parts = []
        for store in self.stores:
            side = store.spec.input_size
            squares = [load_image(picture, size=(side, side)).pixels_HWC for picture in pictures]
            parts.append(store.embed_squares(squares)[0])
        return _mean_direction(parts)

    def sizes(self) -> list[int]:
        return [store.spec.input_size for store in self.stores]


def _scaled_size(store: FeatureStore, scale: float) -> int:
    """The nearest size that patches fill."""
    patch_size = store.backbone.patch_size
    return max(1, round(store.spec.input_size * scale / patch_size)) * patch_size


def _mean_direction(parts_ND: Sequence[NDArray[np.float16]]) -> NDArray[np.float32]:
    total_ND = np.sum([part_ND.astype(np.float32) for part_ND in parts_ND], axis=0)
    return normalise(total_ND)


def evaluate_truth(
    store: FeatureStore,
    queries: StrPath,
    references: StrPath,
    named: NamedTruth,
    options: RetrievalOptions | None = None,
) -> EvaluationResult:
    """Micro-AP, recall at precision .9, mAP and first place for any truth; see `metrics` for the kind of AP.

    Raises SourceNotFound, NoImagesFound, EvaluationImpossible, ModelError.
    """
    options = options or RetrievalOptions()
    scales = _Scales(store, options.scales)
    found, references_ND = scales.embed_folder(references)
    asked, queries_QD = scales.embed_folder(queries)
    truth = find_truth(named, asked, found)
    judged = judge_by_cosine(queries_QD[[query.query for query in truth.queries]], references_ND, truth.queries)
    return EvaluationResult(
        protocol=f"retrieval, {store.spec.name}",
        figures=truth_figures(judged, seed=options.seed),
        facts=_facts(store, scales, options, asked, found) | truth.to_json(),
        remarks=[*truth.remarks(), *_unreadable(asked, found)],
    )


def evaluate_holidays(
    store: FeatureStore, folder: StrPath, options: RetrievalOptions | None = None
) -> EvaluationResult:
    """INRIA Holidays: mAP by trapezoids, the query itself left out of its ranking.

    Pictures are named by six digits: four of the group, two of its pictures, of which 00 is the query. Others are
    searched as well, and match nothing.
    Raises SourceNotFound, NoImagesFound, EvaluationImpossible, ModelError.
    """
    options = options or RetrievalOptions()
    scales = _Scales(store, options.scales)
    pictures, vectors_ND = scales.embed_folder(folder)
    groups: dict[str, list[tuple[str, int]]] = {}
    num_others = 0
    for position, path in enumerate(pictures.paths):
        if (name := _HOLIDAYS_NAME.fullmatch(Path(path).stem)) is None:
            num_others += 1
        else:
            groups.setdefault(name[1], []).append((name[2], position))
    queries = []
    for _, members in sorted(groups.items()):
        own = [position for number, position in members if number == "00"]
        rest = frozenset(position for number, position in members if number != "00")
        if own and rest:
            queries.append(QueryTruth(query=own[0], matches=rest, ignored=frozenset(own)))
    if not queries:
        raise EvaluationImpossible(
            f"expected pictures named as INRIA Holidays has them (100000.jpg, its matches 100001.jpg, 100002.jpg ...) "
            f"below {pictures.folder}, found {len(pictures)} pictures and no query with a match"
        )
    judged = judge_by_cosine(vectors_ND[[query.query for query in queries]], vectors_ND, queries)
    precisions = np.array([trapezoid_average_precision(query.ranks_R, query.num_matches) for query in judged])
    first = np.array([query.is_match_first for query in judged])
    remarks = [f"{len(queries)} queries among {len(pictures)} pictures"]
    if num_others:
        remarks.append(f"{num_others} pictures have other names, and were searched as distractors")
    return EvaluationResult(
        protocol=f"INRIA Holidays, {store.spec.name}",
        figures=[
            Figure(keys=("map",), value=mean(precisions), interval=interval_of_mean(precisions, seed=options.seed)),
            Figure(keys=("rank1",), value=mean(first), interval=interval_of_mean(first, seed=options.seed)),
        ],
        facts=_facts(store, scales, options, pictures) | {"num_queries": len(queries), "num_distractors": num_others},
        remarks=[*remarks, *_unreadable(pictures)],
    )


def evaluate_revisited(
    store: FeatureStore,
    queries: StrPath,
    references: StrPath,
    truth_file: Path,
    options: RetrievalOptions | None = None,
) -> EvaluationResult:
    """Revisited Oxford or Paris: mAP by trapezoids and mP@1, 5, 10, for Easy, Medium and Hard.

    Both folders may be the same. Queries are cut to the box that the truth file has for them.
    Raises SourceNotFound, NoImagesFound, TruthUnusable, EvaluationImpossible, ModelError.
    """
    options = options or RetrievalOptions()
    named = read_revisited(truth_file)
    scales = _Scales(store, options.scales)
    pictures, references_ND = scales.embed_folder(references, {Path(name).stem for name in named.references})
    names = PictureNames(pictures.folder, pictures.paths)
    positions = [names.position_of(name) for name in named.references]
    # Only what the truth file lists is ranked, whatever else has such a name.
    ranked = sorted({position for position in positions if position is not None})
    row_of = {position: row for row, position in enumerate(ranked)}
    rows = [None if position is None else row_of[position] for position in positions]
    crops, missing_queries = _crop_queries(queries, named.queries)
    queries_QD = scales.embed_pictures([crop for _, crop in crops]) if crops else np.empty((0, references_ND.shape[1]))
    judged = {}
    for difficulty, (right, passed_over) in DIFFICULTIES.items():
        truth = [
            QueryTruth(query=number, matches=_rows_in(query, right, rows), ignored=_rows_in(query, passed_over, rows))
            for number, (query, _) in enumerate(crops)
        ]
        matched = [query for query in truth if query.matches]
        if matched:
            vectors_QD = np.ascontiguousarray(queries_QD[[query.query for query in matched]], np.float32)
            judged[difficulty] = judge_by_cosine(vectors_QD, references_ND[ranked], matched)
    missing = Truth(
        queries=[],
        missing_queries=missing_queries,
        missing_references=[encode_path(name) for name, row in zip(named.references, rows, strict=True) if row is None],
    )
    if not judged:
        refuse_without_matches(missing, pictures)
    counts = {difficulty: len(queries) for difficulty, queries in judged.items()}
    return EvaluationResult(
        protocol=f"revisited retrieval, {store.spec.name}",
        figures=revisited_figures(judged, seed=options.seed),
        facts=_facts(store, scales, options, pictures)
        | {"num_queries": counts, "missing": missing.to_json()["missing"]},
        remarks=[
            f"queries with a match: {', '.join(f'{number} {name}' for name, number in counts.items())}; "
            f"{len(ranked)} references",
            *missing.remarks()[1:],
            *_unreadable(pictures),
        ],
    )


def _rows_in(query: RevisitedQuery, kinds: Sequence[str], rows: Sequence[int | None]) -> frozenset[int]:
    found = (rows[position] for kind in kinds for position in query.lists[kind])
    return frozenset(row for row in found if row is not None)


def _crop_queries(
    folder: StrPath, queries: Sequence[RevisitedQuery]
) -> tuple[list[tuple[RevisitedQuery, Image.Image]], list[str]]:
    """Each query that can be read with what its box shows of it, and the names of the others."""
    listing = list_images([folder])
    names = PictureNames(str(Path(folder).absolute()), [file.path for file in listing.files])
    crops, missing = [], []
    for query in queries:
        position = names.position_of(query.name)
        try:
            if position is None:
                raise ImageError("vanished", "not there")
            picture = Image.fromarray(load_image(listing.files[position].path).pixels_HWC)
        except ImageError as error:
            missing.append(f"{encode_path(query.name)} ({error.reason})" if position is not None else query.name)
            continue
        crops.append((query, _cropped(picture, query.box)))
    return crops, missing


def _cropped(picture: Image.Image, box: Box | None) -> Image.Image:
    """The part in the box, as far as it lies in the picture; the whole picture where none of it does."""
    if box is None:
        return picture
    left, top = max(0, round(box[0])), max(0, round(box[1]))
    right, bottom = min(picture.width, round(box[2])), min(picture.height, round(box[3]))
    return picture.crop((left, top, right, bottom)) if left < right and top < bottom else picture


def _facts(store: FeatureStore, scales: _Scales, options: RetrievalOptions, *folders: Pictures) -> dict[str, Any]:
    facts: dict[str, Any] = store.to_json() | {"input_sizes": scales.sizes(), "seed": options.seed}
    names = ("queries", "references") if len(folders) == 2 else ("references",)
    return facts | {name: folder.to_json() for name, folder in zip(names, folders, strict=True)}


def _unreadable(*folders: Pictures) -> list[str]:
    return [
        f"{len(folder.unreadable)} files below {encode_path(folder.folder)} cannot be read and were left out"
        for folder in folders
        if folder.unreadable
    ]

"""Copy detection by the pipeline of `dino-search copies`, or by parts of it: any truth file, Copydays, ISC 2021.

Everything that is measured here is `dino_index`'s own: descriptors, whitening, score normalisation, views, search,
verification. This module only hands it folders in place of a collection, and judges what it finds.

Shapes: N references, D channels of each of [CLS] and GeM, C channels of a copy vector.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dino_index.catalog.portable_paths import encode_path
from dino_index.copy_descriptors import CopyDescriptor, shipped_descriptor
from dino_index.copy_detection import (
    CopyDetector,
    Detection,
    DetectionOptions,
    FailedQuery,
    Query,
    Reference,
    make_query,
    make_reference,
)
from dino_index.copy_search import CopySearch
from dino_index.descriptor_learning import learn_descriptor
from dino_index.embedding import in_order, num_processors
from dino_index.errors import EvaluationImpossible, ImageError, SourceNotFound
from dino_index.held_references import HeldReferences
from dino_index.image_bytes import ReadLimits, read_file
from dino_index.indexing import Progress
from dino_index.score_normalisation import MAX_BACKGROUND
from dino_index.snapshots import Vectors, normalise
from dino_index.whitening import MIN_IMAGES_PER_DIMENSION, fit_reference_whitening, fit_whitening
from dino_training.evaluation.bootstrap import interval_of_mean
from dino_training.evaluation.features import FeatureStore, Pictures, StrPath
from dino_training.evaluation.metrics import mean, trapezoid_average_precision
from dino_training.evaluation.rankings import Judged, judge_by_cosine, judge_candidates, truth_figures
from dino_training.evaluation.results import EvaluationResult, Figure
from dino_training.evaluation.truth import NamedTruth, QueryTruth, find_truth

Descriptor = Literal["copy", "cls"]

_DECODED_AHEAD = 4
# Copydays: originals, and folders of their edited copies. `jpegqual` is what the published archives call it.
_ORIGINAL, _STRONG = "original", "strong"
_BY_NAME = ("jpeg", "jpegqual", "crops")
_COPYDAYS_GROUP = re.compile(r"(\d{4})\d{2}")


@dataclass(frozen=True, kw_only=True)
class CopiesOptions:
    """descriptor: `copy` for the pipeline of the command `copies`, of which `detection` switches parts off; `cls` for
    the cosine of [CLS] of whole pictures and nothing else."""

    descriptor: Descriptor = "copy"
    detection: DetectionOptions = field(default_factory=DetectionOptions)
    whiten: StrPath | None = None
    """A third folder that whitening and background are learned from; None for what ships with the model, or what a
    collection of the references would learn."""
    compat: bool = False
    """Whiten as the reference implementation does: uncentred covariance, fully."""
    dims: int | None = None
    """Channels of a copy vector that are kept, those of the largest variance; None for all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.descriptor not in ("copy", "cls"):
            raise ValueError(f"descriptor must be copy or cls, found {self.descriptor!r}")
        if self.compat and self.whiten is None:
            raise ValueError("compat needs pictures to learn the whitening from: name their folder with whiten")
        if self.dims is not None and self.dims < 1:
            raise ValueError(f"dims must be 1 or more, found {self.dims}")
        if self.detection.regions == "both":
            raise ValueError("regions must be none or query here: references are compared as whole pictures")


def evaluate_copies(
    store: FeatureStore,
    queries: StrPath,
    references: StrPath,
    named: NamedTruth,
    options: CopiesOptions | None = None,
    *,
    search_all: bool = False,
) -> EvaluationResult:
    """Micro-AP, recall at precision .9, mAP and first place for any truth.

    Of each query the best k candidates count; a match beyond them was not found. search_all: queries that truth does
    not name are searched with as well, and match nothing (as in ISC 2021).
    Raises SourceNotFound, NoImagesFound, EvaluationImpossible, ModelError.
    """
    options = options or CopiesOptions()
    found, asked = store.embed_folder(references), store.embed_folder(queries)
    truth = find_truth(named, asked, found, search_all=search_all)
    search = _Search(store, found, options)
    judged, failed = search.judge(asked, truth.queries)
    return EvaluationResult(
        protocol=f"copy detection, {store.spec.name}",
        figures=truth_figures(judged, seed=options.seed),
        facts=search.to_json()
        | {"queries": asked.to_json(), "references": found.to_json(), "failed_queries": failed}
        | truth.to_json(),
        remarks=[*truth.remarks(), *search.remarks(), *_unreadable(asked, found)],
    )


def evaluate_copydays(
    store: FeatureStore, folder: StrPath, distractors: StrPath | None, options: CopiesOptions | None = None
) -> EvaluationResult:
    """INRIA Copydays: mAP by trapezoids over the best k, for each kind of edit, among originals and distractors.

    folder: holds `original`, and of `strong`, `jpeg/Q` (or `jpegqual/Q`) and `crops/P` what there is. Copies have the
    name of their original; strong ones its first four digits.
    Raises SourceNotFound, NoImagesFound, EvaluationImpossible, ModelError.
    """
    options = options or CopiesOptions()
    root = Path(os.path.abspath(os.fsdecode(folder)))
    blocks = _copydays_blocks(root)
    originals = store.embed_folder(root / _ORIGINAL)
    others = store.embed_folder(distractors) if distractors is not None else None
    references = originals if others is None else _joined(originals, others)
    search = _Search(store, references, options)
    figures: list[Figure] = []
    counts: dict[str, int] = {}
    unreadable: list[Pictures] = [originals] if others is None else [originals, others]
    without_original: list[str] = []
    for name, block in blocks.items():
        queries = store.embed_folder(block)
        unreadable.append(queries)
        truth = _copydays_truth(queries, originals, by_group=name == _STRONG)
        matched = [query for query in truth if query.matches]
        without_original += [encode_path(queries.paths[query.query]) for query in truth if not query.matches]
        if not matched:
            continue
        judged, _ = search.judge(queries, matched)
        precisions = np.array([trapezoid_average_precision(query.ranks_R, query.num_matches) for query in judged])
        figures.append(
            Figure(
                keys=("map", name),
                value=mean(precisions),
                interval=interval_of_mean(precisions, seed=options.seed),
            )
        )
        counts[name] = len(matched)
    if not figures:
        raise EvaluationImpossible(
            f"expected copies below {root} that have the names of the pictures in {_ORIGINAL}, found none: strong "
            "copies share the first four digits of a name (200000.jpg, 200001.jpg), others the whole name"
        )
    remarks = [f"{len(originals)} originals, {len(references) - len(originals)} distractors", *search.remarks()]
    if without_original:
        remarks.append(f"{len(without_original)} copies have the name of no original, and were left out")
    return EvaluationResult(
        protocol=f"Copydays, {store.spec.name}",
        figures=figures,
        facts=search.to_json()
        | {
            "num_queries": counts,
            "originals": originals.to_json(),
            "distractors": None if others is None else others.to_json(),
            "copies_without_original": without_original,
        },
        remarks=[*remarks, *_unreadable(*unreadable)],
    )


def _copydays_blocks(root: Path) -> dict[str, Path]:
    """The folders of copies by their names in the figures. Raises SourceNotFound."""
    if not (root / _ORIGINAL).is_dir():
        raise SourceNotFound(
            f"{root} holds no folder {_ORIGINAL}: expected Copydays with {_ORIGINAL}, {_STRONG}, jpeg and crops in it"
        )
    blocks = {_STRONG: root / _STRONG} if (root / _STRONG).is_dir() else {}
    for kind in _BY_NAME:
        if (root / kind).is_dir():
            strengths = [path for path in (root / kind).iterdir() if path.is_dir()]
            strengths.sort(key=lambda path: (len(path.name), path.name))  # 3 5 8 10 15
            blocks |= {f"{kind}/{path.name}": path for path in strengths} or {kind: root / kind}
    if not blocks:
        raise SourceNotFound(
            f"{root} holds originals and no copies: expected {_STRONG}, jpeg or crops beside {_ORIGINAL}"
        )
    return blocks


def _copydays_truth(queries: Pictures, originals: Pictures, *, by_group: bool) -> list[QueryTruth]:
    def key_of(path: str) -> str:
        stem = Path(path).stem
        group = _COPYDAYS_GROUP.fullmatch(stem)
        return group[1] if by_group and group else stem

    positions: dict[str, set[int]] = {}
    for position, path in enumerate(originals.paths):
        positions.setdefault(key_of(path), set()).add(position)
    return [
        QueryTruth(query=query, matches=frozenset(positions.get(key_of(path), ())), ignored=frozenset())
        for query, path in enumerate(queries.paths)
    ]


def _joined(first: Pictures, second: Pictures) -> Pictures:
    """Both, the first ones first."""
    return replace(
        first,
        paths=first.paths + second.paths,
        sha256=first.sha256 + second.sha256,
        cls_ND=np.concatenate([first.cls_ND, second.cls_ND]),
        gem_ND=np.concatenate([first.gem_ND, second.gem_ND]),
        unreadable=first.unreadable | second.unreadable,
        ignored=first.ignored + second.ignored,
    )


class _Search:
    """References, ready to be compared with queries."""

    def __init__(self, store: FeatureStore, references: Pictures, options: CopiesOptions) -> None:
        """Raises SourceNotFound, NoImagesFound, EvaluationImpossible, ModelError."""
        self._store = store
        self._references = references
        self._options = options
        self._learned = "nothing"
        if options.descriptor == "cls":
            return
        descriptor = self._descriptor().switched(
            whitening=options.detection.whitening, normalisation=options.detection.normalisation
        )
        vectors = Vectors(np.arange(len(references)), descriptor.vectors(references.cls_ND, references.gem_ND))
        self._detector = CopyDetector(
            store.backbone, CopySearch(HeldReferences(vectors), descriptor), self._load_reference, options.detection
        )

    def judge(self, queries: Pictures, truth: Sequence[QueryTruth]) -> tuple[list[Judged], list[dict[str, str]]]:
        """The queries' rankings in order, and the queries that could not be read again, which found nothing."""
        if self._options.descriptor == "cls":
            queries_QD = normalise(queries.cls_ND[[query.query for query in truth]])
            return judge_by_cosine(queries_QD, normalise(self._references.cls_ND), truth), []
        judged: list[Judged] = []
        failed: list[dict[str, str]] = []
        items = in_order(
            self._read_query,
            ((queries.paths[query.query], query.ignored) for query in truth),
            num_processors(),
            lambda: _DECODED_AHEAD,
        )
        for query, (item, detections) in zip(truth, self._detector.detect(items), strict=True):
            if isinstance(item, FailedQuery):
                failed.append({"path": encode_path(item.path), "reason": item.reason})
            judged.append(_judge(detections, query, self._options.detection.k))
            self._store.on_progress(Progress(done=len(judged), total=len(truth), failed=len(failed)))
        return judged, failed

    def to_json(self) -> dict[str, Any]:
        options = self._options
        facts = self._store.to_json() | {"descriptor": options.descriptor, "seed": options.seed}
        if options.descriptor == "cls":
            return facts
        detection = options.detection
        return facts | {
            "k": detection.k,
            "variants": detection.variants,
            "regions": detection.regions,
            "num_verified": detection.num_verified,
            "whitening": detection.whitening,
            "normalisation": detection.normalisation,
            "learned": self._learned,
            "compat": options.compat,
            "dims": options.dims,
        }

    def remarks(self) -> list[str]:
        if self._options.descriptor == "cls":
            return ["compared: [CLS] of whole pictures, as they are"]
        detection = self._options.detection
        return [
            f"compared: regions {detection.regions}, variants {detection.variants}, verified: best "
            f"{detection.num_verified} of {detection.k}; learned: {self._learned}"
        ]

    def _descriptor(self) -> CopyDescriptor:
        """What `copies` would use on a collection of the references, or what a third folder teaches."""
        options = self._options
        if options.whiten is None:
            shipped = shipped_descriptor(self._store.spec.weights_path) or CopyDescriptor()
            joined_NC = CopyDescriptor().vectors(self._references.cls_ND, self._references.gem_ND)
            descriptor, learned = learn_descriptor(shipped, joined_NC, self._references.sha256)
            self._learned = f"{' and '.join(learned)} from the references" if learned else "nothing"
        else:
            descriptor = self._learned_from(options.whiten)
        if options.dims is None:
            return descriptor
        if descriptor.whitening is None:
            raise EvaluationImpossible(
                f"expected a whitening to keep {options.dims} channels of, found none for {self._store.spec.name}; "
                "name a folder of other pictures to learn it from: --whiten DIR"
            )
        if options.dims > (num_channels := descriptor.whitening.projection_DD.shape[1]):
            raise EvaluationImpossible(f"expected --dims of at most {num_channels}, as many as the model gives, "
                                       f"found {options.dims}")  # fmt: skip
        return replace(descriptor, whitening=descriptor.whitening.reduced(options.dims))

    def _learned_from(self, folder: StrPath) -> CopyDescriptor:
        pictures = self._store.embed_folder(folder)
        joined_NC = CopyDescriptor().vectors(pictures.cls_ND, pictures.gem_ND)
        whitening = (fit_reference_whitening if self._options.compat else fit_whitening)(joined_NC)
        if whitening is None:
            raise EvaluationImpossible(
                f"expected {MIN_IMAGES_PER_DIMENSION * joined_NC.shape[1]} different pictures or more below "
                f"{pictures.folder} to learn the whitening of {joined_NC.shape[1]} channels from, found {len(pictures)}"
            )
        self._learned = f"whitening and background from {len(pictures)} other pictures"
        chosen = np.random.default_rng(self._options.seed).permutation(len(joined_NC))[:MAX_BACKGROUND]
        return CopyDescriptor(whitening=whitening, background_BC=joined_NC[np.sort(chosen)])

    def _read_query(self, item: tuple[str, frozenset[int]]) -> Query | FailedQuery:
        path, ignored = item
        limits = self._limits
        try:
            content = read_file(path, limits)
            query = make_query(
                content.data, path=path, sha256=content.sha256, side=self._store.spec.input_size,
                options=self._options.detection, limits=limits,
            )  # fmt: skip
        except ImageError as error:
            return FailedQuery(path, f"{error.reason}: {error}")
        return replace(query, excluded=ignored)

    def _load_reference(self, position: int) -> Reference | None:
        try:
            data = read_file(self._references.paths[position], self._limits).data
            return make_reference(data, side=self._store.spec.input_size, limits=self._limits)
        except ImageError:  # gone since it was embedded
            return None

    @property
    def _limits(self) -> ReadLimits:
        return self._store.settings.limits


def _judge(detections: Sequence[Detection], truth: QueryTruth, k: int) -> Judged:
    scores = [detection.score for detection in detections]
    return judge_candidates(scores, [detection.image_id for detection in detections], truth, k)


def _unreadable(*folders: Pictures) -> list[str]:
    return [
        f"{len(folder.unreadable)} files below {encode_path(folder.folder)} cannot be read and were left out"
        for folder in folders
        if folder.unreadable
    ]

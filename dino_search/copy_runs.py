"""Runs of copy detection as the commands and `Collection` offer them: batch, single pair, calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dino_index.backbones import Backbone
from dino_index.calibration import DEFAULT_MATCH_SHARE, MIN_QUERIES, Calibration, DecisionRule
from dino_index.catalog import Catalog
from dino_index.catalog.portable_paths import encode_path
from dino_index.collections import CollectionInfo, count_images, option_for
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_detection import (
    CopyDetector,
    Detection,
    DetectionOptions,
    Query,
    Reference,
    make_query,
    make_reference,
)
from dino_index.copy_search import CopySearch
from dino_index.descriptor_learning import copy_descriptor
from dino_index.errors import CalibrationImpossible, ImageError
from dino_index.held_references import HeldReferences
from dino_index.image_bytes import ReadLimits, read_file
from dino_index.image_paths import absolute_path
from dino_index.indexing import Progress
from dino_index.snapshots import Vectors
from dino_index.verdicts import load_verdicts, ordered_pair
from dino_search.calibrating import DUPLICATES_MODE, calibrate, mode_of, stored_calibration, summary_of
from dino_search.copies import (
    CopiesOptions,
    CopyFinder,
    LocatedImage,
    QueryListing,
    StrPath,
    judge_detection,
    list_queries,
    match_of,
)
from dino_search.copy_results import CopyMatch, CopyQuery
from dino_search.duplicate_checks import PairVerifier
from dino_search.duplicate_results import Duplicates
from dino_search.duplicates import (
    DEFAULT_COPY_SCORE,
    CopyRule,
    DuplicateOptions,
    calibrated_rule,
    find_duplicates,
    fixed_rule,
)

# Edited copies that a first run makes to calibrate a model that no calibration ships with.
_NUM_FIRST_QUERIES = 150

# Inside a collection whole images are compared, as they are.
_WHOLE = DetectionOptions(regions="none", variants="none")

OnRemark = Callable[[str], None]
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class CopiesRun:
    """A batch that is ready to run: iterate over it once."""

    listing: QueryListing
    facts: dict[str, str]
    """What a reader of the results should know, by name."""
    queries: Iterator[CopyQuery]

    def __iter__(self) -> Iterator[CopyQuery]:
        return self.queries


def start_copies(
    finder: CopyFinder,
    models: Path,
    queries: Sequence[StrPath],
    *,
    on_remark: OnRemark = lambda remark: None,
    on_progress: OnProgress = lambda progress: None,
) -> CopiesRun:
    """The queries under these paths against the finder's collection.

    A model without a calibration is calibrated first, on the collection itself.
    Raises CalibrationImpossible, ManifestError, BackendMissing, CatalogErrors.
    """
    listing = list_queries(queries)
    rule = decision_rule(finder, models, on_remark=on_remark, on_progress=on_progress)
    return CopiesRun(
        listing=listing, facts=facts_of(finder, rule), queries=finder.find(listing, rule, on_progress=on_progress)
    )


def decision_rule(
    finder: CopyFinder,
    models: Path,
    *,
    on_remark: OnRemark = lambda remark: None,
    on_progress: OnProgress = lambda progress: None,
) -> DecisionRule:
    """From which scores on a pair is a copy, in the finder's collection and under its options."""
    options = finder.options
    num_references = len(finder.image_ids)
    calibration = stored_calibration(finder.catalog, finder.collection, models, mode_of(options.detection))
    if calibration is None and options.copy_score is None:
        name = finder.collection.name
        on_remark(
            f"no calibration for {finder.collection.model_name} yet: making one from edited copies of images of "
            f"collection {name!r}; for a better one: dino-search calibrate{option_for(name)}"
        )
        done = calibrate(finder, num_queries=_NUM_FIRST_QUERIES, on_remark=on_remark, on_progress=on_progress)
        calibration = done.calibration
    return options.rule(calibration, num_references)


def duplicate_rules(
    catalog: Catalog,
    collection: CollectionInfo,
    models: Path,
    target_precision: float,
    load_backbone: Callable[[], Backbone],
    on_remark: OnRemark,
) -> tuple[CopyRule, PairVerifier | None]:
    """From which cosine on two images of a collection are copies, and what decides those that it leaves open.

    A model without a calibration is calibrated first, where there are images enough. Raises CatalogErrors.
    """
    calibration = stored_calibration(catalog, collection, models, DUPLICATES_MODE)
    with catalog.reading() as session:
        num_references = count_images(session, collection)["ok"]
    if calibration is None and num_references >= MIN_QUERIES:
        on_remark(f"no calibration for {collection.model_name} yet: making one from edited copies of its images")
        options = CopiesOptions(detection=_WHOLE)
        finder = CopyFinder(catalog, collection, load_backbone(), models, options, on_remark=on_remark)
        try:
            calibrate(finder, num_queries=_NUM_FIRST_QUERIES, on_remark=on_remark)
        except CalibrationImpossible as error:
            on_remark(str(error))
        calibration = stored_calibration(catalog, collection, models, DUPLICATES_MODE)
    if calibration is None:
        on_remark(
            f"no calibration for {collection.model_name}, and too few images to make one: copies are pairs with a "
            f"cosine of {DEFAULT_COPY_SCORE} or more"
        )
        return fixed_rule(DEFAULT_COPY_SCORE), None

    def at_precision(calibration: Calibration) -> DecisionRule:
        return DecisionRule.at_precision(
            calibration, target_precision, num_references=num_references, match_share=DEFAULT_MATCH_SHARE
        )

    verified = stored_calibration(catalog, collection, models, mode_of(_WHOLE))
    verifier = None if verified is None else PairVerifier(load_backbone, at_precision(verified))
    return calibrated_rule(at_precision(calibration)), verifier


def duplicates_in(
    catalog: Catalog,
    collection: CollectionInfo,
    models: Path,
    options: DuplicateOptions,
    *,
    target_precision: float,
    copy_score: float | None,
    load_backbone: Callable[[], Backbone],
    on_remark: OnRemark = lambda remark: None,
    on_progress: Callable[[float], None] = lambda done_frac: None,
) -> Duplicates:
    """The duplicates of a collection, as `Collection.duplicates` gives them, which says what the options mean.

    Raises CollectionNotFound, CatalogErrors; ValueError for a score or precision out of range.
    """
    with catalog.reading() as session:
        verdicts = load_verdicts(session)
    descriptor = copy_descriptor(catalog, collection, models, on_remark=on_remark)
    rule, verifier = None if copy_score is None else fixed_rule(copy_score), None
    if rule is None:
        rule, verifier = duplicate_rules(catalog, collection, models, target_precision, load_backbone, on_remark)
    return find_duplicates(
        catalog,
        collection.name,
        options,
        rule,
        descriptor=descriptor,
        verdicts=verdicts,
        verifier=verifier if options.checked else None,
        on_progress=on_progress,
    )


def facts_of(finder: CopyFinder, rule: DecisionRule) -> dict[str, str]:
    options = finder.options
    facts = {
        "references": str(len(finder.image_ids)),
        "compared": f"regions: {options.detection.regions}, variants: {options.detection.variants}, "
        f"verified: best {options.detection.num_verified}",
    }
    if options.copy_score is not None:
        facts["copies"] = f"from score {options.copy_score} on"
    else:
        score = f"from score {rule.copy_score:.4f} on" if np.isfinite(rule.copy_score) else "no score is high enough"
        facts["copies"] = f"at estimated precision {options.target_precision}: {score}"
    if rule.calibration is not None:
        facts["precision"] = f"{summary_of(rule.calibration)}; if {options.match_share:.0%} of the queries have a match"
    return facts


@dataclass(frozen=True, kw_only=True, eq=False)
class PairTools:
    """What two pictures are compared with."""

    backbone: Backbone
    descriptor: CopyDescriptor
    rule: DecisionRule
    options: CopiesOptions
    catalog: Catalog | None
    """Holds the verdicts; None where there is none yet."""


def pair_tools(
    catalog: Catalog,
    collection: CollectionInfo,
    backbone: Backbone,
    models: Path,
    options: CopiesOptions,
    on_remark: OnRemark = lambda remark: None,
) -> PairTools:
    """What pairs are compared with by a collection's model and calibration.

    Raises CalibrationImpossible, CatalogErrors.
    """
    descriptor = copy_descriptor(catalog, collection, models, on_remark=on_remark)
    calibration = stored_calibration(catalog, collection, models, mode_of(options.detection))
    return PairTools(
        backbone=backbone,
        descriptor=descriptor.switched(
            whitening=options.detection.whitening, normalisation=options.detection.normalisation
        ),
        rule=pair_rule(calibration, options, backbone.spec.name),
        options=options,
        catalog=catalog,
    )


def pair_rule(calibration: Calibration | None, options: CopiesOptions, model_name: str) -> DecisionRule:
    """Pairs that someone compares are alike, so they are judged as the candidates of a whole collection are.

    Raises CalibrationImpossible.
    """
    if calibration is None and options.copy_score is None:
        raise CalibrationImpossible(
            f"expected a calibration of {model_name}, found none for these options: run dino-search calibrate on a "
            "collection of that model, or say from where on a pair is a copy: --copy-score S"
        )
    return options.rule(calibration, calibration.num_references if calibration else 1)


@dataclass(frozen=True, eq=False, slots=True)
class PairPicture:
    """One of two pictures that are compared, in both parts that it plays."""

    query: Query
    reference: Reference


def compare_pair(tools: PairTools, first: StrPath, second: StrPath) -> CopyMatch:
    """The better of both directions: either picture may be a part of the other.

    Raises ImageError, CatalogErrors.
    """
    one, other = (_read(absolute_path(path), tools) for path in (first, second))
    return compare_pictures(tools, one, other)


def compare_pictures(tools: PairTools, one: PairPicture, other: PairPicture) -> CopyMatch:
    """`compare_pair` of pictures that have been read. Raises CatalogErrors."""
    verdict = None
    if tools.catalog is not None:
        with tools.catalog.reading() as session:
            pair = ordered_pair(one.query.sha256, other.query.sha256)
            verdict = load_verdicts(session, [pair]).get(pair)
    matches = []
    for query, reference in ((one, other), (other, one)):
        detection = _detect(tools, query.query, reference)
        found = reference.query
        image = LocatedImage(found.path, found.sha256, found.width, found.height)
        judgement = judge_detection(
            query.query, detection, image, tools.rule, verdict, nature_of_image=partial(getattr, found, "nature")
        )
        matches.append(match_of(query.query, image, detection, judgement, verdict, 1))
    return max(matches, key=lambda match: match.score)


def pair_picture(
    data: bytes, path: str, sha256: bytes, *, side: int, detection: DetectionOptions, limits: ReadLimits
) -> PairPicture:
    """A picture file's bytes as one of a pair; in any thread. side: of the model. path: what results call it.

    Raises ImageError.
    """
    query = make_query(data, path=path, sha256=sha256, side=side, options=detection, limits=limits)
    return PairPicture(query, make_reference(data, side=side, limits=limits))


def _read(path: str, tools: PairTools) -> PairPicture:
    side, limits = tools.backbone.spec.input_size, tools.options.limits
    try:
        content = read_file(path, limits)
        return pair_picture(
            content.data, path, content.sha256, side=side, detection=tools.options.detection, limits=limits
        )
    except ImageError as error:
        raise ImageError(error.reason, f"{encode_path(path)} cannot be used: {error}") from error


def _detect(tools: PairTools, query: Query, reference: PairPicture) -> Detection:
    cls_1D, gem_1D = tools.backbone.embed(reference.reference.square_SSC[None])
    vectors = Vectors(np.zeros(1, np.int64), tools.descriptor.vectors(cls_1D, gem_1D))
    detector = CopyDetector(
        tools.backbone,
        CopySearch(HeldReferences(vectors), tools.descriptor),
        lambda _: reference.reference,
        tools.options.detection,
    )
    ((_, (detection,)),) = detector.detect([query])
    return detection

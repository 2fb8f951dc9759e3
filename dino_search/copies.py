"""Batch copy detection: which query images are edited copies of images in a collection, and how sure that is."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index import geometry
from dino_index.backbones import Backbone
from dino_index.calibration import DEFAULT_MATCH_SHARE, DEFAULT_TARGET_PRECISION, Calibration, DecisionRule
from dino_index.catalog import Catalog, ImageRow, SourceRow, bound_parts
from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.collections import CollectionInfo, join_path
from dino_index.copy_decisions import Judgement, Verdict, judge
from dino_index.copy_descriptors import CopyDescriptor
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
from dino_index.copy_search import CopyReferences, CopySearch
from dino_index.copy_vectors import load_copy_vectors, readable_ids
from dino_index.descriptor_learning import copy_descriptor
from dino_index.embedding import num_processors
from dino_index.errors import CollectionEmpty, ImageError, SourceNotFound
from dino_index.held_references import HeldReferences
from dino_index.image_bytes import DEFAULT_LIMITS, ReadLimits, read_file
from dino_index.image_paths import absolute_path
from dino_index.indexing import Progress
from dino_index.manifests import is_manifest
from dino_index.picture_nature import PictureNature, are_burst_frames, are_unproven_plain, nature_of
from dino_index.reference_regions import embed_regions, load_region_vectors
from dino_index.snapshots import Vectors
from dino_index.source_listing import list_sources, shard_files
from dino_index.vector_stores import vector_store_of
from dino_index.verdicts import load_verdicts, ordered_pair
from dino_index.verification import VERIFIED_SCORE
from dino_search.copy_results import CopyMatch, CopyQuery

StrPath = str | os.PathLike[str]

_DECODED_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class CopiesOptions:
    """How queries are compared and decided about."""

    detection: DetectionOptions = field(default_factory=DetectionOptions)
    target_precision: float = DEFAULT_TARGET_PRECISION
    copy_score: float | None = None
    """Pairs from this score on are copies, whatever precision that means; None decides by `target_precision`."""
    match_share: float = DEFAULT_MATCH_SHARE
    """Share of the queries that have a match, as far as it is known beforehand."""
    limits: ReadLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if not 0 < self.target_precision < 1:
            raise ValueError(f"target_precision must be between 0 and 1, found {self.target_precision}")
        if not 0 < self.match_share <= 1:
            raise ValueError(f"match_share must be above 0 and up to 1, found {self.match_share}")

    def rule(self, calibration: Calibration | None, num_references: int) -> DecisionRule:
        """The rule that these options ask for. calibration: needed unless `copy_score` is given."""
        if calibration is None:
            assert self.copy_score is not None
            return DecisionRule(copy_score=self.copy_score, uncertain_score=self.copy_score)
        rule = DecisionRule.at_precision(
            calibration, self.target_precision, num_references=num_references, match_share=self.match_share
        )
        if self.copy_score is None:
            return rule
        return replace(
            rule, copy_score=self.copy_score, uncertain_score=min(self.copy_score, rule.uncertain_score)
        )  # fmt: skip


@dataclass
class QueryListing:
    """The queries under the given paths. failures: (path, reason) of what should be one and cannot be read."""

    paths: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.paths) + len(self.failures)


def list_queries(paths: Sequence[StrPath]) -> QueryListing:
    """Images under files, folders, manifests, tar shards and URLs; what is not there is a failure and stops nothing.

    A given file that is no image is a failure, too; in a folder it is counted under `ignored`.
    Raises ManifestError, BackendMissing.
    """
    found = QueryListing()
    for path in paths:
        try:
            listing = list_sources([path], shards_in_folders=True)
        except SourceNotFound as error:
            found.failures.append((absolute_path(path), str(error)))
            continue
        files = [file.path for file in listing.files]
        files += [file.path for shard in listing.shards for file in shard_files(shard)]
        found.paths += files
        found.failures += [(failure.path, f"{failure.reason}: {failure.message}") for failure in listing.failures]
        if os.path.isfile(path) and not is_manifest(absolute_path(path)) and not (files or listing.failures):
            kinds = ", ".join(listing.ignored) or "something else"
            found.failures.append((absolute_path(path), f"not_an_image: expected an image, found {kinds}"))
        else:
            found.ignored += listing.ignored
    found.paths = list(dict.fromkeys(found.paths))
    return found


@dataclass(frozen=True, slots=True)
class LocatedImage:
    """An image of a collection: where it is, raw sha256 of its bytes, its size in pixels."""

    path: str
    sha256: bytes
    width: int
    height: int

    def read(self, limits: ReadLimits) -> bytes | None:
        """The file's bytes; None where they are others by now. Raises ImageError."""
        content = read_file(self.path, limits)
        return content.data if content.sha256 == self.sha256 else None

    def reference(self, side: int, limits: ReadLimits = DEFAULT_LIMITS) -> Reference | None:
        """The picture to verify others against; None where the file cannot be read any more. side: of the model."""
        try:
            data = self.read(limits)
            return None if data is None else make_reference(data, side=side, limits=limits)
        except ImageError:
            return None

    def nature(self, limits: ReadLimits = DEFAULT_LIMITS) -> PictureNature | None:
        """None where the file cannot be read any more."""
        try:
            data = self.read(limits)
            return None if data is None else nature_of(data, limits)
        except ImageError:
            return None


def located_images(session: Session, image_ids: Sequence[int]) -> dict[int, LocatedImage]:
    """Path and bytes of readable images of the catalog, by id."""
    found = {}
    for part in bound_parts(image_ids):
        rows = session.execute(
            select(ImageRow.id, SourceRow.path, ImageRow.path, ImageRow.sha256, ImageRow.width, ImageRow.height)
            .join(SourceRow, SourceRow.id == ImageRow.source_id)
            .where(ImageRow.id.in_(part), ImageRow.status == "ok")
        )
        for image_id, source, name, sha256, width, height in rows:
            found[image_id] = LocatedImage(join_path(decode_path(source), name), sha256 or b"", width or 1, height or 1)
    return found


def _load_reference(catalog: Catalog, side: int, limits: ReadLimits, image_id: int) -> Reference | None:
    """The picture of an image, where its file still has the bytes that were embedded."""
    with catalog.reading() as session:
        image = located_images(session, [image_id]).get(image_id)
    if image is None:  # removed by another process meanwhile
        return None
    return image.reference(side, limits)


def load_references(
    catalog: Catalog,
    session: Session,
    collection: CollectionInfo,
    descriptor: CopyDescriptor,
    detection: DetectionOptions,
    before: CopyReferences | None = None,
) -> CopyReferences:
    """What queries are compared with, from where the collection's vectors are searched.

    A vector server holds whole images, whitened; anything else is read from the catalog.
    before: loaded from this catalog at an earlier time. Raises CatalogErrors.
    """
    if detection.regions != "both" and detection.whitening:
        return vector_store_of(catalog).load_copies(session, collection, descriptor, before)
    references = load_copy_vectors(session, collection, descriptor)
    if detection.regions == "both":
        parts = load_region_vectors(session, collection, descriptor)
        references = Vectors(
            np.concatenate([references.ids_N, parts.ids_N]),
            np.concatenate([references.vectors_ND, parts.vectors_ND]),
        )
    return HeldReferences(references)


class CopyFinder:
    """Everything that copies in one collection are found with, as of one state of it. For one thread at a time."""

    def __init__(
        self,
        catalog: Catalog,
        collection: CollectionInfo,
        backbone: Backbone,
        models: Path,
        options: CopiesOptions,
        *,
        refit: bool = False,
        before: CopyFinder | None = None,
        on_remark: Callable[[str], None] = lambda remark: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """refit: learn whitening and background anew. before: of an earlier state; its vectors are used again.

        Raises CollectionEmpty, ModelError, CatalogErrors."""
        self.catalog = catalog
        self.collection = collection
        self.options = options
        self._side = backbone.spec.input_size
        descriptor = copy_descriptor(catalog, collection, models, refit=refit, on_remark=on_remark)
        self.descriptor = descriptor.switched(
            whitening=options.detection.whitening, normalisation=options.detection.normalisation
        )
        with catalog.reading() as session:
            self.image_ids = readable_ids(session, collection)
        if not self.image_ids:
            raise CollectionEmpty(
                f"collection {collection.name!r} has no readable image; run: dino-search index FOLDER-WITH-PICTURES"
            )
        if options.detection.regions == "both":
            embed_regions(
                catalog, collection, backbone, limits=options.limits, on_remark=on_remark, on_progress=on_progress
            )
        with catalog.reading() as session:
            self.references: CopyReferences = load_references(
                catalog, session, collection, self.descriptor, options.detection,
                before=before.references if before is not None and before.catalog is catalog else None,
            )  # fmt: skip
        self.search = CopySearch(self.references, self.descriptor)
        # Not a method: a circle of references would keep all vectors until the collector of circles comes round.
        load_reference = partial(_load_reference, catalog, self._side, options.limits)
        self.detector = CopyDetector(backbone, self.search, load_reference, options.detection)

    def find(
        self,
        listing: QueryListing,
        rule: DecisionRule,
        *,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> Iterator[CopyQuery]:
        """Each query with its candidates, in order; those that cannot be read come first, with the reason."""
        failures = (FailedQuery(path, reason) for path, reason in listing.failures)
        num_failed = 0
        queries = chain(failures, self._read_queries(listing.paths))
        detected = self.detector.detect(queries, doubted_from=rule.copy_score)
        for done, (item, detections) in enumerate(detected, 1):
            if isinstance(item, FailedQuery):
                num_failed += 1
                yield CopyQuery(query=encode_path(item.path), status="failed", reason=item.reason)
            else:
                yield CopyQuery(query=encode_path(item.path), matches=self._matches(item, detections, rule))
            on_progress(Progress(done=done, total=len(listing), failed=num_failed))

    def find_one(self, query: Query, rule: DecisionRule) -> CopyQuery:
        """One query that has been read already, with its candidates."""
        ((_, detections),) = self.detector.detect([query], doubted_from=rule.copy_score)
        return CopyQuery(query=encode_path(query.path), matches=self._matches(query, detections, rule))

    def _read_queries(self, paths: Sequence[str]) -> Iterator[Query | FailedQuery]:
        """The queries in order, some decoded ahead."""
        pending: deque[Future[Query | FailedQuery]] = deque()
        workers = ThreadPoolExecutor(num_processors(), "decode")
        try:
            for path in paths:
                pending.append(workers.submit(self.read_query, path))
                if len(pending) > _DECODED_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            workers.shutdown(wait=True, cancel_futures=True)

    def read_query(self, path: str) -> Query | FailedQuery:
        """The picture at a path as a query; in any thread."""
        try:
            content = read_file(path, self.options.limits)
            return make_query(
                content.data, path=path, sha256=content.sha256, side=self._side,
                options=self.options.detection, limits=self.options.limits,
            )  # fmt: skip
        except ImageError as error:
            return FailedQuery(path, f"{error.reason}: {error}")

    def query_of(self, picture: Image.Image, *, path: str) -> Query:
        """A picture that is no file as a query. Raises ImageError."""
        sha256 = hashlib.sha256(picture.tobytes()).digest()
        return make_query(picture, path=path, sha256=sha256, side=self._side, options=self.options.detection)

    def _matches(self, query: Query, detections: Sequence[Detection], rule: DecisionRule) -> list[CopyMatch]:
        with self.catalog.reading() as session:
            images = located_images(session, [detection.image_id for detection in detections])
            pairs = [ordered_pair(query.sha256, image.sha256) for image in images.values()]
            verdicts = load_verdicts(session, pairs)
        # One that is gone was removed by another process meanwhile.
        present = [detection for detection in detections if detection.image_id in images]
        matches = []
        for rank, detection in enumerate(present, 1):
            image = images[detection.image_id]
            verdict = verdicts.get(ordered_pair(query.sha256, image.sha256))
            judgement = judge_detection(query, detection, image, rule, verdict)
            matches.append(match_of(query, image, detection, judgement, verdict, rank))
        return matches


def judge_detection(
    query: Query,
    detection: Detection,
    image: LocatedImage,
    rule: DecisionRule,
    verdict: Verdict | None,
    *,
    nature_of_image: Callable[[], PictureNature | None] | None = None,
) -> Judgement:
    """What is said of a query and a candidate. nature_of_image: how to look into it; None reads its file."""
    decision, precision = rule.decide(detection.score)
    reference_nature = cache(nature_of_image or partial(image.nature, query.limits))

    def is_burst() -> bool:
        reference = reference_nature()
        return reference is not None and are_burst_frames(query.nature, reference)

    def is_unproven_plain() -> bool:
        reference = reference_nature()
        if reference is None:
            return query.nature.plain is not None
        return are_unproven_plain(query.nature, reference)

    def is_refuted() -> bool:
        # Pages of text have been compared letter by letter; their patches say little.
        seen = detection.verification
        return seen is not None and seen.score < VERIFIED_SCORE and query.nature.plain is None

    return judge(
        decision, precision, verdict=verdict, same_bytes=query.sha256 == image.sha256, is_burst=is_burst,
        is_unproven_plain=is_unproven_plain, is_refuted=is_refuted,
    )  # fmt: skip


def match_of(
    query: Query, image: LocatedImage, detection: Detection, judgement: Judgement, verdict: Verdict | None, rank: int
) -> CopyMatch:
    """A judged candidate as results show it."""
    seen = detection.verification
    is_verified = None if seen is None else seen.score >= VERIFIED_SCORE
    transform = None
    if is_verified and seen is not None and seen.transform is not None:
        in_pixels = geometry.in_pixels(seen.transform, (query.width, query.height), (image.width, image.height))
        transform = tuple(tuple(map(float, row)) for row in in_pixels[:2])
    return CopyMatch(
        query=encode_path(query.path),
        reference=encode_path(image.path),
        image_id=detection.image_id,
        score=round(detection.score, 6),
        cosine=detection.cosine,
        rank=rank,
        decision=judgement.decision,
        precision=judgement.precision,
        reason=judgement.reason,
        verdict=verdict,
        similar=judgement.similar,
        verified=is_verified,
        variant=detection.view.name,
        query_area=seen.query_area if is_verified and seen else None,
        reference_area=seen.reference_area if is_verified and seen else None,
        transform=transform,  # type: ignore[arg-type]
        query_sha256=query.sha256.hex(),
        reference_sha256=image.sha256.hex(),
    )

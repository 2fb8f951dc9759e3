"""Which references a query is an edited copy of: views of the query, candidates, verification.

Shapes: V views of one query, B pictures in a forward pass, S x S pixels, H x W pixels, C colours.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_index.backbones import Backbone
from dino_index.copy_search import Candidate, CopySearch
from dino_index.image_bytes import DEFAULT_LIMITS, ReadLimits
from dino_index.images import load_image
from dino_index.picture_nature import PictureNature, nature_of
from dino_index.query_views import QueryView, Variants, check_variants, query_views
from dino_index.regions import Regions, check_regions
from dino_index.verification import Matching, Patches, Verification, match, patches_of, verify, verify_best

# Of .25 to 1 the best on edited copies of photographs; micro-AP changes by .01 over that range.
VERIFICATION_WEIGHT = 0.5
# From here on no false pair was seen; other candidates matter only where they are about as alike: further copies are.
_BEYOND_DOUBT = 0.95
_FAR_BEHIND = 0.2
# Candidates that are so much less alike than the best one are not verified: of 500 edited copies no more were found.
_HOPELESSLY_BEHIND = 0.15
# Ways to look at a query that are tried on a candidate: a mirror image is nearly as alike as what it mirrors.
_MAX_VIEWS = 4
# Of the patches of a view: where so many agree, it is the right one.
_CLEAR_INLIERS_FRAC = 1 / 6
_QUERIES_AHEAD = 4
# Parts of a query are cut from a picture whose shorter side has this many times the model's input size.
_PICTURE_SCALE = 2
_MAX_KNOWN = 256

_Embedded = tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.float16] | None]


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """How queries are compared with a collection."""

    k: int = 20
    """Candidates of each query."""
    variants: Variants = "all"
    regions: Regions = "query"
    num_verified: int = 5
    """Best candidates of each query that are verified; 0 switches verification off."""
    whitening: bool = True
    normalisation: bool = True
    """Whether what looks like everything has that taken off its scores."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, found {self.k}")
        if self.num_verified < 0:
            raise ValueError(f"num_verified must be 0 or more, found {self.num_verified}")
        check_variants(self.variants)
        check_regions(self.regions)


@dataclass(frozen=True, slots=True)
class FailedQuery:
    """A query that cannot be used, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """A picture to find the originals of, ready for forward passes."""

    path: str
    sha256: bytes
    width: int
    height: int
    """Of the whole picture, upright."""
    views: list[QueryView]
    """The whole picture first."""
    source: bytes | Image.Image
    """What it was made from."""
    limits: ReadLimits
    excluded: frozenset[int] = frozenset()
    """Ids of images that are not looked for."""

    @cached_property
    def nature(self) -> PictureNature:
        """Looked into when it is asked for: only what may be a copy needs it."""
        return nature_of(self.source, self.limits)


def make_query(
    data: bytes | Image.Image,
    *,
    path: str,
    sha256: bytes,
    side: int,
    options: DetectionOptions,
    limits: ReadLimits = DEFAULT_LIMITS,
) -> Query:
    """A query of an image file's bytes or of a picture; in any thread. side: S of the model. Raises ImageError."""
    square = load_image(data, size=(side, side), limits=limits)
    picture = load_image(data, max_short_side=_PICTURE_SCALE * side, limits=limits)
    views = query_views(
        square.pixels_HWC, picture.pixels_HWC, variants=options.variants, regions=options.regions != "none"
    )
    return Query(
        path=path,
        sha256=sha256,
        width=square.width,
        height=square.height,
        views=views,
        source=data,
        limits=limits,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """A candidate's picture, read again. square_SSC: as it was embedded."""

    square_SSC: NDArray[np.uint8]
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """A candidate after it has been looked into."""

    image_id: int
    score: float
    """What ranks: `likeness`, and what verification adds to it."""
    likeness: float
    """Cosine less bias."""
    cosine: float
    view: QueryView
    verification: Verification | None = None
    """None where it was not asked for, or the reference cannot be read any more."""


def make_reference(data: bytes | Image.Image, *, side: int, limits: ReadLimits = DEFAULT_LIMITS) -> Reference:
    """A candidate's picture; in any thread. data: a file's bytes or a picture. Raises ImageError."""
    square = load_image(data, size=(side, side), limits=limits)
    return Reference(square_SSC=square.pixels_HWC, width=square.width, height=square.height)


class CopyDetector:
    """Finds the originals of queries, many at a time. For one thread at a time."""

    def __init__(
        self,
        backbone: Backbone,
        search: CopySearch,
        load_reference: Callable[[int], Reference | None],
        options: DetectionOptions,
    ) -> None:
        """load_reference: the picture of an image id, None where it cannot be read; called in several threads."""
        self._backbone = backbone
        self._search = search
        self._options = options
        self._references = KnownReferences(load_reference)

    def detect(
        self, items: Iterable[Query | FailedQuery], *, doubted_from: float = math.inf
    ) -> Iterator[tuple[Query | FailedQuery, list[Detection]]]:
        """Each query with its candidates, best first, and each failed one with none, in order.

        doubted_from: candidates of this likeness on are verified, however many, so that none is called a copy for its
        likeness alone.
        """
        embedding: deque[tuple[Query | FailedQuery, list[Future[_Embedded]]]] = deque()
        verifying: deque[tuple[Query | FailedQuery, Future[list[Detection]] | None]] = deque()
        with self._backbone.forward_threads() as forward:

            def search_oldest() -> None:
                item, futures = embedding.popleft()
                verifying.append((item, self._search_and_verify(forward, item, futures, doubted_from)))

            for item in items:
                embedding.append((item, self._embed(forward, item)))
                if len(embedding) > _QUERIES_AHEAD:
                    search_oldest()
                if len(verifying) > _QUERIES_AHEAD:
                    yield _finished(*verifying.popleft())
            while embedding:
                search_oldest()
            while verifying:
                yield _finished(*verifying.popleft())

    def verify_references(self, first_id: int, second_id: int) -> Verification | None:
        """Two references against each other; None where one cannot be read."""
        known = self._references.get([first_id, second_id], self._backbone)
        if len(known) < 2:
            return None
        return verify(known[first_id], known[second_id])

    def _embed(self, forward: Executor, item: Query | FailedQuery) -> list[Future[_Embedded]]:
        if isinstance(item, FailedQuery):
            return []
        embed = self._backbone.embed_with_patches if self._options.num_verified else self._without_patches
        pixels = [view.pixels_SSC for view in item.views]
        # Equal parts: a pass of the one view that is left over would cost half as much again for it.
        num_passes = math.ceil(len(pixels) / self._backbone.batch_size)
        ends = [len(pixels) * number // num_passes for number in range(num_passes + 1)]
        return [forward.submit(embed, self._backbone.stack(pixels[begin:end])) for begin, end in pairwise(ends)]

    def _without_patches(self, pixels_BHWC: NDArray[np.uint8]) -> _Embedded:
        return *self._backbone.embed(pixels_BHWC), None

    def _search_and_verify(
        self,
        forward: Executor,
        item: Query | FailedQuery,
        futures: Sequence[Future[_Embedded]],
        doubted_from: float,
    ) -> Future[list[Detection]] | None:
        if isinstance(item, FailedQuery):
            return None
        # Not in this thread, whose products would take all processors from the forward passes.
        return forward.submit(self._look_into, item, [future.result() for future in futures], doubted_from)

    def _look_into(self, query: Query, parts: Sequence[_Embedded], doubted_from: float) -> list[Detection]:
        """The candidates with the best few verified, in their final order. parts: of the query's views."""
        candidates = self._search.candidates(
            np.concatenate([cls_BD for cls_BD, _, _ in parts]),
            np.concatenate([gem_BD for _, gem_BD, _ in parts]),
            self._options.k + len(query.excluded),
        )
        candidates = [candidate for candidate in candidates if candidate.image_id not in query.excluded]
        patches_VhwP = [patches for _, _, patches_BhwP in parts if patches_BhwP is not None for patches in patches_BhwP]
        verified = self._verify(query, candidates, patches_VhwP, doubted_from)
        detections = []
        for candidate in candidates:
            view, verification = verified.get(candidate.image_id, (candidate.views[0], None))
            detections.append(
                Detection(
                    image_id=candidate.image_id,
                    score=combined_score(candidate.score, verification),
                    likeness=candidate.score,
                    cosine=candidate.cosine,
                    view=query.views[view],
                    verification=verification,
                )
            )
        return sorted(detections, key=lambda detection: (-detection.score, detection.image_id))

    def _verify(
        self,
        query: Query,
        candidates: Sequence[Candidate],
        patches_VhwP: Sequence[NDArray[np.float16]],
        doubted_from: float,
    ) -> dict[int, tuple[int, Verification]]:
        """By image id the view that fits best, and how, of the first few candidates and those that are in doubt.

        Without references that cannot be read, and without those that are not in doubt and far behind the best one or
        one that fits beyond doubt.
        """
        found: dict[int, tuple[int, Verification]] = {}
        num_verified = self._options.num_verified
        if not num_verified:
            return found
        of_views: dict[int, Patches] = {}
        needed = max((candidate.score for candidate in candidates), default=0.0) - _HOPELESSLY_BEHIND
        in_doubt = [candidate for candidate in candidates[num_verified:] if candidate.score >= doubted_from]
        # The first alone: where it is beyond doubt, few others matter.
        for part in (candidates[:1], [*candidates[1:num_verified], *in_doubt]):
            near = [candidate for candidate in part if candidate.score >= min(needed, doubted_from)]
            references = self._references.get([candidate.image_id for candidate in near], self._backbone)
            for candidate in near:
                reference = references.get(candidate.image_id)
                if reference is None or candidate.score < min(needed, doubted_from):
                    continue
                view, verification = _verify_views(query, candidate, reference, patches_VhwP, of_views)
                found[candidate.image_id] = view, verification
                if verification.score >= _BEYOND_DOUBT:
                    needed = max(needed, candidate.score - _FAR_BEHIND)
        return found


def _verify_views(
    query: Query,
    candidate: Candidate,
    reference: Patches,
    patches_VhwP: Sequence[NDArray[np.float16]],
    known: dict[int, Patches],
) -> tuple[int, Verification]:
    """The view of the query in which the candidate fits best, and how. known: patches of views, which are added to."""
    views = candidate.views[:_MAX_VIEWS]
    matchings: list[Matching] = []
    for number in views:
        view = query.views[number]
        if number not in known:
            width, height = view.size_of(query.width, query.height)
            known[number] = patches_of(view.pixels_SSC, patches_VhwP[number], width=width, height=height)
        matchings.append(match(known[number], reference))
        if matchings[-1].num_inliers >= _CLEAR_INLIERS_FRAC * known[number].num_patches:
            break
    best, verification = verify_best(matchings)
    return views[best], verification.of_original(query.views[views[best]].from_query)


def combined_score(likeness: float, verification: Verification | None) -> float:
    """The final score of a pair: what verification is sure of outweighs any likeness."""
    return likeness if verification is None else likeness + VERIFICATION_WEIGHT * verification.score


def _finished(
    item: Query | FailedQuery, detections: Future[list[Detection]] | None
) -> tuple[Query | FailedQuery, list[Detection]]:
    return item, [] if detections is None else detections.result()


class KnownReferences:
    """Patches of the references that were verified last. For several threads."""

    def __init__(self, load: Callable[[int], Reference | None]) -> None:
        self._load = load
        self._known: OrderedDict[int, Patches | None] = OrderedDict()
        self._lock = Lock()

    def get(self, image_ids: Sequence[int], backbone: Backbone) -> dict[int, Patches]:
        """Of those images that can be read, by id; new ones in one forward pass of the calling thread."""
        with self._lock:
            found = {image_id: self._known[image_id] for image_id in image_ids if image_id in self._known}
        loaded = {image_id: self._load(image_id) for image_id in image_ids if image_id not in found}
        readable = {image_id: reference for image_id, reference in loaded.items() if reference is not None}
        if readable:
            squares = [reference.square_SSC for reference in readable.values()]
            patches_BhwP = backbone.patches(np.stack(squares))
            for (image_id, reference), patches_hwP in zip(readable.items(), patches_BhwP, strict=True):
                found[image_id] = patches_of(
                    reference.square_SSC, patches_hwP, width=reference.width, height=reference.height
                )
        found |= {image_id: None for image_id in loaded if image_id not in readable}
        with self._lock:
            for image_id, known in found.items():
                self._known[image_id] = known
                self._known.move_to_end(image_id)
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return {image_id: known for image_id, known in found.items() if known is not None}

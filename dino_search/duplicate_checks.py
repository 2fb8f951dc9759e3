"""What cosines do not say of a pair inside a collection: patches and pixels, plain pages, frames of one burst.

The files of likely copies are read for it, each once; one that cannot be read any more, or holds other bytes by now,
is taken as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

from dino_index.backbones import Backbone
from dino_index.calibration import DecisionRule
from dino_index.copy_decisions import Decision
from dino_index.copy_detection import KnownReferences, Reference, combined_score
from dino_index.embedding import num_processors
from dino_index.picture_nature import PictureNature, are_burst_frames, are_unproven_plain
from dino_index.verification import VERIFIED_SCORE, verify
from dino_search.copies import LocatedImage

_FILES_A_PART = 64
# A page of text takes a megabyte while it is compared.
_MAX_PAGES = 64

FileOf = Callable[[Sequence[int]], Mapping[int, LocatedImage]]
"""Images by id, without those that are gone."""


class PairVerifier:
    """Verifies pairs of images by their patches and pixels, for decisions that cosines alone leave open."""

    def __init__(self, load_backbone: Callable[[], Backbone], rule: DecisionRule) -> None:
        """rule: on scores of whole images with verification."""
        self._load_backbone = load_backbone
        self._rule = rule

    def decide(
        self,
        pairs: Sequence[tuple[int, int]],
        likeness_P: Sequence[float],
        files_of: FileOf,
        on_progress: Callable[[float], None] = lambda done_frac: None,
    ) -> list[tuple[Decision, float | None] | None]:
        """Decision and estimated precision of each pair of image ids; None where a file cannot be read any more.

        likeness_P: cosine less bias.
        """
        if not pairs:
            return []
        backbone = self._load_backbone()
        side = backbone.spec.input_size

        def load(image_id: int) -> Reference | None:
            image = files_of([image_id]).get(image_id)
            return None if image is None else image.reference(side)

        known = KnownReferences(load)

        def decide_one(pair: tuple[int, int], likeness: float) -> tuple[Decision, float | None] | None:
            patches = known.get(list(pair), backbone)
            if len(patches) < 2:
                return None
            verification = verify(patches[pair[0]], patches[pair[1]])
            decision, precision = self._rule.decide(combined_score(likeness, verification))
            if decision == "copy" and verification.score < VERIFIED_SCORE:
                decision = "uncertain"
            return decision, precision

        decided: list[tuple[Decision, float | None] | None] = []
        with backbone.forward_threads() as forward:
            # In order, so that pairs of one image follow each other and its patches are at hand.
            for number, decision in enumerate(forward.map(decide_one, pairs, likeness_P), 1):
                decided.append(decision)
                on_progress(number / len(pairs))
        return decided


class PairChecks:
    """The nature of some images, by id."""

    def __init__(self, files_of: FileOf) -> None:
        self._files_of = files_of
        self._natures: dict[int, PictureNature] = {}
        self._page_of = lru_cache(_MAX_PAGES)(self._read)

    def read(self, image_ids: Sequence[int], on_progress: Callable[[float], None] = lambda done_frac: None) -> None:
        """Reads the files of these images."""
        with ThreadPoolExecutor(num_processors(), "decode") as pool:
            for begin in range(0, len(image_ids), _FILES_A_PART):
                part = image_ids[begin : begin + _FILES_A_PART]
                for image_id, nature in zip(part, pool.map(self._read, part), strict=True):
                    if nature is not None:
                        self._natures[image_id] = replace(nature, page_HWC=None)
                on_progress((begin + len(part)) / len(image_ids))

    def is_plain(self, image_id: int) -> bool:
        nature = self._natures.get(image_id)
        return nature is not None and nature.plain is not None

    def is_burst(self, first_id: int, second_id: int) -> bool:
        first, second = self._natures.get(first_id), self._natures.get(second_id)
        return first is not None and second is not None and are_burst_frames(first, second)

    def is_unproven_plain(self, first_id: int, second_id: int) -> bool:
        """Whether one is a plain page, and the pixels do not prove that both are the same."""
        if not (self.is_plain(first_id) or self.is_plain(second_id)):
            return False
        first, second = self._page_of(first_id), self._page_of(second_id)
        return first is None or second is None or are_unproven_plain(first, second)

    def _read(self, image_id: int) -> PictureNature | None:
        image = self._files_of([image_id]).get(image_id)
        return None if image is None else image.nature()

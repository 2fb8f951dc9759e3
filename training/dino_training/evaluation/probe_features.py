"""Features that a linear classifier is trained on: tokens of the last blocks of a frozen backbone.

Shapes: B images, N of a set, F features, S side of a picture, C = 3 colours.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_index.descriptors import global_token
from dino_index.errors import EvaluationImpossible
from dino_index.indexing import Progress
from dino_training.evaluation.feature_cache import FeatureCache
from dino_training.evaluation.features import FeatureStore
from dino_training.evaluation.labelled_batches import centre_decode_size, centre_views
from dino_training.evaluation.labelled_images import LabelledImages

# The paper's: four blocks for ViT-S; [CLS] and the average patch of the last block for ViT-B, which is this wide.
_NUM_BLOCKS = 4
_WIDE = 768
_NOTHING = np.empty(0, np.float16)


@dataclass(frozen=True, kw_only=True)
class FeatureKind:
    """num_blocks: the last so many blocks give their [CLS], after the final norm; 0 takes the pooled features of an
    architecture without blocks. average_pool: the mean of the last block's patch tokens as well."""

    num_blocks: int
    average_pool: bool

    @classmethod
    def of(cls, model: nn.Module, num_blocks: int | None = None, average_pool: bool | None = None) -> FeatureKind:
        """What is asked for; None takes what the paper takes of an architecture like this.

        Raises EvaluationImpossible where the architecture has not so many blocks, or none.
        """
        depth = _depth(model)
        if not depth:
            if num_blocks or average_pool:
                raise EvaluationImpossible(
                    f"expected an architecture with blocks and a [CLS] token, found {type(model).__name__}, which "
                    "gives one pooled vector; leave the choice of blocks and patches out"
                )
            return cls(num_blocks=0, average_pool=False)
        is_wide = int(model.num_features) >= _WIDE  # type: ignore[arg-type]
        if num_blocks is None:
            num_blocks = 1 if is_wide else min(_NUM_BLOCKS, depth)
        if num_blocks > depth:
            raise EvaluationImpossible(f"the model has {depth} blocks, expected {num_blocks} or more; take fewer")
        return cls(num_blocks=num_blocks, average_pool=is_wide if average_pool is None else average_pool)

    @property
    def name(self) -> str:
        """As the figures and the cache call it."""
        if not self.num_blocks:
            return "pooled"
        return f"cls-of-{self.num_blocks}" + ("-and-mean-patch" if self.average_pool else "")

    def num_features(self, dim: int) -> int:
        """F, where one token has so many channels."""
        return dim * (max(1, self.num_blocks) + self.average_pool)

    def features(self, model: nn.Module, pictures_BCHW: Tensor) -> Tensor:
        """features_BF, in the model's dtype. pictures_BCHW: normalised."""
        if not self.num_blocks:
            return global_token(model, model.forward_features(pictures_BCHW))  # type: ignore[operator]
        layers: list[tuple[Tensor, Tensor]] = model.forward_intermediates(  # type: ignore[operator]
            pictures_BCHW, indices=self.num_blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC",
            intermediates_only=True,
        )  # fmt: skip
        parts = [prefix_BPD[:, 0] for _, prefix_BPD in layers]
        if self.average_pool:
            parts.append(layers[-1][0].mean(dim=1))
        return torch.cat(parts, dim=1)


class ProbeFeatures:
    """Features of one kind by the model of a store."""

    def __init__(self, store: FeatureStore, kind: FeatureKind) -> None:
        self._store = store
        self.kind = kind
        self.num_features = kind.num_features(int(store.backbone.model.num_features))  # type: ignore[arg-type]

    def of_centres(self, images: LabelledImages) -> tuple[LabelledImages, NDArray[np.float16]]:
        """(the images that could be read, features_NF of the middle of each of them), kept in the store's cache.

        Raises OutOfMemory.
        """
        store, size = self._store, self._store.spec.input_size
        images.source.prepare(decode_size=centre_decode_size(size), cache_bytes=0)
        features_NF = np.empty((len(images), self.num_features), np.float16)
        batch_size = store.settings.batch_size or store.backbone.batch_size
        with self._cache() as cache, store.backbone.forward_threads() as forward:
            waiting: deque[tuple[list[int], list[bytes], Future[NDArray[np.float16]]]] = deque()
            numbers: list[int] = []
            digests: list[bytes] = []
            squares: list[NDArray[np.uint8]] = []
            found: list[int] = []

            def submit() -> None:
                pixels_BSSC = store.backbone.stack(squares)
                future = forward.submit(store.backbone.describe, pixels_BSSC, self.kind.features)
                waiting.append((list(numbers), list(digests), future))
                numbers.clear()
                digests.clear()
                squares.clear()

            def take() -> None:
                taken, keys, future = waiting.popleft()
                features_NF[taken] = future.result()
                if cache is not None:
                    pairs = zip(keys, taken, strict=True)
                    cache.add((key, (size, size), (features_NF[row], _NOTHING)) for key, row in pairs)

            for number, pixels_SSC in centre_views(images, size, store.settings.workers):
                found.append(number)
                digest = hashlib.sha256(pixels_SSC.tobytes()).digest()
                known = cache.get(digest) if cache is not None else None
                if known is not None and len(known[0]) == self.num_features:
                    features_NF[number] = known[0]
                else:
                    numbers.append(number)
                    digests.append(digest)
                    squares.append(pixels_SSC)
                if len(squares) == batch_size:
                    submit()
                while len(waiting) > store.backbone.max_waiting:
                    take()
                if not len(found) % batch_size or len(found) == len(images):
                    failed = len(images.unreadable)
                    store.on_progress(Progress(done=len(found), total=len(images), failed=failed))
            if squares:
                submit()
            while waiting:
                take()
        kept = np.array(found, np.int64)
        return images.subset(kept), features_NF[kept]

    def of_batches(
        self, batches: Iterable[tuple[NDArray[np.uint8], NDArray[np.int64]]]
    ) -> Iterator[tuple[NDArray[np.float16], NDArray[np.int64]]]:
        """(features_BF, classes_B) for each (pixels_BSSC, classes_B). Raises OutOfMemory."""
        backbone = self._store.backbone
        size = self._store.settings.batch_size or backbone.batch_size
        with backbone.forward_threads() as forward:
            for pixels_BSSC, classes_B in batches:
                parts = [pixels_BSSC[begin : begin + size] for begin in range(0, len(pixels_BSSC), size)]
                found = list(forward.map(lambda part: backbone.describe(part, self.kind.features), parts))
                yield np.concatenate(found), classes_B

    def _cache(self) -> closing[FeatureCache] | nullcontext[None]:
        store = self._store
        if store.cache_folder is None:
            return nullcontext()
        return closing(FeatureCache(store.cache_folder, f"{store.spec.fingerprint}-{self.kind.name}", store.on_remark))


def _depth(model: nn.Module) -> int:
    """How many blocks give a [CLS] token; 0 for an architecture that has none, or of which timm gives only the last."""
    forward = getattr(model, "forward_intermediates", None)
    gives_cls = forward is not None and "return_prefix_tokens" in inspect.signature(forward).parameters
    if getattr(model, "cls_token", None) is None or not gives_cls:
        return 0
    return len(model.blocks)  # type: ignore[arg-type]

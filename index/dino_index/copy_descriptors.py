"""The vectors that copies are compared by, and how their cosines become comparable between queries.

A copy vector is [CLS/|CLS| ‖ GeM/|GeM|], whitened where that has been learned, unit length (arXiv 2104.14294, section
4.2). What has been learned, the whitening and the background of `score_normalisation`, is frozen: the same pictures
always get the same score.

Shapes: N images, B background images, D channels of each of [CLS] and GeM, C channels of a copy vector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dino_index.copy_settings import SINGLE_IMAGES
from dino_index.errors import ModelError
from dino_index.score_normalisation import MIN_BACKGROUND, biases, size_correction
from dino_index.snapshots import normalise
from dino_index.whitening import Whitening

_DIGEST_BYTES = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class CopyDescriptor:
    """How raw vectors of the catalog become copy vectors, and what is taken off a query's cosines."""

    whitening: Whitening | None = None
    background_BC: NDArray[np.float32] | None = None
    """Vectors of pictures such as the queries will meet, not whitened; None takes nothing off."""
    background_sha256: tuple[bytes, ...] = ()
    """Whose they are, where they come from a collection; empty for pictures that it does not hold."""

    def vectors(
        self, cls_ND: NDArray[np.float16 | np.float32], gem_ND: NDArray[np.float16 | np.float32]
    ) -> NDArray[np.float32]:
        """vectors_NC, float32, unit length, of raw [CLS] and GeM."""
        joined_ND = normalise(np.concatenate([normalise(cls_ND), normalise(gem_ND)], axis=1))
        return joined_ND if self.whitening is None else self.whitening.apply(joined_ND)

    def biases(self, queries_NC: NDArray[np.float32]) -> NDArray[np.float32]:
        """What score normalisation takes off the cosines of each query."""
        if self.background_BC is None or len(self.background_BC) < MIN_BACKGROUND:
            return np.zeros(len(queries_NC), np.float32)
        return biases(queries_NC, self._compared_background) + np.float32(self._size_correction)

    def switched(self, *, whitening: bool, normalisation: bool) -> CopyDescriptor:
        """The same without what is switched off."""
        return replace(
            self,
            whitening=self.whitening if whitening else None,
            background_BC=self.background_BC if normalisation else None,
        )

    @cached_property
    def _compared_background(self) -> NDArray[np.float32]:
        assert self.background_BC is not None
        return self.background_BC if self.whitening is None else self.whitening.apply(self.background_BC)

    @cached_property
    def _size_correction(self) -> float:
        return size_correction(self._compared_background)

    def to_bytes(self) -> bytes:
        """A safetensors file; the background in float16."""
        arrays: dict[str, NDArray[np.generic]] = {}
        if self.whitening is not None:
            arrays |= {"mean": self.whitening.mean_D, "projection": self.whitening.projection_DD}
        if self.background_BC is not None:
            arrays["background"] = self.background_BC.astype(np.float16)
        if self.background_sha256:
            digests = np.frombuffer(b"".join(self.background_sha256), np.uint8)
            arrays[SINGLE_IMAGES] = digests.reshape(-1, _DIGEST_BYTES)
        return save(arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> CopyDescriptor:
        """What `to_bytes` wrote. Raises ModelError."""
        try:
            arrays = load(data)
        except SafetensorError as error:
            raise ModelError(
                f"the stored whitening cannot be read ({error}); learn it anew: dino-search calibrate --refit"
            ) from error
        whitening = None
        if "mean" in arrays:
            projection_DD = np.ascontiguousarray(arrays["projection"], np.float32)
            whitening = Whitening(arrays["mean"].astype(np.float32), projection_DD)
        background_BC = arrays.get("background")
        return cls(
            whitening=whitening,
            background_BC=None if background_BC is None else normalise(background_BC),
            background_sha256=tuple(map(bytes, arrays.get(SINGLE_IMAGES, ()))),
        )


def shipped_descriptor(weights_path: Path) -> CopyDescriptor | None:
    """What ships beside bundled weights; None for weights without it."""
    path = weights_path.with_suffix(".copies.safetensors")
    return CopyDescriptor.from_bytes(path.read_bytes()) if path.is_file() else None

"""The two kinds of vectors that a server may hold of a collection: those that `search` and that `copies` go by.

Shapes: N images of a part, D channels of a search vector, C of a copy vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from dino_index.catalog import StoredVectorsRow
from dino_index.collections import CollectionInfo
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_vectors import copy_dim, copy_parts
from dino_index.snapshots import normalise, stored_parts

SEARCH, COPIES = "search", "copies"

Part = tuple[list[int], list[int], NDArray[np.float32]]
"""(image ids, generations, vectors of unit length) of some images, in the order of ids."""


class VectorKind(Protocol):
    """How vectors of one kind are made of what the catalog holds."""

    @property
    def name(self) -> str: ...

    @property
    def whitening(self) -> bytes | None:
        """What the vectors depend on beside the catalog's embeddings, a safetensors file; None for nothing."""
        ...

    @property
    def whitening_sha256(self) -> bytes | None:
        """Tells one from another."""
        ...

    def dim(self, collection: CollectionInfo) -> int: ...

    def parts(
        self,
        session: Session,
        collection: CollectionInfo,
        after_generation: int = -1,
        up_to_generation: int | None = None,
    ) -> Iterator[Part]:
        """Of readable images that got theirs after one generation and not after another. Raises CatalogUnavailable."""
        ...


@dataclass(frozen=True)
class SearchVectors:
    """See `VectorKind`: the [CLS] vector."""

    name = SEARCH
    whitening = None
    whitening_sha256 = None

    def dim(self, collection: CollectionInfo) -> int:
        return collection.dim

    def parts(
        self,
        session: Session,
        collection: CollectionInfo,
        after_generation: int = -1,
        up_to_generation: int | None = None,
    ) -> Iterator[Part]:
        for _, ids, generations, raw_ND in stored_parts(session, collection, after_generation, up_to_generation):
            yield ids, generations, normalise(raw_ND)


@dataclass(frozen=True, eq=False)
class CopyVectors:
    """See `VectorKind`: what `descriptor` makes of [CLS] and GeM."""

    descriptor: CopyDescriptor
    name = COPIES

    @classmethod
    def of(cls, row: StoredVectorsRow) -> CopyVectors:
        """The kind that a server holds by the catalog's note."""
        return cls(CopyDescriptor() if row.whitening is None else CopyDescriptor.from_bytes(row.whitening))

    @cached_property
    def whitening(self) -> bytes | None:
        if self.descriptor.whitening is None:
            return None
        return CopyDescriptor(whitening=self.descriptor.whitening).to_bytes()

    @cached_property
    def whitening_sha256(self) -> bytes | None:
        whitening = self.descriptor.whitening
        if whitening is None:
            return None
        # Of the numbers: the same whitening may be written differently by another version of safetensors.
        return hashlib.sha256(whitening.mean_D.tobytes() + whitening.projection_DD.tobytes()).digest()

    def dim(self, collection: CollectionInfo) -> int:
        return copy_dim(collection, self.descriptor)

    def parts(
        self,
        session: Session,
        collection: CollectionInfo,
        after_generation: int = -1,
        up_to_generation: int | None = None,
    ) -> Iterator[Part]:
        yield from copy_parts(session, collection, self.descriptor, after_generation, up_to_generation)

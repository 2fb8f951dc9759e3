"""The contents of a collection: images with equal bytes are one, which is compared once.

Shapes: N contents, I images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import ImageRow
from dino_index.collections import CollectionInfo, join_path, source_paths
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_vectors import load_copy_vectors
from dino_index.image_paths import parent_of
from dino_index.index_types import Rows

_ROWS_PER_FETCH = 8192


class Contents:
    """Different bytes, by position; which images have them, and their vectors."""

    def __init__(
        self, ids_I: NDArray[np.int64], digests_I: NDArray[np.void], vectors: Rows, folders_I: NDArray[np.int64] | None
    ) -> None:
        """Images in the order of their vectors. folders_I: a number for each folder; None where folders are nothing."""
        unique_N, first_N, content_I = np.unique(digests_I, return_index=True, return_inverse=True)
        # Numbered by their first image, so that results are ordered as images were added.
        order_N = np.argsort(first_N)
        number_N = np.empty(len(order_N), np.int64)
        number_N[order_N] = np.arange(len(order_N))
        self._first_N = first_N[order_N]
        self._digests_N = unique_N[order_N]
        content_I = number_N[content_I.ravel()]
        self._vectors = vectors
        self._ids_I = ids_I
        self._by_content = np.argsort(content_I, kind="stable")
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(content_I, minlength=len(unique_N)))])
        self.only_folder_N: NDArray[np.int64] | None = None
        """The folder that all images of a content lie in; -1 where they lie in several."""
        if folders_I is not None:
            lowest_N = np.full(len(unique_N), np.iinfo(np.int64).max)
            highest_N = np.full(len(unique_N), -1)
            np.minimum.at(lowest_N, content_I, folders_I)
            np.maximum.at(highest_N, content_I, folders_I)
            self.only_folder_N = np.where(lowest_N == highest_N, lowest_N, -1)

    @classmethod
    def load(
        cls, session: Session, collection: CollectionInfo, descriptor: CopyDescriptor, with_folders: bool
    ) -> Contents:
        vectors = load_copy_vectors(session, collection, descriptor)
        digests_I = np.zeros(len(vectors), "V32")
        folders_I = np.zeros(len(vectors), np.int64) if with_folders else None
        numbers: dict[tuple[int, str], int] = {}
        statement = (
            select(ImageRow.sha256, ImageRow.source_id, ImageRow.path)
            .where(ImageRow.collection_id == collection.id, ImageRow.status == "ok")
            .order_by(ImageRow.id)
        )
        sources = source_paths(session, collection)
        rows = session.execute(statement, execution_options={"yield_per": _ROWS_PER_FETCH})
        for number, (sha256, source_id, path) in enumerate(rows):
            digests_I[number] = np.void(sha256 or b"")
            if folders_I is not None:
                folder = (0, parent_of(join_path(sources[source_id], path)))
                folders_I[number] = numbers.setdefault(folder, len(numbers))
        return cls(vectors.ids_N, digests_I, vectors, folders_I)

    def __len__(self) -> int:
        return len(self._first_N)

    @property
    def dim(self) -> int:
        return self._vectors.dim

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._vectors.rows(self._first_N[positions])

    def scores(self, left_A: NDArray[np.int64], right_B: NDArray[np.int64]) -> NDArray[np.float32]:
        """(A, B)"""
        scores_AB: NDArray[np.float32] = np.minimum(self.rows(left_A) @ self.rows(right_B).T, 1)
        return scores_AB

    def digest(self, node: int) -> bytes:
        return bytes(self._digests_N[node].tobytes())

    def nodes_of(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """Contents by their sha256, those that are there."""
        known = np.frombuffer(b"".join(digests), "V32") if digests else np.empty(0, "V32")
        found = np.flatnonzero(np.isin(self._digests_N.view("S32"), known.view("S32")))
        return {self.digest(int(node)): int(node) for node in found}

    def images_of(self, node: int) -> list[int]:
        positions = self._by_content[self._ends[node] : self._ends[node + 1]]
        return [int(image_id) for image_id in self._ids_I[positions]]

    def first_image(self, node: int) -> int:
        return int(self._ids_I[self._first_N[node]])

    def repeated(self) -> NDArray[np.int64]:
        """Contents that several images have, in several folders where folders count."""
        several_N = np.diff(self._ends) > 1
        if self.only_folder_N is not None:
            several_N &= self.only_folder_N < 0
        return np.flatnonzero(several_N)

"""A home with one collection of given vectors, written without images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import insert

from dino_index.catalog import Catalog, CollectionRow, EmbeddingRow, ImageRow, SnapshotRow, SourceRow
from dino_index.collections import CollectionInfo, advance_generation, create_collection, find_collection
from dino_index.model_files import ModelSpec
from dino_index.snapshots import write_snapshot
from dino_index.vector_index import VectorIndex

_ROWS_PER_INSERT = 20_000


class _NoModel(ModelSpec):
    fingerprint = "0" * 64


class Filled:
    """The home, open."""

    def __init__(self, catalog: Catalog, collection: CollectionInfo, source_id: int = 0) -> None:
        """source_id: of what is added; 0 where nothing is."""
        self.catalog = catalog
        self.collection = collection
        self._source_id = source_id
        self._num_added = 0

    @classmethod
    def created(cls, home: Path, dim: int) -> Filled:
        """A new one, without any vector."""
        catalog = Catalog.open(home, create=True)
        assert catalog is not None
        spec = _NoModel(name="none", weights_path=Path("none"), architecture="none", input_size=8)
        with catalog.writing() as session:
            collection = create_collection(session, "default", spec, dim)
            source = SourceRow(collection_id=collection.id, path="/nowhere")
            session.add(source)
            session.flush()
            return cls(catalog, collection, source.id)

    @classmethod
    def opened(cls, home: Path) -> Filled:
        """One that was filled before, to build and to search."""
        catalog = Catalog.open(home)
        assert catalog is not None
        with catalog.reading() as session:
            return cls(catalog, find_collection(session, "default"))

    def add(self, vectors_ND: NDArray[np.float16], *, with_gem: bool = False) -> None:
        """with_gem: the same vectors once more, as those of GeM."""
        with self.catalog.writing() as session:
            generation = advance_generation(session, self.collection)
            for begin in range(0, len(vectors_ND), _ROWS_PER_INSERT):
                images: list[dict[str, Any]] = []
                embeddings: list[dict[str, Any]] = []
                for vector_D in vectors_ND[begin : begin + _ROWS_PER_INSERT]:
                    digest = hashlib.sha256(self._num_added.to_bytes(8, "big")).digest()
                    images.append(
                        {"collection_id": self.collection.id, "source_id": self._source_id, "size": 1, "mtime_ns": 1,
                         "path": str(self._num_added), "sha256": digest, "status": "ok", "generation": generation}
                    )  # fmt: skip
                    embeddings += [
                        {"sha256": digest, "model_id": self.collection.model_id, "kind": kind, "region": "full",
                         "vector": vector_D.tobytes()}
                        for kind in (("cls", "gem") if with_gem else ("cls",))
                    ]  # fmt: skip
                    self._num_added += 1
                session.execute(insert(ImageRow), images)
                session.execute(insert(EmbeddingRow), embeddings)

    def ask_for(self, index_type: str) -> None:
        with self.catalog.writing() as session:
            session.get_one(CollectionRow, self.collection.id).index_type = index_type

    def build(self, *, append: bool = False) -> None:
        write_snapshot(self.catalog, self.collection, append=append)

    def open(self) -> VectorIndex:
        with self.catalog.reading() as session:
            return VectorIndex.load(self.catalog, session, self.collection)

    def snapshot(self) -> tuple[int, int, str]:
        """(bytes, vectors, reason) of the snapshot."""
        with self.catalog.reading() as session:
            row = session.get_one(SnapshotRow, self.collection.id)
            return row.num_bytes, row.num_vectors, row.reason

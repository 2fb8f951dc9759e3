"""A collection filled with given vectors, as an indexing run would record them, and the slow truth about it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from databases import created_catalog
from dino_index.catalog import CollectionRow, ImageRow
from dino_index.collections import CollectionInfo, create_collection, find_collection
from dino_index.embedding import EmbeddedFile, FileFacts
from dino_index.image_files import ListedFile
from dino_index.model_files import ModelSpec
from dino_index.recording import BatchRecorder, Sources, remove_images
from dino_index.snapshots import write_snapshot
from dino_index.vector_stores import VectorSearch, vector_store_of

Found = tuple[list[int], list[float]]


class _NoModel(ModelSpec):
    fingerprint = "0" * 64


class VectorShelf:
    """Vectors by file name: added, replaced, removed, compacted, searched."""

    def __init__(self, home: Path, dim: int, index_type: str = "auto") -> None:
        self.home = home
        self.catalog = created_catalog(home)
        self.vectors: dict[int, NDArray[np.float16]] = {}
        """What can be found, by image id."""
        self.files = home.parent / "files"  # they need to exist, or new ones would count as moved ones
        self.files.mkdir(exist_ok=True)
        spec = _NoModel(name="none", weights_path=Path("none"), architecture="none", input_size=8)
        with self.catalog.writing() as session:
            self.collection: CollectionInfo = create_collection(session, "default", spec, dim)
            Sources.covering(session, self.collection, [str(self.files)])
            session.get_one(CollectionRow, self.collection.id).index_type = index_type

    def put(self, **vectors: NDArray[Any]) -> dict[str, int]:
        """Adds or replaces a vector under each name, in one transaction; image ids by name."""
        outcomes = []
        for name, vector_D in vectors.items():
            path = self.files / name
            path.touch()
            facts = FileFacts(os.urandom(32), 1, 1, 1, 1)  # new bytes each time
            vector_D = np.asarray(vector_D, np.float16)
            outcomes.append(EmbeddedFile(ListedFile(str(path), 1, 1), facts, vector_D, vector_D))
        with self.catalog.writing() as session:
            BatchRecorder(session, self.collection).record(outcomes, None)
            session.flush()
            rows = session.scalars(select(ImageRow).where(ImageRow.collection_id == self.collection.id))
            ids = {row.path: row.id for row in rows}
        self.vectors |= {ids[name]: np.asarray(vector_D, np.float16) for name, vector_D in vectors.items()}
        return {name: ids[name] for name in vectors}

    def remove(self, *image_ids: int) -> None:
        with self.catalog.writing() as session:
            remove_images(session, self.collection, image_ids)
        for image_id in image_ids:
            del self.vectors[image_id]

    def compact(self, *, append: bool = False) -> None:
        if append:
            write_snapshot(self.catalog, self.collection, append=True)
        else:
            vector_store_of(self.catalog).compact(self.collection)

    def asked_type(self) -> str:
        with self.catalog.reading() as session:
            return session.get_one(CollectionRow, self.collection.id).index_type

    def snapshots(self) -> list[Path]:
        return sorted((self.home / "snapshots").rglob("*.faiss"), key=lambda path: int(path.name.split("-")[1]))

    def index(self) -> VectorSearch:
        with self.catalog.reading() as session:
            return vector_store_of(self.catalog).load(session, find_collection(session, "default"))

    def search(
        self, query_D: NDArray[Any], k: int, allowed: NDArray[np.int64] | None = None, index: VectorSearch | None = None
    ) -> Found:
        ((ids, scores),) = (index or self.index()).search(unit(query_D)[None], k, allowed_ids=allowed)
        return ids.tolist(), scores.tolist()

    def brute_force(self, query_D: NDArray[Any], k: int, allowed: NDArray[np.int64] | None = None) -> Found:
        """The k highest cosines to 6 decimals, ties by id, in float64."""
        ids = [image_id for image_id in self.vectors if allowed is None or image_id in set(allowed.tolist())]
        if not ids:
            return [], []
        vectors_ND = np.stack([self.vectors[image_id] for image_id in ids]).astype(np.float64)
        cosines = (vectors_ND * query_D).sum(1) / np.linalg.norm(vectors_ND, axis=1) / np.linalg.norm(query_D)
        ranked = sorted((-round(score, 6), image_id) for score, image_id in zip(cosines.tolist(), ids, strict=True))
        return [image_id for _, image_id in ranked[:k]], [-score for score, _ in ranked[:k]]


def random_vectors(number: int, dim: int, prefix: str = "", seed: int = 0) -> dict[str, NDArray[np.float16]]:
    """Vectors by name, for `VectorShelf.put`."""
    rng = np.random.default_rng(seed)
    return {f"{prefix}{i}": rng.normal(size=dim).astype(np.float16) for i in range(number)}


def unit(vector_D: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(vector_D / np.linalg.norm(vector_D), np.float32)

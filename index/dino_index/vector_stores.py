"""Where vectors are searched: in snapshot files of the home, or by a Milvus server; both behind one interface.

Shapes: Q queries, D channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog
from dino_index.collections import CollectionInfo
from dino_index.snapshot_store import SnapshotStore

if TYPE_CHECKING:
    from dino_index.copy_descriptors import CopyDescriptor
    from dino_index.copy_search import CopyReferences
    from dino_index.milvus_store import MilvusStore


class VectorSearch(Protocol):
    """The vectors of a collection that can be found, as of one generation. For one thread at a time."""

    generation: int

    def is_current(self, session: Session, collection: CollectionInfo) -> bool:
        """Whether nothing that can be found has changed since this was loaded."""
        ...

    def __len__(self) -> int: ...

    def search(
        self, queries_QD: NDArray[np.float32], k: int, *, allowed_ids: NDArray[np.int64] | None = None
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """For each query (ids, scores) of its k nearest vectors: cosine to 6 decimals, best first, ties by id.

        An approximate index may miss some of the nearest; scores are exact whatever the type.
        queries_QD: float32, unit length. k: at least 1; fewer come back only where fewer exist.
        allowed_ids: the only images to find; None for all.
        """
        ...


class VectorStore(Protocol):
    """The vectors of a catalog's collections, derived from it: whatever is lost here can be made again.

    Everything raises CatalogErrors; on a server VectorStoreErrors as well.
    """

    @property
    def place(self) -> str:
        """Where it is, for people; without any password."""
        ...

    def connect(self) -> None:
        """Raises VectorStoreError where nothing can be stored, before long work is done for it."""
        ...

    def check_type(self, asked: str, dim: int) -> None:
        """Raises IndexTypeInvalid for a type of index that is not to be had for vectors of `dim` numbers."""
        ...

    def weigh(self, session: Session, collection: CollectionInfo, num_vectors: int) -> None:
        """Raises TooLittleMemory where this machine could not index so many vectors, and would have to."""
        ...

    def load(self, session: Session, collection: CollectionInfo) -> VectorSearch:
        """The vectors as `session` sees the collection."""
        ...

    def load_copies(
        self,
        session: Session,
        collection: CollectionInfo,
        descriptor: CopyDescriptor,
        before: CopyReferences | None = None,
    ) -> CopyReferences:
        """What copies are compared with, as `session` sees the collection.

        before: loaded from this catalog at an earlier time; what it has need not be read again.
        """
        ...

    def keep_up(self, collection: CollectionInfo) -> None:
        """Stores what was recorded since, if that takes no waiting; `settle` and `load` do it otherwise."""
        ...

    def settle(self, collection: CollectionInfo, *, retype: bool = False) -> None:
        """What ends a run that changed vectors: the next search starts at once.

        retype: build anew where the collection is to have another type of index than it has.
        """
        ...

    def compact(self, collection: CollectionInfo) -> None:
        """Stores everything anew, beside the old, with nothing of removed vectors."""
        ...

    def problem(self, collection: CollectionInfo) -> str | None:
        """In which way the stored vectors disagree with the catalog, in a line; `compact` puts it right."""
        ...

    def facts(self, session: Session, collection: CollectionInfo) -> dict[str, Any]:
        """`vector_store`, `index_type`, `index_reason` and `images_in_snapshot`, as `info` gives them."""
        ...


def vector_store_of(catalog: Catalog) -> VectorStore:
    """The store that the catalog was opened with. Raises VectorStoreError for a URL of no use."""
    return server_store_of(catalog) or SnapshotStore(catalog)


def server_store_of(catalog: Catalog) -> MilvusStore | None:
    """The store on a server; None where vectors are in the home. Raises VectorStoreError for a URL of no use."""
    if catalog.vectors_url is None:
        return None
    # FAISS, which others do without until they search.
    from dino_index.milvus_store import MilvusStore, server_at

    return MilvusStore(catalog, server_at(catalog.vectors_url))

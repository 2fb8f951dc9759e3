"""Collections on a Milvus server: made, filled, sealed, dropped. Everything may be done twice.

Shapes: N vectors, D channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dino_index.errors import VectorStoreError
from dino_index.index_type_names import FLAT
from dino_index.milvus_search import GENERATION, ID, INDEX_TYPES, VECTOR, num_lists
from dino_index.milvus_server import CALL_TIMEOUT_S, PATIENTLY_S, CollectionGone, MilvusServer

if TYPE_CHECKING:
    from pymilvus import MilvusClient

_LOADING_TIMEOUT_S, _FLUSH_TIMEOUT_S, _MAX_HANDOFF_S, _POLL_S = 600.0, 120.0, 120.0, 0.5
_BYTES_A_CALL = 8 * 2**20
_IDS_A_CALL = 10_000
_HNSW_LINKS, _HNSW_CONSTRUCTION = 32, 120


def create_vectors(server: MilvusServer, name: str, index_type: str, num_vectors: int, dim: int) -> None:
    """Makes a collection, empty and ready to be searched; num_vectors: how many it is to hold, about.

    Raises VectorStoreErrors, as everything here does.
    """
    from pymilvus import DataType, MilvusClient

    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field(ID, DataType.INT64, is_primary=True)
    schema.add_field(GENERATION, DataType.INT64)
    schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=dim)
    index = MilvusClient.prepare_index_params()
    index.add_index(
        VECTOR, index_name=VECTOR, index_type=INDEX_TYPES[index_type], metric_type="IP",
        params=_parameters(index_type, num_vectors),
    )  # fmt: skip

    def create(client: MilvusClient) -> None:
        if not client.has_collection(name, timeout=CALL_TIMEOUT_S):
            client.create_collection(name, schema=schema, num_shards=1, timeout=CALL_TIMEOUT_S)
        client.create_index(name, index, timeout=CALL_TIMEOUT_S)
        client.load_collection(name, timeout=_LOADING_TIMEOUT_S)

    server.call(create, patience_s=PATIENTLY_S)


def upsert_vectors(
    server: MilvusServer,
    name: str,
    ids: Sequence[int],
    generations: Sequence[int],
    vectors_ND: NDArray[np.float32],
    *,
    patience_s: float,
) -> list[int]:
    """Adds or replaces vectors; ids of those that are no numbers, for which a server has no place."""
    sound_N = np.asarray(np.isfinite(vectors_ND).all(axis=1))
    rows = [
        {ID: image_id, GENERATION: generation, VECTOR: vector_D}
        for image_id, generation, vector_D, is_sound in zip(ids, generations, vectors_ND, sound_N, strict=True)
        if is_sound
    ]
    rows_a_call = max(1, _BYTES_A_CALL // (4 * vectors_ND.shape[1]))
    for begin in range(0, len(rows), rows_a_call):
        part = rows[begin : begin + rows_a_call]

        def upsert(client: MilvusClient, part: list[dict[str, Any]] = part) -> None:
            client.upsert(name, part, timeout=CALL_TIMEOUT_S)

        server.call(upsert, patience_s=patience_s)
    return [image_id for image_id, is_sound in zip(ids, sound_N, strict=True) if not is_sound]


def delete_vectors(server: MilvusServer, name: str, ids: Sequence[int], *, patience_s: float) -> None:
    for begin in range(0, len(ids), _IDS_A_CALL):
        part = list(ids[begin : begin + _IDS_A_CALL])

        def delete(client: MilvusClient, part: list[int] = part) -> None:
            client.delete(name, ids=part, timeout=CALL_TIMEOUT_S)

        server.call(delete, patience_s=patience_s)


def seal_vectors(server: MilvusServer, name: str, on_wait: Callable[[], object]) -> None:
    """Has the server index everything, and waits until it searches by that; on_wait: called again and again."""
    server.call(lambda client: client.flush(name, timeout=_FLUSH_TIMEOUT_S), patience_s=PATIENTLY_S)
    serving_by = math.inf
    while True:
        facts, segments = server.call(
            lambda client: (
                client.describe_index(name, VECTOR, timeout=CALL_TIMEOUT_S),
                client.list_loaded_segments(name, timeout=CALL_TIMEOUT_S),
            ),
            patience_s=PATIENTLY_S,
        )
        if facts["state"] == "Failed":
            raise VectorStoreError(f"Milvus at {server.place} built no index: {facts.get('index_state_fail_reason')}")
        if facts["state"] == "Finished" and not facts["pending_index_rows"]:
            # Until it has loaded the index it goes by a coarse one of its own, which found 86 % of the 10 nearest.
            num_served = sum(segment.num_rows for segment in segments if segment.index_name)
            serving_by = min(serving_by, time.monotonic() + _MAX_HANDOFF_S)
            if num_served >= facts["indexed_rows"] or time.monotonic() > serving_by:
                return
        on_wait()
        time.sleep(_POLL_S)


def drop_vectors(server: MilvusServer, name: str) -> None:
    with suppress(CollectionGone):
        server.call(lambda client: client.drop_collection(name, timeout=CALL_TIMEOUT_S))


def server_time(server: MilvusServer, *, patience_s: float) -> int:
    """The server's clock: a search that has seen this moment has seen every change before it."""
    return server.call(
        # No public method gives it.
        lambda client: int(client._get_connection().alloc_timestamp(timeout=CALL_TIMEOUT_S)),
        patience_s=patience_s,
    )


def _parameters(index_type: str, num_vectors: int) -> dict[str, int]:
    if index_type == FLAT:
        return {}
    if index_type == "hnsw":
        return {"M": _HNSW_LINKS, "efConstruction": _HNSW_CONSTRUCTION}
    return {"nlist": num_lists(num_vectors)}

"""Copy vectors on a Milvus server, searched there.

Shapes: V views of one query, K chosen vectors, N vectors, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dino_index.milvus_search import MilvusIndex

# What chooses may be coarse, and what was removed meanwhile is found and left out.
_NUM_SPARE = 32


class ServedReferences:
    """See `CopyReferences`. What it gives raises VectorStoreErrors."""

    def __init__(self, index: MilvusIndex) -> None:
        self._index = index

    def nearest(
        self, views_VC: NDArray[np.float32], biases_V: NDArray[np.float32], num_images: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rows = self._index.nearest_to_any(views_VC, -biases_V, num_images + _NUM_SPARE)
        return rows.ids_C, rows.vectors_CD

    def vectors_of(self, image_ids: Sequence[int]) -> NDArray[np.float32]:
        rows = self._index.rows_of(np.unique(np.array(image_ids, np.int64)))
        positions = {image_id: position for position, image_id in enumerate(rows.ids_C.tolist())}
        vectors_NC: NDArray[np.float32] = rows.vectors_CD[[positions[image_id] for image_id in image_ids]]
        return vectors_NC

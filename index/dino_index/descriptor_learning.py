"""What copy detection learns of a collection once: whitening, where nothing ships with the model, and background.

Shapes: N images, B background images, C channels of a copy vector.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, ImageRow, bound_parts
from dino_index.collections import CollectionInfo, model_of
from dino_index.copy_descriptors import CopyDescriptor, shipped_descriptor
from dino_index.copy_settings import add_whitening, latest_whitening
from dino_index.copy_vectors import load_copy_vectors
from dino_index.errors import CatalogError
from dino_index.score_normalisation import MAX_BACKGROUND
from dino_index.whitening import MIN_IMAGES_PER_DIMENSION, fit_whitening

logger = logging.getLogger(__name__)

MIN_OWN_BACKGROUND = 100
"""A collection with fewer different images says too little about what queries will look like."""


def copy_descriptor(
    catalog: Catalog,
    collection: CollectionInfo,
    models: Path,
    *,
    refit: bool = False,
    on_remark: Callable[[str], None] = lambda remark: None,
) -> CopyDescriptor:
    """The collection's frozen descriptor; learned, and stored as its next version, where there is none yet.

    models: the home's folder of models. refit: learn it anew in any case.
    Learned are the whitening, unless it ships with the model, from 10 images a dimension on, and the background, from
    100 images on: a choice of the collection's own images, as nothing else resembles its queries as much. A smaller
    collection has what ships with its model, if anything, and nothing is stored.
    Raises ModelError, CatalogErrors.
    """
    with catalog.reading() as session:
        stored = latest_whitening(session, collection)
        if stored is not None and not refit:
            return CopyDescriptor.from_bytes(stored[1])
        shipped = shipped_descriptor(model_of(collection, models).weights_path) or CopyDescriptor()
        learned, facts = _learn(session, collection, shipped)
    if not facts:
        return shipped
    on_remark(f"learned from {facts['images']} images of collection {collection.name!r}: {facts['learned']}")

    def store(session: Session) -> bytes:
        return add_whitening(session, collection, learned.to_bytes(), facts, after=stored[0] if stored else 0)[1]

    try:
        return CopyDescriptor.from_bytes(catalog.write(store))
    except CatalogError as error:
        logger.warning("%s; going on with what was learned, which is not stored", error)
        return learned


def learn_descriptor(
    shipped: CopyDescriptor, joined_NC: NDArray[np.float32], sha256: Sequence[bytes]
) -> tuple[CopyDescriptor, list[str]]:
    """What pictures teach a descriptor, and what that was: whitening, background, both or nothing.

    joined_NC: their copy vectors, not whitened. sha256: whose they are.
    """
    learned: list[str] = []
    whitening = shipped.whitening
    if whitening is None and (whitening := fit_whitening(joined_NC)) is not None:
        learned.append("whitening")
    elif whitening is None:
        logger.info("no whitening: %d images, %d a dimension are needed", len(joined_NC), MIN_IMAGES_PER_DIMENSION)
    descriptor = replace(shipped, whitening=whitening)
    chosen, positions = _choose_background(sha256)
    if len(chosen) >= MIN_OWN_BACKGROUND:
        descriptor = replace(descriptor, background_BC=joined_NC[positions], background_sha256=chosen)
        learned.append("background")
    return descriptor, learned


def _learn(
    session: Session, collection: CollectionInfo, shipped: CopyDescriptor
) -> tuple[CopyDescriptor, dict[str, Any]]:
    """The descriptor and facts about it; no facts where nothing was learned."""
    joined = load_copy_vectors(session, collection, CopyDescriptor())
    position_by_id = {image_id: position for position, image_id in enumerate(joined.ids_N.tolist())}
    digests = [b""] * len(joined)
    for part in bound_parts(list(position_by_id)):
        for image_id, digest in session.execute(select(ImageRow.id, ImageRow.sha256).where(ImageRow.id.in_(part))):
            digests[position_by_id[image_id]] = digest or b""
    descriptor, learned = learn_descriptor(shipped, joined.vectors_ND, digests)
    if not learned:
        return descriptor, {}
    return descriptor, {"images": len(joined), "learned": " and ".join(learned)}


def _choose_background(sha256: Sequence[bytes]) -> tuple[tuple[bytes, ...], NDArray[np.int64]]:
    """Distinct images, those of the lowest sha256: as good as random, and the same wherever they are chosen."""
    position_of: dict[bytes, int] = {}
    for position, digest in enumerate(sha256):
        if digest:
            position_of.setdefault(digest, position)
    chosen = sorted(position_of)[:MAX_BACKGROUND]
    return tuple(chosen), np.array([position_of[digest] for digest in chosen], np.int64)

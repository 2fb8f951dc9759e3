"""Regions of a collection's own images, embedded on demand: queries that show a small part of one find it by them.

They are stored beside the embeddings of whole images, fourteen regions of [CLS] and GeM an image, and take as many
forward passes as that, once.

Shapes: N vectors, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy import exists, select
from sqlalchemy.orm import Session, aliased

from dino_index.backbones import Backbone
from dino_index.catalog import Catalog, EmbeddingRow, ImageRow, SourceRow
from dino_index.catalog.bulk import insert_rows
from dino_index.catalog.portable_paths import decode_path
from dino_index.collections import CollectionInfo, hold_model, join_path
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.embedding import num_processors
from dino_index.errors import ImageError
from dino_index.image_bytes import DEFAULT_LIMITS, ReadLimits, read_file
from dino_index.images import decode
from dino_index.indexing import Progress
from dino_index.regions import region_boxes
from dino_index.snapshots import Vectors

# Regions are cut from a picture whose shorter side has this many times the model's input size.
_PICTURE_SCALE = 2
_IMAGES_A_TRANSACTION = 32
_ROWS_PER_FETCH = 4096


@dataclass(frozen=True, slots=True)
class _Missing:
    sha256: bytes
    path: str


def embed_regions(
    catalog: Catalog,
    collection: CollectionInfo,
    backbone: Backbone,
    *,
    limits: ReadLimits = DEFAULT_LIMITS,
    on_remark: Callable[[str], None] = lambda remark: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Embeds and stores the regions of all images that have none yet; what was done before an interruption stays.

    Files that cannot be read any more, or hold another picture now, are counted in a remark and found as wholes only.
    Raises CatalogErrors, FingerprintMismatch.
    """
    missing = catalog.read(lambda session: _without_regions(session, collection))
    if not missing:
        return
    num_passes = len(missing) * len(region_boxes())
    on_remark(f"embedding regions of {len(missing)} images, {num_passes} forward passes, once")
    num_done = num_unreadable = 0
    side = backbone.spec.input_size
    with ThreadPoolExecutor(num_processors(), "decode") as decoding, backbone.forward_threads() as forward:
        for begin in range(0, len(missing), _IMAGES_A_TRANSACTION):
            part = missing[begin : begin + _IMAGES_A_TRANSACTION]
            cut = list(decoding.map(lambda image: _regions_of(image, side, limits), part))
            embedded = list(forward.map(lambda pixels: None if pixels is None else backbone.embed(pixels), cut))
            rows = [
                {"sha256": image.sha256, "model_id": collection.model_id, "kind": kind, "region": name,
                 "vector": vector.tobytes()}
                for image, vectors in zip(part, embedded, strict=True)
                if vectors is not None
                for kind, vectors_RD in zip(("cls", "gem"), vectors, strict=True)
                for name, vector in zip(region_boxes(), vectors_RD, strict=True)
            ]  # fmt: skip

            def store(session: Session, rows: list[dict[str, object]] = rows) -> None:
                hold_model(session, collection)
                # Another process may have stored some of them meanwhile.
                still_missing = {image.sha256 for image in _without_regions(session, collection)}
                new = [row for row in rows if row["sha256"] in still_missing]
                insert_rows(session.connection(), EmbeddingRow.__table__, new)

            catalog.write(store)
            num_done += len(part)
            num_unreadable += sum(vectors is None for vectors in embedded)
            on_progress(Progress(done=num_done, total=len(missing), failed=num_unreadable))
    if num_unreadable:
        on_remark(f"{num_unreadable} images cannot be read any more, or have changed: their regions are not compared")


def load_region_vectors(session: Session, collection: CollectionInfo, descriptor: CopyDescriptor) -> Vectors:
    """Copy vectors of all stored regions, each with its image's id."""
    cls, gem = aliased(EmbeddingRow), aliased(EmbeddingRow)
    rows = session.execute(
        select(ImageRow.id, cls.vector, gem.vector)
        .join(cls, cls.sha256 == ImageRow.sha256)
        .join(gem, (gem.sha256 == cls.sha256) & (gem.model_id == cls.model_id) & (gem.region == cls.region))
        .where(
            ImageRow.collection_id == collection.id, ImageRow.status == "ok", cls.model_id == collection.model_id,
            cls.kind == "cls", gem.kind == "gem", cls.region != "full",
        )
        .order_by(ImageRow.id, cls.region)
        .execution_options(yield_per=_ROWS_PER_FETCH)
    )  # fmt: skip
    ids: list[int] = []
    parts: list[NDArray[np.float32]] = []
    for part in rows.partitions():
        part_ids, cls_blobs, gem_blobs = zip(*part, strict=True)
        ids += part_ids
        cls_ND, gem_ND = (
            np.frombuffer(b"".join(blobs), np.float16).reshape(len(blobs), -1) for blobs in (cls_blobs, gem_blobs)
        )
        parts.append(descriptor.vectors(cls_ND, gem_ND))
    vectors_NC = np.concatenate(parts) if parts else np.empty((0, 2 * collection.dim), np.float32)
    return Vectors(np.array(ids, np.int64), vectors_NC)


def _without_regions(session: Session, collection: CollectionInfo) -> list[_Missing]:
    """One path for each content that has no regions."""
    has_regions = exists().where(
        EmbeddingRow.sha256 == ImageRow.sha256,
        EmbeddingRow.model_id == collection.model_id,
        EmbeddingRow.region != "full",
    )
    rows = session.execute(
        select(ImageRow.sha256, SourceRow.path, ImageRow.path)
        .join(SourceRow, SourceRow.id == ImageRow.source_id)
        .where(ImageRow.collection_id == collection.id, ImageRow.status == "ok", ~has_regions)
        .order_by(ImageRow.id)
    )
    paths = {sha256: join_path(decode_path(source), name) for sha256, source, name in rows}
    return [_Missing(sha256, path) for sha256, path in paths.items() if sha256 is not None]


def _regions_of(image: _Missing, side: int, limits: ReadLimits) -> NDArray[np.uint8] | None:
    """Pixels of all regions of an image; None where the file cannot be read or holds another picture now."""
    from dino_index.query_views import cut

    try:
        content = read_file(image.path, limits)
        if content.sha256 != image.sha256:
            return None
        picture = Image.fromarray(
            decode(content.data, max_short_side=_PICTURE_SCALE * side, limits=limits).pixels_HWC
        )  # fmt: skip
    except ImageError:
        return None
    return np.stack([cut(picture, box, side) for box in region_boxes().values()])

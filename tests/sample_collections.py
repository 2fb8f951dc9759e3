"""Small collections for tests: generated pictures, a backbone that takes milliseconds, and what the catalog holds."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from sqlalchemy import func, select

from bad_files import encoded, picture
from databases import created_catalog, open_catalog
from dino_index.catalog import CollectionRow, EmbeddingRow, ImageRow, SourceRow
from dino_index.catalog.portable_paths import decode_path
from dino_index.collections import find_collection, join_path
from dino_index.indexing import IndexOptions, IndexSummary, Progress, index_paths
from dino_index.model_files import resolve_model
from dino_index.vector_index import VectorIndex

TINY_VIT: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "architecture_args": {"depth": 1, "embed_dim": 64, "num_heads": 1, "img_size": 32},
    "input_size": 32,
}
TINY_DIM = 64


def jpeg(seed: int) -> bytes:
    """A small picture as a file's bytes; another seed, another picture."""
    return encoded(picture(seed=seed), "JPEG")


def write_pictures(folder: Path, *names: str, seed: int = 0) -> list[Path]:
    """A picture of its own under each name; `a/b.jpg` makes the folder too."""
    paths = [folder / name for name in names]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed + number))
    return paths


def write_shard(path: Path, members: Mapping[str, bytes]) -> Path:
    """An uncompressed tar archive of the members, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def save_tiny_model(path: Path, *, seed: int = 0, **changed: Any) -> Path:
    """A one-block vision transformer with random weights, described in its metadata."""
    rng = np.random.default_rng(seed)
    shapes = {
        "cls_token": (1, 1, 64), "pos_embed": (1, 5, 64),
        "patch_embed.proj.weight": (64, 3, 16, 16), "patch_embed.proj.bias": (64,),
        "blocks.0.norm1.weight": (64,), "blocks.0.norm1.bias": (64,),
        "blocks.0.attn.qkv.weight": (192, 64), "blocks.0.attn.qkv.bias": (192,),
        "blocks.0.attn.proj.weight": (64, 64), "blocks.0.attn.proj.bias": (64,),
        "blocks.0.norm2.weight": (64,), "blocks.0.norm2.bias": (64,),
        "blocks.0.mlp.fc1.weight": (256, 64), "blocks.0.mlp.fc1.bias": (256,),
        "blocks.0.mlp.fc2.weight": (64, 256), "blocks.0.mlp.fc2.bias": (64,),
        "norm.weight": (64,), "norm.bias": (64,),
    }  # fmt: skip
    weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, path, metadata={"dino_search": json.dumps(TINY_VIT | changed)})
    return path


def index_files(
    home: Path,
    model: Path,
    *paths: str | Path,
    collection: str = "default",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> IndexSummary:
    """One run of `index_paths`, options as `IndexOptions` has them."""
    catalog = created_catalog(home)
    spec = resolve_model(model)
    try:
        return index_paths(
            catalog, collection, paths, spec, lambda: spec, IndexOptions(**options),
            on_progress=on_progress, should_stop=should_stop,
        )  # fmt: skip
    finally:
        catalog.close()


def findable(home: Path, collection: str = "default") -> set[str]:
    """Absolute paths of all images that a search can find."""
    catalog = open_catalog(home)
    with catalog.reading() as session:
        info = find_collection(session, collection)
        index = VectorIndex.load(catalog, session, info)
    catalog.close()
    query_1D = np.full((1, info.dim), info.dim**-0.5, np.float32)
    paths = {image_id: path for path, image_id in ids_of(home, collection).items()}
    return {paths[image_id] for image_id in index.search(query_1D, 10_000)[0][0].tolist()}


def images_of(home: Path, collection: str = "default") -> dict[str, dict[str, Any]]:
    """Everything that the catalog has about each file, by absolute path; vectors included, ids and times left out."""
    images = {}
    for path, row, vectors in _rows(home, collection):
        columns = {
            name: getattr(row, name) for name in "status error_code label facts sha256 size width height".split()
        }
        images[path] = columns | vectors
    return images


def errors_of(home: Path, collection: str = "default") -> dict[str, tuple[str | None, str | None]]:
    """(code, message) of each file in failed state, by absolute path."""
    rows = _rows(home, collection)
    return {path: (row.error_code, row.error_message) for path, row, _ in rows if row.status == "failed"}


def ids_of(home: Path, collection: str = "default") -> dict[str, int]:
    """Image id by absolute path."""
    return {path: row.id for path, row, _ in _rows(home, collection)}


def count_rows(home: Path, table: type[Any]) -> int:
    catalog = open_catalog(home)
    with catalog.reading() as session:
        num_rows = session.scalars(select(func.count()).select_from(table)).one()
    catalog.close()
    return num_rows


def _rows(home: Path, collection: str) -> list[tuple[str, ImageRow, dict[str, bytes]]]:
    catalog = open_catalog(home)
    with catalog.reading() as session:
        wanted = session.scalars(select(CollectionRow).where(CollectionRow.name == collection)).one()
        found = session.execute(
            select(SourceRow.path, ImageRow)
            .join(SourceRow, SourceRow.id == ImageRow.source_id)
            .where(ImageRow.collection_id == wanted.id)
        ).all()
        vectors: dict[bytes, dict[str, bytes]] = {}
        for row in session.scalars(select(EmbeddingRow).where(EmbeddingRow.model_id == wanted.model_id)):
            vectors.setdefault(row.sha256, {})[row.kind] = row.vector
        session.expunge_all()
    catalog.close()
    paths = [join_path(decode_path(source), row.path) for source, row in found]
    assert len(set(paths)) == len(paths), "a file is in the catalog twice"
    return [(path, row, vectors.get(row.sha256 or b"", {})) for path, (_, row) in zip(paths, found, strict=True)]

"""What an exported collection looks like on disk: names, columns, and the description that goes with it.

Vectors and metadata lie as clip-retrieval lays them out, row by row aligned: parts are read in the order of their
names, and a vector's number in the FAISS file is its row. What that layout has no place for lies beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dino_index.errors import ExportDamaged, ExportIncomplete, ExportTooNew, NotAnExport
from dino_index.model_files import ModelSpec

FORMAT = "dino-search export"
VERSION = 1
DESCRIPTION = "export.json"
FAISS_FILE = "image.index"
FAILED_FILE = "failed.parquet"
METADATA = "metadata"
# clip-retrieval looks into img_emb alone, and expects unit vectors there; the others are as the catalog has them.
UNIT_VECTORS = "img_emb"
RAW_VECTORS = {"cls": "cls_emb", "gem": "gem_emb"}

_FILE_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("image_path", pa.string()),
    ("image_id", pa.int64()),
    ("source", pa.string()),
    ("path", pa.string()),
    ("label", pa.string()),
    ("size", pa.int64()),
    ("mtime_ns", pa.int64()),
    # Text, as JSON and web services have no other form for times and nested values.
    ("added_at", pa.string()),
    ("metadata", pa.string()),
]
IMAGE_SCHEMA = pa.schema([*_FILE_COLUMNS, ("sha256", pa.string()), ("width", pa.int32()), ("height", pa.int32())])
FAILED_SCHEMA = pa.schema([*_FILE_COLUMNS, ("error_code", pa.string()), ("error_message", pa.string())])


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """The model that the vectors come from, as the exporting catalog knew it."""

    name: str
    fingerprint: str
    dim: int
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """One file of an export as it was written."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `export.json` says."""

    export_id: str
    """Of this export alone: an import that was cut off is known again by it."""
    written_at: str
    collection: str
    index_type: str
    model: ExportedModel
    images: int
    failed: int
    rows: list[int]
    """Images in each part."""
    files: dict[str, ExportedFile]
    """By path relative to the folder, `/` between parts; the description itself left out."""

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION} | asdict(self)


def part_number(part: int, num_parts: int) -> str:
    """A part's number as file names have it: so many digits that names sort as numbers do."""
    return str(part).zfill(len(str(max(num_parts - 1, 0))))


def vectors_file(folder: str, part: int, num_parts: int) -> str:
    return f"{folder}/{folder}_{part_number(part, num_parts)}.npy"


def metadata_file(part: int, num_parts: int) -> str:
    return f"{METADATA}/metadata_{part_number(part, num_parts)}.parquet"


def read_description(folder: Path) -> Description:
    """What the export in a folder says about itself. Raises NotAnExport, ExportTooNew, ExportDamaged."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise NotAnExport(_why_no_export(folder))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise NotAnExport(f"{path} is no description of a dino-search export; expected its format to be {FORMAT!r}")
        version = values.pop("version", None)
        if isinstance(version, int) and version > VERSION:
            raise ExportTooNew(
                f"{folder} is an export of version {version}, this dino-search reads versions up to {VERSION}; "
                "update dino-search"
            )
        return _description(values)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ExportDamaged(f"{path} cannot be understood ({error}); export the collection again") from error


def require_complete(description: Description, folder: Path) -> None:
    """Raises ExportIncomplete for an export that was written without what restores a collection."""
    num_parts = len(description.rows)
    needed = [vectors_file(name, part, num_parts) for name in RAW_VECTORS.values() for part in range(num_parts)]
    needed += [metadata_file(part, num_parts) for part in range(num_parts)] + [FAILED_FILE]
    if missing := [name for name in needed if name not in description.files]:
        raise ExportIncomplete(
            f"{folder} was exported without {missing[0]}, which an import needs; export again with --format all"
        )


def _description(values: Mapping[str, Any]) -> Description:
    """Raises TypeError, ValueError where a value is not what it should be."""
    model = ExportedModel(**values["model"]) if isinstance(values.get("model"), dict) else None
    if model is None:
        raise ValueError("it names no model")
    files = {name: ExportedFile(**file) for name, file in values["files"].items()}
    description = Description(**{**values, "model": model, "files": files})
    ModelSpec.from_config(model.name, model.config)
    if not re.fullmatch("[0-9a-f]{64}", str(model.fingerprint)) or not _is_count(model.dim) or model.dim == 0:
        raise ValueError("its model has no fingerprint or no dimension")
    for name in files:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise ValueError(f"it names the file {name!r} outside the folder")
    counts = [description.images, description.failed, *description.rows]
    if not all(map(_is_count, counts)) or sum(description.rows) != description.images:
        raise ValueError(f"it counts {description.images} images, and {description.rows} in its parts")
    return description


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _why_no_export(folder: Path) -> str:
    if not folder.is_dir():
        return f"expected a folder that `dino-search export` wrote, found no folder {folder}"
    if (folder / UNIT_VECTORS).is_dir() or (folder / FAISS_FILE).is_file():
        return (
            f"{folder} holds embeddings of another program (no {DESCRIPTION}): it lacks the raw [CLS] and GeM vectors, "
            "the sha256 of each image and the fingerprint of the model, without which no picture could be compared "
            "with them; index the images themselves: dino-search index FOLDER-WITH-PICTURES -c NAME"
        )
    return f"expected {DESCRIPTION} in {folder}, found none: it is no folder that `dino-search export` wrote"

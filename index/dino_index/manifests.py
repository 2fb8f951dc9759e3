"""Manifests: lists of images with, if there are any, labels and further facts about them.

`.txt` has a path a line; `.csv`, `.parquet` and `.jsonl` have `path`, optionally `label`, and further columns.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any

from dino_index.errors import ImageError, ManifestError
from dino_index.image_formats import HEAD_BYTES, image_format
from dino_index.image_paths import is_url

if TYPE_CHECKING:
    import pyarrow as pa

_PATH, _LABEL = "path", "label"
_ROWS_PER_BATCH = 4096
_MAX_BINARY_BYTES = 1024


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One image as a manifest names it.

    where: manifest and line or row, for messages. path: as written. facts: the further columns as JSON values; None
    for a manifest that has none.
    """

    where: str
    path: str
    label: str | None
    facts: dict[str, Any] | None


_Row = tuple[int, Any, Any, Mapping[str, Any] | None]


def is_manifest(path: str) -> bool:
    """Whether a given path is taken for a manifest: by its name, unless it is a file that holds an image."""
    if os.path.splitext(path)[1].lower() not in _READERS:
        return False
    if is_url(path):
        return True
    try:
        with open(path, "rb") as file:
            return image_format(file.read(HEAD_BYTES)) is None
    except (OSError, ValueError):
        return False


def read_manifest(path: str) -> Iterator[ManifestRow]:
    """The rows of a manifest, one at a time, in its order. path: absolute, or a URL.

    Raises ManifestError for one that cannot be read, has no column `path`, or has a row without a path.
    """
    unit, read = _READERS[os.path.splitext(path)[1].lower()]
    try:
        with _opened(path) as file:
            for number, named, label, facts in read(file, path):
                where = f"{path}, {unit} {number}"
                if not isinstance(named, str) or not named:
                    raise ManifestError(f"{where}: expected a path, found {named!r}")
                yield ManifestRow(where, named, _label(label, where), _facts(facts))
    except OSError as error:
        raise ManifestError(f"the manifest {path} cannot be read: {error.strerror or error}") from error
    except ImageError as error:
        raise ManifestError(f"the manifest {path} cannot be read: {error}") from error


def to_json_value(value: Any) -> Any:
    """The value as what JSON and every database can hold: no NaN, no times, no bytes, no broken text."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case str():
            # PostgreSQL stores no text with a null character; lone surrogates stand for bytes that are not UTF-8.
            return value.replace("\0", r"\x00").encode("utf-8", "backslashreplace").decode()
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Decimal():
            whole = value.is_finite() and value == value.to_integral_value()
            return int(value) if whole else to_json_value(float(value))
        case bytes():
            # A picture in a column would make every row of the catalog as large as a file.
            return base64.b64encode(value).decode() if len(value) <= _MAX_BINARY_BYTES else f"({len(value)} bytes)"
        case Mapping():
            return {str(to_json_value(key)): to_json_value(each) for key, each in value.items()}
        case list() | tuple() | set():
            return [to_json_value(each) for each in value]
    return to_json_value(str(value))


def _facts(facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if facts is None else {str(to_json_value(key)): to_json_value(value) for key, value in facts.items()}


def _label(label: Any, where: str) -> str | None:
    if isinstance(label, float):
        label = None if math.isnan(label) else int(label) if label.is_integer() else label
    if isinstance(label, bool) or not isinstance(label, str | int | float | None):
        raise ManifestError(f"{where}: expected a text or a number as label, found {label!r}")
    text = "" if label is None else str(label)
    if any("\ud800" <= character <= "\udfff" or character == "\0" for character in text):
        raise ManifestError(f"{where}: expected a label in UTF-8, found {label!r}")
    return text or None


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    if is_url(path):
        from dino_index.remote_files import open_remote

        with open_remote(path) as (file, _, _):
            yield file
    else:
        with open(path, "rb") as file:
            yield file


def _as_text(file: IO[bytes]) -> io.TextIOWrapper:
    """The file as text; it is closed with it."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_lines(file: IO[bytes], path: str) -> Iterator[_Row]:
    with _as_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.rstrip("\r\n"), None, None


def _read_csv(file: IO[bytes], path: str) -> Iterator[_Row]:
    with _as_text(file) as lines:
        rows = csv.DictReader(lines)
        try:
            columns = list(rows.fieldnames or ())
            _require_path(columns, path)
            further = [column for column in columns if column not in (_PATH, _LABEL)]
            for row in rows:
                if None in row:
                    raise ManifestError(
                        f"{path}, line {rows.line_num}: expected {len(columns)} columns as in the first line, found "
                        f"{len(columns) + len(row[None])}; put a path that holds a comma in quotes"
                    )
                if any(row.values()):
                    facts = {column: row[column] or None for column in further} if further else None
                    yield rows.line_num, row[_PATH], row.get(_LABEL), facts
        except csv.Error as error:
            raise ManifestError(f"{path}, line {rows.line_num}: {error}") from error


def _read_jsonl(file: IO[bytes], path: str) -> Iterator[_Row]:
    with _as_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ManifestError(f"{path}, line {number}: expected JSON: {error}") from error
            if not isinstance(value, dict) or _PATH not in value:
                raise ManifestError(
                    f"{path}, line {number}: expected an object with the key path, found {line.strip()}"
                )
            further = {key: each for key, each in value.items() if key not in (_PATH, _LABEL)}
            yield number, value[_PATH], value.get(_LABEL), further or None


def _read_parquet(file: IO[bytes], path: str) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(file)
        columns = list(table.schema_arrow.names)
        _require_path(columns, path)
        further = [column for column in columns if column not in (_PATH, _LABEL)]
        for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH):
            values = {name: _to_python(batch.column(name)) for name in columns}
            labels = values.get(_LABEL, [None] * batch.num_rows)
            for at in range(batch.num_rows):
                number += 1
                facts = {name: values[name][at] for name in further} if further else None
                yield number, values[_PATH][at], labels[at], facts
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, pa.ArrowException) and error.errno is not None:
            raise
        raise ManifestError(
            f"the manifest {path} cannot be read as Parquet behind row {number}: {' '.join(str(error).split())[:300]}"
        ) from error


def _to_python(column: pa.Array) -> list[Any]:
    """Values of a column; times that Python has no type for become coarser or text."""
    import pyarrow as pa

    try:
        values: list[Any] = column.cast(_without_nanoseconds(column.type), safe=False).to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        values = column.cast(pa.string()).to_pylist()
    return values


def _without_nanoseconds(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pa.time64("us")
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_nanoseconds(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_without_nanoseconds(kind.value_type))
    return kind


def _require_path(columns: list[str], path: str) -> None:
    if _PATH not in columns:
        found = ", ".join(columns) or "nothing"
        raise ManifestError(f"{path} must have the column path{_in_first_line(path)}, found {found}")


def _in_first_line(path: str) -> str:
    return " in its first line" if path.lower().endswith(".csv") else ""


_READERS: dict[str, tuple[str, Callable[[IO[bytes], str], Iterator[_Row]]]] = {
    ".txt": ("line", _read_lines),
    ".csv": ("line", _read_csv),
    ".jsonl": ("line", _read_jsonl),
    ".parquet": ("row", _read_parquet),
}

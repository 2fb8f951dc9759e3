"""Verdicts, whitening and calibration as files of an exported collection.

Exports of earlier versions have none of these files, and need none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from dino_index.catalog import CalibrationRow, WhiteningRow
from dino_index.collections import CollectionInfo
from dino_index.copy_decisions import Verdict
from dino_index.errors import ExportDamaged
from dino_index.verdicts import RecordedVerdict, load_verdicts, ordered_pair, record_verdicts, recorded_verdicts

_T = TypeVar("_T")

VERDICTS_FILE, WHITENING_FILE, CALIBRATION_FILE = "verdicts.parquet", "whitening.parquet", "calibration.parquet"

_SCHEMAS = {
    VERDICTS_FILE: pa.schema(
        [(name, pa.string()) for name in ("first_sha256", "second_sha256", "decision", "note", "decided_at")]
    ),
    WHITENING_FILE: pa.schema(
        [("version", pa.int32()), ("data", pa.binary()), ("facts", pa.string()), ("created_at", pa.string())]
    ),
    CALIBRATION_FILE: pa.schema([("version", pa.int32()), ("value", pa.string()), ("created_at", pa.string())]),
}
_SETTINGS: dict[str, type[WhiteningRow] | type[CalibrationRow]] = {
    WHITENING_FILE: WhiteningRow,
    CALIBRATION_FILE: CalibrationRow,
}


@dataclass(frozen=True, kw_only=True)
class CopyTables:
    """What an export says about copies. settings: columns of whitening and calibration rows, by file."""

    verdicts: list[RecordedVerdict]
    settings: Mapping[str, list[dict[str, Any]]]


def write_copy_tables(session: Session, collection: CollectionInfo, folder: Path) -> list[str]:
    """Writes the verdicts on pairs with an image of the collection, and every version of its settings; file names."""
    tables: dict[str, list[dict[str, Any]]] = {
        VERDICTS_FILE: [
            {
                "first_sha256": verdict.pair[0].hex(), "second_sha256": verdict.pair[1].hex(),
                "decision": verdict.decision, "note": verdict.note, "decided_at": verdict.decided_at.isoformat(),
            }
            for verdict in recorded_verdicts(session, collection.id)
        ]
    }  # fmt: skip
    for name, table in _SETTINGS.items():
        ours = table.collection_id == collection.id, table.model_id == collection.model_id
        rows: Sequence[Any] = session.scalars(select(table).where(*ours).order_by(table.version)).all()
        tables[name] = [_settings_columns(row) for row in rows]
    for name, columns in tables.items():
        pq.write_table(pa.Table.from_pylist(columns, schema=_SCHEMAS[name]), folder / name)
    return list(tables)


def read_copy_tables(folder: Path, names: Mapping[str, Any]) -> CopyTables:
    """What `write_copy_tables` wrote, as far as `names` has it. Raises ExportDamaged."""
    verdicts = _converted(folder, VERDICTS_FILE, names, _verdict_of)
    settings = {name: _converted(folder, name, names, _columns_of) for name in _SETTINGS}
    return CopyTables(verdicts=verdicts, settings=settings)


def store_copy_tables(session: Session, collection: CollectionInfo, tables: CopyTables) -> None:
    """Adds the verdicts on pairs that have none here, and the settings where the collection has none of its own."""
    known = load_verdicts(session, [verdict.pair for verdict in tables.verdicts])
    record_verdicts(session, [verdict for verdict in tables.verdicts if verdict.pair not in known])
    key = {"collection_id": collection.id, "model_id": collection.model_id}
    # Together or not at all: scores that a calibration is about come from the whitening beside it.
    if any(session.scalars(select(table.version).filter_by(**key).limit(1)).all() for table in _SETTINGS.values()):
        return
    for name, table in _SETTINGS.items():
        if rows := tables.settings[name]:
            session.execute(insert(table), [key | row for row in rows])


def _settings_columns(row: WhiteningRow | CalibrationRow) -> dict[str, Any]:
    columns = {"version": row.version, "created_at": row.created_at.isoformat()}
    if isinstance(row, WhiteningRow):
        return columns | {"data": row.data, "facts": json.dumps(row.facts)}
    return columns | {"value": json.dumps(row.value)}


def _rows(folder: Path, name: str, names: Mapping[str, Any]) -> list[dict[str, Any]]:
    if name not in names:
        return []
    try:
        table = pq.read_table(folder / name)
    except (OSError, pa.ArrowException) as error:
        raise ExportDamaged(f"{folder / name} is no table that Parquet reads: {error}") from error
    if not table.schema.equals(_SCHEMAS[name]):
        expected = _SCHEMAS[name].names
        raise ExportDamaged(f"{folder / name} has the columns {table.schema.names}, expected {expected} of their types")
    return list(table.to_pylist())


def _converted(folder: Path, name: str, names: Mapping[str, Any], convert: Callable[[dict[str, Any]], _T]) -> list[_T]:
    converted = []
    for number, row in enumerate(_rows(folder, name, names)):
        try:
            converted.append(convert(row))
        except (TypeError, ValueError, AttributeError) as error:
            raise ExportDamaged(f"row {number} of {folder / name} cannot be used: {error}") from error
    return converted


def _verdict_of(row: dict[str, Any]) -> RecordedVerdict:
    one, other = bytes.fromhex(row["first_sha256"]), bytes.fromhex(row["second_sha256"])
    if not len(one) == len(other) == 32 or row["decision"] not in get_args(Verdict):
        raise ValueError(f"no two sha256 with a decision of {', '.join(get_args(Verdict))}")
    decided_at = datetime.fromisoformat(row["decided_at"])
    return RecordedVerdict(
        pair=ordered_pair(one, other), decision=row["decision"], note=row["note"] or "", decided_at=decided_at
    )


def _columns_of(row: dict[str, Any]) -> dict[str, Any]:
    if row["version"] < 1:
        raise ValueError(f"it is version {row['version']}")
    columns = {"version": row["version"], "created_at": datetime.fromisoformat(row["created_at"])}
    texts = {name: json.loads(row[name]) for name in ("facts", "value") if name in row}
    if not all(isinstance(value, dict) for value in texts.values()):
        raise ValueError("it is no object")
    return columns | texts | ({"data": row["data"]} if "data" in row else {})

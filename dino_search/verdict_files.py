"""Verdicts as CSV and JSON files: what people exchange, edit in spreadsheets, and download from a report of copies."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

from dino_index.copy_decisions import Verdict
from dino_index.errors import VerdictFileError
from dino_search.csv_lines import csv_line

_DECISIONS = get_args(Verdict)
# What a spreadsheet takes for a formula. Paths are absolute and begin with none of these; a note may.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_MAX_LINES_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class VerdictRow:
    """One decision as files have it; its fields are their columns, in this order.

    query, reference: paths in the catalog's portable encoding, empty where none is known; a pair has no direction.
    query_sha256, reference_sha256: hex; they say which pictures are meant, or, where both are empty, the paths do.
    """

    query: str
    reference: str
    decision: Verdict
    query_sha256: str
    reference_sha256: str
    note: str = ""
    decided_at: str = ""
    """ISO 8601, UTC where it does not say; empty: now."""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


COLUMNS = tuple(field.name for field in fields(VerdictRow))


@dataclass(frozen=True, kw_only=True)
class VerdictFile:
    """What was read: rows by where they stand in the file, and columns that mean nothing here."""

    rows: dict[str, VerdictRow]
    unused_columns: list[str]


class RowRefused(ValueError):
    """Why a row cannot be used, in words."""


def write_text(rows: list[VerdictRow], form: str) -> str:
    """The file's text. form: `csv` or `json`."""
    if form == "json":
        return json.dumps({"verdicts": [row.to_json() for row in rows]}, indent=1, ensure_ascii=False) + "\n"
    lines = [csv_line(COLUMNS)]
    for row in rows:
        note = f"'{row.note}" if _FORMULA.match(row.note) else row.note
        lines.append(csv_line((row.to_json() | {"note": note}).values()))
    return "".join(lines)


def read_verdict_file(file: Path) -> VerdictFile:
    """All rows of a file, CSV or JSON by its content. Raises VerdictFileError, which names each row of no use."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise VerdictFileError(f"{file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise VerdictFileError(f"{file} is no text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    is_json = text.lstrip()[:1] in ("{", "[")
    refused: list[str] = []
    rows: dict[str, VerdictRow] = {}
    unused: set[str] = set()
    for place, values in _json_rows(text, file) if is_json else _csv_rows(text, file):
        try:
            rows[place] = _row_of(values, from_csv=not is_json)
        except RowRefused as error:
            refused.append(f"{place}: {error}")
        unused |= {str(name) for name in values if name not in COLUMNS}
    if refused:
        raise refusal(file, refused)
    return VerdictFile(rows=rows, unused_columns=sorted(unused))


def refusal(file: Path, refused: list[str]) -> VerdictFileError:
    """The error for rows of no use, each of which says where it stands."""
    named = "; ".join(refused[:_MAX_LINES_NAMED])
    more = f"; and {len(refused) - _MAX_LINES_NAMED} more" if len(refused) > _MAX_LINES_NAMED else ""
    return VerdictFileError(f"{file}: {len(refused)} rows cannot be used, so nothing was recorded. {named}{more}")


def moment(text: str) -> datetime:
    """The time that a row gives; now for an empty text. Raises ValueError."""
    if not text:
        return datetime.now(UTC)
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _csv_rows(text: str, file: Path) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    first = text.partition("\n")[0]
    # As spreadsheets write CSV where the comma is the decimal sign.
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if ";" in first and "," not in first else ",")
    try:
        names = set(rows.fieldnames or ())
        if "decision" not in names or not ({"query", "reference"} <= names or set(COLUMNS[3:5]) <= names):
            raise VerdictFileError(
                f"{file} must have the columns {', '.join(COLUMNS[:5])} in its first line (paths or sha256 may be "
                f"left out), found {', '.join(rows.fieldnames or ()) or 'nothing'}"
            )
        last = rows.line_num
        for row in rows:
            # A quoted value may take several lines: the first of them is where people look.
            yield f"line {last + 1}", row
            last = rows.line_num
    except csv.Error as error:
        raise VerdictFileError(f"{file}, line {rows.line_num}: {error}; nothing was recorded") from error


def _json_rows(text: str, file: Path) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise VerdictFileError(f"{file} is no JSON: {error}; nothing was recorded") from error
    found = found.get("verdicts") if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise VerdictFileError(f"{file} must hold a list of verdicts, or an object with such a list as `verdicts`")
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise refusal(file, [f"entry {number}: expected an object, found {str(row)[:80]}"])
        yield f"entry {number}", row


def _row_of(values: Mapping[Any, Any], *, from_csv: bool) -> VerdictRow:
    """Raises RowRefused."""
    if None in values:
        raise RowRefused("it has more values than the first line has columns")
    row = {name: "" if (value := values.get(name)) is None else value for name in COLUMNS}
    if wrong := next((name for name, value in row.items() if not isinstance(value, str)), None):
        raise RowRefused(f"{wrong} must be text, found {row[wrong]!r}")
    row = {name: value if name in ("query", "reference", "note") else value.strip() for name, value in row.items()}
    row["decision"] = row["decision"].lower()
    if row["decision"] not in _DECISIONS:
        raise RowRefused(f"expected the decision {' or '.join(_DECISIONS)}, found {row['decision'] or 'none'!r}")
    for name in COLUMNS[3:5]:
        row[name] = row[name].lower()
        if row[name] and not re.fullmatch("[0-9a-f]{64}", row[name]):
            raise RowRefused(f"{name} must be 64 hexadecimal digits, found {row[name][:80]!r}")
    for side in ("query", "reference"):
        if not row[side] and not row[f"{side}_sha256"]:
            raise RowRefused(f"expected a path or sha256 of the {side}, found neither")
    if from_csv and _FORMULA.match(row["note"].removeprefix("'")) and row["note"].startswith("'"):
        row["note"] = row["note"][1:]
    try:
        moment(row["decided_at"])
        row["note"].encode()
    except ValueError as error:
        raise RowRefused(str(error)) from error
    return VerdictRow(**cast(Any, row))

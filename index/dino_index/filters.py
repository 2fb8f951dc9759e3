"""Filters such as `label = cat` or `year >= 1990`: which images of a collection they let through.

A field is a column of the catalog or a metadata key that a manifest brought; `metadata.KEY` means the key where a
column has the same name. Columns are compared by the database, metadata here: no SQL for JSON is the same on all of
them. A value that is not there (no label, no such key) is different from every value, and neither less nor greater.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Text, and_, cast, false, func, literal, not_, or_, select
from sqlalchemy.orm import Session

from dino_index.catalog import ImageRow
from dino_index.catalog.portable_paths import encode_path
from dino_index.collections import CollectionInfo, source_paths
from dino_index.errors import FilterError
from dino_index.image_paths import separator_of

if TYPE_CHECKING:
    from sqlalchemy.orm import InstrumentedAttribute

OPERATORS = ("=", "!=", "<", "<=", ">", ">=")
METADATA = "metadata."
_SYNTAX = re.compile(r"\s*(?P<field>.+?)\s*(?P<operator>!=|<=|>=|==|=|<|>)\s*(?P<value>.*?)\s*", re.DOTALL)
_NUMBERS: dict[str, InstrumentedAttribute[Any]] = {
    "id": ImageRow.id, "width": ImageRow.width, "height": ImageRow.height, "size": ImageRow.size,
}  # fmt: skip
_TEXTS: dict[str, InstrumentedAttribute[Any]] = {
    "label": ImageRow.label, "status": ImageRow.status, "error_code": ImageRow.error_code,
}  # fmt: skip
COLUMNS = (*_NUMBERS, *_TEXTS, "path", "sha256", "added_at")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_ROWS_PER_FETCH = 8192


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition. field: a column or metadata key. operator: one of `OPERATORS`. value: as written."""

    field: str
    operator: str
    value: str

    @property
    def is_of_metadata(self) -> bool:
        return self.field not in COLUMNS

    @property
    def key(self) -> str:
        """The metadata key."""
        return self.field.removeprefix(METADATA)


def parse_filter(text: str) -> Filter:
    """The condition in a text `FIELD OP VALUE`; a value may stand in quotes. Raises FilterError."""
    found = _SYNTAX.fullmatch(text)
    if found is None:
        raise FilterError(
            f"expected a filter FIELD OP VALUE with one of {' '.join(OPERATORS)}, found {text!r}; "
            "such as --filter 'label = cat'"
        )
    if found["operator"] == "==":
        raise FilterError(f"expected one of {' '.join(OPERATORS)}, found == in {text!r}; write a single =")
    value = found["value"]
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    elif not value:
        raise FilterError(f"expected a value behind {found['operator']} in {text!r}; write '' for an empty text")
    return Filter(found["field"], found["operator"], value)


def matching_ids(session: Session, collection: CollectionInfo, filters: Sequence[Filter]) -> NDArray[np.int64]:
    """Ids of the collection's images that pass all filters, ascending.

    Raises FilterError for a field that is neither a column nor a metadata key of the collection, and for a value that
    a column cannot have.
    """
    conditions = [ImageRow.collection_id == collection.id]
    conditions += [_condition(session, collection, each) for each in filters if not each.is_of_metadata]
    of_metadata = [each for each in filters if each.is_of_metadata]
    if not of_metadata:
        return np.array(session.scalars(select(ImageRow.id).where(*conditions).order_by(ImageRow.id)).all(), np.int64)
    tests = [(each.key, _metadata_test(each)) for each in of_metadata]
    unseen = {each.key for each in of_metadata}
    ids: list[int] = []
    rows = session.execute(
        # As text, which takes half the time of letting the database's interface parse it.
        select(ImageRow.id, cast(ImageRow.facts, Text)).where(*conditions),
        execution_options={"yield_per": _ROWS_PER_FETCH},
    )
    for image_id, text in rows:
        facts = json.loads(text)
        if unseen:
            unseen -= facts.keys()
        if all(test(facts.get(key)) for key, test in tests):
            ids.append(image_id)
    if unseen:
        _require_known_keys(session, collection, unseen)
    return np.sort(np.array(ids, np.int64))


def _require_known_keys(session: Session, collection: CollectionInfo, keys: set[str]) -> None:
    """Raises FilterError for a key that no image of the collection has."""
    known: set[str] = set()
    for facts in _all_facts(session, collection):
        known |= facts.keys()
    if unknown := sorted(keys - known):
        has = f"metadata keys {', '.join(sorted(known))}" if known else "no metadata"
        raise FilterError(
            f"expected a field of collection {collection.name!r}, found {unknown[0]!r}; "
            f"it has the fields {', '.join(COLUMNS)}, and {has}"
        )


def _all_facts(session: Session, collection: CollectionInfo) -> Iterator[dict[str, Any]]:
    of_collection = select(ImageRow.facts).where(ImageRow.collection_id == collection.id)
    yield from session.scalars(of_collection, execution_options={"yield_per": _ROWS_PER_FETCH})


def _metadata_test(each: Filter) -> Callable[[Any], bool]:
    """Whether a JSON value passes: compared as numbers where both are ones, else as text."""
    compare, wanted = _COMPARE[each.operator], _as_number(each.value)

    def test(value: Any) -> bool:
        if value is None:
            return each.operator == "!="
        number = _as_number(value)
        if number is not None and wanted is not None:
            return bool(compare(number, wanted))
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif not isinstance(value, str):
            # Lists and objects have no order; the text of a number is as good as any beside another text.
            if isinstance(value, list | dict):
                return each.operator == "!="
            value = repr(value)
        return bool(compare(value, each.value))

    return test


def _as_number(value: Any) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        # Whole numbers exactly: those of catalogues and databases may have more digits than a float holds.
        for read in (int, float):
            try:
                number = read(value)
            except ValueError:
                continue
            return number if number == number and abs(number) != float("inf") else None
    return None


def _condition(session: Session, collection: CollectionInfo, each: Filter) -> ColumnElement[bool]:
    if each.field in _NUMBERS:
        number = _as_number(each.value)
        if number is None:
            raise FilterError(f"{each.field} is a number, found {each.value!r} to compare it with")
        if abs(number) >= 2**63:  # more than databases take as a whole number
            number = float(number)
        return _compared(_NUMBERS[each.field], each.operator, literal(number))
    if each.field in _TEXTS:
        return _compared(_ordered(session, _TEXTS[each.field]), each.operator, literal(_storable(each.value)))
    if each.field == "path":
        return _path_condition(session, collection, each)
    if each.field == "sha256":
        return _digest_condition(each)
    return _time_condition(each)


def _compared(column: Any, operator_: str, value: ColumnElement[Any]) -> ColumnElement[bool]:
    condition: ColumnElement[bool] = _COMPARE[operator_](column, value)
    return or_(condition, column.is_(None)) if operator_ == "!=" else condition


def _ordered(session: Session, column: Any) -> Any:
    """The text in an order that is the same on every machine, by its characters' numbers."""
    return column.collate("C") if session.get_bind().dialect.name == "postgresql" else column


def _path_condition(session: Session, collection: CollectionInfo, each: Filter) -> ColumnElement[bool]:
    """Full paths are put together from those of the sources, which are few."""
    conditions = []
    for source_id, source in source_paths(session, collection).items():
        separator = separator_of(source)
        below: Any = ImageRow.path
        if separator != "/":
            below = func.replace(ImageRow.path, "/", separator)
        prefix = literal(encode_path(source.rstrip(separator)) + separator)
        path = _ordered(session, prefix + below)
        conditions.append(and_(ImageRow.source_id == source_id, _COMPARE[each.operator](path, _storable(each.value))))
    return or_(false(), *conditions)


def _digest_condition(each: Filter) -> ColumnElement[bool]:
    if each.operator not in ("=", "!=") or not re.fullmatch("[0-9a-fA-F]{64}", each.value):
        raise FilterError(
            f"sha256 is compared by = or != with 64 hexadecimal digits, found {each.operator} {each.value!r}"
        )
    return _compared(ImageRow.sha256, each.operator, literal(bytes.fromhex(each.value)))


def _time_condition(each: Filter) -> ColumnElement[bool]:
    """A value without a time of day stands for the whole day. Times without a zone are of UTC, as the catalog's are."""
    try:
        start = datetime.fromisoformat(each.value)
    except ValueError as error:
        raise FilterError(
            f"added_at is compared with a date or time such as 2024-12-31 or 2024-12-31T18:00, found {each.value!r}"
        ) from error
    start = start.astimezone(UTC) if start.tzinfo else start.replace(tzinfo=UTC)
    is_day = re.fullmatch(r"\d{4}-?\d{2}-?\d{2}|\d{4}-?W\d{2}(-?\d)?", each.value) is not None
    end = start + (timedelta(days=1) if is_day else timedelta(microseconds=1))
    column = ImageRow.added_at
    within = and_(column >= start, column < end)
    conditions = {
        "=": within, "!=": not_(within), "<": column < start, "<=": column < end, ">": column >= end,
        ">=": column >= start,
    }  # fmt: skip
    return conditions[each.operator]


def _storable(value: str) -> str:
    """The text as a database takes it; surrogates stand for bytes of an argument that are not UTF-8."""
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "")

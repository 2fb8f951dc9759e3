r"""Column values that SQLite and PostgreSQL give back alike.

PostgreSQL refuses the character NUL in text, JSON has no number that is not finite, and SQLite forgets time zones.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Dialect, Text
from sqlalchemy.types import TypeDecorator


class PortableText(TypeDecorator[str]):
    r"""Text in which NUL is written `\x00`, as in portable paths. Migrations give it an order by code points."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value if value is None else portable_text(value)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, in UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else _in_utc(value)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else _in_utc(value)


def portable_text(value: str) -> str:
    r"""The text with each NUL as `\x00`."""
    return value.replace("\0", r"\x00") if "\0" in value else value


def portable_json(value: Any) -> str:
    """JSON for any database: NUL as in `portable_text`, NaN as null, infinite numbers as text."""
    return json.dumps(_portable(value), allow_nan=False)


def _portable(value: Any) -> Any:
    match value:
        case str():
            return portable_text(value)
        case dict():
            return {_portable(key): _portable(item) for key, item in value.items()}
        case list() | tuple():
            return [_portable(item) for item in value]
        case float() if not math.isfinite(value):
            return None if math.isnan(value) else str(value)
    return value


def _in_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

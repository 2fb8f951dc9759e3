"""API keys: made, listed, revoked, and told from others. A key itself is shown once and kept nowhere.

A key is `ds_` and 32 random bytes: so many that a plain hash protects it, and that nobody guesses one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import ApiKeyRow
from dino_index.errors import KeyNotFound
from dino_search.api.catalog_door import CatalogDoor
from dino_search.home import default_database, default_home

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
"""Each includes those before it."""

KEY_START = "ds_"
_NUM_RANDOM_BYTES = 32
_NUM_SHOWN = len(KEY_START) + 6


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What is known of a key. collections: names; None for all."""

    id: int
    name: str
    prefix: str
    sha256: bytes
    scope: Scope
    collections: tuple[str, ...] | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    def is_valid(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def allows(self, scope: Scope) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)

    def reaches(self, collection: str) -> bool:
        return self.collections is None or collection in self.collections

    def status(self, now: datetime) -> Literal["valid", "expired", "revoked"]:
        if self.is_valid(now):
            return "valid"
        return "expired" if self.revoked_at is None else "revoked"

    def to_json(self) -> dict[str, Any]:
        """As `keys list --json` prints it: without the hash."""
        return {
            "id": self.id,
            "name": self.name,
            "prefix": self.prefix,
            "scope": self.scope,
            "collections": None if self.collections is None else list(self.collections),
            "status": self.status(datetime.now(UTC)),
            "created_at": self.created_at.isoformat(),
            "expires_at": _text(self.expires_at),
            "revoked_at": _text(self.revoked_at),
            "last_used_at": _text(self.last_used_at),
        }


class ApiKeys:
    """The keys of a home, or of a database by URL; None for those that the environment names."""

    def __init__(self, home: str | Path | None = None, database: str | None = None) -> None:
        self._door = CatalogDoor(Path(home) if home is not None else default_home(), database or default_database())

    def add(
        self,
        name: str,
        *,
        scope: Scope,
        collections: Sequence[str] | None = None,
        expires_days: float | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key: what is known of it, and the key itself, which cannot be had again.

        collections: which it is for; they need not exist yet. None for all.
        Raises ValueError for a scope or a number of days of no use, CatalogErrors.
        """
        if scope not in SCOPES:
            raise ValueError(f"the scope must be one of {', '.join(SCOPES)}, found {scope!r}")
        if expires_days is not None and not 0 < expires_days <= 36_500:
            raise ValueError(f"a key expires after more than 0 and up to 36500 days, found {expires_days}")
        key = KEY_START + secrets.token_urlsafe(_NUM_RANDOM_BYTES)
        now = datetime.now(UTC)

        def record(session: Session) -> ApiKey:
            row = ApiKeyRow(
                name=name, prefix=key[:_NUM_SHOWN], sha256=digest_of(key), scope=scope, created_at=now,
                collections=sorted(set(collections)) if collections is not None else None,
                expires_at=None if expires_days is None else now + timedelta(days=expires_days),
            )  # fmt: skip
            session.add(row)
            session.flush()
            return _key_of(row)

        with self._door.created_catalog().writing() as session:
            return record(session), key

    def listed(self) -> list[ApiKey]:
        """All keys that ever were, oldest first. Raises CatalogErrors."""
        catalog = self._door.catalog()
        if catalog is None:
            return []
        with catalog.reading() as session:
            return [_key_of(row) for row in session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.id))]

    def revoke(self, key_id: int) -> ApiKey:
        """Ends a key for good; one that was revoked before stays as it is. Raises KeyNotFound, CatalogErrors."""
        catalog = self._door.catalog()
        if catalog is not None:
            with catalog.writing() as session:
                row = session.get(ApiKeyRow, key_id)
                if row is not None:
                    row.revoked_at = row.revoked_at or datetime.now(UTC)
                    return _key_of(row)
        raise KeyNotFound(f"expected the id of an API key, found {key_id}; see: dino-search keys list")

    def note_uses(self, used_at: dict[int, datetime]) -> None:
        """Records when keys were last used. Raises CatalogErrors."""
        catalog = self._door.catalog()
        if catalog is None or not used_at:
            return
        with catalog.writing() as session:
            for row in session.scalars(select(ApiKeyRow).where(ApiKeyRow.id.in_(used_at))):
                row.last_used_at = max(used_at[row.id], row.last_used_at or used_at[row.id])

    def close(self) -> None:
        self._door.close()


def digest_of(key: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def find_key(key: str, known: Iterable[ApiKey]) -> ApiKey | None:
    """The one among the known keys that this is, whether it is still valid or not.

    All are compared, each in the same time, so that how long it takes tells nothing.
    """
    digest, found = digest_of(key), None
    for candidate in known:
        if hmac.compare_digest(candidate.sha256, digest):
            found = candidate
    return found


def _key_of(row: ApiKeyRow) -> ApiKey:
    return ApiKey(
        id=row.id, name=row.name, prefix=row.prefix, sha256=row.sha256, scope=cast(Scope, row.scope),
        collections=None if row.collections is None else tuple(row.collections),
        created_at=row.created_at, expires_at=row.expires_at, revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )  # fmt: skip


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()

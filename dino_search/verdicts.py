"""People's verdicts on pairs of pictures: listed, exported, imported. Each is known by the sha256 of both pictures."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, CollectionRow, ImageRow, SourceRow, bound_parts
from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.collections import find_collection, join_path, relative_path
from dino_index.errors import ImageError, OutputExists, OutputUnwritable, VerdictFileError
from dino_index.image_bytes import read_file
from dino_index.image_paths import absolute_path, is_below, is_url
from dino_index.verdicts import RecordedVerdict, ordered_pair, record_verdicts, recorded_verdicts
from dino_search.home import default_database, default_home
from dino_search.verdict_files import (
    RowRefused,
    VerdictFile,
    VerdictRow,
    moment,
    read_verdict_file,
    refusal,
    write_text,
)


@dataclass(frozen=True, kw_only=True)
class VerdictImport:
    """What became of a file's rows."""

    rows: int
    added: int
    changed: int
    """Pairs whose decision or note was another one before."""
    unchanged: int
    repeated: int
    """Rows on a pair that a later row of the file is about, too: that one counts."""
    unused_columns: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Verdicts:
    """The verdicts of a home, or of a database by URL; None for those that the environment names."""

    def __init__(self, home: str | Path | None = None, database: str | None = None) -> None:
        self._home = Path(home) if home is not None else default_home()
        self._database = database or default_database()

    def listed(self, collection: str | None = None) -> list[VerdictRow]:
        """All verdicts, oldest first, with the paths that the catalog knows the pictures by.

        collection: only those on pairs with a picture of it. Raises CollectionNotFound, CatalogErrors.
        """
        with self._reading() as session:
            if session is None:
                return []
            return listed_verdicts(session, collection)

    def export(self, file: str | Path, collection: str | None = None, *, force: bool = False) -> int:
        """Writes what `listed` gives into a .csv or .json file, whole or not at all; how many verdicts.

        Raises OutputExists, OutputUnwritable, VerdictFileError for another kind of file; as `listed` does.
        """
        file = Path(file)
        form = file.suffix.lower().removeprefix(".")
        if form not in ("csv", "json"):
            raise VerdictFileError(f"expected a file name that ends in .csv or .json, found {file.name}")
        if os.path.lexists(file) and not force:
            raise OutputExists(f"{file} exists already; choose another name or add --force to overwrite it")
        rows = self.listed(collection)
        partial = file.with_name(f".{file.name}.{uuid4().hex[:8]}")
        try:
            partial.write_text(write_text(rows, form), encoding="utf-8", newline="")
            os.replace(partial, file)
        except OSError as error:
            raise OutputUnwritable(f"{file} cannot be written: {error.strerror}; choose another place") from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return len(rows)

    def import_from(self, file: str | Path) -> VerdictImport:
        """Records all verdicts of a file in one transaction, or none; they go before what is recorded.

        A row without sha256 means the pictures at its paths, relative ones beside the file: as the catalog knows them,
        else as the files are.
        Raises VerdictFileError, CatalogErrors.
        """
        file = Path(file)
        found = read_verdict_file(file)
        verdicts = self._resolved(found, file)
        catalog = Catalog.open(self._home, create=True, url=self._database)
        assert catalog is not None
        with closing(catalog):
            counts = catalog.write(lambda session: record_verdicts(session, verdicts))
        distinct = counts.added + counts.changed + counts.unchanged
        return VerdictImport(
            rows=len(verdicts), added=counts.added, changed=counts.changed, unchanged=counts.unchanged,
            repeated=len(verdicts) - distinct, unused_columns=found.unused_columns,
        )  # fmt: skip

    def _resolved(self, found: VerdictFile, file: Path) -> list[RecordedVerdict]:
        """Raises VerdictFileError for paths that lead to no picture."""
        folder = file.absolute().parent
        wanted = {
            _located(path, folder)
            for row in found.rows.values()
            for path, digest in ((row.query, row.query_sha256), (row.reference, row.reference_sha256))
            if not digest
        }
        with self._reading() as session:
            known = _digests_of(session, wanted) if session is not None and wanted else {}
        refused: list[str] = []
        verdicts: list[RecordedVerdict] = []
        for place, row in found.rows.items():
            try:
                one, other = (
                    bytes.fromhex(digest) if digest else _digest(_located(path, folder), known)
                    for path, digest in ((row.query, row.query_sha256), (row.reference, row.reference_sha256))
                )
            except RowRefused as error:
                refused.append(f"{place}: {error}")
                continue
            verdicts.append(
                RecordedVerdict(
                    pair=ordered_pair(one, other), decision=row.decision, note=row.note,
                    decided_at=moment(row.decided_at),
                )
            )  # fmt: skip
        if refused:
            raise refusal(file, refused)
        return verdicts

    @contextmanager
    def _reading(self) -> Iterator[Session | None]:
        """A session; None where there is no catalog yet."""
        catalog = Catalog.open(self._home, url=self._database)
        if catalog is None:
            yield None
            return
        with closing(catalog), catalog.reading() as session:
            yield session


def listed_verdicts(
    session: Session, collection: str | None = None, *, told: Sequence[str] | None = None
) -> list[VerdictRow]:
    """What `Verdicts.listed` gives, as the session sees it. told: of these collections paths are named; None: of all.

    Raises CollectionNotFound.
    """
    chosen = find_collection(session, collection).id if collection is not None else None
    recorded = recorded_verdicts(session, chosen)
    paths = _paths_of(session, {digest for verdict in recorded for digest in verdict.pair}, chosen, told)
    return [
        VerdictRow(
            query=paths.get(verdict.pair[0], ""), reference=paths.get(verdict.pair[1], ""),
            decision=verdict.decision, query_sha256=verdict.pair[0].hex(),
            reference_sha256=verdict.pair[1].hex(), note=verdict.note, decided_at=verdict.decided_at.isoformat(),
        )
        for verdict in recorded
    ]  # fmt: skip


def _located(portable: str, folder: Path) -> str:
    path = decode_path(portable)
    return absolute_path(path if is_url(path) else os.path.join(folder, path))


def _digest(path: str, known: dict[str, set[bytes]]) -> bytes:
    """Raises RowRefused."""
    digests = known.get(path, set())
    if len(digests) != 1:  # not known, or known in two collections with different content: then the file decides
        try:
            known[path] = digests = {read_file(path).sha256}
        except ImageError as error:
            raise RowRefused(f"{encode_path(path)} is not in the catalog, and as a file: {error}") from error
    return next(iter(digests))


def _paths_of(
    session: Session, digests: Collection[bytes], collection_id: int | None, told: Sequence[str] | None
) -> dict[bytes, str]:
    """A path, in the portable encoding, of each picture that is in the catalog: of its first image.

    collection_id: an image of this collection goes before others. told: only of these collections.
    """
    wanted = select(ImageRow.sha256, ImageRow.collection_id, ImageRow.id, SourceRow.path, ImageRow.path).join(
        SourceRow, SourceRow.id == ImageRow.source_id
    )
    if told is not None:
        wanted = wanted.join(CollectionRow, CollectionRow.id == ImageRow.collection_id).where(
            CollectionRow.name.in_(told)
        )
    paths: dict[bytes, tuple[bool, int, str]] = {}
    for part in bound_parts(sorted(digests)):
        rows = session.execute(wanted.where(ImageRow.sha256.in_(part)))
        for digest, owner, image_id, source, name in rows:
            candidate = (owner != collection_id, image_id, encode_path(join_path(decode_path(source), name)))
            assert digest is not None
            paths[digest] = min(paths.get(digest, candidate), candidate)
    return {digest: path for digest, (_, _, path) in paths.items()}


def _digests_of(session: Session, paths: Collection[str]) -> dict[str, set[bytes]]:
    """The sha256 under which images of any collection are known by these absolute paths."""
    found: dict[str, set[bytes]] = {}
    for source_id, portable in session.execute(select(SourceRow.id, SourceRow.path)).all():
        source = decode_path(portable)
        names = {relative_path(path, source): path for path in paths if is_below(path, source)}
        for part in bound_parts(list(names)):
            rows = session.execute(
                select(ImageRow.path, ImageRow.sha256).where(
                    ImageRow.source_id == source_id, ImageRow.path.in_(part), ImageRow.status == "ok"
                )
            )
            for name, digest in rows:
                assert digest is not None
                found.setdefault(names[name], set()).add(digest)
    return found

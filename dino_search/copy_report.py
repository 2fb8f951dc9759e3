"""The report of a batch of copy detection: tables for programs, and a page to look through the pairs and decide.

Everything is written while the queries come in, into a folder with a temporary name; the files take their names when
all of them are whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from dino_index.catalog.column_types import portable_json
from dino_index.errors import OutputExists, OutputUnwritable
from dino_index.purging import PARQUET_KIND
from dino_search.copy_report_page import CopyReportPage, PageFacts
from dino_search.copy_results import CopyMatch, CopyQuery
from dino_search.csv_lines import csv_line

if TYPE_CHECKING:
    from dino_search.collection import Collection

KIND = "copies"
"""What the catalog calls a report's files that are text."""
MATCHES_CSV, QUERIES_CSV, MATCHES_JSON, PARQUET, PAGE = (
    "matches.csv", "queries.csv", "matches.json", "matches.parquet", "report.html",
)  # fmt: skip
# The page last: it is what people wait for.
FILES = (MATCHES_CSV, QUERIES_CSV, MATCHES_JSON, PARQUET, PAGE)
# Paths are absolute, so that no cell begins with what spreadsheets take for a formula, and none has to be changed.
MATCH_COLUMNS = ("query", "reference", "score", "cosine", "rank", "decision", "precision")
QUERY_COLUMNS = ("query", "status", "reason")

_ROWS_A_GROUP = 10_000
_POINTS = pa.list_(pa.list_(pa.float64()))
_TYPES = {
    "image_id": pa.int64(), "rank": pa.int32(), "score": pa.float64(), "cosine": pa.float64(),
    "precision": pa.float64(), "similar": pa.bool_(), "verified": pa.bool_(), "query_area": _POINTS,
    "reference_area": _POINTS, "transform": _POINTS,
}  # fmt: skip
PARQUET_SCHEMA = pa.schema([(field.name, _TYPES.get(field.name, pa.string())) for field in fields(CopyMatch)])


class CopyReport:
    """Writes a report from queries that are added one at a time; whole when left without an exception, else not at all.

    folder: made when it is not there. limit: how many pairs the page shows; the tables have all.
    min_score: pairs below it are not listed, and count as before. force: replace an earlier report's files.
    facts: what else the page and the JSON file say about the run, by name.
    Entering raises OutputExists; `add` and leaving raise OutputUnwritable.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        title: str,
        collection: str,
        model: str,
        limit: int = 10_000,
        min_score: float | None = None,
        force: bool = False,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.counts: Counter[str] = Counter(
            dict.fromkeys(
                ("queries", "failed", "queries_with_copies", "candidates", "copy", "uncertain", "different",
                 "similar", "listed"), 0,
            )
        )  # fmt: skip
        """candidates, and those by decision: of all queries; listed: without those below `min_score`."""
        self._title = title
        self._collection = collection
        self._model = model
        self._limit = limit
        self._min_score = min_score
        self._force = force
        self._facts = dict(facts or {})
        self._partial: Path | None = None
        self._files: dict[str, IO[str]] = {}
        self._parquet: pq.ParquetWriter | None = None
        self._page: CopyReportPage | None = None
        self._group: list[dict[str, Any]] = []

    def __enter__(self) -> CopyReport:
        refuse_existing_report(self.folder, self._force)
        # In the folder where that exists, which may be a file system of its own; else beside it.
        where = self.folder if self.folder.is_dir() else self.folder.parent
        partial = where / f".{self.folder.name}.{uuid4().hex[:8]}.partial"
        try:
            with self._unwritable():
                where.mkdir(parents=True, exist_ok=True)
                partial.mkdir()
                self._partial = partial
                for name in (MATCHES_CSV, QUERIES_CSV, "matches.jsonl", "queries.jsonl"):
                    self._files[name] = open(partial / name, "w", encoding="utf-8", newline="")
                self._files[MATCHES_CSV].write(csv_line(MATCH_COLUMNS))
                self._files[QUERIES_CSV].write(csv_line(QUERY_COLUMNS))
                self._parquet = pq.ParquetWriter(partial / PARQUET, PARQUET_SCHEMA)
                self._page = CopyReportPage(partial, limit=self._limit)
        except BaseException:
            self._discard()
            raise
        return self

    def add(self, query: CopyQuery) -> None:
        """Enters a query with its candidates, or why it could not be used."""
        assert self._page is not None, "a report takes queries while it is open"
        with self._unwritable():
            self.counts["queries"] += 1
            self.counts["failed"] += query.status == "failed"
            self.counts["queries_with_copies"] += any(match.decision == "copy" for match in query.matches)
            self._files[QUERIES_CSV].write(csv_line((query.query, query.status, query.reason)))
            head = {"query": query.query, "status": query.status, "reason": query.reason}
            self._write_json_line("queries.jsonl", head, is_first=self.counts["queries"] == 1)
            if query.status == "failed":
                self._page.add_failed(query.query, query.reason)
            for match in query.matches:
                self._add_match(match, self._page)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._unwritable():
                    self._finish()
        finally:
            self._discard()

    def record_in(self, collection: Collection) -> bool:
        """Has the catalog remember the files for a purge to look into; False where the home is read-only."""
        kinds = {name: PARQUET_KIND if name == PARQUET else KIND for name in FILES}
        return all(collection.record_report(self.folder / name, kind) for name, kind in kinds.items())

    def _add_match(self, match: CopyMatch, page: CopyReportPage) -> None:
        self.counts.update(("candidates", match.decision))
        self.counts["similar"] += match.similar
        if self._min_score is not None and match.score < self._min_score:
            return
        self.counts["listed"] += 1
        precision = None if match.precision is None else round(match.precision, 6)
        self._files[MATCHES_CSV].write(
            csv_line(
                (match.query, match.reference, round(match.score, 6), round(match.cosine, 6), match.rank,
                 match.decision, precision)
            )
        )  # fmt: skip
        values = match.to_json()
        self._write_json_line("matches.jsonl", values, is_first=self.counts["listed"] == 1)
        self._group.append(values)
        if len(self._group) == _ROWS_A_GROUP:
            self._write_group()
        page.add_match(match)

    def _write_json_line(self, name: str, value: dict[str, Any], *, is_first: bool) -> None:
        text = portable_json(value)
        self._files[name].write(text if is_first else f",\n{text}")

    def _write_group(self) -> None:
        assert self._parquet is not None
        self._parquet.write_table(pa.Table.from_pylist(self._group, schema=PARQUET_SCHEMA))
        self._group = []

    def _finish(self) -> None:
        """Completes all files, and gives them their names."""
        assert self._partial is not None
        assert self._page is not None
        assert self._parquet is not None
        if self._group:
            self._write_group()
        self._parquet.close()
        for file in self._files.values():
            file.close()
        written_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._write_json(self._partial, written_at)
        facts = PageFacts(
            title=self._title, collection=self._collection, model=self._model, written_at=written_at,
            facts=self._facts, counts=self.counts, min_score=self._min_score,
        )  # fmt: skip
        self._page.write(self._partial / PAGE, facts)
        for name in ("matches.jsonl", "queries.jsonl"):
            (self._partial / name).unlink()
        for name in FILES:
            _sync(self._partial / name)
        # Looked for again: another report may have been written here meanwhile.
        refuse_existing_report(self.folder, self._force)
        if self._partial.parent != self.folder and not self.folder.exists():
            os.rename(self._partial, self.folder)
        else:
            self.folder.mkdir(exist_ok=True)
            for name in FILES:
                os.replace(self._partial / name, self.folder / name)

    def _write_json(self, partial: Path, written_at: str) -> None:
        head = {
            "title": self._title, "collection": self._collection, "model": self._model, "written_at": written_at,
            "min_score": self._min_score, "facts": self._facts, "counts": dict(self.counts),
        }  # fmt: skip
        with open(partial / MATCHES_JSON, "w", encoding="utf-8", newline="") as file:
            file.write(json.dumps(head, indent=1).removesuffix("\n}"))
            for name in ("queries", "matches"):
                file.write(f',\n "{name}": [\n')
                with open(partial / f"{name}.jsonl", encoding="utf-8", newline="") as lines:
                    shutil.copyfileobj(lines, file, 1 << 20)
                file.write("\n]")
            file.write("\n}\n")

    def _discard(self) -> None:
        """Closes what is open and deletes what has no final name."""
        if self._page is not None:
            self._page.close()
        if self._parquet is not None:
            self._parquet.close()
        for file in self._files.values():
            file.close()
        self._page, self._parquet, self._files = None, None, {}
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None

    @contextmanager
    def _unwritable(self) -> Iterator[None]:
        """Raises OutputUnwritable."""
        try:
            yield
        except OSError as error:
            advice = "free some space or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose"
            raise OutputUnwritable(
                f"the report {self.folder} cannot be written: {error.strerror or error}; {advice} another place"
            ) from error


def refuse_existing_report(folder: Path, force: bool) -> None:
    """Raises OutputExists where a report's files would replace others without being told to."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputExists(f"{folder} is no folder; choose another name for the report")
    found = [name for name in FILES if os.path.lexists(folder / name)]
    if found and not force:
        raise OutputExists(
            f"{folder / found[0]} exists already; choose another folder or add --force to overwrite the report in it"
        )


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())

"""The report of duplicates: a table, JSON, and a page with the groups side by side that works from disk."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from jinja2 import Environment, PackageLoader, select_autoescape

from dino_index.errors import OutputExists, OutputUnwritable
from dino_search.thumbnails import thumbnail_uri

if TYPE_CHECKING:
    from dino_search.collection import Collection
    from dino_search.duplicate_results import Duplicate, DuplicateGroup, Duplicates

KIND = "duplicates"
"""What the catalog calls such a file."""
FILE_NAMES = ("groups.csv", "groups.json", "groups.html")
COLUMNS = ("group", "path", "keep", "score", "min_score", "width", "height", "size", "identical")

DEFAULT_LIMIT = 2000
_THUMBNAILS_PER_GROUP = 24
_THUMBNAIL_SIDE = 160


def refuse_existing_report(folder: Path, force: bool) -> None:
    """Raises OutputExists where the report would overwrite something."""
    if folder.exists() and not folder.is_dir():
        raise OutputExists(f"{folder} is a file; choose another name for the folder of the report")
    existing = [name for name in FILE_NAMES if (folder / name).exists()]
    if existing and not force:
        raise OutputExists(
            f"{folder} holds {', '.join(existing)} already; choose another folder or add --force to overwrite them"
        )


def write_duplicate_report(
    folder: Path, found: Duplicates, *, force: bool = False, limit: int = DEFAULT_LIMIT
) -> list[Path]:
    """Writes the three files, which take their names when all of them are whole; returns their paths.

    limit: thumbnails in the page; what lies beyond is shown by name. Raises OutputExists, OutputUnwritable.
    """
    refuse_existing_report(folder, force)
    partial = folder.parent / f".{folder.name}.{uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        _write_table(partial / "groups.csv", found)
        with open(partial / "groups.json", "w", encoding="utf-8") as file:
            json.dump(found.to_json(), file, indent=2, ensure_ascii=False)
        _write_page(partial / "groups.html", found, limit)
        for name in FILE_NAMES:
            with open(partial / name, "rb") as written:
                os.fsync(written.fileno())
        if folder.exists():
            for name in FILE_NAMES:
                os.replace(partial / name, folder / name)
        else:
            os.rename(partial, folder)
    except OSError as error:
        raise OutputUnwritable(f"{folder} cannot be written: {error.strerror}; choose another place for it") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(partial)
    return [folder / name for name in FILE_NAMES]


def write_both_reports(
    collection: Collection, folder: Path, found: Duplicates, *, force: bool = False, limit: int = DEFAULT_LIMIT
) -> bool:
    """Writes the groups, and the pairs they were made from as a report of copies, into one folder.

    Has the catalog remember the files for a purge to look into; False where the home is read-only.
    Raises OutputExists, OutputUnwritable.
    """
    from dino_search.copy_report import CopyReport

    recorded = True
    for path in write_duplicate_report(folder, found, force=force, limit=limit):
        recorded &= collection.record_report(path, KIND)
    assert found.pairs is not None
    pairs = CopyReport(
        folder, title=f"Duplicates in {found.collection}", collection=found.collection, model=found.model, force=force,
        facts={"pairs": "whole images, by the cosine of their copy vectors"},
    )  # fmt: skip
    with pairs as written:
        for query in found.pairs.queries():
            written.add(query)
    return pairs.record_in(collection) and recorded


def _write_table(path: Path, found: Duplicates) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for group in found.groups:
            for image in group.files:
                table.writerow(
                    [group.group, image.path, _yes_no(image.keep), f"{image.score:.6f}", f"{group.min_score:.6f}",
                     image.width, image.height, image.size, _yes_no(image.identical)]
                )  # fmt: skip


def _yes_no(value: bool) -> str:
    return "true" if value else "false"


def _write_page(path: Path, found: Duplicates, limit: int) -> None:
    environment = Environment(loader=PackageLoader("dino_search"), autoescape=select_autoescape(default=True))
    thumbnails = _Thumbnails(limit)
    parts = environment.get_template("duplicates.html.j2").generate(
        found=found, groups=thumbnails.groups(found), thumbnails=thumbnails, name=lambda place: Path(place).name,
        num_spare=sum(len(group.files) - 1 for group in found.groups),
        spare_bytes=sum(group.spare_bytes for group in found.groups), bytes_of=_readable,
    )  # fmt: skip
    # Part by part: thousands of thumbnails need not be in memory together.
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(parts)


class _Thumbnails:
    """Thumbnails of each group's first files, while the limit lasts."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self.limit = limit
        self.num_left_out = 0

    def groups(self, found: Duplicates) -> Iterator[tuple[DuplicateGroup, list[tuple[Duplicate, str | None]], int]]:
        """(group, files with their thumbnails, how many files are left out)."""
        for group in found.groups:
            shown: list[tuple[Duplicate, str | None]] = []
            for file in islice(group.files, _THUMBNAILS_PER_GROUP):
                source = None
                if self._left > 0:
                    source = thumbnail_uri(file.path, side=_THUMBNAIL_SIDE, quality=80)
                    self._left -= 1
                else:
                    self.num_left_out += 1
                shown.append((file, source))
            yield group, shown, len(group.files) - len(shown)


def _readable(num_bytes: int) -> str:
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"

"""`report.html` of a copy report: one file that stands alone, written while the pairs come in.

Rows, pictures and thumbnails go to files of their own first, so that memory holds no more than the number of each
picture. The page's script shows the rows that are on the screen and no others.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from dino_index.catalog.column_types import portable_json
from dino_index.errors import ImageError
from dino_search.copy_results import CopyMatch, Point
from dino_search.thumbnails import Thumbnail, make_thumbnail

THUMBNAIL_SIDE = 160
_QUALITY = 60
_PICTURES_A_BLOCK = 200
"""A block of thumbnails is taken apart by the script when one of its pictures is first shown."""
_MAX_FAILED_SHOWN = 1000
_MAX_PENDING = 64


@dataclass(frozen=True, kw_only=True)
class PageFacts:
    """What the page says besides its rows."""

    title: str
    collection: str
    model: str
    written_at: str
    facts: Mapping[str, str]
    counts: Mapping[str, int]
    min_score: float | None


class CopyReportPage:
    """The page of one report. folder: takes its files until `write` puts them together; its other files are left alone.

    Raises OSError.
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._limit = limit
        self._paths = {name: folder / f"page-{name}" for name in ("rows", "pictures", "thumbnails")}
        self._files: dict[str, IO[str]] = {
            name: open(path, "w", encoding="ascii")  # noqa: SIM115 (closed by `close`)
            for name, path in self._paths.items()
        }
        self._files["thumbnails"].write(_begin_block(0))
        self._numbers: dict[tuple[str, str], int] = {}
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self._pending: deque[Future[Thumbnail | None]] = deque()
        self._num_written = 0
        self._failed: list[tuple[str, str]] = []
        self.num_rows = 0

    def add_match(self, match: CopyMatch) -> None:
        """Shows a pair, if there is room for it."""
        if self.num_rows == self._limit:
            return
        row = [
            self._number_of(match.query, match.query_sha256),
            self._number_of(match.reference, match.reference_sha256),
            round(match.score, 4), round(match.cosine, 4), match.rank, match.decision,
            None if match.precision is None else round(match.precision, 4), match.reason, match.verdict,
            int(match.similar), match.verified, match.variant, _rounded(match.query_area),
            _rounded(match.reference_area),
        ]  # fmt: skip
        self._write("rows", row, is_first=self.num_rows == 0)
        self.num_rows += 1

    def add_failed(self, query: str, reason: str) -> None:
        """Lists a query that could not be used, if there is room for it."""
        if len(self._failed) < _MAX_FAILED_SHOWN:
            self._failed.append((query, reason))

    def write(self, target: Path, page: PageFacts) -> None:
        """Puts the page together; its parts are deleted."""
        while self._pending:
            self._write_next_thumbnail()
        self.close()
        around_rows, around_pictures, around_thumbnails, end = _render(page, self._failed, self.num_rows)
        with open(target, "w", encoding="utf-8", newline="\n") as file:
            for text, name in (
                (around_rows, "rows"), (around_pictures, "pictures"), (around_thumbnails, "thumbnails"),
            ):  # fmt: skip
                file.write(text)
                with open(self._paths[name], encoding="ascii") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
            file.write(end)
        for path in self._paths.values():
            path.unlink()

    def close(self) -> None:
        """Ends its threads and closes its files."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    def _number_of(self, path: str, sha256: str) -> int:
        """The picture's number; a picture that is met for the first time gets the next one and a thumbnail."""
        key = (path, sha256)
        if key not in self._numbers:
            self._write("pictures", [path, sha256], is_first=not self._numbers)
            self._numbers[key] = len(self._numbers)
            self._pending.append(self._pool.submit(_thumbnail, path))
            if len(self._pending) > _MAX_PENDING:
                self._write_next_thumbnail()
        return self._numbers[key]

    def _write_next_thumbnail(self) -> None:
        thumbnail = self._pending.popleft().result()
        number, file = self._num_written, self._files["thumbnails"]
        if number and number % _PICTURES_A_BLOCK == 0:
            file.write(f"</script>\n{_begin_block(number // _PICTURES_A_BLOCK)}")
        # Base64 and digits: nothing in them can end the block.
        file.write(f"{thumbnail.width},{thumbnail.height},{thumbnail.base64}\n" if thumbnail else "\n")
        self._num_written += 1

    def _write(self, name: str, value: list[Any], *, is_first: bool) -> None:
        # ASCII, and `<` escaped: no text of a file can end the block of data that it stands in.
        text = portable_json(value).replace("<", r"\u003c")
        self._files[name].write(text if is_first else f",\n{text}")


def _render(page: PageFacts, failed: list[tuple[str, str]], num_rows: int) -> list[str]:
    """The page's text around its three parts."""
    environment = Environment(
        loader=PackageLoader("dino_search"), autoescape=select_autoescape(default=True), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = "{:,}".format
    source = environment.loader
    assert source is not None
    script, style = (source.get_source(environment, f"copy_report.{kind}")[0] for kind in ("js", "css"))
    marker = uuid4().hex
    settings = {
        "id": uuid4().hex, "title": page.title, "block": _PICTURES_A_BLOCK, "side": THUMBNAIL_SIDE,
    }  # fmt: skip
    text = environment.get_template("copy_report.html.j2").render(
        page=page, failed=failed, num_rows=num_rows, marker=marker, script=Markup(script), style=Markup(style),
        script_hash=_hash(script), style_hash=_hash(style),
        settings=Markup(portable_json(settings).replace("<", r"\u003c")),
    )  # fmt: skip
    parts = text.split(marker)
    assert len(parts) == 4, len(parts)
    return parts


def _begin_block(number: int) -> str:
    return f'<script type="text/plain" id="thumbnails-{number}">'


def _hash(text: str) -> str:
    """What a content security policy knows an inline script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _rounded(area: tuple[Point, ...] | None) -> list[list[float]] | None:
    return None if area is None else [[round(x, 3), round(y, 3)] for x, y in area]


def _thumbnail(path: str) -> Thumbnail | None:
    try:
        return make_thumbnail(path, side=THUMBNAIL_SIDE, quality=_QUALITY)
    except ImageError:
        return None

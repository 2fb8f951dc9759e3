"""Contact sheets: one HTML file that shows queries beside what was found, with the thumbnails inside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from jinja2 import Environment, PackageLoader, select_autoescape

from dino_index.errors import OutputUnwritable
from dino_search.results import SearchResults
from dino_search.thumbnails import thumbnail_uri

KIND = "contact sheet"
"""What the catalog calls such a file."""

_THUMBNAIL_SIDE = 240


def write_contact_sheet(path: Path, title: str, found: Sequence[SearchResults], note: str = "") -> None:
    """Writes the sheet, whole or not at all. Pictures that cannot be read any more are shown by name only.

    Raises OutputUnwritable.
    """
    environment = Environment(loader=PackageLoader("dino_search"), autoescape=select_autoescape(default=True))
    page = environment.get_template("contact_sheet.html.j2").render(
        title=title,
        note=note,
        found=found,
        thumbnail=lambda place: thumbnail_uri(place, side=_THUMBNAIL_SIDE, quality=85),
        name=lambda place: Path(place).name,
    )
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OutputUnwritable(f"{path} cannot be written: {error.strerror}; choose another place for it") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)

"""What commands share: their common options, and writing to people and to machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dino_index.errors import OutputExists
from dino_index.image_bytes import DEFAULT_LIMITS

CollectionOption = Annotated[str, typer.Option("--collection", "-c", help="Name of the collection.")]
HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="DINO_SEARCH_HOME", help="Folder of catalog and indexes.", show_default="user data folder"
    ),
]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where the model runs.")]
PoolingOption = Annotated[
    str | None, typer.Option(metavar="normalised|reference", help="GeM pooling.", show_default="the collection's")
]
BatchSizeOption = Annotated[
    int, typer.Option(min=0, max=4096, help="Pictures in one forward pass; 0: what suits the device.")
]
WorkersOption = Annotated[int, typer.Option(min=0, help="Threads that decode; 0: one a processor.")]
MaxPixelsOption = Annotated[int, typer.Option(min=1, envvar="DINO_SEARCH_MAX_PIXELS", help="Refuse larger pictures.")]
MaxBytesOption = Annotated[int, typer.Option(min=1, envvar="DINO_SEARCH_MAX_BYTES", help="Refuse larger files.")]
MAX_PIXELS, MAX_BYTES = DEFAULT_LIMITS.max_pixels, DEFAULT_LIMITS.max_bytes
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=not _can_print_unicode()))


def print_line(*columns: str) -> None:
    """One line on stdout, a tab between columns; what would break the line or the terminal is shown escaped."""
    print("\t".join(map(printable, columns)))


def tell(text: str) -> None:
    """A remark for people, on stderr."""
    print(printable(text), file=sys.stderr)


def complain(text: str) -> None:
    """An error for people: one line on stderr."""
    tell(f"error: {text}")


def printable(text: str) -> str:
    """The text in one line that any terminal can show."""
    escaped = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    encoding = sys.stdout.encoding or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def refuse_existing(path: Path, force: bool) -> None:
    """Raises OutputExists."""
    if path.exists() and not force:
        raise OutputExists(f"{path} exists already; choose another name or add --force to overwrite it")


def _can_print_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"

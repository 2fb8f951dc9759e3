"""`dino-search relocate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dino_search.commands.output import HomeOption, JsonOption, print_json, print_line, tell


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search relocate /media/old/photos /mnt/photos")(relocate)


def relocate(
    old: Annotated[str, typer.Argument(metavar="OLD", help="What was indexed: a folder, a shard or a URL.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Where its files are now.")],
    collection: Annotated[
        str | None,
        typer.Option("--collection", "-c", help="The only collection to change.", show_default="all of the home"),
    ] = None,
    home: HomeOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Also when files are missing at the new place.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Follow a folder that was moved: paths are rewritten, nothing is read again."""
    from dino_search.collection import Collection

    with Collection.open(collection or "default", home=home) as opened:
        done = opened.relocate(old, new, everywhere=collection is None, unchecked=yes)
    if as_json:
        print_json(asdict(done))
        return
    print_line(f"{done.images} images of {', '.join(done.collections)} are at {new} now")
    tell(f"{done.checked} files looked for, {done.missing} missing, {done.changed} of another size")

"""`dino-search catalog`: backup, restore, copy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_search.commands.output import HomeOption, JsonOption, print_json, print_line, tell
from dino_search.home import default_database, default_home

if TYPE_CHECKING:
    from dino_search.catalogs import CatalogCopy

ReplaceOption = Annotated[
    bool, typer.Option("--force", help="Replace a catalog that holds something; what it held is kept as a file.")
]


def add_commands(app: typer.Typer) -> None:
    catalog = typer.Typer(
        help="Back up, restore and move the whole catalog: all collections with their embeddings.",
        epilog="dino-search catalog backup my-pictures.backup",
        no_args_is_help=True,
    )
    catalog.command(epilog="dino-search catalog backup my-pictures.backup")(backup)
    catalog.command(epilog="dino-search catalog restore my-pictures.backup")(restore)
    catalog.command(epilog="dino-search catalog copy postgresql://me@localhost/pictures")(copy)
    app.add_typer(catalog, name="catalog")


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    home: HomeOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write everything into one portable file, while others work on it."""
    from dino_search.catalogs import back_up_catalog

    done = back_up_catalog(file, home=home or default_home(), database=default_database(), force=force)
    _report("backed up", done, as_json)


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `catalog backup` wrote.")],
    home: HomeOption = None,
    force: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fill the catalog from a backup, all at once or not at all; older ones are migrated."""
    from dino_search.catalogs import restore_catalog

    done = restore_catalog(file, home=home or default_home(), database=default_database(), force=force)
    _report("restored", done, as_json)


def copy(
    target: Annotated[str, typer.Argument(metavar="URL|DIR", help="A PostgreSQL database, or another home folder.")],
    home: HomeOption = None,
    force: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy the catalog into a PostgreSQL database, or from there into the SQLite file of a home folder."""
    from dino_search.catalogs import copy_catalog_to

    done = copy_catalog_to(target, home=home or default_home(), database=default_database(), force=force)
    _report("copied", done, as_json)


def _report(what: str, done: CatalogCopy, as_json: bool) -> None:
    if as_json:
        print_json(asdict(done) | {"kept": str(done.kept) if done.kept else None})
        return
    print_line(f"{what} {done.images} images in {done.collections} collections, {done.embeddings} embeddings")
    if done.kept:
        tell(f"what was there before is kept in {done.kept}")
    if done.snapshots_written:
        tell(f"{done.snapshots_written} index files were missing and are written anew")

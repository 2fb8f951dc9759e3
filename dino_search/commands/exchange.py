"""`dino-search export` and `import`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dino_search.commands.output import (
    CollectionOption,
    HomeOption,
    JsonOption,
    print_json,
    print_line,
    tell,
)

_FORMATS = ("all", "embeddings", "faiss")


def add_commands(app: typer.Typer) -> None:
    app.command("export", epilog="dino-search export ./my-export")(export_folder)
    app.command("import", epilog="dino-search import ./my-export -c restored")(import_folder)


def export_folder(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    collection: CollectionOption = "default",
    home: HomeOption = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join(_FORMATS),
            help="embeddings: without the FAISS file. faiss: that file and the metadata alone, which import refuses.",
        ),
    ] = "all",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a collection as Parquet, .npy (clip-retrieval's layout) and FAISS files."""
    from typing import cast

    from dino_index.exports import ExportFormat
    from dino_search.collection import Collection

    if form not in _FORMATS:
        raise typer.BadParameter(f"expected one of {', '.join(_FORMATS)}, found {form!r}", param_hint="--format")
    with Collection.open(collection, home=home) as opened:
        written = opened.export(out, form=cast(ExportFormat, form), force=force)
    if as_json:
        print_json(written.to_json())
        return
    print_line(f"{written.images} images and {written.failed} failed files of '{collection}' in {written.folder}")
    print_line(f"{written.num_bytes / 1e6:.1f} MB in {written.parts} parts")


def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `dino-search export` wrote.")],
    collection: CollectionOption = "default",
    home: HomeOption = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="The same weights on this machine, where they lie elsewhere."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add an exported collection's images, vectors, labels and metadata to a collection."""
    from dino_search.collection import Collection

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            tell(f"{done}/{total} images")

    with Collection.open(collection, home=home, model=model) as opened:
        done = opened.import_from(folder, on_part=show)
    if as_json:
        print_json(done.to_json())
        return
    print_line(f"{done.added} added, {done.updated} updated, {done.skipped} unchanged, {done.failed} of them failed")
    print_line(f"{done.images} images in collection '{collection}'")
    if done.added:
        tell("images have the ids that they had" if done.ids == "kept" else "images have new ids")

"""`dino-search verdicts`: list, import, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dino_search.commands.output import ForceOption, HomeOption, JsonOption, print_json, print_line, tell

OneCollectionOption = Annotated[
    str | None,
    typer.Option("--collection", "-c", help="Only pairs with a picture of this collection.", show_default="all pairs"),
]


def add_commands(app: typer.Typer) -> None:
    verdicts = typer.Typer(
        help="People's decisions on pairs of pictures, which go before every score: list, import, export.",
        epilog="dino-search verdicts import verdicts.csv",
        no_args_is_help=True,
    )
    verdicts.command("list", epilog="dino-search verdicts list --json")(list_verdicts)
    verdicts.command("import", epilog="dino-search verdicts import verdicts.csv")(import_verdicts)
    verdicts.command("export", epilog="dino-search verdicts export verdicts.csv")(export_verdicts)
    app.add_typer(verdicts, name="verdicts")


def list_verdicts(collection: OneCollectionOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show each decision with the paths that the pictures are known by."""
    from dino_search.verdicts import Verdicts

    rows = Verdicts(home).listed(collection)
    if as_json:
        print_json({"verdicts": [row.to_json() for row in rows]})
        return
    for row in rows:
        query = row.query or f"sha256:{row.query_sha256}"
        reference = row.reference or f"sha256:{row.reference_sha256}"
        print_line(row.decision, query, reference, row.decided_at[:10], row.note)
    if not rows:
        tell("no verdicts yet; mark pairs in a report of copies, then run: dino-search verdicts import FILE")


def import_verdicts(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV or JSON, as a report or `export` writes it.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record the decisions of a file, all or none; they take the place of earlier ones on the same pairs.

    Columns: query,reference,decision,query_sha256,reference_sha256,note,decided_at. The decision is copy or not_copy.
    Without sha256 the paths are looked up, relative ones beside the file.
    """
    from dino_search.verdicts import Verdicts

    done = Verdicts(home).import_from(file)
    if as_json:
        print_json(done.to_json())
    else:
        print_line(f"{done.added} added, {done.changed} changed, {done.unchanged} unchanged")
    if done.repeated:
        tell(f"{done.repeated} rows are about a pair that a later row is about, too: the last one counts")
    if done.unused_columns:
        tell(f"columns that mean nothing here: {', '.join(done.unused_columns)}")


def export_verdicts(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The .csv or .json file to write.")],
    collection: OneCollectionOption = None,
    home: HomeOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the decisions into a file that `import` takes, here or in another home."""
    from dino_index.catalog.portable_paths import encode_path
    from dino_search.verdicts import Verdicts

    num_written = Verdicts(home).export(file, collection, force=force)
    if as_json:
        print_json({"file": encode_path(str(file.absolute())), "verdicts": num_written})
    else:
        print_line(f"{num_written} verdicts written to {file}")

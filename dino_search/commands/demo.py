"""`dino-search demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dino_search.commands.output import print_line, tell


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search demo")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for pictures, catalog and pages.")] = Path(
        "dino-search-demo"
    ),
) -> None:
    """Index, search, classify and detect edited copies of real photographs; write pages to open."""
    from dino_search.collection import Collection
    from dino_search.demonstration import PHOTOGRAPHS, run_demonstration

    tell(f"{len(PHOTOGRAPHS)} photographs, edited copies of them, and searches by other edited copies ...")
    with Collection.open("demo", home=out / "home") as collection:
        done = run_demonstration(out, collection)
    print_line(f"indexed    {done.summary.images} images with {collection.model_name()}, without labels or download")
    print_line(f"searched   {done.num_found} of {done.num_queries} edited copies find their own photograph first")
    print_line(f"classified {done.num_classified} of {done.num_queries} edited copies get its label")
    print_line(f"copies     {done.num_copies} of {done.num_queries} are called copies, {done.num_wrong} of a wrong one")
    print_line(f"open       {done.contact_sheet}")
    print_line(f"report     {done.copy_report}")
    print_line(f"try        dino-search search {done.example_query} -c demo --home {out / 'home'}")

"""`dino-search search` and `classify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_search.commands.output import (
    CollectionOption,
    ForceOption,
    HomeOption,
    JsonOption,
    print_json,
    print_line,
    printable,
    refuse_existing,
    tell,
)

FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="'FIELD OP VALUE'",
        help="Keep to images whose column (label, path, width, added_at ...) or metadata is =, !=, <, <=, > or >= a "
        "value; repeatable, all must hold.",
    ),
]

if TYPE_CHECKING:
    from dino_search.results import SearchResult


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search search query.jpg -k 5")(search)
    app.command(epilog="dino-search classify query.jpg")(classify)


def search(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The picture to search by.")],
    collection: CollectionOption = "default",
    home: HomeOption = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many images to show.")] = 10,
    min_score: Annotated[float | None, typer.Option(help="Leave out lower scores (cosine, up to 1).")] = None,
    filters: FilterOption = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with thumbnails.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the images most like a picture."""
    if html is not None:
        refuse_existing(html, force)
    from dino_search.collection import Collection

    with Collection.open(collection, home=home) as opened:
        found = opened.search(image, k=k, min_score=min_score, filters=filters or ())
        if html is not None:
            from dino_search.contact_sheet import KIND, write_contact_sheet

            write_contact_sheet(html, f"Search in {collection}", [found])
            tell(f"wrote {html}")
            if not opened.record_report(html, KIND):
                tell(f"the home cannot be written, so that remove --purge will not know of {html}")
    if as_json:
        print_json(found.to_json())
    else:
        if not found.results:
            tell("no image passes the filters" if filters and min_score is None else "nothing reaches the asked score")
        _print_results(found.results)


def classify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="The pictures to classify.")],
    collection: CollectionOption = "default",
    home: HomeOption = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many labelled images vote.")] = 20,
    temperature: Annotated[float, typer.Option(min=1e-3, help="A vote weighs exp(score/temperature).")] = 0.07,
    filters: FilterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify pictures by the labels of their nearest images."""
    from dino_search.collection import Collection

    with Collection.open(collection, home=home) as opened:
        classified = opened.classify(images, k=k, temperature=temperature, filters=filters or ())
    if as_json:
        print_json(classified.to_json())
        return
    for result in classified.results:
        print_line(result.label, f"{result.probability:.3f}", result.query)
        if len(classified.results) == 1:
            _print_results(result.neighbours)


def _print_results(results: list[SearchResult]) -> None:
    if not sys.stdout.isatty():
        for result in results:
            print_line(str(result.rank), f"{result.score:.4f}", result.label or "", result.path)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("rank", "score", "label", "path", box=None)
    for result in results:
        cells = [str(result.rank), f"{result.score:.4f}", result.label or "", result.path]
        # As Text: brackets in a name are no markup.
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in cells))
    Console().print(table)

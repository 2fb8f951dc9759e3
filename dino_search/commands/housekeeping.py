"""`dino-search info`, `verify`, `compact` and `remove`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dino_search.commands.output import (
    CollectionOption,
    HomeOption,
    JsonOption,
    print_json,
    print_line,
    tell,
)

if TYPE_CHECKING:
    from dino_index.purging import PurgeReport


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search info --failures")(info)
    app.command(epilog="dino-search verify --repair")(verify)
    app.command(epilog="dino-search compact")(compact)
    app.command(epilog="dino-search remove ./photos/private")(remove)


def info(
    collection: CollectionOption = "default",
    home: HomeOption = None,
    failures: Annotated[bool, typer.Option("--failures", help="List the files that could not be read.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a collection."""
    from dino_search.collection import Collection

    with Collection.open(collection, home=home) as opened:
        facts = opened.info()
        ledger = opened.failures() if failures else []
    if as_json:
        print_json(facts | {"failures": ledger} if failures else facts)
    elif failures:
        for failure in ledger:
            print_line(failure["code"], failure["path"], failure["message"])
    else:
        for key, value in facts.items():
            print_line(f"{key + ':':<20}{', '.join(value) if isinstance(value, list) else value}")


def verify(
    collection: CollectionOption = "default",
    home: HomeOption = None,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what can be.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that database, embeddings and index agree; exit 1 if something stays wrong."""
    from dino_search.collection import Collection

    with Collection.open(collection, home=home) as opened:
        report = opened.verify(repair=repair)
    if as_json:
        print_json({"images": report.images_checked, "problems": report.problems, "repaired": report.repaired})
    else:
        for problem in report.repaired:
            print_line("repaired", problem)
        for problem in report.problems:
            print_line("problem", problem)
        print_line(f"{report.images_checked} images checked, {len(report.problems)} problems")
        if report.problems and not repair:
            tell("to put right what can be: dino-search verify --repair")
    if report.problems:
        raise typer.Exit(1)


def compact(collection: CollectionOption = "default", home: HomeOption = None) -> None:
    """Write the index anew and give unused space back."""
    from dino_index.image_paths import is_url
    from dino_search.collection import Collection

    with Collection.open(collection, home=home) as opened:
        opened.compact()
        facts = opened.info()
    place = facts["vector_store"]
    # Index files have a folder, a server has a URL.
    where = f"of '{collection}' at {place}" if is_url(place) else f"in the index file of '{collection}'"
    print_line(f"{facts['images_in_snapshot']} images {where}")


def remove(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="PATH|ID...", help="Image files, folders or image ids.")
    ] = None,
    collection: CollectionOption = "default",
    home: HomeOption = None,
    purge: Annotated[
        bool,
        typer.Option(
            "--purge",
            help="Remove every trace from the home as well: vectors, index files, freed pages. "
            "Without PATH: what earlier removals left behind.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Drop images from the collection; the files stay where they are."""
    from dino_search.collection import Collection

    if not targets and not purge:
        raise typer.BadParameter("expected at least one image file, folder or id", param_hint="PATH|ID...")
    chosen = [int(target) if target.isascii() and target.isdigit() else target for target in targets or ()]
    with Collection.open(collection, home=home) as opened:
        if purge:
            _report_purge(collection, opened.purge(chosen), as_json)
            return
        num_removed = opened.remove(chosen)
    if as_json:
        print_json({"collection": collection, "images": num_removed})
    else:
        print_line(f"{num_removed} images removed from '{collection}'")
    tell("the next index of their folder adds them again, unless --exclude leaves them out")


def _report_purge(collection: str, report: PurgeReport, as_json: bool) -> None:
    """Prints what was purged and what may still show it; exit 1 where something could not be done."""
    if as_json:
        print_json({"collection": collection} | report.to_json())
    else:
        print_line(f"{report.images} images purged from '{collection}', with {report.vectors} vectors")
        if report.verdicts:
            print_line(f"{report.verdicts} verdicts on pairs with such an image forgotten")
        if report.uploads:
            print_line(f"{report.uploads} of their files deleted, which had been sent to the service")
        for kind, found in (
            ("shared", report.shared),
            ("report", report.reports),
            ("backup", report.backups),
            ("problem", report.problems),
        ):
            for line in found:
                print_line(kind, line)
    if report.shared:
        tell("shared: these images have the same bytes; purge them too, or their vectors stay")
    if report.reports or report.backups:
        tell("reports name purged images, backups may hold them: neither is changed, delete what is not needed")
    if report.whitenings:
        tell("the whitening was learned from purged images and went too: the next copies learns and calibrates anew")
    if report.images > report.uploads:
        tell("the files stay where they are; the next index of their folder adds them again")
    if report.problems:
        raise typer.Exit(1)

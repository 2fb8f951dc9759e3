"""`dino-search duplicates`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dino_search.commands.output import (
    CollectionOption,
    ForceOption,
    HomeOption,
    JsonOption,
    print_json,
    print_line,
    tell,
)

if TYPE_CHECKING:
    from dino_search.collection import Collection
    from dino_search.duplicate_results import Duplicates


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search duplicates --report ./duplicates")(duplicates)


def duplicates(
    collection: CollectionOption = "default",
    home: HomeOption = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write groups and pairs there, as tables and pages.")
    ] = None,
    group: Annotated[
        str,
        typer.Option(
            metavar="components|star|complete",
            help="components: all that is connected; star: all are copies of one; complete: all of each other.",
        ),
    ] = "components",
    copy_score: Annotated[
        float | None,
        typer.Option(metavar="S", help="Call copies from this cosine on.", show_default="by --target-precision"),
    ] = None,
    target_precision: Annotated[
        float, typer.Option(metavar="P", help="Call copies so that this share of them is right (estimated).")
    ] = 0.99,
    min_score: Annotated[
        float | None, typer.Option(metavar="S", help="Leave pairs with a lower score out of the list of pairs.")
    ] = None,
    keep: Annotated[
        str, typer.Option(metavar="resolution|size|oldest|newest|path", help="Which file of a group to keep.")
    ] = "resolution",
    ignore_same_folder: Annotated[
        bool, typer.Option("--ignore-same-folder", help="Do not count two files in one folder as a pair.")
    ] = False,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Decide by stored embeddings alone; read no file to verify pairs.")
    ] = False,
    apply: Annotated[
        str | None,
        typer.Option(
            metavar="move|trash|hardlink",
            help="Show what would be done with the files that are not kept; --yes does it. Nothing is ever deleted.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Where --apply move puts files.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do what --apply shows.")] = False,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Log of what --apply does.", show_default="in the home")
    ] = None,
    undo: Annotated[Path | None, typer.Option(metavar="LOG", help="Put back what this log says was done.")] = None,
    report_limit: Annotated[int, typer.Option(min=0, help="Thumbnails in groups.html.")] = 2000,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find images that are in the collection more than once, as they are or edited."""
    from dino_search.collection import Collection
    from dino_search.duplicates import DuplicateOptions

    if undo is not None:
        _undo(undo, as_json)
        return
    _check_options(group, copy_score, target_precision, keep, apply, to, yes)
    if report is not None:
        from dino_search import copy_report, duplicate_report

        duplicate_report.refuse_existing_report(report, force)
        copy_report.refuse_existing_report(report, force)
    if apply is not None:
        from dino_search.duplicate_actions import check_action

        check_action(apply, to)  # type: ignore[arg-type]
    with Collection.open(collection, home=home) as opened:
        options = DuplicateOptions(
            linkage=group,  # type: ignore[arg-type]
            keep=keep,  # type: ignore[arg-type]
            min_score=min_score,
            ignore_same_folder=ignore_same_folder,
            checked=not unchecked,
        )
        with _progress_bar() as show:
            found = opened.duplicates(
                options,
                target_precision=target_precision,
                copy_score=copy_score,
                on_remark=tell,
                on_progress=show,
            )
        for remark in found.remarks:
            tell(remark)
        if report is not None:
            _write_report(opened, report, found, force, report_limit)
        if apply is not None:
            _apply(opened, found, apply, to, yes, log, as_json)
            return
    if as_json:
        print_json(found.to_json())
    else:
        _print_groups(found)


@contextmanager
def _progress_bar() -> Iterator[Callable[[float], None]]:
    """A bar with the time left on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done_frac: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("comparing", total=1.0)
        yield lambda done_frac: bar.update(task, completed=done_frac)


def _check_options(
    group: str,
    copy_score: float | None,
    target_precision: float,
    keep: str,
    apply: str | None,
    to: Path | None,
    yes: bool,
) -> None:
    """Raises BadParameter."""
    from dino_index.duplicate_groups import LINKAGES
    from dino_search.duplicate_actions import ACTIONS
    from dino_search.duplicate_results import KEEP_POLICIES

    for option, value, allowed in (
        ("--group", group, LINKAGES),
        ("--keep", keep, KEEP_POLICIES),
        ("--apply", apply, (None, *ACTIONS)),
    ):
        if value not in allowed:
            names = ", ".join(name for name in allowed if name is not None)
            raise typer.BadParameter(f"expected one of {names}, found {value!r}", param_hint=option)
    if copy_score is not None and not 0 < copy_score <= 1:
        raise typer.BadParameter(f"expected more than 0 and at most 1, found {copy_score}", param_hint="--copy-score")
    if not 0 < target_precision < 1:
        raise typer.BadParameter(
            f"expected more than 0 and less than 1, found {target_precision}", param_hint="--target-precision"
        )
    if (apply == "move") != (to is not None):
        raise typer.BadParameter("--apply move needs --to DIR, and nothing else takes it", param_hint="--to")
    if yes and apply is None:
        raise typer.BadParameter("--yes belongs to --apply", param_hint="--yes")


def _write_report(opened: Collection, report: Path, found: Duplicates, force: bool, limit: int) -> None:
    from dino_search.duplicate_report import write_both_reports

    recorded = write_both_reports(opened, report, found, force=force, limit=limit)
    tell(f"open {report / 'groups.html'}, or {report / 'report.html'} to look through pairs and decide")
    if not recorded:
        tell(f"the home cannot be written, so that remove --purge will not know of {report}")


def _print_groups(found: Duplicates) -> None:
    for group in found.groups:
        for file in group.files:
            mark = "keep" if file.keep else "identical" if file.identical else "copy"
            print_line(str(group.group), mark, f"{file.score:.4f}", file.path)
    num_spare = sum(len(group.files) - 1 for group in found.groups)
    num_bytes = sum(group.spare_bytes for group in found.groups)
    tell(
        f"{len(found.groups)} groups among {found.images} images; {num_spare} files need not be kept "
        f"({num_bytes / 1e6:,.1f} MB)"
    )
    if found.failed:
        tell(f"{found.failed} files could not be read and were not compared: dino-search info --failures")
    chained = [str(group.group) for group in found.groups if group.chained]
    if chained:
        shown = ", ".join(chained[:10]) + (" ..." if len(chained) > 10 else "")
        tell(
            f"{len(chained)} groups are chained, so that some of their files are no copies of each other: {shown}; "
            "--group star or complete takes them apart"
        )


def _apply(
    opened: Collection, found: Duplicates, action: str, to: Path | None, yes: bool, log: Path | None, as_json: bool
) -> None:
    from dino_search.commands.signals import stopping_on_signals
    from dino_search.duplicate_actions import apply_plan, new_log_path, plan_actions

    plan = plan_actions(found.groups, action)  # type: ignore[arg-type]
    if not yes:
        if as_json:
            print_json(
                {"action": action, "dry_run": True, "acts": [act.to_json() for act in plan.acts],
                 "skipped": [skipped.to_json() for skipped in plan.skipped]}
            )  # fmt: skip
        else:
            for act in plan.acts:
                print_line(action, act.file.path, act.kept.path)
            _print_skipped(plan.skipped)
        tell(
            f"nothing was done: {action} would take {len(plan.acts)} files ({plan.num_bytes / 1e6:,.1f} MB) and leave "
            f"{len(plan.skipped)} alone; add --yes to do it"
        )
        return
    if to is not None and opened.is_indexed(to):
        tell(f"{to} lies in a folder that was indexed: the next index of that folder adds what is moved there again")
    with stopping_on_signals("this file") as received:
        done = apply_plan(plan, log or new_log_path(opened.home), folder=to, should_stop=lambda: bool(received))
    if as_json:
        print_json(
            {"action": action, "dry_run": False, "log": str(done.log) if done.log else None, "done": done.done,
             "skipped": [skipped.to_json() for skipped in done.skipped]}
        )  # fmt: skip
    else:
        for entry in done.done:
            print_line(action, entry["path"], entry["to"])
        _print_skipped(done.skipped)
    tell(f"{action}: {len(done.done)} files done, {len(done.skipped)} left alone")
    if done.log is not None:
        tell(f"to put all back: dino-search duplicates --undo {done.log}")
    if done.done and action != "hardlink":
        tell("the collection still names these files, until the next: dino-search index FOLDER --prune")
    if received:
        raise typer.Exit(128 + received[0])


def _print_skipped(skipped: list[Any]) -> None:
    for entry in skipped:
        print_line("skipped", entry.path, entry.reason)


def _undo(log: Path, as_json: bool) -> None:
    """Exit 1 where something could not be put back."""
    from dino_search.duplicate_actions import undo

    undone = undo(log)
    if as_json:
        print_json(
            {"restored": undone.restored, "unchanged": undone.unchanged,
             "failed": [failed.to_json() for failed in undone.failed]}
        )  # fmt: skip
    else:
        for path in undone.restored:
            print_line("restored", path)
        for failed in undone.failed:
            print_line("failed", failed.path, failed.reason)
    tell(
        f"{len(undone.restored)} files put back, {len(undone.unchanged)} were in their place, "
        f"{len(undone.failed)} could not be put back"
    )
    if undone.failed:
        sys.stdout.flush()
        raise typer.Exit(1)

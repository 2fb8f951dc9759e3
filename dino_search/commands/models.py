"""`dino-search models`, with `list` and `get`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from dino_search.commands.output import HomeOption, JsonOption, print_json, print_line, tell

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_COLUMNS = ("name", "MB", "descriptor", "source", "licence")
_UNKNOWN = "-"


def add_commands(app: typer.Typer) -> None:
    models = typer.Typer(
        help="Show and fetch the backbones that --model takes.",
        epilog="dino-search models get vit_small_patch16_224.dino --default",
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    models.callback()(_list_unless_asked_otherwise)
    models.command("list", epilog="dino-search models list --json")(list_models)
    models.command("get", epilog="dino-search models get vit_small_patch16_224.dino --default")(get_model)
    app.add_typer(models, name="models")


def _list_unless_asked_otherwise(
    context: typer.Context,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    if context.invoked_subcommand is None:
        list_models(home=home, as_json=as_json)


def list_models(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show the models of this home: size, length of a descriptor, source, licence."""
    from dino_search.models import Models

    found = Models(home).list()
    if as_json:
        print_json([model.to_json() for model in found])
        return
    rows = [_COLUMNS] + [
        (model.name, f"{model.megabytes:.1f}", str(model.dim or _UNKNOWN), model.source, model.licence or _UNKNOWN)
        for model in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    marks = ["", *("default" if model.is_default else "" for model in found)]
    for row, mark in zip(rows, marks, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print_line("  ".join([*cells, mark]).rstrip())


def get_model(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A timm name with its tag, as vit_small_patch14_dinov2.lvd142m.")
    ],
    make_default: Annotated[
        bool, typer.Option("--default", help="New collections of this home use it from now on.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model's weights from the Hugging Face hub; the only command that goes online.

    HF_ENDPOINT names another server of that kind; DINO_SEARCH_HUB_TIMEOUT is how many seconds one may keep silent (10).
    """
    from dino_search.models import Models

    models = Models(home)
    with _ending_on_signals(), _progress_bar(name) as show:
        got = models.get(name, make_default=make_default, on_progress=show, on_remark=tell)
    if as_json:
        print_json(got.to_json())
        return
    print_line(
        f"{got.name}: {got.megabytes:.1f} MB, {got.dim or _UNKNOWN} channels, {got.licence or 'licence unknown'}"
    )
    if make_default:
        print_line("new collections of this home use it; an existing one keeps its own model")
    else:
        tell(f"use it: dino-search index PATH --model {got.name} -c NAME")


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: after clearing away what is half made."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar with bytes, rate and time left on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

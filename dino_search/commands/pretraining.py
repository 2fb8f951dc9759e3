"""`dino-search pretrain`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_index.model_files import BUNDLED
from dino_search.commands.output import HomeOption, print_line, tell
from dino_search.commands.signals import stopping_on_signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from dino_training import Progress, Recipe, RunSummary

_DEFAULT_RECIPE = "small"
_RECIPE_WITH_TEACHER = "distilled"


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search pretrain ./photos --out runs/mine --set epochs=10")(pretrain)


def pretrain(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Folders, images, manifests, tar shards, or URLs of these."),
    ],
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder for weights, checkpoints, metrics and report.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Settings.",
            show_default=f"{_DEFAULT_RECIPE}; {_RECIPE_WITH_TEACHER} with --teacher",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting over the recipe's; repeatable.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help=f"Weights to start from: '{BUNDLED}', a fetched model, or a weights file."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="A frozen teacher: weights file, 'bundled', 'efficientnet_lite0' or a timm name."
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="folders|FILE.csv", help="For the k-NN figure; training does not see them.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Where training runs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in RUN.")] = False,
    collection: Annotated[str, typer.Option("--collection", "-c", hidden=True)] = "default",
    home: HomeOption = None,
) -> None:
    """Train a backbone on your own images, without labels (DINO)."""
    from dino_training import pretrain as run_pretraining

    init, teacher = (name and _file_of(name, home) for name in (init, teacher))
    chosen = _load(recipe, out, resume, teacher, settings or [], {"labels": labels, "device": device})
    with stopping_on_signals("this step and a checkpoint") as signals, training_progress() as show:
        summary = run_pretraining(
            images, out, chosen, init=init, resume=resume,
            on_progress=show, on_remark=tell, should_stop=lambda: bool(signals),
        )  # fmt: skip
    is_first = int(os.environ.get("RANK", "0")) == 0
    if is_first:
        _print_summary(summary)
    if summary.status == "stopped":
        if is_first:
            tell("stopped; the same command with --resume goes on from there")
        # Where torchrun has started several processes, the signal may have gone to another one.
        raise typer.Exit(128 + (signals[0] if signals else signal.SIGTERM))


def _file_of(name: str, home: Path | None) -> str:
    """The weights file of a model that was fetched into the home; all other names as they are."""
    from dino_index.model_files import stored_path
    from dino_search.home import default_home

    path = stored_path(name, (home or default_home()) / "models")
    return name if path is None or os.path.exists(name) else str(path)


def _load(
    recipe: str | None,
    out: Path,
    resume: bool,
    teacher: str | None,
    settings: list[str],
    options: dict[str, str | None],
) -> Recipe:
    """The recipe with everything that the command line says over it."""
    from dino_training import load_recipe
    from dino_training.pretraining import RECIPE

    # In quotes: a path may look like YAML.
    overrides = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    if teacher is not None:
        overrides += ["teacher=frozen", f"teacher_model={json.dumps(teacher)}"]
        if recipe is not None and not any(setting.startswith("loss=") for setting in settings):
            overrides += ["loss=infonce"]
    if recipe is None and resume and (out / RECIPE).is_file():
        recipe = str(out / RECIPE)
    if recipe is None:
        recipe = _DEFAULT_RECIPE if teacher is None else _RECIPE_WITH_TEACHER
    return load_recipe(recipe, overrides + settings)


def _print_summary(summary: RunSummary) -> None:
    from dino_training.export import BEST_WEIGHTS, WEIGHTS

    print_line(f"{summary.status} after {summary.num_steps} steps, {summary.images_seen:,} images seen")
    if summary.num_unreadable:
        tell(f"{summary.num_unreadable} files could not be read and were left out")
    if summary.before is not None and summary.after is not None:
        name = "copies found first" if summary.after.knn_top1 is None else "k-NN accuracy"
        print_line(f"{name}: {summary.before.main:.1%} at the start, {summary.after.main:.1%} now")
    print_line(f"weights    {summary.run / WEIGHTS}")
    if summary.best_step not in (None, summary.num_steps):
        print_line(f"best       {summary.run / BEST_WEIGHTS} (step {summary.best_step})")
    print_line(f"report     {summary.run / 'report.html'}")
    print_line(f"try        dino-search index IMAGES --model {summary.run / WEIGHTS} -c NAME")


@contextmanager
def training_progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with the figures of the run on a terminal; a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, figures="")

        def show(progress: Progress) -> None:
            if bar.tasks[0].description != progress.activity and {bar.tasks[0].description, progress.activity} != {
                "training", "evaluating",
            }:  # fmt: skip
                bar.reset(task)
            bar.update(
                task, description=progress.activity, completed=progress.done, total=progress.total,
                figures=_in_words(progress.figures),
            )  # fmt: skip

        yield show


def _plain_lines() -> Callable[[Progress], None]:
    """At most one line in ten seconds, and one at the end of each activity, so that a log file stays readable."""
    from time import monotonic

    last_shown, last_line = -10.0, ""

    def show(progress: Progress) -> None:
        nonlocal last_shown, last_line
        line = f"{progress.activity} {progress.done}/{progress.total}  {_in_words(progress.figures)}".rstrip()
        if line != last_line and (monotonic() - last_shown >= 10 or progress.done == progress.total):
            last_shown, last_line = monotonic(), line
            tell(line)

    return show


def _in_words(figures: dict[str, float | None]) -> str:
    names = {
        "loss": "loss {:.3f}",
        "teacher_entropy": "h(Pt) {:.2f}",
        "kl": "KL {:.3f}",
        "images_per_second": "{:.0f} images/s",
        "knn_top1": "k-NN {:.1%}",
        "copies_found": "copies found {:.1%}",
    }
    return "  ".join(names[key].format(value) for key, value in figures.items() if value is not None)

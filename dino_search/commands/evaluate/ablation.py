"""`dino-search evaluate ablation`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_search.commands.evaluate.common import CollectionOption, Place, SeedOption, show, wrong_usage
from dino_search.commands.indexing import require_choice
from dino_search.commands.output import MAX_BYTES, MAX_PIXELS, DeviceOption, HomeOption, JsonOption, tell
from dino_search.commands.pretraining import training_progress
from dino_search.commands.signals import stopping_on_signals

if TYPE_CHECKING:
    from dino_training.evaluation.features import FeatureStore


def ablation(
    train: Annotated[
        Path, typer.Option(metavar="DIR", help="Labelled pictures, in folders named by their class or of a set.")
    ],
    val: Annotated[Path, typer.Option(metavar="DIR", help="The same, to be classified.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the runs, result.json, table.md and plot.png.")],
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="What to pretrain on; repeatable.", show_default="--train"),
    ] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="What all runs share; ablation/dino has the published scale.")
    ] = "small",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting over the recipe's; repeatable.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Length of each run, in whole epochs.", show_default="the recipe's"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", min=1, help="The same in epochs.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A run, such as no_momentum; repeatable.", show_default="all"),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours that vote.")] = 20,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    collection: CollectionOption = "default",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train with each part of DINO changed, and measure by k-NN. The same command goes on with runs in --out."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    from dino_training import load_recipe
    from dino_training.evaluation.ablation import AblationOptions, evaluate_ablation

    base = load_recipe(recipe, [f"device={device}", *(settings or [])])
    with wrong_usage():
        options = AblationOptions(
            recipe=base, steps=steps, epochs=epochs, only=tuple(dict.fromkeys(only or ())), k=k, seed=seed
        )

    @contextmanager
    def open_store(weights: Path) -> Iterator[FeatureStore]:
        place = Place(str(weights), None, device, 0, 0, MAX_PIXELS, MAX_BYTES, None, True, home)
        with place.store() as store:
            yield store

    with stopping_on_signals("this step and a checkpoint") as signals, training_progress() as show_progress:
        result = evaluate_ablation(
            images or [str(train)], train, val, out, options, open_store,
            on_progress=show_progress, on_remark=tell, should_stop=lambda: bool(signals),
        )  # fmt: skip
    if result.stopped:
        tell("stopped; the same command goes on from there")
        raise typer.Exit(128 + (signals[0] if signals else signal.SIGTERM))
    show(result, out, as_json)
    if result.failed:
        raise typer.Exit(1)

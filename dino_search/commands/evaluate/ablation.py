"""`dino-search evaluate ablation`."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_search.commands.evaluate.common import (
    CollectionOption,
    EpochsOption,
    JudgedOption,
    LearnedFromOption,
    Place,
    RecipeOption,
    RunsOption,
    SeedOption,
    SettingsOption,
    StepsOption,
    show,
    wrong_usage,
)
from dino_search.commands.indexing import require_choice
from dino_search.commands.output import MAX_BYTES, MAX_PIXELS, DeviceOption, HomeOption, JsonOption, tell
from dino_search.commands.pretraining import training_progress
from dino_search.commands.signals import stopping_on_signals

if TYPE_CHECKING:
    from dino_training.evaluation.features import FeatureStore


def ablation(
    train: LearnedFromOption,
    val: JudgedOption,
    out: RunsOption,
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="What to pretrain on; repeatable.", show_default="--train"),
    ] = None,
    recipe: RecipeOption = "small",
    settings: SettingsOption = None,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
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

    def open_store(weights: Path) -> AbstractContextManager[FeatureStore]:
        return Place(str(weights), None, device, 0, 0, MAX_PIXELS, MAX_BYTES, None, True, home).store()

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

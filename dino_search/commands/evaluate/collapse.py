"""`dino-search evaluate collapse`."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from dino_search.commands.evaluate.common import (
    CollectionOption,
    EpochsOption,
    RecipeOption,
    RunsOption,
    SeedOption,
    SettingsOption,
    StepsOption,
    show,
    wrong_usage,
)
from dino_search.commands.indexing import require_choice
from dino_search.commands.output import DeviceOption, HomeOption, JsonOption, tell
from dino_search.commands.pretraining import training_progress
from dino_search.commands.signals import stopping_on_signals


def collapse(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="What pretrain takes; a small set will do.")],
    out: RunsOption,
    recipe: RecipeOption = "small",
    settings: SettingsOption = None,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    collection: CollectionOption = "default",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train with and without centring and sharpening: entropy and KL curves. The same command goes on with runs in
    --out."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    from dino_training import load_recipe
    from dino_training.evaluation.collapse import CollapseOptions, evaluate_collapse

    # Runs this short are not judged by what they have learnt, so their figure may be rough.
    shared = load_recipe(recipe, [f"device={device}", "num_evaluated=64", *(settings or [])])
    with wrong_usage():
        options = CollapseOptions(recipe=shared, steps=steps, epochs=epochs, seed=seed)
    with stopping_on_signals("this step and a checkpoint") as signals, training_progress() as show_progress:
        result = evaluate_collapse(
            images, out, options, on_progress=show_progress, on_remark=tell, should_stop=lambda: bool(signals)
        )
    if result is None:
        tell("stopped; the same command goes on from there")
        raise typer.Exit(128 + (signals[0] if signals else signal.SIGTERM))
    show(result, out, as_json)

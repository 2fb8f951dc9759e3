"""`dino-search evaluate linear`."""

from __future__ import annotations

from typing import Annotated

import typer

from dino_search.commands.evaluate.common import (
    CacheOption,
    CollectionOption,
    InputSizeOption,
    JudgedOption,
    LearnedFromOption,
    ModelOption,
    NoCacheOption,
    OutOption,
    PerClassOption,
    Place,
    SeedOption,
    refuse_existing,
    show,
    wrong_usage,
)
from dino_search.commands.indexing import require_choice
from dino_search.commands.output import (
    MAX_BYTES,
    MAX_PIXELS,
    BatchSizeOption,
    DeviceOption,
    ForceOption,
    HomeOption,
    JsonOption,
    WorkersOption,
)


def linear(
    train: LearnedFromOption,
    val: JudgedOption,
    fast: Annotated[
        bool, typer.Option("--fast", help="Compute features once, of the middle of each image; sweep learning rates.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 100,
    learning_rate: Annotated[
        list[float] | None,
        typer.Option(
            metavar="RATE",
            help="Peak rate for a batch of 256; of several, one is chosen on held-out training images.",
            show_default="0.001; with --fast ten from 0.0003 to 10",
        ),
    ] = None,
    train_batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a step of training.")] = 1024,
    blocks: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Last blocks whose [CLS] is taken.", show_default="4; 1 for ViT-B"),
    ] = None,
    average_pool: Annotated[
        bool | None,
        typer.Option("--average-pool/--no-average-pool", help="Take the mean patch, too.", show_default="for ViT-B"),
    ] = None,
    per_class: PerClassOption = None,
    seed: SeedOption = 0,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = 0,
    workers: WorkersOption = 0,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    out: OutOption = None,
    force: ForceOption = False,
    collection: CollectionOption = "default",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Linear classification on frozen features: the paper's protocol, or a fast one."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    from dino_training.evaluation.linear import LinearOptions, evaluate_linear

    with wrong_usage():
        options = LinearOptions(
            fast=fast,
            learning_rates=tuple(learning_rate) if learning_rate else None,
            epochs=epochs,
            batch_size=train_batch,
            num_blocks=blocks,
            average_pool=average_pool,
            per_class=per_class,
            seed=seed,
        )
    refuse_existing(out, force)
    place = Place(model, input_size, device, batch_size, workers, MAX_PIXELS, MAX_BYTES, cache, no_cache, home)
    with place.store("training" if not fast else "embedding") as store:
        result = evaluate_linear(store, train, val, options)
    show(result, out, as_json)

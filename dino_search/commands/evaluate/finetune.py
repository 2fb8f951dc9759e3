"""`dino-search evaluate finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dino_search.commands.evaluate.common import (
    CollectionOption,
    InputSizeOption,
    JudgedOption,
    LearnedFromOption,
    ModelOption,
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
    DeviceOption,
    ForceOption,
    HomeOption,
    JsonOption,
    WorkersOption,
)
from dino_search.commands.output import refuse_existing as refuse_existing_file


def finetune(
    train: LearnedFromOption,
    val: JudgedOption,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="From random weights: the supervised baseline.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 256,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Peak rate for a batch of 256.")] = 0.0005,
    layer_decay: Annotated[
        float | None,
        typer.Option(help="Of the rate, from a block to the one before.", show_default=".75; 1 from scratch"),
    ] = None,
    warmup_epochs: Annotated[float, typer.Option(help="Over which the rate rises.")] = 5.0,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.05,
    drop_path: Annotated[float, typer.Option(help="Stochastic depth of the last block.")] = 0.1,
    mixup: Annotated[float, typer.Option(help="Of mixing pictures; 0: none.")] = 0.8,
    cutmix: Annotated[float, typer.Option(help="Of pasting pictures into others; 0: none.")] = 1.0,
    smoothing: Annotated[float, typer.Option(help="Of labels.")] = 0.1,
    erasing: Annotated[float, typer.Option(help="Share of pictures of which a part is erased.")] = 0.25,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Write the backbone there, for index --model."),
    ] = None,
    per_class: PerClassOption = None,
    seed: SeedOption = 0,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    out: OutOption = None,
    force: ForceOption = False,
    collection: CollectionOption = "default",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune the whole network with labels, or train it from scratch, and measure what it then knows."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    from dino_training.evaluation.finetune import FinetuneOptions, evaluate_finetune

    with wrong_usage():
        options = FinetuneOptions(
            from_scratch=from_scratch, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
            layer_decay=layer_decay, warmup_epochs=warmup_epochs, weight_decay=weight_decay, drop_path=drop_path,
            mixup=mixup, cutmix=cutmix, smoothing=smoothing, erasing=erasing, per_class=per_class, seed=seed,
        )  # fmt: skip
    if save is not None:
        if save.suffix != ".safetensors":
            raise typer.BadParameter(f"expected a name that ends in .safetensors with --save, found {save}")
        refuse_existing_file(save, force)
    refuse_existing(out, force)
    place = Place(model, input_size, device, 0, workers, MAX_PIXELS, MAX_BYTES, None, True, home)
    with place.store("training") as store:
        result = evaluate_finetune(store, train, val, options, save=save)
    show(result, out, as_json)

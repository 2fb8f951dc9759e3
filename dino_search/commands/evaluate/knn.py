"""`dino-search evaluate knn`."""

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
    MaxBytesOption,
    MaxPixelsOption,
    WorkersOption,
)


def knn(
    train: LearnedFromOption,
    val: JudgedOption,
    k: Annotated[
        list[int] | None, typer.Option("-k", min=1, help="Neighbours; repeatable.", show_default="10, 20, 100, 200")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of a neighbour's vote.")] = 0.07,
    per_class: PerClassOption = None,
    seed: SeedOption = 0,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = 0,
    workers: WorkersOption = 0,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bytes: MaxBytesOption = MAX_BYTES,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    out: OutOption = None,
    force: ForceOption = False,
    collection: CollectionOption = "default",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Weighted k-NN classification of one labelled folder by another."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    from dino_training.evaluation.knn import KnnOptions, evaluate_knn
    from dino_training.evaluation.voting import KS

    with wrong_usage():
        options = KnnOptions(ks=tuple(dict.fromkeys(k or KS)), temperature=temperature, per_class=per_class, seed=seed)
    refuse_existing(out, force)
    place = Place(model, input_size, device, batch_size, workers, max_pixels, max_bytes, cache, no_cache, home)
    with place.store() as store:
        result = evaluate_knn(store, train, val, options)
    show(result, out, as_json)

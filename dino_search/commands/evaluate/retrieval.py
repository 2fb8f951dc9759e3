"""`dino-search evaluate retrieval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dino_search.commands.evaluate.common import (
    CacheOption,
    CollectionOption,
    InputSizeOption,
    ModelOption,
    NoCacheOption,
    OutOption,
    Place,
    SeedOption,
    TruthOption,
    refuse_existing,
    require_with_layout,
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

_LAYOUTS = ("truth", "revisited", "holidays")


def retrieval(
    references: Annotated[Path, typer.Option(metavar="DIR", help="Pictures to be found.")],
    queries: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Pictures to find them by.", show_default="the references"),
    ] = None,
    truth: TruthOption = None,
    gnd: Annotated[
        Path | None, typer.Option(metavar="FILE.pkl", help="Ground truth of revisited Oxford or Paris.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(metavar="truth|revisited|holidays", help="Where truth is.", show_default="by --truth or --gnd"),
    ] = None,
    scales: Annotated[
        str, typer.Option(metavar="S,S...", help="Input sizes whose vectors are added up, as factors: 1,.7071,.5")
    ] = "1",
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
    """Retrieval by the cosine of [CLS]: any truth file, revisited Oxford and Paris, INRIA Holidays."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    layout = layout or ("revisited" if gnd is not None else "truth")
    require_choice("--layout", layout, _LAYOUTS)
    require_with_layout("--gnd FILE.pkl", needed=layout == "revisited", given=gnd is not None, layout=layout)
    require_with_layout("--truth FILE.csv", needed=layout == "truth", given=truth is not None, layout=layout)
    from dino_training.evaluation.retrieval import (
        RetrievalOptions,
        evaluate_holidays,
        evaluate_revisited,
        evaluate_truth,
    )
    from dino_training.evaluation.truth import read_truth

    with wrong_usage():
        options = RetrievalOptions(scales=tuple(map(float, scales.split(","))), seed=seed)
    refuse_existing(out, force)
    place = Place(model, input_size, device, batch_size, workers, max_pixels, max_bytes, cache, no_cache, home)
    # What is wrong with it is said before a model is loaded.
    named = read_truth(truth) if truth is not None else None
    with place.store() as store:
        if named is not None:
            result = evaluate_truth(store, queries or references, references, named, options)
        elif gnd is not None:
            result = evaluate_revisited(store, queries or references, references, gnd, options)
        else:
            result = evaluate_holidays(store, references, options)
    show(result, out, as_json)

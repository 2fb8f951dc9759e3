"""`dino-search evaluate copies`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dino_search.commands.copies import NormalisationOption, VariantsOption, VerifyOption, WhiteningOption
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

_LAYOUTS = ("truth", "copydays", "isc")


def copies(
    queries: Annotated[
        Path, typer.Option(metavar="DIR", help="Suspected copies; of Copydays, the folder that holds its parts.")
    ],
    references: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The originals; of Copydays, distractors.")
    ] = None,
    truth: TruthOption = None,
    layout: Annotated[
        str, typer.Option(metavar="truth|copydays|isc", help="What the files are: any, Copydays, ISC 2021.")
    ] = "truth",
    descriptor: Annotated[
        str, typer.Option(metavar="copy|cls", help="The pipeline of copies, or the cosine of [CLS] alone.")
    ] = "copy",
    k: Annotated[int, typer.Option("-k", min=1, help="Candidates of each query.")] = 20,
    regions: Annotated[
        str, typer.Option(metavar="none|query", help="Whether parts of queries are compared.")
    ] = "query",
    variants: VariantsOption = "all",
    verify: VerifyOption = 5,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="As --verify 0.")] = False,
    whitening: WhiteningOption = True,
    normalisation: NormalisationOption = True,
    whiten: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Other pictures to learn whitening and background from.",
            show_default="as copies does: with the model, and of the references",
        ),
    ] = None,
    compat: Annotated[
        bool, typer.Option("--compat", help="Whiten as the reference implementation does: uncentred, fully.")
    ] = False,
    dims: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Channels that are kept, as ISC's 256.", show_default="all")
    ] = None,
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
    """Copy detection, by the pipeline of the command copies: any truth file, Copydays, ISC 2021."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    require_choice("--layout", layout, _LAYOUTS)
    require_with_layout("--truth FILE.csv", needed=layout != "copydays", given=truth is not None, layout=layout)
    if layout != "copydays" and references is None:
        raise typer.BadParameter("expected --references DIR, found none")
    from dino_index.copy_detection import DetectionOptions
    from dino_training.evaluation.copies import CopiesOptions, evaluate_copies, evaluate_copydays
    from dino_training.evaluation.truth import read_isc_truth, read_truth

    with wrong_usage():
        options = CopiesOptions(
            descriptor=descriptor,  # type: ignore[arg-type]
            detection=DetectionOptions(
                k=k, variants=variants, regions=regions, num_verified=0 if no_verify else verify,  # type: ignore[arg-type]
                whitening=whitening, normalisation=normalisation,
            ),
            whiten=whiten,
            compat=compat,
            dims=dims,
            seed=seed,
        )  # fmt: skip
    refuse_existing(out, force)
    place = Place(model, input_size, device, batch_size, workers, max_pixels, max_bytes, cache, no_cache, home)
    read = read_isc_truth if layout == "isc" else read_truth
    named = read(truth) if truth is not None else None
    with place.store() as store:
        if named is None or references is None:
            result = evaluate_copydays(store, queries, references, options)
        else:
            result = evaluate_copies(store, queries, references, named, options, search_all=layout == "isc")
    show(result, out, as_json)

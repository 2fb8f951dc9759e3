"""`dino-search evaluate`: knn, retrieval, copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dino_search.commands.copies import NormalisationOption, VariantsOption, VerifyOption, WhiteningOption
from dino_search.commands.indexing import progress_bar, require_choice
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
    print_json,
    print_line,
    tell,
)

if TYPE_CHECKING:
    from dino_training.evaluation.features import FeatureStore
    from dino_training.evaluation.results import EvaluationResult

_LAYOUTS_OF_RETRIEVAL = ("truth", "revisited", "holidays")
_LAYOUTS_OF_COPIES = ("truth", "copydays", "isc")

ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="'bundled', a fetched model, a safetensors file or a PyTorch checkpoint.",
        show_default="the home's default",
    ),
]
InputSizeOption = Annotated[
    int | None,
    typer.Option(metavar="PIXELS", help="Side of the square the model sees.", show_default="the model's"),
]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Folder of vectors to use again.", show_default="in the home"),
]
NoCacheOption = Annotated[bool, typer.Option("--no-cache", help="Neither use nor keep vectors.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Write result.json, table.md and plot.png there.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of draws and confidence intervals.")]
TruthOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE.csv", help="Columns query, reference and perhaps junk; empty reference: no match."),
]
CollectionOption = Annotated[str, typer.Option("--collection", "-c", hidden=True)]


def add_commands(app: typer.Typer) -> None:
    evaluate = typer.Typer(
        help="Measure a model: k-NN classification, retrieval, copy detection. Figures come with 95 % intervals.",
        epilog="dino-search evaluate knn --train ./train --val ./val",
        no_args_is_help=True,
    )
    evaluate.command("knn", epilog="dino-search evaluate knn --train ./train --val ./val --json")(knn)
    evaluate.command(
        "retrieval",
        epilog="dino-search evaluate retrieval --queries ./queries --references ./photos --truth truth.csv",
    )(retrieval)
    evaluate.command(
        "copies", epilog="dino-search evaluate copies --queries ./copies --references ./originals --truth truth.csv"
    )(copies)
    app.add_typer(evaluate, name="evaluate")


def knn(
    train: Annotated[Path, typer.Option(metavar="DIR", help="Pictures in folders named by their class.")],
    val: Annotated[Path, typer.Option(metavar="DIR", help="The same, to be classified.")],
    k: Annotated[
        list[int] | None, typer.Option("-k", min=1, help="Neighbours; repeatable.", show_default="10, 20, 100, 200")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of a neighbour's vote.")] = 0.07,
    per_class: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Draw N training images a class.", show_default="all")
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
    """Weighted k-NN classification of one labelled folder by another."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    from dino_training.evaluation.knn import KnnOptions, evaluate_knn
    from dino_training.evaluation.voting import KS

    with _wrong_usage():
        options = KnnOptions(ks=tuple(dict.fromkeys(k or KS)), temperature=temperature, per_class=per_class, seed=seed)
    _refuse_existing(out, force)
    place = _Place(model, input_size, device, batch_size, workers, max_pixels, max_bytes, cache, no_cache, home)
    with place.store() as store:
        result = evaluate_knn(store, train, val, options)
    _show(result, out, as_json)


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
    require_choice("--layout", layout, _LAYOUTS_OF_RETRIEVAL)
    _require("--gnd FILE.pkl", needed=layout == "revisited", given=gnd is not None, layout=layout)
    _require("--truth FILE.csv", needed=layout == "truth", given=truth is not None, layout=layout)
    from dino_training.evaluation.retrieval import (
        RetrievalOptions,
        evaluate_holidays,
        evaluate_revisited,
        evaluate_truth,
    )
    from dino_training.evaluation.truth import read_truth

    with _wrong_usage():
        options = RetrievalOptions(scales=tuple(map(float, scales.split(","))), seed=seed)
    _refuse_existing(out, force)
    place = _Place(model, input_size, device, batch_size, workers, max_pixels, max_bytes, cache, no_cache, home)
    # What is wrong with it is said before a model is loaded.
    named = read_truth(truth) if truth is not None else None
    with place.store() as store:
        if named is not None:
            result = evaluate_truth(store, queries or references, references, named, options)
        elif gnd is not None:
            result = evaluate_revisited(store, queries or references, references, gnd, options)
        else:
            result = evaluate_holidays(store, references, options)
    _show(result, out, as_json)


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
    require_choice("--layout", layout, _LAYOUTS_OF_COPIES)
    _require("--truth FILE.csv", needed=layout != "copydays", given=truth is not None, layout=layout)
    if layout != "copydays" and references is None:
        raise typer.BadParameter("expected --references DIR, found none")
    from dino_index.copy_detection import DetectionOptions
    from dino_training.evaluation.copies import CopiesOptions, evaluate_copies, evaluate_copydays
    from dino_training.evaluation.truth import read_isc_truth, read_truth

    with _wrong_usage():
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
    _refuse_existing(out, force)
    place = _Place(model, input_size, device, batch_size, workers, max_pixels, max_bytes, cache, no_cache, home)
    read = read_isc_truth if layout == "isc" else read_truth
    named = read(truth) if truth is not None else None
    with place.store() as store:
        if named is None or references is None:
            result = evaluate_copydays(store, queries, references, options)
        else:
            result = evaluate_copies(store, queries, references, named, options, search_all=layout == "isc")
    _show(result, out, as_json)


class _Place:
    """Which model embeds, where and how, and where its vectors are kept."""

    def __init__(
        self,
        model: str | None,
        input_size: int | None,
        device: str,
        batch_size: int,
        workers: int,
        max_pixels: int,
        max_bytes: int,
        cache: Path | None,
        no_cache: bool,
        home: Path | None,
    ) -> None:
        from dino_index.embedding import EmbeddingSettings
        from dino_index.image_bytes import ReadLimits
        from dino_index.purging import EVALUATION_FOLDER
        from dino_search.home import default_home

        self._home = home or default_home()
        self._model, self._input_size, self._device = model, input_size, device
        self._cache = None if no_cache else cache or self._home / EVALUATION_FOLDER
        with _wrong_usage():
            self._settings = EmbeddingSettings(
                batch_size=batch_size,
                workers=workers,
                limits=ReadLimits(max_pixels=max_pixels, max_bytes=max_bytes),
            )

    @contextmanager
    def store(self) -> Iterator[FeatureStore]:
        from dino_index.model_files import resolve_model
        from dino_index.model_store import models_folder, resolve_default
        from dino_search.models import Models
        from dino_training.evaluation.features import FeatureStore

        if self._model is None:
            spec = resolve_default(Models(self._home).default(), self._home, input_size=self._input_size)
        else:
            spec = resolve_model(
                self._model, input_size=self._input_size, models=models_folder(self._home), on_remark=tell
            )
        with progress_bar("embedding") as show:
            store = FeatureStore(
                spec,
                device=self._device,  # type: ignore[arg-type]
                settings=self._settings,
                cache=self._cache,
                on_progress=show,
                on_remark=tell,
            )
            try:
                yield store
            finally:
                store.close()


@contextmanager
def _wrong_usage() -> Iterator[None]:
    """A value out of range is wrong usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _require(option: str, *, needed: bool, given: bool, layout: str) -> None:
    if needed and not given:
        raise typer.BadParameter(f"expected {option} with --layout {layout}, found none")
    if given and not needed:
        raise typer.BadParameter(f"{option} says nothing with --layout {layout}; leave one of them out")


def _refuse_existing(out: Path | None, force: bool) -> None:
    from dino_training.evaluation.results import refuse_existing_results

    if out is not None:
        refuse_existing_results(out, force)


def _show(result: EvaluationResult, out: Path | None, as_json: bool) -> None:
    from dino_training.evaluation.results import write_results

    if as_json:
        print_json(result.to_json())
    else:
        _print_table(result)
    for remark in result.remarks:
        tell(remark)
    if out is not None:
        write_results(result, out)
        tell(f"written to {out}")


def _print_table(result: EvaluationResult) -> None:
    rows: list[Any] = result.rows()
    width = max(len(name) for name, _, _ in rows)
    for name, value, interval in rows:
        print_line(name.ljust(width), value.rjust(7), interval)

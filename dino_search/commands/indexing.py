"""`dino-search index`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from dino_index.model_files import BUNDLED_VERSION, RECOMMENDED
from dino_search.commands.output import (
    MAX_BYTES,
    MAX_PIXELS,
    BatchSizeOption,
    CollectionOption,
    DeviceOption,
    HomeOption,
    JsonOption,
    MaxBytesOption,
    MaxPixelsOption,
    PoolingOption,
    WorkersOption,
    complain,
    print_json,
    print_line,
    tell,
)
from dino_search.commands.signals import stopping_on_signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from dino_index.indexing import IndexSummary, Progress


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search index ./photos")(index)


def index(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Folders, images, manifests (.txt, .csv, .jsonl, .parquet), tar shards, or URLs of these.",
        ),
    ],
    collection: CollectionOption = "default",
    home: HomeOption = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave out files and folders that match; repeatable.")
    ] = None,
    rehash: Annotated[bool, typer.Option(help="Compare contents, not size and time of change.")] = False,
    prune: Annotated[bool, typer.Option(help="Drop images under PATH whose file is gone.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Prune even if more than 20 % would go.")] = False,
    labels: Annotated[
        str | None, typer.Option(metavar="folders|FILE.csv", help="Label images by folder, or from a CSV file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="'bundled', a fetched model, a safetensors file or a PyTorch checkpoint.",
            show_default="the collection's",
        ),
    ] = None,
    input_size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Side of the square the model sees.", show_default="the model's"),
    ] = None,
    pooling: PoolingOption = None,
    index_type: Annotated[
        str | None,
        typer.Option(
            metavar="auto|flat|hnsw|ivf|ivfpq|FACTORY",
            help="How vectors are indexed; FACTORY: a FAISS factory string.",
            show_default="the collection's",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="i/N", help="Index the i-th of N shares of the files, as one of N processes."),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="Embed in this process, or on a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto",
            help="Head of the Ray cluster.",
            show_default="RAY_ADDRESS, else this machine",
        ),
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=0, help="Models on the Ray cluster, a GPU or processor each; 0: all that are free.")
    ] = 0,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = 0,
    workers: WorkersOption = 0,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bytes: MaxBytesOption = MAX_BYTES,
    as_json: JsonOption = False,
) -> None:
    """Add new and changed images, skip unchanged ones."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    require_choice("--engine", engine, ("local", "ray"))
    if engine == "local" and (ray_address is not None or replicas):
        raise typer.BadParameter("--ray-address and --replicas are for --engine ray")
    require_choice("--pooling", pooling or "normalised", ("normalised", "reference"))
    from dino_index.embedding import EmbeddingSettings
    from dino_index.image_bytes import ReadLimits
    from dino_index.indexing import IndexOptions
    from dino_index.ray_engine import RaySettings
    from dino_index.shares import Share
    from dino_search.collection import Collection

    try:
        options = IndexOptions(
            exclude=exclude or (),
            rehash=rehash,
            prune=prune,
            prune_any=yes,
            labels=labels,
            index_type=index_type,
            share=Share.parse(shard) if shard is not None else None,
            embedding=EmbeddingSettings(
                batch_size=batch_size,
                workers=workers,
                limits=ReadLimits(max_pixels=max_pixels, max_bytes=max_bytes),
            ),
            ray=RaySettings(address=ray_address, replicas=replicas) if engine == "ray" else None,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    opened = Collection.open(
        collection,
        home=home,
        model=model,
        pooling=pooling,  # type: ignore[arg-type]
        input_size=input_size,
        device=device,  # type: ignore[arg-type]
        on_remark=tell,
    )
    with opened, stopping_on_signals("this batch") as signals, progress_bar("indexing") as show:
        summary = opened.index(paths, options, on_progress=show, should_stop=lambda: bool(signals))
    if as_json:
        print_json(summary.to_json())
    else:
        _print_summary(summary, collection, opened.model_name())
    if summary.interrupted:
        tell(f"stopped with {summary.remaining} files to go; the same command goes on from there")
        raise typer.Exit(128 + signals[0])
    if shard is not None and not summary.readable and not summary.failed:
        tell(f"no files fall to share {shard}")
    elif not summary.readable and not summary.removed:
        complain(f"no image under the given paths could be read; see: {_ledger_of(collection)}")
        raise typer.Exit(1)


def require_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises BadParameter, which is wrong usage."""
    if value not in choices:
        raise typer.BadParameter(f"expected one of {', '.join(choices)}, found {value!r}", param_hint=option)


def _print_summary(summary: IndexSummary, collection: str, model: str) -> None:
    print_line(
        f"{summary.added} added, {summary.updated} updated, {summary.skipped} unchanged, "
        f"{summary.removed} removed, {summary.failed} failed, {summary.ignored} ignored"
    )
    print_line(f"{summary.images} images in collection '{collection}' ({model})")
    if summary.added or summary.updated:
        tell(f"{summary.images_per_second} images/s")
    if model == BUNDLED_VERSION:
        tell(
            f"{model} is small and ships with dino-search; a better one, for new collections: "
            f"dino-search models get {RECOMMENDED} --default"
        )
    if summary.moved:
        tell(f"{summary.moved} of the updated ones were found again under another path")
    if summary.failed:
        tell(f"{summary.failed} files could not be read; list them: {_ledger_of(collection)}")
    _tell_counts("ignored, as they are no images", summary.ignored_by_type)
    _tell_counts("folders skipped", summary.skipped_folders)
    _tell_counts("files skipped", summary.skipped_files)
    if "tar shard" in summary.ignored_by_type:
        tell("tar shards in folders are left alone; to index what is in them, name them: dino-search index PATH/*.tar")
    if summary.repeated:
        tell(f"{summary.repeated} rows of manifests name a file again; the first one counts")
    if summary.unmatched_labels:
        tell(f"{summary.unmatched_labels} rows of the label file name no image that was found")


def _ledger_of(collection: str) -> str:
    from dino_index.collections import option_for

    return f"dino-search info --failures{option_for(collection)}"


def _tell_counts(what: str, counts: Mapping[str, int]) -> None:
    if counts:
        tell(f"{what}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[Progress], None]]:
    """A bar with images/s and time left on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(what), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s"), TimeRemainingColumn(), TextColumn("{task.fields[failed]}"),
    )  # fmt: skip
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, rate="-", failed="")

        def show(progress: Progress) -> None:
            speed = bar.tasks[0].speed
            bar.update(
                task,
                completed=progress.done,
                total=progress.total,
                rate=f"{speed:.0f}" if speed else "-",
                failed=f"{progress.failed} failed" if progress.failed else "",
            )

        yield show

"""`dino-search reindex`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dino_search.commands.indexing import progress_bar, require_choice
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
    print_json,
    print_line,
    tell,
)
from dino_search.commands.signals import stopping_on_signals

if TYPE_CHECKING:
    from dino_index.reindexing import ReindexSummary


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search reindex -c default --model bundled")(reindex)


def reindex(
    model: Annotated[str, typer.Option(metavar="NAME|FILE", help="As for index.")],
    collection: CollectionOption = "default",
    home: HomeOption = None,
    pooling: PoolingOption = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Enter images whose file cannot be read any more as failed.")
    ] = False,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = 0,
    workers: WorkersOption = 0,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bytes: MaxBytesOption = MAX_BYTES,
    as_json: JsonOption = False,
) -> None:
    """Give a collection another model; ids and labels stay, and it can be searched meanwhile."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    require_choice("--pooling", pooling or "normalised", ("normalised", "reference"))
    from dino_index.embedding import EmbeddingSettings
    from dino_index.image_bytes import ReadLimits
    from dino_index.reindexing import ReindexOptions
    from dino_search.collection import Collection

    try:
        limits = ReadLimits(max_pixels=max_pixels, max_bytes=max_bytes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    options = ReindexOptions(
        allow_missing=allow_missing,
        embedding=EmbeddingSettings(batch_size=batch_size, workers=workers, limits=limits),
    )
    opened = Collection.open(collection, home=home, device=device)  # type: ignore[arg-type]
    with opened, stopping_on_signals("this batch") as signals, progress_bar("reindexing") as show:
        summary = opened.reindex(
            model,
            options,
            pooling=pooling,  # type: ignore[arg-type]
            on_progress=show,
            on_remark=tell,
            should_stop=lambda: bool(signals),
        )
    if as_json:
        print_json(summary.to_json())
    else:
        _print_summary(summary)
    if summary.interrupted:
        tell(f"stopped with {summary.remaining} pictures to go; the same command goes on from there")
        raise typer.Exit(128 + signals[0])


def _print_summary(summary: ReindexSummary) -> None:
    if summary.interrupted:
        print_line(f"collection '{summary.collection}' still has {summary.previous_model}")
    elif not summary.switched:
        print_line(f"nothing to do: collection '{summary.collection}' has {summary.model} already")
        return
    else:
        print_line(f"{summary.images} images in collection '{summary.collection}' ({summary.model})")
    tell(f"{summary.embedded} pictures embedded ({summary.images_per_second} images/s), {summary.reused} known before")
    if summary.updated:
        tell(f"{summary.updated} files had changed since they were indexed and were taken with their new content")
    if summary.failed:
        from dino_index.collections import option_for

        ledger = f"dino-search info --failures{option_for(summary.collection)}"
        tell(f"{summary.failed} images could not be read any more and are failed ones now; list them: {ledger}")

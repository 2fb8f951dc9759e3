"""`dino-search bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_search.commands.output import CollectionOption, HomeOption, JsonOption, print_json, print_line, tell

if TYPE_CHECKING:
    from dino_search.benchmark import Benchmark


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search bench --images ./photos")(bench)


def bench(
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="FOLDER", help="Pictures to read.", show_default="scikit-image's photographs"),
    ] = None,
    collection: CollectionOption = "default",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine in under a minute: decoding, forward passes, indexing, searching, and what N images take.

    Takes the collection's model and vectors where there are some, else the bundled model and random vectors.
    """
    from dino_search.benchmark import run_benchmark
    from dino_search.home import default_home

    measured = run_benchmark(
        home or default_home(), collection, images, on_stage=lambda stage: tell(f"measuring {stage} ...")
    )
    if as_json:
        print_json(measured.to_json())
    else:
        _print_benchmark(measured)


def _print_benchmark(measured: Benchmark) -> None:
    print_line("model", f"{measured.model}, {measured.dim} channels, {measured.dtype} on {measured.device}")
    print_line("pictures", f"{measured.pictures}, {measured.megapixels:.1f} megapixels")
    for name, speed in (("decode", measured.decode), ("forward", measured.forward), ("index", measured.index)):
        print_line(name, f"{speed.images_per_second:,.1f} images/s")
    search = measured.search
    print_line("open", f"{search.open_s:.2f} s for {search.num_vectors:,} vectors ({search.vectors})")
    print_line("search", f"{search.median_ms:.1f} ms, 19 of 20 under {search.slowest_of_20_ms:.1f} ms")
    for estimate in measured.estimates:
        print_line(
            f"{estimate.images:,} images",
            f"{_duration(estimate.index_s)} to index",
            f"{estimate.disk_bytes / 1e6:,.0f} MB of disk",
            f"{estimate.memory_bytes / 1e6:,.0f} MB of memory to search",
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

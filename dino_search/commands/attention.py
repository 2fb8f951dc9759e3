"""`dino-search attention`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_search.commands.evaluate.common import (
    CollectionOption,
    InputSizeOption,
    ModelOption,
    SeedOption,
    print_table,
    wrong_usage,
)
from dino_search.commands.indexing import progress_bar, require_choice
from dino_search.commands.output import (
    MAX_BYTES,
    MAX_PIXELS,
    DeviceOption,
    HomeOption,
    JsonOption,
    MaxBytesOption,
    MaxPixelsOption,
    complain,
    print_json,
    print_line,
    tell,
)

if TYPE_CHECKING:
    from dino_index.backbones import Backbone
    from dino_search.attention import DrawnAttention


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search attention photo.jpg --out attention --grid")(attention)


def attention(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Images, folders, manifests, shards, URLs; videos, with OpenCV."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for a folder of PNG files for each picture.")],
    mass: Annotated[float, typer.Option(metavar="SHARE", help="Of a head's attention that its mask keeps.")] = 0.6,
    grid: Annotated[bool, typer.Option("--grid", help="Also draw all pictures on one sheet, grid.png.")] = False,
    masks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Masks of the objects, NAME.png each, to compare with (Jaccard)."),
    ] = None,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Of a video, each Nth frame.")] = 1,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bytes: MaxBytesOption = MAX_BYTES,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    collection: CollectionOption = "default",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw where a model looks: the attention of [CLS] in its last block, by heads; larger --input-size, finer maps."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    from dino_index.image_bytes import ReadLimits
    from dino_search.attention import AttentionOptions, draw_attention
    from dino_training.evaluation.results import write_results

    with wrong_usage():
        options = AttentionOptions(
            mass=mass, grid=grid, masks=masks, every=every, force=force, seed=seed,
            limits=ReadLimits(max_pixels=max_pixels, max_bytes=max_bytes),
        )  # fmt: skip
    with progress_bar("drawing") as show:
        drawn = draw_attention(
            images,
            out,
            lambda: _backbone(model, input_size, device, home),
            options,
            on_progress=show,
            on_remark=tell,
        )
    if drawn.result is not None:
        write_results(drawn.result, out)
    if as_json:
        print_json(drawn.to_json())
    else:
        _print(drawn)
    _tell_rest(drawn)
    if not drawn.pictures:
        complain("no picture could be read")
        raise typer.Exit(1)


def _backbone(model: str | None, input_size: int | None, device: str, home: Path | None) -> Backbone:
    from dino_index.backbones import Backbone
    from dino_search.models import Models

    spec = Models(home).resolve(model, input_size=input_size, on_remark=tell)
    return Backbone(spec, device=device)  # type: ignore[arg-type]


def _print(drawn: DrawnAttention) -> None:
    if drawn.result is not None:
        print_table(drawn.result)
    else:
        for picture in drawn.pictures:
            print_line(str(picture.folder), picture.path)


def _tell_rest(drawn: DrawnAttention) -> None:
    for path, (_, message) in drawn.failed.items():
        tell(f"left out: {path}: {message}")
    for what, counts in (("ignored, as they are no images", drawn.ignored), ("skipped", drawn.skipped)):
        if counts:
            tell(f"{what}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    if drawn.ignored["video"]:
        tell("videos in folders are left alone; name them to have their frames drawn")
    for remark in drawn.result.remarks if drawn.result is not None else ():
        tell(remark)
    if drawn.pictures:
        tell(f"{len(drawn.pictures)} pictures drawn by {drawn.model} in {drawn.out}, {len(drawn.failed)} failed")
    if drawn.grid is not None:
        tell(f"sheet {drawn.grid}")

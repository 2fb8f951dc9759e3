"""What the commands of `evaluate` share: options, the model that embeds and its vectors, how a result is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dino_search.commands.indexing import progress_bar
from dino_search.commands.output import print_json, print_line, tell

if TYPE_CHECKING:
    from dino_training.evaluation.features import FeatureStore
    from dino_training.evaluation.results import EvaluationResult

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
LearnedFromOption = Annotated[
    Path,
    typer.Option(
        "--train", metavar="PATH", help="Pictures in folders named by their class; or a set with its labels' files."
    ),
]
JudgedOption = Annotated[Path, typer.Option("--val", metavar="PATH", help="The same, to be classified.")]
PerClassOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Draw N training images a class.", show_default="all")
]
TruthOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE.csv", help="Columns query, reference and perhaps junk; empty reference: no match."),
]
RunsOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder for the runs, result.json, table.md and plot.png.")
]
RecipeOption = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="What all runs share; ablation/dino has the published scale.")
]
SettingsOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting over the recipe's; repeatable.")
]
StepsOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Length of each run, in whole epochs.", show_default="the recipe's"),
]
EpochsOption = Annotated[int | None, typer.Option(metavar="N", min=1, help="The same in epochs.")]
CollectionOption = Annotated[str, typer.Option("--collection", "-c", hidden=True)]


class Place:
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
        with wrong_usage():
            self._settings = EmbeddingSettings(
                batch_size=batch_size,
                workers=workers,
                limits=ReadLimits(max_pixels=max_pixels, max_bytes=max_bytes),
            )

    @contextmanager
    def store(self, what: str = "embedding") -> Iterator[FeatureStore]:
        """what: is being done, for the bar of progress."""
        from dino_search.models import Models
        from dino_training.evaluation.features import FeatureStore

        spec = Models(self._home).resolve(self._model, input_size=self._input_size, on_remark=tell)
        with progress_bar(what) as show:
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
def wrong_usage() -> Iterator[None]:
    """A value out of range is wrong usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def require_with_layout(option: str, *, needed: bool, given: bool, layout: str) -> None:
    if needed and not given:
        raise typer.BadParameter(f"expected {option} with --layout {layout}, found none")
    if given and not needed:
        raise typer.BadParameter(f"{option} says nothing with --layout {layout}; leave one of them out")


def refuse_existing(out: Path | None, force: bool) -> None:
    from dino_training.evaluation.results import refuse_existing_results

    if out is not None:
        refuse_existing_results(out, force)


def show(result: EvaluationResult, out: Path | None, as_json: bool) -> None:
    from dino_training.evaluation.results import write_results

    if as_json:
        print_json(result.to_json())
    else:
        print_table(result)
    for remark in result.remarks:
        tell(remark)
    if out is not None:
        write_results(result, out)
        tell(f"written to {out}")


def print_table(result: EvaluationResult) -> None:
    rows: list[Any] = result.rows()
    width = max(len(name) for name, _, _ in rows)
    for name, value, interval in rows:
        print_line(name.ljust(width), value.rjust(7), interval)

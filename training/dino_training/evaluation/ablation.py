"""What each part of DINO is worth: the same run with and without it, at any scale (arXiv 2104.14294, section 5).

All runs start from the same seed and are measured by weighted k-NN. `random` is the backbone before the first step,
which training has to beat. A folder holds the runs: those that are done are not repeated, one that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dino_index.errors import DinoSearchError, EvaluationImpossible, OutputUnwritable, RunExists
from dino_training.checkpoints import list_checkpoints
from dino_training.evaluation.ablation_variants import VARIANTS, Variant
from dino_training.evaluation.bootstrap import Interval
from dino_training.evaluation.features import FeatureStore, StrPath
from dino_training.evaluation.knn import KnnOptions, evaluate_knn
from dino_training.evaluation.plots import Bar, draw_bars
from dino_training.evaluation.results import EvaluationResult, Figure
from dino_training.export import WEIGHTS, export_backbone
from dino_training.image_source import ImageSource
from dino_training.networks import build_backbone
from dino_training.pretraining import Progress, pretrain
from dino_training.recipe import Recipe

RANDOM = "random"
RUNS = "runs"
_DONE = "ablation.json"

OpenStore = Callable[[Path], AbstractContextManager[FeatureStore]]
"""What embeds by the given weights."""


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """recipe: what all runs share. steps, epochs: length of each; None: the recipe's. only: names of runs; (): all."""

    recipe: Recipe
    steps: int | None = None
    """At least so many steps of the recipe's batch, in whole epochs."""
    epochs: int | None = None
    only: tuple[str, ...] = ()
    k: int = 20
    seed: int = 0
    """Of the confidence intervals; that of the runs is the recipe's."""

    def __post_init__(self) -> None:
        names = [variant.name for variant in VARIANTS]
        if unknown := set(self.only) - {*names, RANDOM}:
            raise ValueError(f"expected runs among {', '.join([RANDOM, *names])}, found {', '.join(sorted(unknown))}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("expected steps or epochs, found both")
        for name in ("steps", "epochs", "k"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, found {value}")

    def chosen(self) -> list[Variant]:
        return [variant for variant in VARIANTS if not self.only or variant.name in self.only]


@dataclass(frozen=True, kw_only=True)
class DoneRun:
    """value: top-1 accuracy. warnings: of the run, such as a collapse."""

    value: float
    interval: Interval
    num_steps: int = 0
    seconds: float = 0.0
    warnings: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class AblationResult(EvaluationResult):
    """Figures beside the published ones. failed: why a run has none, by name. stopped: before all had been tried."""

    failed: dict[str, str]
    stopped: bool = False

    def rows(self) -> list[tuple[str, str, str]]:
        return [
            (name, value, f"{interval}   {_published(figure)}".rstrip())
            for figure, (name, value, interval) in zip(self.figures, super().rows(), strict=True)
        ]

    def to_markdown(self) -> str:
        lines = [self.protocol, "", "| run | is | k-NN | 95 % interval | published k-NN | published linear |"]
        lines.append("| --- | --- | ---: | --- | ---: | ---: |")
        for figure, (_, value, interval) in zip(self.figures, super().rows(), strict=True):
            variant = _variant_of(figure)
            what = "the backbone before training" if variant is None else variant.what
            known = (None, None) if variant is None else (variant.knn, variant.linear)
            cells = [
                figure.keys[-1],
                what,
                value,
                interval,
                *("" if value is None else f"{100 * value:.1f}" for value in known),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| {name} | | failed | | | |" for name in self.failed]
        return "\n".join([*lines, "", *(f"- {remark}" for remark in self.remarks)]) + "\n"

    def plot(self) -> Image.Image:
        bars = [
            Bar(f"{figure.keys[-1]} {_published(figure)}".rstrip(), figure.value, figure.interval)
            for figure in self.figures
        ]
        return draw_bars(self.protocol, bars)


def evaluate_ablation(
    images: Sequence[StrPath],
    train: StrPath,
    val: StrPath,
    out: Path,
    options: AblationOptions,
    open_store: OpenStore,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_remark: Callable[[str], None] = lambda remark: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> AblationResult:
    """k-NN accuracy of the chosen runs, pretrained on `images`, and of those that `out` holds already.

    A run that fails is reported and left out. Raises RunExists where `out` holds runs with other settings;
    EvaluationImpossible where not one could be measured; and as `ImageSource.open` and `evaluate_knn` do for what all
    runs need.
    """
    ablation = _Ablation([os.fspath(path) for path in images], train, val, out, options, open_store)
    ablation.refuse_other_settings()
    # Before hours of training: what evaluation needs is there.
    done = {RANDOM: ablation.measure_random()}
    failed: dict[str, str] = {}
    stopped = False
    chosen = options.chosen()
    for number, variant in enumerate(chosen, 1):
        if (known := ablation.known(variant.name)) is not None:
            on_remark(f"{variant.name}: done before")
        elif stopped := stopped or should_stop():
            break
        else:
            on_remark(f"{variant.name} ({number} of {len(chosen)}): {variant.what}")
            try:
                known = ablation.run(variant, on_progress, on_remark, should_stop)
            except (DinoSearchError, RuntimeError, MemoryError) as error:  # torch has no type for what does not fit
                failed[variant.name] = " ".join(str(error).split()) or type(error).__name__
                on_remark(f"{variant.name} failed: {failed[variant.name]}")
                continue
            if known is None:
                stopped = True
                break
        done[variant.name] = known
    for variant in VARIANTS:  # of earlier calls
        known = ablation.known(variant.name) if variant.name not in failed else None
        if known is not None:
            done.setdefault(variant.name, known)
    if not stopped and len(done) == 1 and failed:
        raise EvaluationImpossible(f"not one of {len(failed)} runs could be measured: {'; '.join(failed.values())}")
    return ablation.result(done, failed, stopped)


class _Ablation:
    """The runs in one folder, all of one scale."""

    def __init__(
        self,
        images: Sequence[str],
        train: StrPath,
        val: StrPath,
        out: Path,
        options: AblationOptions,
        open_store: OpenStore,
    ) -> None:
        self._images, self._train, self._val, self._out = images, train, val, out
        self._options, self._open_store = options, open_store
        source = ImageSource.open(images)
        self._num_images, self._digest = len(source), source.digest
        recipe = options.recipe
        if options.steps is not None:
            recipe = replace(recipe, epochs=math.ceil(options.steps / max(1, self._num_images // recipe.batch_size)))
        elif options.epochs is not None:
            recipe = replace(recipe, epochs=options.epochs)
        self._base, _ = recipe.resolve(self._num_images)

    def refuse_other_settings(self) -> None:
        """Raises RunExists where the folder holds a run, whichever, that was made otherwise; RecipeError."""
        for name in [RANDOM, *(variant.name for variant in VARIANTS)]:
            before = self._read(name)
            if before is not None and before["settings"] != self._settings(name):
                raise RunExists(
                    f"{self._folder(name)} holds a run with other images or settings than are asked for now; ask for "
                    "the same ones to go on with it, or choose another --out"
                )

    def known(self, name: str) -> DoneRun | None:
        """A run that is done."""
        found = self._read(name)
        if found is None or found.get("done") is None:
            return None
        values = found["done"]
        return DoneRun(**values | {"interval": tuple(values["interval"])})

    def measure_random(self) -> DoneRun:
        """The backbone that all runs with the base's architecture start from."""
        if (known := self.known(RANDOM)) is not None:
            return known
        folder = self._begin(RANDOM)
        torch.manual_seed(self._base.seed)
        backbone = build_backbone(self._base, student=True)
        export_backbone(backbone, self._base, folder / WEIGHTS, {"recipe": RANDOM})
        return self._measure(RANDOM, 0, 0.0, [])

    def run(
        self,
        variant: Variant,
        on_progress: Callable[[Progress], None],
        on_remark: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> DoneRun | None:
        """Trains and measures; None where it was asked to stop before."""
        recipe = variant.recipe(self._base)
        folder = self._begin(variant.name)
        began = time.monotonic()
        summary = pretrain(
            self._images, folder, recipe, resume=bool(list_checkpoints(folder)),
            on_progress=on_progress, on_remark=on_remark, should_stop=should_stop,
        )  # fmt: skip
        if summary.status == "stopped":
            return None
        return self._measure(variant.name, summary.num_steps, time.monotonic() - began, summary.warnings)

    def result(self, done: dict[str, DoneRun], failed: dict[str, str], stopped: bool) -> AblationResult:
        options, base = self._options, self._base
        variants = [variant for variant in VARIANTS if variant.name in done]
        order = [RANDOM, *(variant.name for variant in variants)]
        return AblationResult(
            protocol=f"ablation of {base.name}: weighted {options.k}-NN after {base.epochs} epochs of "
            f"{self._num_images:,} images",
            figures=[
                Figure(keys=("top1", name), value=done[name].value, interval=done[name].interval) for name in order
            ],
            facts={
                "published": {
                    variant.name: {"knn": variant.knn, "linear": variant.linear}
                    for variant in variants
                    if variant.knn is not None
                },
                "runs": {
                    name: {
                        "folder": str(self._folder(name)),
                        "steps": done[name].num_steps,
                        "seconds": round(done[name].seconds, 1),
                        "warnings": list(done[name].warnings),
                    }
                    for name in order
                },
                "failed": failed,
                "k": options.k,
                "seed": options.seed,
                "images": self._num_images,
                "epochs": base.epochs,
                "batch_size": base.batch_size,
                "recipe": base.name,
            },
            remarks=[
                f"published figures are of ImageNet, ViT-S and 100 epochs or more; these of {self._num_images:,} "
                f"images, {base.epochs} epochs and one seed: compare the order within a column, if that",
                *(f"{name}: {warning}" for name in order for warning in done[name].warnings),
                *(f"{name} failed: {message}" for name, message in failed.items()),
            ],
            failed=failed,
            stopped=stopped,
        )

    def _measure(self, name: str, num_steps: int, seconds: float, warnings: Sequence[str]) -> DoneRun:
        options = self._options
        with self._open_store(self._folder(name) / WEIGHTS) as store:
            found = evaluate_knn(store, self._train, self._val, KnnOptions(ks=(options.k,), seed=options.seed))
        (figure,) = (figure for figure in found.figures if figure.keys[0] == "top1")
        done = DoneRun(
            value=figure.value, interval=figure.interval, num_steps=num_steps, seconds=seconds, warnings=list(warnings)
        )
        self._write(name, done)
        return done

    def _settings(self, name: str) -> dict[str, Any]:
        """What decides the figure of a run, as JSON values."""
        variant = next((variant for variant in VARIANTS if variant.name == name), None)
        recipe = self._base if variant is None else variant.recipe(self._base)
        return {
            "recipe": replace(recipe, **_OF_THE_MACHINE).to_yaml(),
            "images": self._digest,
            "train": os.path.abspath(self._train),
            "val": os.path.abspath(self._val),
            "k": self._options.k,
            "seed": self._options.seed,
        }

    def _folder(self, name: str) -> Path:
        return self._out / RUNS / name

    def _begin(self, name: str) -> Path:
        folder = self._folder(name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputUnwritable(f"{folder} cannot be made: {error.strerror}; choose another --out") from error
        self._write(name, None)
        return folder

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self._folder(name) / _DONE).read_text("utf-8"))
        except (OSError, ValueError):  # none, or half of one
            return None
        return found

    def _write(self, name: str, done: DoneRun | None) -> None:
        path = self._folder(name) / _DONE
        values = None if done is None else vars(done)
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps({"settings": self._settings(name), "done": values}, indent=1), "utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise OutputUnwritable(f"{path} cannot be written: {error.strerror}; choose another --out") from error


# Settings that may differ between two calls for the same runs.
_OF_THE_MACHINE: dict[str, Any] = {
    "device": "auto", "precision": "auto", "attention": "auto", "compile": "auto", "workers": 0, "cache_gb": 4.0,
    "save_every_minutes": 5.0, "log_every_steps": 10,
}  # fmt: skip


def _variant_of(figure: Figure) -> Variant | None:
    return next((variant for variant in VARIANTS if variant.name == figure.keys[-1]), None)


def _published(figure: Figure) -> str:
    variant = _variant_of(figure)
    return "" if variant is None or variant.knn is None else f"(published {100 * variant.knn:.1f} %)"

"""Why DINO needs both centring and sharpening: the same run with both, with either, with neither.

The experiment of arXiv 2104.14294, figure 7, at any scale: the entropy of the teacher's targets, and the KL divergence
that the student is left with. Without centring the entropy falls to 0 (one prototype for every image), without
sharpening it rises to ln K (all prototypes alike); in both cases the KL falls to 0, and nothing is learnt any more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_index.errors import EvaluationImpossible, RecipeError, RunExists, TrainingDiverged
from dino_training.checkpoints import list_checkpoints
from dino_training.collapse import name_collapse
from dino_training.evaluation.bootstrap import interval_of_mean
from dino_training.evaluation.plots import draw_lines, side_by_side
from dino_training.evaluation.results import EvaluationResult, Figure
from dino_training.image_source import ImageSource
from dino_training.pretraining import RECIPE, Progress, pretrain
from dino_training.recipe import Recipe, load_recipe
from dino_training.run_log import METRICS

RUNS = "runs"
# Share of a run, at its end, that its figures are the mean of.
_END_FRAC = 0.25

_Switches = dict[str, Any]
_WITHOUT_CENTRING: _Switches = {"centring": "none"}
_WITHOUT_SHARPENING: _Switches = {"sharpening": False}
VARIANTS: dict[str, _Switches] = {
    "both": {},
    "centring only": _WITHOUT_SHARPENING,
    "sharpening only": _WITHOUT_CENTRING,
    "neither": _WITHOUT_CENTRING | _WITHOUT_SHARPENING,
}
"""Name of each run: what differs from the recipe."""


@dataclass(frozen=True, kw_only=True)
class CollapseOptions:
    """recipe: what all runs share. steps, epochs: length of each; None: the recipe's."""

    recipe: Recipe
    steps: int | None = None
    """At least so many steps of the recipe's batch, in whole epochs."""
    epochs: int | None = None
    seed: int = 0
    """Of the confidence intervals; that of the runs is the recipe's."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("expected steps or epochs, found both")
        for name in ("steps", "epochs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, found {value}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """What a run logged, by step: the teacher's entropy and the KL in nats; nan where they were not finite."""

    steps_S: NDArray[np.int64]
    teacher_entropy_S: NDArray[np.float64]
    mean_entropy_S: NDArray[np.float64]
    """Of the mean of the targets over a batch: what is left of it shows whether images differ."""
    kl_S: NDArray[np.float64]
    spread_S: NDArray[np.float64]

    @classmethod
    def read(cls, run: Path) -> Curves:
        """Those in a run's metrics.jsonl."""
        rows = [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]
        rows = [row for row in rows if row["event"] == "step"]

        def column(key: str) -> NDArray[np.float64]:
            return np.array([math.nan if row[key] is None else row[key] for row in rows], np.float64)

        return cls(
            steps_S=np.array([row["step"] for row in rows], np.int64),
            teacher_entropy_S=column("teacher_entropy"),
            mean_entropy_S=column("mean_entropy"),
            kl_S=column("kl"),
            spread_S=column("spread"),
        )

    def at_end(self, values_S: NDArray[np.float64]) -> NDArray[np.float64]:
        """The finite values of the last quarter of the steps, or the last one before; one nan if there is none."""
        last_S = values_S[-max(1, round(_END_FRAC * len(values_S))) :]
        for part_S in (last_S[np.isfinite(last_S)], values_S[np.isfinite(values_S)][-1:]):
            if len(part_S):
                return part_S
        return np.array([math.nan])

    def points(self, values_S: NDArray[np.float64]) -> list[tuple[float, float]]:
        return list(zip(self.steps_S.tolist(), values_S.tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        columns = {"teacher_entropy": self.teacher_entropy_S, "mean_entropy": self.mean_entropy_S, "kl": self.kl_S}
        return {"step": self.steps_S.tolist()} | {
            key: [value if math.isfinite(value) else None for value in values_S.tolist()]
            for key, values_S in columns.items()
        }


@dataclass(frozen=True, kw_only=True)
class CollapseResult(EvaluationResult):
    """Figures are shares of ln K, means over the end of a run; curves_of: all of it, by the name of the run."""

    curves_of: dict[str, Curves]
    ln_k: float

    def plot(self) -> Image.Image:
        """Two panels: the teacher's entropy and the KL, a line for each run."""
        curves_of, marks = self.curves_of, {"ln K": self.ln_k}
        return side_by_side(
            [
                draw_lines(
                    "Entropy of the teacher's targets (nats)",
                    "step",
                    {name: curves.points(curves.teacher_entropy_S) for name, curves in curves_of.items()},
                    y_range=(0, self.ln_k),
                    marks=marks,
                ),
                draw_lines(
                    "KL divergence, teacher to student (nats)",
                    "step",
                    {name: curves.points(curves.kl_S) for name, curves in curves_of.items()},
                    y_range=(0, 0),
                ),
            ]
        )


def evaluate_collapse(
    images: Sequence[str | Path],
    out: Path,
    options: CollapseOptions,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_remark: Callable[[str], None] = lambda remark: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> CollapseResult | None:
    """Trains the four runs in `out`/runs and compares their curves; None where it was asked to stop before the end.

    Runs that are there are gone on with. One that diverges is reported, and its curve ends there.
    Raises RecipeError for a recipe that has no centring, no sharpening or no prototypes; RunExists where `out` holds
    runs of another length; EvaluationImpossible where a run has logged nothing; and as `pretrain` does.
    """
    recipe = _recipe_of(options, len(ImageSource.open(images)))
    curves_of: dict[str, Curves] = {}
    diverged: dict[str, str] = {}
    for number, (name, switches) in enumerate(VARIANTS.items(), 1):
        run = out / RUNS / name.replace(" ", "_")
        on_remark(f"{name} ({number} of {len(VARIANTS)})")
        resume = bool(list_checkpoints(run))
        if resume and (epochs := load_recipe(run / RECIPE).epochs) != recipe.epochs:
            raise RunExists(
                f"{run} holds a run of {epochs} epochs, found {recipe.epochs} asked for now; ask for {epochs}, "
                "or choose another --out"
            )
        try:
            summary = pretrain(
                images, run, replace(recipe, **switches), resume=resume,
                on_progress=on_progress, on_remark=on_remark, should_stop=should_stop,
            )  # fmt: skip
        except TrainingDiverged as error:
            diverged[name] = str(error)
        else:
            if summary.status == "stopped":
                return None
        curves_of[name] = Curves.read(run)
        if not (np.isfinite(curves_of[name].teacher_entropy_S) & np.isfinite(curves_of[name].kl_S)).any():
            raise EvaluationImpossible(
                f"expected entropy and KL of each step of the run in {run}, found no finite value: "
                f"{diverged.get(name, 'it has logged none')}; --set a lower learning_rate"
            )
    return _result(curves_of, recipe, options, diverged)


def _recipe_of(options: CollapseOptions, num_images: int) -> Recipe:
    """What the runs share, with nothing `auto` that depends on the number of images. Raises RecipeError."""
    recipe = options.recipe
    if not recipe.uses_prototypes or recipe.centring == "none" or not recipe.sharpening or recipe.teacher == "frozen":
        raise RecipeError(
            "expected a recipe with prototypes, centring and sharpening, which the runs then go without in turn, found "
            f"loss {recipe.loss}, centring {recipe.centring}, sharpening {recipe.sharpening}, teacher {recipe.teacher};"
            " take another --recipe, such as small"
        )
    if options.steps is not None:
        recipe = replace(recipe, epochs=math.ceil(options.steps / max(1, num_images // recipe.batch_size)))
    elif options.epochs is not None:
        recipe = replace(recipe, epochs=options.epochs)
    recipe, _ = recipe.resolve(num_images)
    # Each step is a point of the curves; what the runs are worth otherwise is not asked.
    return replace(recipe, log_every_steps=1, evaluate_every_epochs=0.0, labels="none")


def _result(
    curves_of: dict[str, Curves], recipe: Recipe, options: CollapseOptions, diverged: dict[str, str]
) -> CollapseResult:
    assert isinstance(recipe.num_prototypes, int)
    ln_k = math.log(recipe.num_prototypes)
    figures: list[Figure] = []
    kinds: dict[str, str | None] = {}
    remarks = [f"shares of ln K = {ln_k:.3f}, means over the last quarter of {_length(curves_of['both'])} steps"]
    for key, attribute in (("teacher_entropy_frac", "teacher_entropy_S"), ("kl_frac", "kl_S")):
        for name, curves in curves_of.items():
            values_S = curves.at_end(getattr(curves, attribute)) / ln_k
            interval = interval_of_mean(values_S, seed=options.seed)
            figures.append(Figure(keys=(key, name), value=float(values_S.mean()), interval=interval))
    for name, curves in curves_of.items():
        found = name_collapse(
            recipe.num_prototypes,
            entropy=float(curves.at_end(curves.teacher_entropy_S).mean()),
            mean_entropy=float(curves.at_end(curves.mean_entropy_S).mean()),
            spread=float(curves.at_end(curves.spread_S).mean()),
        )
        kinds[name] = found.kind if found is not None else None
        remarks.append(f"{name}: {_KINDS_IN_WORDS[kinds[name]]}")
    remarks += [f"{name}: {message}" for name, message in diverged.items()]
    return CollapseResult(
        protocol=f"collapse of {recipe.name}, {recipe.architecture}, K {recipe.num_prototypes}, "
        f"{recipe.epochs} epochs, batches of {recipe.batch_size}",
        figures=figures,
        facts={
            "collapse": kinds,
            "ln_k": ln_k,
            "diverged": diverged,
            "recipe": recipe.name,
            "epochs": recipe.epochs,
            "batch_size": recipe.batch_size,
            "curves": {name: curves.to_json() for name, curves in curves_of.items()},
        },
        remarks=remarks,
        curves_of=curves_of,
        ln_k=ln_k,
    )


_KINDS_IN_WORDS: dict[str | None, str] = {
    None: "no collapse at its end",
    "uniform": "collapsed to the uniform distribution",
    "single_dimension": "collapsed to a single dimension",
    "constant": "collapsed to one distribution for every image",
}


def _length(curves: Curves) -> int:
    return int(curves.steps_S[-1])

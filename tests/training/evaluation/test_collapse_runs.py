"""`evaluate collapse`: four tiny runs, their curves, and what is said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dino_index.errors import EvaluationImpossible, RecipeError, RunExists, TrainingDiverged
from dino_training.evaluation.collapse import (
    VARIANTS,
    CollapseOptions,
    CollapseResult,
    Curves,
    _result,
    evaluate_collapse,
)
from dino_training.evaluation.results import write_results
from dino_training.pretraining import RunSummary, pretrain
from dino_training.recipe import load_recipe
from tiny_runs import STEPS_PER_EPOCH, quick_runs, stop_after, tiny_recipe, write_noise

NAMES = ["both", "centring only", "sharpening only", "neither"]
LN_K = math.log(16)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("noise"))


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def finished(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CollapseResult, Path]:
    """Long enough for tiny networks without centring to end at one prototype."""
    out = tmp_path_factory.mktemp("out")
    recipe = tiny_recipe(center_momentum=0.5, momentum=0.9)
    result = evaluate_collapse([noise], out, CollapseOptions(recipe=recipe, steps=60))
    assert result is not None
    return result, out


def test_the_json_has_both_curves_of_all_four_runs(finished: tuple[CollapseResult, Path]) -> None:
    printed = json.loads(json.dumps(finished[0].to_json()))
    assert list(printed["curves"]) == NAMES
    for name in NAMES:
        curve = printed["curves"][name]
        assert curve["step"] == list(range(1, 61))
        assert len(curve["teacher_entropy"]) == len(curve["kl"]) == len(curve["mean_entropy"]) == 60
        assert all(0 <= value <= LN_K + 1e-4 for value in curve["teacher_entropy"])
        for key, series in (("teacher_entropy_frac", "teacher_entropy"), ("kl_frac", "kl")):
            assert printed[key][name] == pytest.approx(np.mean(curve[series][-15:]) / LN_K, rel=1e-4)
            low, high = printed["confidence"][key][name]
            assert low <= printed[key][name] <= high
    assert printed["ln_k"] == pytest.approx(LN_K)


def test_runs_differ_in_the_two_switches_alone(finished: tuple[CollapseResult, Path]) -> None:
    recipes = [load_recipe(finished[1] / "runs" / name.replace(" ", "_") / "recipe.yaml") for name in NAMES]
    assert [(recipe.centring, recipe.sharpening) for recipe in recipes] == [
        ("mean", True), ("mean", False), ("none", True), ("none", False),
    ]  # fmt: skip
    assert len({recipe.to_yaml().replace("centring: none", "centring: mean") for recipe in recipes}) == 2
    assert {recipe.epochs for recipe in recipes} == {20}


def test_sharpening_lowers_the_entropy_and_centring_raises_it(finished: tuple[CollapseResult, Path]) -> None:
    entropies = finished[0].to_json()["teacher_entropy_frac"]
    assert entropies["sharpening only"] < entropies["both"] <= entropies["centring only"]
    assert entropies["sharpening only"] < entropies["neither"]


def test_the_plot_has_a_line_for_each_run_in_both_panels(finished: tuple[CollapseResult, Path], tmp_path: Path) -> None:
    result = finished[0]
    pixels_HWC = np.asarray(result.plot())
    half = pixels_HWC.shape[1] // 2
    for panel_HWC in (pixels_HWC[:, :half], pixels_HWC[:, half:]):
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)):
            assert (panel_HWC == colour).all(axis=-1).sum() > 200
    write_results(result, tmp_path)
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert "| teacher_entropy_frac both |" in (tmp_path / "table.md").read_text()


def test_the_same_command_goes_on_after_a_stop_and_ends_as_without_one(
    finished: tuple[CollapseResult, Path], noise: Path, tmp_path: Path
) -> None:
    options = CollapseOptions(recipe=tiny_recipe(center_momentum=0.5, momentum=0.9), steps=60)
    assert evaluate_collapse([noise], tmp_path, options, should_stop=stop_after(70)) is None
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["both", "centring_only"]
    result = evaluate_collapse([noise], tmp_path, options)
    assert result is not None
    assert result.to_json() == finished[0].to_json()


def test_runs_of_another_length_are_not_gone_on_with(finished: tuple[CollapseResult, Path], noise: Path) -> None:
    with pytest.raises(RunExists, match="holds a run of 20 epochs, found 2 asked for now"):
        evaluate_collapse([noise], finished[1], CollapseOptions(recipe=tiny_recipe(), epochs=2))


@pytest.mark.parametrize(
    "changed",
    [{"centring": "none"}, {"sharpening": False}, {"loss": "mse"}],
    ids=["no centring", "no sharpening", "no prototypes"],
)
def test_a_recipe_without_what_is_switched_off_is_refused(
    changed: dict[str, object], noise: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="expected a recipe with prototypes, centring and sharpening"):
        evaluate_collapse([noise], tmp_path / "out", CollapseOptions(recipe=tiny_recipe(**changed), epochs=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [({"steps": 3, "epochs": 1}, "found both"), ({"steps": 0}, "steps must be"), ({"epochs": -1}, "epochs must be")],
)
def test_lengths_that_make_no_sense_are_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollapseOptions(recipe=tiny_recipe(), **given)


def test_a_run_that_diverges_is_reported_and_the_others_count(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*arguments: object, **named: object) -> RunSummary:
        summary = pretrain(*arguments, **named)  # type: ignore[arg-type]
        if Path(str(arguments[1])).name == "neither":
            raise TrainingDiverged("not finite")
        return summary

    monkeypatch.setattr("dino_training.evaluation.collapse.pretrain", diverging)
    result = evaluate_collapse([noise], tmp_path, CollapseOptions(recipe=tiny_recipe(), epochs=1))
    assert result is not None
    printed = result.to_json()
    assert printed["diverged"] == {"neither": "not finite"}
    assert list(printed["curves"]) == NAMES
    assert "neither: not finite" in result.remarks
    assert len(printed["curves"]["both"]["step"]) == STEPS_PER_EPOCH


def curves(entropy: float, mean_entropy: float, kl: float = 0.1) -> Curves:
    flat = np.ones(8)
    return Curves(
        steps_S=np.arange(8), teacher_entropy_S=entropy * flat, mean_entropy_S=mean_entropy * flat, kl_S=kl * flat,
        spread_S=flat,
    )  # fmt: skip


def test_each_kind_of_collapse_is_named() -> None:
    given = dict(
        zip(NAMES, [curves(1.5, 2.5), curves(LN_K, LN_K), curves(0.001, 0.002), curves(2.0, 2.0)], strict=True)
    )
    result = _result(given, tiny_recipe(), CollapseOptions(recipe=tiny_recipe()), {})
    assert result.to_json()["collapse"] == {
        "both": None, "centring only": "uniform", "sharpening only": "single_dimension", "neither": "constant",
    }  # fmt: skip
    assert list(VARIANTS) == NAMES


def test_values_that_are_not_finite_are_null_and_count_nowhere(tmp_path: Path) -> None:
    rows = [
        {"event": "step", "step": step, "teacher_entropy": None if step % 2 else 1.0, "mean_entropy": 2.0, "kl": 0.5,
         "spread": 1.0}
        for step in range(1, 9)
    ]  # fmt: skip
    lines = [json.dumps(row) for row in [{"event": "remark", "step": 0}, *rows]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    read = Curves.read(tmp_path)
    assert read.to_json()["teacher_entropy"] == [None, 1.0] * 4
    assert read.at_end(read.teacher_entropy_S).tolist() == [1.0]
    assert len(read.points(read.kl_S)) == 8
    assert read.at_end(np.array([1.0, 2.0, *[np.nan] * 6])).tolist() == [2.0]


def test_a_run_without_one_finite_value_cannot_be_judged(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(paths: object, run: Path, *others: object, **named: object) -> RunSummary:
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text('{"event": "remark", "step": 1}\n')
        raise TrainingDiverged("loss was not finite in 5 steps")

    monkeypatch.setattr("dino_training.evaluation.collapse.pretrain", failing)
    with pytest.raises(EvaluationImpossible, match=r"found no finite value: loss was not finite in 5 steps; --set"):
        evaluate_collapse([noise], tmp_path, CollapseOptions(recipe=tiny_recipe(), epochs=1))

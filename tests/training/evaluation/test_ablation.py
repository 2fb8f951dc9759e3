from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_index.errors import EvaluationImpossible, RecipeError, RunExists, TrainingDiverged
from dino_index.model_files import resolve_model
from dino_training import Recipe, load_recipe, pretrain
from dino_training.evaluation import ablation
from dino_training.evaluation.ablation import AblationOptions, AblationResult, evaluate_ablation
from dino_training.evaluation.ablation_variants import VARIANTS, recipe_changes
from dino_training.evaluation.features import FeatureStore
from dino_training.evaluation.knn import KnnOptions, evaluate_knn
from dino_training.recipe import recipe_names
from set_bytes import write_mnist
from tiny_runs import leave_out_pictures, tiny_recipe

BY_NAME = {variant.name: variant for variant in VARIANTS}


def open_store(weights: Path) -> AbstractContextManager[FeatureStore]:
    @contextmanager
    def opened() -> Iterator[FeatureStore]:
        store = FeatureStore(resolve_model(weights), device="cpu")
        yield store
        store.close()

    return opened()


class Folder:
    """A set of 24 + 8 pictures in four classes, and a folder for runs of one epoch on it."""

    def __init__(self, folder: Path) -> None:
        self.set = write_mnist(folder / "set", [0, 3, 6, 9] * 6, [0, 3, 6, 9] * 2, side=16)
        self.out = folder / "out"
        self.remarks: list[str] = []

    def evaluate(self, *only: str, recipe: Recipe | None = None, **options: Any) -> AblationResult:
        self.remarks.clear()
        chosen = AblationOptions(recipe=recipe or tiny_recipe(), only=only, **{"epochs": 1, "k": 3} | options)
        return evaluate_ablation(
            [self.set], self.set, self.set, self.out, chosen, open_store, on_remark=self.remarks.append
        )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    leave_out_pictures(monkeypatch)
    return Folder(tmp_path)


# --- variants


def test_every_ablation_recipe_is_a_run_and_changes_what_its_name_says() -> None:
    shipped = {name.removeprefix("ablation/") for name in recipe_names() if name.startswith("ablation/")}
    assert shipped <= BY_NAME.keys()
    assert recipe_changes("dino") == {}
    assert recipe_changes("mse") == {"loss": "mse"}
    assert recipe_changes("no_multi_crop") == {"multi_crop": False, "global_scale": (0.14, 1.0)}


@pytest.mark.parametrize("name", BY_NAME)
def test_variant_differs_from_the_base_in_what_it_is_about_alone(name: str) -> None:
    base = load_recipe("small", ["num_prototypes=512", "epochs=7"])
    recipe = BY_NAME[name].recipe(base)
    changed = {field.name for field in fields(Recipe) if getattr(recipe, field.name) != getattr(base, field.name)}
    assert recipe.name == f"small/{name}"
    if name.endswith("_batch"):
        parts = {"half": 2, "quarter": 4, "eighth": 8}[name.removesuffix("_batch")]
        assert changed == {"name", "batch_size", "multi_crop", "global_scale"}
        assert recipe.batch_size == 64 / parts
    elif name == "half_patches":
        assert changed == {"name", "architecture_args"}
        assert recipe.architecture_args == {"patch_size": 4}
    else:
        # Where the base has a variant's value already, nothing is left to change.
        assert changed - {"name"} <= recipe_changes(name).keys()


def test_patch_size_is_found_in_the_architectures_name() -> None:
    base = load_recipe("ablation/dino")
    assert BY_NAME["half_patches"].recipe(base).architecture_args == {"patch_size": 8}
    with pytest.raises(RecipeError, match="expected a vision transformer with a patch size, found resnet50"):
        BY_NAME["half_patches"].recipe(load_recipe("dino_resnet50"))
    with pytest.raises(RecipeError, match="expected an even patch size to halve, found 7"):
        BY_NAME["half_patches"].recipe(load_recipe("small", ["architecture_args={patch_size: 7}"]))
    with pytest.raises(RecipeError, match="that 8 divides, found 12"):
        BY_NAME["eighth_batch"].recipe(load_recipe("small", ["batch_size=12"]))


# --- runs


def test_runs_of_every_kind_are_made_and_stand_beside_the_published_figures(folder: Folder) -> None:
    names = ("dino", "no_momentum", "mse", "swav", "half_patches", "half_batch")
    result = folder.evaluate(*names)
    assert result.failed == {}
    printed = result.to_json()
    assert list(printed["top1"]) == ["random", *names]
    assert printed["published"]["mse"] == {"knn": 0.526, "linear": 0.624}
    assert printed["runs"]["dino"]["steps"] == 3
    assert printed["runs"]["half_batch"]["steps"] == 6
    table = result.to_markdown().splitlines()
    (line,) = (line for line in table if line.startswith("| no_momentum |"))
    assert line.endswith("| 0.1 | 0.1 |")
    assert sum(line.startswith("| ") for line in table) == 2 + 1 + len(names)
    assert result.plot().width > 400
    for name, value in printed["top1"].items():
        with open_store(folder.out / "runs" / name / "backbone.safetensors") as store:
            direct = evaluate_knn(store, folder.set, folder.set, KnnOptions(ks=(3,))).to_json()
        assert direct["top1"]["3"] == value, name


def test_random_is_where_every_run_starts(folder: Folder) -> None:
    result = folder.evaluate("dino", recipe=tiny_recipe(learning_rate=0.0, min_learning_rate=0.0))
    top1 = result.to_json()["top1"]
    assert top1["dino"] == top1["random"]


def test_runs_that_are_done_are_not_repeated_and_others_are_added(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = folder.evaluate("dino", "mse").to_json()
    trained: list[str] = []

    def note(paths: Any, run: Path, *arguments: Any, **options: Any) -> Any:
        trained.append(run.name)
        return pretrain(paths, run, *arguments, **options)

    monkeypatch.setattr(ablation, "pretrain", note)
    second = folder.evaluate("sinkhorn").to_json()
    assert trained == ["sinkhorn"]
    assert list(second["top1"]) == ["random", "dino", "sinkhorn", "mse"]
    assert second["top1"] | first["top1"] == second["top1"]
    folder.evaluate("dino", "mse", "sinkhorn")
    assert trained == ["sinkhorn"]
    assert folder.remarks == ["dino: done before", "sinkhorn: done before", "mse: done before"]


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(folder: Folder, tmp_path: Path) -> None:
    asked = iter([False] * 4 + [True] * 9)
    chosen = AblationOptions(recipe=tiny_recipe(), only=("dino", "mse"), epochs=3, k=3)
    stopped = evaluate_ablation(
        [folder.set], folder.set, folder.set, folder.out, chosen, open_store, should_stop=lambda: next(asked)
    )
    assert stopped.stopped
    assert list(stopped.to_json()["top1"]) == ["random"]
    resumed = folder.evaluate("dino", "mse", epochs=3).to_json()["top1"]
    folder.out = tmp_path / "other"
    assert folder.evaluate("dino", "mse", epochs=3).to_json()["top1"] == resumed


def test_a_run_that_fails_is_reported_and_the_others_go_on(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:

    def fail_some(paths: Any, run: Path, *arguments: Any, **options: Any) -> Any:
        if run.name == "dino":
            raise TrainingDiverged("the loss was not finite")
        if run.name == "mse":
            raise RuntimeError("CUDA out of memory.\nTried to allocate")
        return pretrain(paths, run, *arguments, **options)

    monkeypatch.setattr(ablation, "pretrain", fail_some)
    # eighth_batch does not go together with a batch of 12.
    result = folder.evaluate("dino", "mse", "byol", "eighth_batch", recipe=tiny_recipe(batch_size=12))
    assert list(result.to_json()["top1"]) == ["random", "byol"]
    assert result.to_json()["failed"] == {
        "dino": "the loss was not finite",
        "mse": "CUDA out of memory. Tried to allocate",
        "eighth_batch": "expected a batch_size that 8 divides, found 12; --set another",
    }
    assert "| mse | | failed | | | |" in result.to_markdown()
    monkeypatch.setattr(ablation, "pretrain", pretrain)
    again = folder.evaluate("dino", "mse", recipe=tiny_recipe(batch_size=12))
    assert list(again.to_json()["top1"]) == ["random", "dino", "mse", "byol"]
    assert again.failed == {}


def test_nothing_that_could_be_measured_is_an_error(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TrainingDiverged("the loss was not finite")

    monkeypatch.setattr(ablation, "pretrain", fail)
    with pytest.raises(EvaluationImpossible, match="not one of 1 runs could be measured: the loss was not finite"):
        folder.evaluate("dino")


def test_a_folder_with_runs_of_other_settings_is_left_as_it_is(folder: Folder) -> None:
    folder.evaluate("dino")
    before = (folder.out / "runs/dino/ablation.json").read_bytes()
    for changed in ({"epochs": 2}, {"k": 2}, {"recipe": tiny_recipe(seed=1)}):
        with pytest.raises(RunExists, match=r"random holds a run with other images or settings"):
            folder.evaluate("mse", **changed)
    write_mnist(folder.set, [0, 3, 6, 9] * 7, [0, 3, 6, 9] * 2, side=16)
    with pytest.raises(RunExists):
        folder.evaluate("dino")
    assert (folder.out / "runs/dino/ablation.json").read_bytes() == before


def test_what_belongs_to_the_machine_may_change(folder: Folder) -> None:
    folder.evaluate("dino")
    folder.evaluate("dino", recipe=tiny_recipe(workers=2, log_every_steps=5))
    assert folder.remarks == ["dino: done before"]


def test_one_class_ends_before_anything_is_trained(folder: Folder) -> None:
    for file in folder.set.iterdir():
        file.unlink()
    write_mnist(folder.set, [7] * 16, [7] * 4, side=16)
    with pytest.raises(EvaluationImpossible, match="found one"):
        folder.evaluate()
    assert not (folder.out / "runs/dino").exists()


def test_fewer_images_than_k_all_vote(folder: Folder) -> None:
    result = folder.evaluate("dino", k=1000).to_json()
    assert result["k"] == 1000
    assert 0 <= result["top1"]["dino"] <= 1


def test_steps_are_filled_up_to_whole_epochs(folder: Folder) -> None:
    result = folder.evaluate("dino", epochs=None, steps=4).to_json()
    assert (result["epochs"], result["runs"]["dino"]["steps"]) == (2, 6)


def test_half_written_result_of_a_run_counts_as_none(folder: Folder) -> None:
    whole = folder.evaluate("dino").to_json()["top1"]
    path = folder.out / "runs/dino/ablation.json"
    path.write_text(path.read_text()[:40])
    assert folder.evaluate("dino").to_json()["top1"] == whole
    assert json.loads(path.read_text())["done"]["value"] == whole["dino"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"only": ("dyno",)}, "expected runs among random, dino, .*found dyno"),
        ({"steps": 1, "epochs": 1}, "expected steps or epochs, found both"),
        ({"steps": 0}, "steps must be 1 or more, found 0"),
        ({"k": 0}, "k must be 1 or more, found 0"),
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AblationOptions(recipe=tiny_recipe(), **wrong)


def test_plot_is_a_picture_with_a_bar_for_each_run(folder: Folder) -> None:
    one, two = folder.evaluate("dino").plot(), folder.evaluate("dino", "mse").plot()
    assert isinstance(one, Image.Image)
    assert two.height > one.height
    assert np.asarray(two).std() > 10

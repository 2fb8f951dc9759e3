from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from dino_index.errors import EvaluationImpossible
from dino_training import Recipe
from dino_training.evaluation.few_labels import (
    METHODS,
    FewLabelsOptions,
    evaluate_few_labels,
    fit_logistic,
    load_squares,
    train_supervised,
)
from dino_training.evaluation.labelled_images import LabelledImages
from dino_training.export import export_backbone
from dino_training.networks import build_backbone
from sample_collections import write_pictures
from set_bytes import write_mnist
from tiny_runs import tiny_recipe

QUICK = FewLabelsOptions(shots=(1, 4), draws=2, steps=5, batch_size=4, k=3)


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe(flip_prob=0.0)


@pytest.fixture
def weights(tmp_path: Path, recipe: Recipe) -> Path:
    torch.manual_seed(5)
    export_backbone(build_backbone(recipe, student=False), recipe, tmp_path / "backbone.safetensors", {})
    return tmp_path / "backbone.safetensors"


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return write_mnist(tmp_path / "set", [0, 3, 6, 9] * 6, [0, 3, 6, 9] * 3, side=16)


def test_every_method_has_a_figure_for_every_number_of_labels(weights: Path, recipe: Recipe, digits: Path) -> None:
    said: list[str] = []
    result = evaluate_few_labels(weights, recipe, digits, digits, QUICK, on_remark=said.append)
    printed = result.to_json()
    for method in METHODS:
        assert list(printed[method]) == ["1", "4"]
        for shot, value in printed[method].items():
            low, high = printed["confidence"][method][shot]
            assert 0 <= low <= value <= high <= 1
    assert (printed["val"]["used"], printed["train"]["used"], printed["classes"]) == (12, 24, 4)
    assert len(said) == 4
    assert f"| 4 | {100 * printed['dino_knn']['4']:.1f} (" in result.to_markdown()
    assert isinstance(result.plot(), Image.Image)


def test_the_same_seed_gives_the_same_figures(weights: Path, recipe: Recipe, tmp_path: Path) -> None:
    for part, seed in (("train", 0), ("val", 50)):
        names = [f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(10)]
        write_pictures(tmp_path / part, *names, seed=seed)
    options = replace(QUICK, shots=(1,), draws=1)
    results = [
        evaluate_few_labels(
            weights, recipe, tmp_path / "train", tmp_path / "val", replace(options, seed=seed)
        ).to_json()
        for seed in (1, 1, 2)
    ]
    assert results[0] == results[1]
    assert [results[0][method] for method in METHODS] != [results[2][method] for method in METHODS]


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    features_MD = rng.normal(size=(60, 8)).astype(np.float32)
    features_MD /= np.linalg.norm(features_MD, axis=1, keepdims=True)
    classes_M = rng.integers(0, 3, 60)
    asked_QD = rng.normal(size=(400, 8)).astype(np.float32)
    asked_QD /= np.linalg.norm(asked_QD, axis=1, keepdims=True)
    classify = fit_logistic(features_MD, classes_M, 3)
    # C is one over the penalty on the sum of the losses.
    oracle = LogisticRegression(C=1 / (60 * 1e-3), max_iter=5000, tol=1e-8).fit(features_MD * 8**0.5, classes_M)
    assert (classify(asked_QD) == oracle.predict(asked_QD * 8**0.5)).mean() > 0.99


def test_a_network_learns_a_few_labelled_images_by_heart(recipe: Recipe, digits: Path) -> None:
    training, squares_NSSC = load_squares(LabelledImages.open(digits, "train"), 16)
    numbers_N = np.array([["0", "3", "6", "9"].index(label) for label in training.labels])
    options = FewLabelsOptions(steps=80, batch_size=8, learning_rate=0.01)
    plain = replace(recipe, global_scale=(0.9, 1.0), jitter=(0.0, 0.0, 0.0, 0.0), blur_prob=(0.0, 0.0, 0.0),
                    solarise_prob=(0.0, 0.0, 0.0), grey_prob=0.0)  # fmt: skip
    network = train_supervised(squares_NSSC[:8], numbers_N[:8], 4, plain, options, seed=0)
    assert (network.classify(squares_NSSC[:8]) == numbers_N[:8]).mean() == 1


def test_folders_of_classes_are_taken_as_well(weights: Path, recipe: Recipe, tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(3)))
    write_pictures(tmp_path / "val", "cat/0.jpg", "newt/1.jpg", seed=9)
    (tmp_path / "train/cat/broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    result = evaluate_few_labels(weights, recipe, tmp_path / "train", tmp_path / "val", QUICK)
    assert result.to_json()["dino_knn"]["4"] <= 0.5
    remarks = "\n".join(result.remarks)
    assert "whose images count as wrong: newt" in remarks
    assert "classes with fewer than 4 images, all of which are drawn: cat, dog" in remarks
    assert "1 files cannot be read" in remarks


def test_no_more_neighbours_vote_than_a_class_has_labelled_images(weights: Path, recipe: Recipe, digits: Path) -> None:
    results = [
        evaluate_few_labels(weights, recipe, digits, digits, replace(QUICK, k=k, shots=(2,), draws=1)).to_json()
        for k in (2, 500)
    ]
    assert results[0]["dino_knn"] == results[1]["dino_knn"]
    assert results[0]["random_knn"] == results[1]["random_knn"]


def test_one_class_is_an_error_in_one_line(weights: Path, recipe: Recipe, tmp_path: Path) -> None:
    one = write_mnist(tmp_path / "one", [7] * 4, [7] * 2, side=16)
    with pytest.raises(EvaluationImpossible, match=r"found one \(7\)"):
        evaluate_few_labels(weights, recipe, one, one, QUICK)


@pytest.mark.parametrize("wrong", [{"shots": ()}, {"shots": (0,)}, {"draws": 0}, {"steps": 0}, {"k": 0}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FewLabelsOptions(**wrong)

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coloured_sets import write_coloured
from dino_index.errors import EvaluationImpossible
from dino_training.evaluation.classification import places_of_logits
from dino_training.evaluation.features import FeatureStore
from dino_training.evaluation.linear import LinearOptions, evaluate_linear, held_out_rows
from dino_training.evaluation.voting import NO_CLASS

QUICK: dict[str, Any] = {"epochs": 8, "batch_size": 8}
RATES = (0.001, 0.1, 3.0)


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    return write_coloured(tmp_path / "train", 12), write_coloured(tmp_path / "val", 4, seed=1)


@pytest.mark.parametrize("fast", [True, False])
def test_classes_that_can_be_separated_are(sets: tuple[Path, Path], store: FeatureStore, fast: bool) -> None:
    options = LinearOptions(fast=fast, learning_rates=RATES, **QUICK)
    result = evaluate_linear(store, *sets, options)
    found = result.to_json()
    assert (found["top1"], found["top5"], found["confidence"]["top1"]) == (1.0, 1.0, [1.0, 1.0])
    assert (found["features"], found["held_out"], found["batch_size"]) == ("cls-of-1", 3, 8)
    assert set(found["held_out_top1"]) == {"0.001", "0.1", "3"}
    assert ("not learnt from" in " ".join(result.remarks)) is not fast


def test_the_rate_that_was_chosen_is_trained_again_on_everything(sets: tuple[Path, Path], store: FeatureStore) -> None:
    swept = evaluate_linear(store, *sets, LinearOptions(fast=True, learning_rates=RATES, epochs=1)).to_json()
    alone = LinearOptions(fast=True, learning_rates=(swept["learning_rate"],), epochs=1)
    assert evaluate_linear(store, *sets, alone).to_json()["top1"] == swept["top1"]
    assert evaluate_linear(store, *sets, alone).to_json()["held_out"] == 0


@pytest.mark.parametrize("fast", [True, False])
def test_the_choice_of_the_rate_never_looks_at_what_is_judged(
    sets: tuple[Path, Path], store: FeatureStore, tmp_path: Path, fast: bool
) -> None:
    turned = {"blue": "green", "green": "red", "red": "blue"}
    wrong = write_coloured(tmp_path / "wrong", 4, names=turned, seed=1)
    options = LinearOptions(fast=fast, learning_rates=RATES, **QUICK)
    right, misled = (evaluate_linear(store, sets[0], val, options).to_json() for val in (sets[1], wrong))
    assert (right["top1"], misled["top1"]) == (1.0, 0.0)
    for key in ("learning_rate", "held_out_top1", "train"):
        assert right[key] == misled[key]


def test_the_rate_that_is_best_on_held_out_images_is_chosen(sets: tuple[Path, Path], store: FeatureStore) -> None:
    options = LinearOptions(fast=True, learning_rates=(1e-7, 0.3, 1e40), epochs=30, batch_size=8)
    found = evaluate_linear(store, *sets, options).to_json()
    top1 = found["held_out_top1"]
    assert found["learning_rate"] == 0.3
    assert top1["0.3"] == 1.0 > max(top1["1e-07"], top1["1e+40"])
    swept = evaluate_linear(store, *sets, LinearOptions(fast=True, epochs=30, batch_size=8)).to_json()
    assert swept["held_out_top1"][f"{swept['learning_rate']:g}"] == max(swept["held_out_top1"].values())


def test_a_tenth_of_each_class_is_held_out() -> None:
    classes = np.repeat(np.arange(5), [1, 2, 9, 40, 101])
    rows = held_out_rows(classes, 0)
    assert np.bincount(classes[rows], minlength=5).tolist() == [0, 1, 1, 4, 10]
    assert len(set(rows.tolist())) == len(rows)
    np.testing.assert_array_equal(rows, held_out_rows(classes, 0))
    assert rows.tolist() != held_out_rows(classes, 1).tolist()


@pytest.mark.parametrize("fast", [True, False])
def test_one_image_a_class_is_enough_to_learn_from(sets: tuple[Path, Path], store: FeatureStore, fast: bool) -> None:
    options = LinearOptions(fast=fast, learning_rates=(0.01, 1.0), epochs=20, per_class=1)
    result = evaluate_linear(store, *sets, options)
    found = result.to_json()
    assert (found["train"]["used"], found["held_out"], found["batch_size"]) == (3, 0, 3)
    assert found["top1"] > 0.6
    assert any("no class has one to hold out" in remark for remark in result.remarks)


@pytest.mark.parametrize("fast", [True, False])
def test_classes_only_in_val_are_wrong_and_unreadable_files_counted(
    sets: tuple[Path, Path], store: FeatureStore, fast: bool
) -> None:
    (sets[1] / "blue").rename(sets[1] / "azure")
    (sets[0] / "red/broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (sets[1] / "red/broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    result = evaluate_linear(store, *sets, LinearOptions(fast=fast, learning_rates=(0.3,), **QUICK))
    found = result.to_json()
    assert (found["top1"], found["top5"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found["classes_only_in_val"] == ["azure"]
    assert (found["train"]["used"], found["val"]["used"]) == (36, 12)
    assert [len(found[part]["unreadable"]) for part in ("train", "val")] == [1, 1]
    said = " ".join(result.remarks)
    assert "4 images are of classes without a training image, and count as wrong: azure" in said
    assert "1 training files cannot be read" in said
    assert "1 other files cannot be read" in said


@pytest.mark.parametrize("fast", [True, False])
def test_a_class_whose_images_cannot_be_read_is_no_class(
    sets: tuple[Path, Path], store: FeatureStore, fast: bool
) -> None:
    for colour in ("red", "green"):
        for path in (sets[0] / colour).iterdir():
            path.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(EvaluationImpossible, match=r"found one \(blue\)"):
        evaluate_linear(store, *sets, LinearOptions(fast=fast, **QUICK))


def test_images_that_are_learnt_from_and_judged_are_counted(sets: tuple[Path, Path], store: FeatureStore) -> None:
    (sets[1] / "red/same.png").symlink_to(sets[0] / "red/0.png")
    result = evaluate_linear(store, *sets, LinearOptions(fast=True, learning_rates=(0.3,), **QUICK))
    assert result.to_json()["val_images_in_train"] == 1
    assert "1 of the others are training images as well" in " ".join(result.remarks)


def test_the_published_rate_is_the_default_and_the_sweep_is_of_the_fast_protocol() -> None:
    assert LinearOptions().rates == (0.001,)
    assert len(LinearOptions(fast=True).rates) == 10
    assert LinearOptions(learning_rates=(1.0, 0.5, 1.0)).rates == (0.5, 1.0)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch_size": 0}, {"num_blocks": 0}, {"per_class": 0}, {"learning_rates": (0.0, 1.0)}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LinearOptions(**wrong)


def test_places_of_logits_are_how_many_classes_are_ahead() -> None:
    logits = torch.randn(40, 7)
    logits[:10] *= 1e4  # probabilities of 0 in float32
    own = torch.randint(7, (40,))
    own[5] = NO_CLASS
    logits[6, 2] = torch.nan
    logits[7, 2] = torch.inf
    places = places_of_logits(logits, own)
    assert places[5:8].tolist() == [-1, -1, -1]
    for row in [*range(5), *range(8, 40)]:
        ranked = sorted(range(7), key=lambda number: (-logits[row, number].item(), number))
        assert places[row] == ranked.index(int(own[row]))

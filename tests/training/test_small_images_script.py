"""The script of the small-image experiments, from scikit-learn's digits to figures."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dino_training.set_files import open_sets
from tiny_runs import leave_out_pictures, write_tiny_recipe

SCRIPT = Path(__file__).parents[2] / "training/small_images.py"


def test_digits_go_from_idx_files_to_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_tiny_recipe(tmp_path / "tiny.yaml", epochs=1, batch_size=256, num_evaluated=64)
    out = tmp_path / "out"
    options = ["--digits", "--out", out, "--recipe", recipe, "--steps", "2", "--draws", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    leave_out_pictures(monkeypatch)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    written = {path.name for path in out.iterdir()}
    assert written == {
        "digits", "run", "knn.json", "few_labels.json", "few_labels.md", "few_labels.png", "learning_curve.png",
        "attention.png",
    }  # fmt: skip
    assert json.loads((out / "few_labels.json").read_text())["val"]["used"] == 500
    assert json.loads((out / "knn.json").read_text())["train"]["used"] == 1297
    for name in written:
        if name.endswith(".png"):
            with Image.open(out / name) as picture:
                assert picture.width > 300

    train, test = (open_sets([out / "digits"], purpose) for purpose in ("training", "testing"))
    shown = np.concatenate([each.files[0].pixels_NHWC[..., 0] for each in (test, train)])
    data = load_digits()
    order_N = np.random.default_rng(0).permutation(1797)
    assert np.abs(shown * (16 / 255) - data.images[order_N]).max() < 0.05
    assert test.labels() + train.labels() == [str(digit) for digit in data.target[order_N]]

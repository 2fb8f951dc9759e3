"""The small-image recipes on sets in their own files, from `pretrain` to `evaluate knn`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from commands_in_process import Command
from set_bytes import cifar_records, random_pictures, stl_pictures, write_mnist

SMALLER = (
    "epochs=1", "batch_size=8", "num_local_views=2", "head_hidden=16", "head_bottleneck=8", "num_prototypes=16",
    "evaluate_every_epochs=0", "num_evaluated=8", "workers=1", "precision=float32",
)  # fmt: skip
"""Over a recipe: a run of a second, the backbone's depth aside."""


def mnist(folder: Path) -> Path:
    return write_mnist(folder, [0, 1, 2, 3] * 4, [0, 1, 2, 3], compress=True)


def cifar10(folder: Path) -> Path:
    folder.mkdir()
    pixels = random_pictures(16, 32, 32, 3)
    (folder / "data_batch_1.bin").write_bytes(cifar_records(pixels, [[number % 4] for number in range(16)]))
    (folder / "test_batch.bin").write_bytes(cifar_records(pixels[:4], [[number] for number in range(4)]))
    return folder


def stl10(folder: Path) -> Path:
    folder.mkdir()
    pixels = random_pictures(8, 96, 96, 3)
    for name in ("train", "test"):
        (folder / f"{name}_X.bin").write_bytes(stl_pictures(pixels))
        (folder / f"{name}_y.bin").write_bytes(bytes([1, 2, 3, 4] * 2))
    (folder / "unlabeled_X.bin").write_bytes(stl_pictures(pixels))
    return folder


@pytest.mark.parametrize(
    ("recipe", "write", "patch", "num_training"),
    [("mnist", mnist, 8, 16), ("cifar10", cifar10, 4, 16), ("stl10", stl10, 12, 8)],
)
def test_recipe_runs_from_the_sets_files_to_accuracy(
    dino_search: Command, tmp_path: Path, recipe: str, write: Callable[[Path], Path], patch: int, num_training: int
) -> None:
    folder, run = write(tmp_path / "set"), tmp_path / "run"
    arguments = f"architecture_args={{patch_size: {patch}, embed_dim: 16, depth: 1, num_heads: 2}}"
    changes = [word for setting in (*SMALLER, arguments) for word in ("--set", setting)]
    trained = dino_search("pretrain", folder, "--recipe", recipe, "--out", run, "--labels", "folders", *changes)
    assert trained.code == 0, trained.err
    assert "finished after 2 steps, 16 images seen" in trained.out
    assert "k-NN accuracy" in trained.out
    ended = dino_search(
        "evaluate", "knn", "--train", folder, "--val", folder, "--model", run / "backbone.safetensors", "--json"
    )
    assert ended.code == 0, ended.err
    found = ended.json()
    assert (found["train"]["used"], found["train"]["classes"]) == (num_training, 4)
    assert found["top5"]["200"] == 1


def test_file_that_is_cut_off_ends_in_one_line(dino_search: Command, tmp_path: Path) -> None:
    path = mnist(tmp_path / "set") / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    for command in (
        ["pretrain", tmp_path / "set", "--recipe", "mnist", "--out", tmp_path / "run"],
        ["evaluate", "knn", "--train", tmp_path / "set", "--val", tmp_path / "set"],
    ):
        ended = dino_search(*command)
        assert (ended.code, ended.out) == (1, "")
        assert ended.err.startswith(f"error: {path}: the compressed file is cut off or damaged")
        assert ended.err.count("\n") == 1

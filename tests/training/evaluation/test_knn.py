from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dino_index.backbones import Backbone
from dino_index.errors import EvaluationImpossible, NoImagesFound, SetFileUnusable
from dino_index.knn import vote
from dino_index.model_files import resolve_model
from dino_index.snapshots import normalise
from dino_training.evaluation.features import FeatureStore
from dino_training.evaluation.knn import KnnOptions, evaluate_knn
from sample_collections import write_pictures
from set_bytes import digit_like, write_mnist


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    write_pictures(tmp_path / "train", *(f"{name}/{n}.jpg" for name in ("cat", "dog", "owl") for n in range(8)))
    write_pictures(tmp_path / "val", *(f"{name}/{n}.jpg" for name in ("cat", "dog", "owl") for n in range(5)), seed=5)
    return tmp_path / "train", tmp_path / "val"


def slow_accuracy(store: FeatureStore, train: Path, val: Path, k: int, top: int) -> float:
    known, asked = store.embed_folder(train), store.embed_folder(val)
    train_ND, val_QD = normalise(known.cls_ND), normalise(asked.cls_ND)
    right = 0
    for path, query in zip(asked.paths, val_QD, strict=True):
        scores = train_ND @ query
        nearest = np.argsort(-scores, kind="stable")[:k]
        labels = [Path(known.paths[position]).parent.name for position in nearest]
        ranked = [label for label, _ in vote(scores[nearest].tolist(), labels, 0.07)]
        right += Path(path).parent.name in ranked[:top]
    return right / len(asked)


def test_accuracy_is_that_of_classifying_one_by_one(sets: tuple[Path, Path], store: FeatureStore) -> None:
    result = evaluate_knn(store, *sets, KnnOptions(ks=(1, 3, 10, 200))).to_json()
    for k in (1, 3, 10, 200):
        assert result["top1"][str(k)] == pytest.approx(slow_accuracy(store, *sets, k, 1)), k
        assert result["top5"][str(k)] == pytest.approx(slow_accuracy(store, *sets, k, 5)), k
        low, high = result["confidence"]["top1"][str(k)]
        assert 0 <= low <= result["top1"][str(k)] <= high <= 1


def test_a_class_without_training_images_is_wrong_and_reported(sets: tuple[Path, Path], store: FeatureStore) -> None:
    write_pictures(sets[1], "newt/0.jpg", "newt/1.jpg", "newt/2.jpg", seed=90)
    before = evaluate_knn(store, *sets, KnnOptions(ks=(200,)))
    result = before.to_json()
    assert result["classes_only_in_val"] == ["newt"]
    assert result["top5"]["200"] == pytest.approx(15 / 18)  # all 24 vote, for three classes
    assert any("newt" in remark for remark in before.remarks)
    assert any("all 24 training images vote" in remark for remark in before.remarks)


def test_few_images_a_class_are_drawn_by_the_seed(sets: tuple[Path, Path], store: FeatureStore) -> None:
    results = [
        evaluate_knn(store, *sets, KnnOptions(ks=(1,), per_class=2, seed=seed)).to_json() for seed in (0, 0, 1, 2, 3)
    ]
    assert results[0] == results[1]
    assert {result["train"]["used"] for result in results} == {6}
    assert len({result["top1"]["1"] for result in results}) > 1
    plenty = evaluate_knn(store, *sets, KnnOptions(ks=(5,), per_class=99))
    assert plenty.to_json()["top1"] == evaluate_knn(store, *sets, KnnOptions(ks=(5,))).to_json()["top1"]
    assert any("fewer than 99" in remark for remark in plenty.remarks)


def test_one_class_is_an_error_in_one_line(tmp_path: Path, store: FeatureStore) -> None:
    write_pictures(tmp_path / "train", "cat/0.jpg", "cat/1.jpg")
    write_pictures(tmp_path / "val", "cat/0.jpg")
    with pytest.raises(EvaluationImpossible, match=r"found one \(cat\)") as caught:
        evaluate_knn(store, tmp_path / "train", tmp_path / "val")
    assert "\n" not in str(caught.value)


def test_pictures_beside_the_folders_are_left_out_and_counted(sets: tuple[Path, Path], store: FeatureStore) -> None:
    expected = evaluate_knn(store, *sets).to_json()["top1"]
    write_pictures(sets[0], "loose.jpg", seed=70)
    write_pictures(sets[1], "loose.jpg", "loose2.jpg", seed=70)
    result = evaluate_knn(store, *sets).to_json()
    assert result["top1"] == expected
    assert (result["train"]["unlabelled"], result["val"]["unlabelled"]) == (1, 2)


def test_folders_without_a_readable_picture_are_an_error(sets: tuple[Path, Path], store: FeatureStore) -> None:
    empty = sets[0].parent / "empty"
    empty.mkdir()
    with pytest.raises(NoImagesFound, match="empty"):
        evaluate_knn(store, sets[0], empty)


@pytest.mark.parametrize("wrong", [{"ks": ()}, {"ks": (0,)}, {"temperature": 0.0}, {"per_class": 0}])
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).rstrip("s")):
        KnnOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("compress", [False, True])
def test_a_published_set_is_measured_as_the_same_pictures_in_folders_are(
    tmp_path: Path, store: FeatureStore, compress: bool
) -> None:
    train, test = [0, 1, 2, 3] * 5, [3, 2, 1, 0, 0, 3]
    write_mnist(tmp_path / "set", train, test, compress=compress)
    for part, labels, seed in (("train", train, 0), ("val", test, 1)):
        for number, (pixels_HW, label) in enumerate(zip(digit_like(labels, seed), labels, strict=True)):
            folder = tmp_path / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_HW).save(folder / f"{number:02}.png")
    options = KnnOptions(ks=(1, 3, 20))
    found = evaluate_knn(store, tmp_path / "set", tmp_path / "set", options).to_json()
    expected = evaluate_knn(store, tmp_path / "train", tmp_path / "val", options).to_json()
    assert (found["top1"], found["top5"]) == (expected["top1"], expected["top5"])
    assert (found["train"]["used"], found["val"]["used"], found["train"]["classes"]) == (20, 6, 4)
    assert found["train"]["ignored"]["other" if not compress else "archive"] == 2  # the files of the test set
    suffix = ".gz" if compress else ""
    known, asked = (tmp_path / f"set/{name}-images-idx3-ubyte{suffix}" for name in ("train", "t10k"))
    assert evaluate_knn(store, known, asked, options).to_json()["top1"] == found["top1"]


def test_a_set_of_one_class_or_without_its_test_files_or_labels_is_an_error_in_one_line(
    tmp_path: Path, store: FeatureStore
) -> None:
    one = write_mnist(tmp_path / "one", [7] * 4, [7])
    with pytest.raises(EvaluationImpossible, match=r"found one \(7\)"):
        evaluate_knn(store, one, one)
    half = write_mnist(tmp_path / "half", [1, 2])
    with pytest.raises(NoImagesFound, match=r"expected files for testing in .*half, found 1 for another purpose"):
        evaluate_knn(store, half, half)
    bare = write_mnist(tmp_path / "bare", [1, 2], [1])
    (bare / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SetFileUnusable, match="has no labels"):
        evaluate_knn(store, bare, bare)


def test_a_set_with_fewer_images_than_k_lets_all_vote(tmp_path: Path, store: FeatureStore) -> None:
    few = write_mnist(tmp_path, [1, 2, 3], [1, 2])
    result = evaluate_knn(store, few, few, KnnOptions(ks=(1, 200)))
    assert result.to_json()["top5"]["200"] == 1
    assert any("all 3 training images vote" in remark for remark in result.remarks)


def test_pictures_of_a_set_are_cached_by_content(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "set", [0, 1, 2, 3], [1, 2])
    num_embedded = 0
    embed = Backbone.embed

    def count(self: Backbone, pixels_BHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        nonlocal num_embedded
        num_embedded += len(pixels_BHWC)
        return embed(self, pixels_BHWC)

    monkeypatch.setattr(Backbone, "embed", count)
    results = []
    for _ in range(2):
        store = FeatureStore(resolve_model(tiny_model), device="cpu", cache=tmp_path / "cache")
        results.append(evaluate_knn(store, tmp_path / "set", tmp_path / "set").to_json())
        store.close()
        assert num_embedded == 6
    assert results[0] == results[1]

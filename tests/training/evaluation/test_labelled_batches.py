from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_index.errors import ImageError
from dino_training.evaluation.labelled_batches import TrainingBatches, centre_views
from dino_training.evaluation.labelled_images import LabelledImages
from sample_collections import jpeg


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    """Ten pictures of one grey each: 10, 20, ... in two classes."""
    for number in range(10):
        path = tmp_path / f"{'dark' if number < 5 else 'light'}/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (10 * number + 10,) * 3).save(path)
    return LabelledImages.open(tmp_path, "train")


def batches(images: LabelledImages, batch_size: int, seed: int = 0, workers: int = 2) -> TrainingBatches:
    return TrainingBatches(
        images, np.arange(len(images)), size=16, batch_size=batch_size, seed=seed, workers=workers
    )  # fmt: skip


def test_an_epoch_takes_each_image_once_with_its_own_class(images: LabelledImages) -> None:
    seen = []
    for pixels, classes in batches(images, 5)(3):
        assert pixels.shape == (5, 16, 16, 3)
        np.testing.assert_array_equal(pixels[:, 0, 0, 0], 10 * classes + 10)
        seen.append(classes.tolist())
    assert len(seen) == 6
    for epoch in range(3):
        assert sorted(seen[2 * epoch] + seen[2 * epoch + 1]) == list(range(10))
    assert seen[:2] != seen[2:4]


def test_what_fills_no_batch_is_left_out_of_an_epoch_and_not_of_all(images: LabelledImages) -> None:
    loader = batches(images, 4)
    assert loader.steps_per_epoch == 2
    counts = Counter(number for _, classes in loader(10) for number in classes.tolist())
    assert sum(counts.values()) == 80
    assert set(counts) == set(range(10))


def test_fewer_images_than_a_batch_are_the_batch(images: LabelledImages) -> None:
    loader = batches(images, 256)
    assert (loader.batch_size, loader.steps_per_epoch) == (10, 1)
    assert [len(classes) for _, classes in loader(2)] == [10, 10]


def test_views_follow_from_the_seed_and_not_from_the_threads(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"c{number}").mkdir()
        (tmp_path / f"c{number}/0.jpg").write_bytes(jpeg(number))
    images = LabelledImages.open(tmp_path, "train")
    runs = [
        np.stack([pixels for pixels, _ in batches(images, 2, seed, workers)(2)])
        for seed, workers in ((0, 1), (0, 3), (1, 1))
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()
    assert (runs[0][:2] != runs[0][2:]).any()  # other views in another epoch


def test_an_image_that_vanishes_is_named(images: LabelledImages) -> None:
    Path(images.source.names[3]).unlink()
    with pytest.raises(ImageError, match=r"dark/3\.png could be read when training began") as caught:
        list(batches(images, 5)(1))
    assert caught.value.reason == "vanished"


def test_the_middles_of_readable_images_come_in_order(images: LabelledImages) -> None:
    Path(images.source.names[3]).write_bytes(b"nothing")
    found = list(centre_views(images, 16, workers=3))
    assert [number for number, _ in found] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert all((pixels == 10 * number + 10).all() for number, pixels in found)
    assert len(images.readable()) == 9

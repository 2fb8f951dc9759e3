from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from dino_index.errors import DinoSearchError, ImageError, NoImagesFound, TruthUnusable
from dino_training.evaluation.labelled_images import LabelledImages
from dino_training.evaluation.published_sets import Part
from sample_collections import jpeg, write_pictures, write_shard
from set_bytes import write_mnist


def labels_of(path: Path, part: Part = "train") -> dict[str, str]:
    """Label by file name."""
    images = LabelledImages.open(path, part)
    return dict(zip(map(os.path.basename, images.names), images.labels, strict=True))


def write_flowers(root: Path) -> Path:
    """Six images of three classes: two to train, one more to train, three to be judged."""
    write_pictures(root, *(f"jpg/image_{number:05d}.jpg" for number in range(1, 7)))
    savemat(root / "imagelabels.mat", {"labels": np.array([[7, 7, 8, 8, 9, 7]], np.uint8)})
    parts = {"trnid": [[5, 1]], "valid": [[3]], "tstid": [[2, 4, 6]]}
    savemat(root / "setid.mat", {name: np.array(ids, np.uint16) for name, ids in parts.items()})
    return root


def write_cars(root: Path) -> Path:
    write_pictures(root, "cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg")
    (root / "devkit").mkdir()
    fields = [(field, object) for field in ("bbox_x1", "class", "fname")]
    train = np.array([[(39, 14, "00001.jpg"), (36, 3, "00002.jpg")]], fields)
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": train})
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": np.array([[(1, 3, "00001.jpg")]], fields)})
    return root


def write_inaturalist(root: Path) -> Path:
    write_pictures(root, "train_val2018/Aves/1/a.jpg", "train_val2018/Fungi/2/b.jpg")
    described = {
        "images": [
            {"id": 10, "file_name": "train_val2018/Aves/1/a.jpg"},
            {"id": 11, "file_name": "train_val2018/Fungi/2/b.jpg"},
        ],
        "annotations": [{"image_id": 11, "category_id": 2}, {"image_id": 10, "category_id": 1}],
    }
    (root / "train2018.json").write_text(json.dumps(described))
    return root / "train2018.json"


def test_folders_and_shards_of_classes_are_read_alike(tmp_path: Path) -> None:
    write_pictures(tmp_path / "folders", "cat/0.jpg", "cat/deep/1.jpg", "dog/2.jpg", "loose.jpg")
    assert labels_of(tmp_path / "folders") == {"0.jpg": "cat", "1.jpg": "cat", "2.jpg": "dog"}
    assert LabelledImages.open(tmp_path / "folders", "val").num_unlabelled == 1
    shard = write_shard(tmp_path / "shard.tar", {"cat/0.jpg": jpeg(0), "dog/1.jpg": jpeg(1)})
    assert labels_of(shard) == {"0.jpg": "cat", "1.jpg": "dog"}


def test_manifests_name_images_and_their_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "list.csv").write_text("path,label\na.jpg,cat\nb.jpg,dog\n")
    assert labels_of(tmp_path / "list.csv") == {"a.jpg": "cat", "b.jpg": "dog"}


def test_flowers_are_trained_on_two_parts_and_judged_on_the_third(tmp_path: Path) -> None:
    root = write_flowers(tmp_path)
    train = {"image_00005.jpg": "009", "image_00001.jpg": "007", "image_00003.jpg": "008"}
    assert labels_of(root, "train") == train
    assert labels_of(root, "val") == {"image_00002.jpg": "007", "image_00004.jpg": "008", "image_00006.jpg": "007"}


def test_cars_are_read_from_the_devkit(tmp_path: Path) -> None:
    root = write_cars(tmp_path)
    assert labels_of(root, "train") == {"00001.jpg": "014", "00002.jpg": "003"}
    assert labels_of(root, "val") == {"00001.jpg": "003"}


def test_cars_without_labels_of_the_test_are_refused(tmp_path: Path) -> None:
    root = write_cars(tmp_path)
    (root / "cars_test_annos_withlabels.mat").rename(root / "devkit/cars_test_annos.mat")
    with pytest.raises(TruthUnusable, match=r"withlabels\.mat, found no such file; devkit/cars_test_annos\.mat has no"):
        LabelledImages.open(root, "val")


def test_inaturalist_is_read_from_its_json(tmp_path: Path) -> None:
    assert labels_of(write_inaturalist(tmp_path)) == {"a.jpg": "1", "b.jpg": "2"}


def test_images_that_labels_name_and_are_not_there_are_counted(tmp_path: Path) -> None:
    root = write_flowers(tmp_path)
    (root / "jpg/image_00001.jpg").unlink()
    images = LabelledImages.open(root, "train")
    assert (len(images), list(images.unreadable)) == (2, [str(root / "jpg/image_00001.jpg")])
    for path in (root / "jpg").iterdir():
        path.unlink()
    with pytest.raises(NoImagesFound, match="found none of 3, such as"):
        LabelledImages.open(root, "train")


def damage_labels(root: Path) -> Path:
    write_flowers(root)
    (root / "imagelabels.mat").write_bytes(b"\x80\x04nothing of MATLAB")
    return root


def name_too_many(root: Path) -> Path:
    write_flowers(root)
    savemat(root / "setid.mat", {"trnid": [[1, 99]], "valid": [[2]], "tstid": [[3]]})
    return root


def lack_a_part(root: Path) -> Path:
    write_flowers(root)
    savemat(root / "setid.mat", {"tstid": [[3]]})
    return root


def lead_out(root: Path) -> Path:
    described = {
        "images": [{"id": 1, "file_name": "../secret.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 1}],
    }
    (root / "train2018.json").write_text(json.dumps(described))
    return root / "train2018.json"


def lack_annotations(root: Path) -> Path:
    file = write_inaturalist(root)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    return file


def be_something_else(root: Path) -> Path:
    (root / "list.json").write_text('["a.jpg"]')
    return root / "list.json"


def test_files_of_small_pictures_are_read_for_what_they_are_for(tmp_path: Path) -> None:
    write_mnist(tmp_path, [4, 5, 4], [6])
    assert labels_of(tmp_path) == {"00000": "4", "00001": "5", "00002": "4"}
    assert labels_of(tmp_path, "val") == {"00000": "6"}
    assert labels_of(tmp_path / "t10k-images-idx3-ubyte") == {"00000": "6"}


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (damage_labels, "cannot be read"),
        (name_too_many, "names image 99, expected 1..6"),
        (lack_a_part, "expected `trnid`"),
        (lead_out, r"found '\.\./secret\.jpg'"),
        (lack_annotations, "2 of 2 images have no annotation"),
        (be_something_else, "expected `images` with id and file_name"),
    ],
)
def test_files_of_labels_of_no_use_are_refused_in_one_line(write: object, said: str, tmp_path: Path) -> None:
    assert callable(write)
    path = write(tmp_path)
    with pytest.raises(TruthUnusable, match=said) as caught:
        LabelledImages.open(path, "train")
    assert "\n" not in str(caught.value)


def test_images_that_cannot_be_read_are_left_out_and_kept_with_their_reason(tmp_path: Path) -> None:
    write_pictures(tmp_path, "cat/0.jpg", "cat/1.jpg", "dog/0.jpg")
    (tmp_path / "cat/2.jpg").write_bytes(b"nothing")
    (tmp_path / "cat/1.jpg").write_bytes(jpeg(1)[:300])
    images = LabelledImages.open(tmp_path, "train").checked()
    assert images.labels == ["cat", "dog"]
    assert {Path(path).name: error.reason for path, error in images.unreadable.items()} == {
        "1.jpg": "truncated", "2.jpg": "not_an_image",
    }  # fmt: skip
    described = images.to_json()
    assert (described["used"], described["classes"], len(described["unreadable"])) == (2, 2, 2)


def test_readable_images_are_drawn_for_each_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(6)))
    for number in range(4):
        (tmp_path / f"cat/{number}.jpg").write_bytes(jpeg(1)[:300])
    for seed in range(4):
        drawn = LabelledImages.open(tmp_path, "train").drawn(2, seed)
        assert drawn.labels == ["cat", "cat", "dog", "dog"]
        assert len(drawn.checked()) == 4
    again = LabelledImages.open(tmp_path, "train").drawn(2, seed)
    assert again.positions_N.tolist() == drawn.positions_N.tolist()


def test_errors_are_those_of_this_program(tmp_path: Path) -> None:
    with pytest.raises(DinoSearchError):
        LabelledImages.open(tmp_path / "gone", "train")
    write_pictures(tmp_path, "cat/0.jpg")
    images = LabelledImages.open(tmp_path, "train")
    (tmp_path / "cat/0.jpg").unlink()
    with pytest.raises(ImageError):
        images.load(0)

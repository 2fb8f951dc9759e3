"""Published sets in their own files: pixels, labels, parts; one line for each file that is not what it should be."""

from __future__ import annotations

import gzip
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dino_index.errors import NoImagesFound, SetFileUnusable, SourceNotFound
from dino_training.image_source import ImageSource
from dino_training.set_files import open_sets
from sample_collections import write_pictures
from set_bytes import (
    cifar_pickle,
    cifar_pickle_of_python_2,
    cifar_records,
    digit_like,
    idx_labels,
    idx_pictures,
    random_pictures,
    stl_pictures,
    write_mnist,
)

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def pixels_of(source: ImageSource) -> list[NDArray[np.uint8]]:
    return [source.load(position) for position in range(len(source))]


def assert_shows(source: ImageSource, pixels_NHWC: NDArray[np.uint8]) -> None:
    """Grey pictures come as colour ones with three equal channels."""
    assert len(source) == len(pixels_NHWC)
    for loaded_HWC, written_HWC in zip(pixels_of(source), pixels_NHWC, strict=True):
        assert np.array_equal(loaded_HWC, np.broadcast_to(written_HWC, loaded_HWC.shape))


# --- what is read


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_is_read_from_its_files(tmp_path: Path, compress: bool) -> None:
    labels = [3, 0, 9, 9, 1]
    write_mnist(tmp_path, labels, [2, 2], compress=compress)
    source = ImageSource.open([tmp_path], labels="folders")
    assert_shows(source, digit_like(labels)[..., None])
    assert source.labels == ["3", "0", "9", "9", "1"]
    suffix = ".gz" if compress else ""
    assert source.names[3] == str(tmp_path / f"{IMAGES}{suffix}/00003")
    assert source.skipped == {"file for another purpose": 1}


def test_pictures_need_not_be_square(tmp_path: Path) -> None:
    pixels_NHW = random_pictures(3, 5, 9, 1)[..., 0]
    (tmp_path / "images-idx3-ubyte").write_bytes(idx_pictures(pixels_NHW))
    assert_shows(ImageSource.open([tmp_path]), pixels_NHW[..., None])


def test_other_spellings_of_idx_names_are_known(tmp_path: Path) -> None:
    (tmp_path / "emnist-train-images.idx3-ubyte").write_bytes(idx_pictures(digit_like([4, 5])))
    (tmp_path / "emnist-train-labels.idx1-ubyte.gz").write_bytes(gzip.compress(idx_labels([4, 5])))
    assert ImageSource.open([tmp_path], labels="folders").labels == ["4", "5"]


def test_cifar10_is_read_from_binary_batches_with_the_names_of_classes(tmp_path: Path) -> None:
    one, two = random_pictures(4, 32, 32, 3), random_pictures(3, 32, 32, 3, seed=1)
    (tmp_path / "data_batch_1.bin").write_bytes(cifar_records(one, [[0], [9], [2], [0]]))
    (tmp_path / "data_batch_2.bin").write_bytes(cifar_records(two, [[1], [1], [1]]))
    (tmp_path / "test_batch.bin").write_bytes(cifar_records(two, [[5], [5], [5]]))
    (tmp_path / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    source = ImageSource.open([tmp_path], labels="folders")
    assert_shows(source, np.concatenate([one, two]))
    assert source.labels == ["airplane", "9", "bird", "airplane", *["automobile"] * 3]


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    pixels = random_pictures(3, 32, 32, 3)
    (tmp_path / "train.bin").write_bytes(cifar_records(pixels, [[1, 99], [2, 0], [19, 5]]))
    assert ImageSource.open([write_pictures(tmp_path, "a.jpg")[0].parent]).names == [str(tmp_path / "a.jpg")]
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"class{number}" for number in range(100)))
    source = ImageSource.open([tmp_path / "train.bin"], labels="folders")
    assert_shows(source, pixels)
    assert source.labels == ["class99", "class0", "class5"]


@pytest.mark.parametrize(("name", "key"), [("data_batch_1", "labels"), ("train", "fine_labels")])
def test_cifar_pickles_are_read(tmp_path: Path, name: str, key: str) -> None:
    pixels = random_pictures(4, 32, 32, 3)
    (tmp_path / name).write_bytes(cifar_pickle(pixels, [7, 0, 7, 2], key))
    (tmp_path / "meta").touch()
    source = ImageSource.open([tmp_path], labels="folders")
    assert_shows(source, pixels)
    assert source.labels == ["7", "0", "7", "2"]


def test_cifar_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    pixels = random_pictures(3, 32, 32, 3)
    (tmp_path / "data_batch_1").write_bytes(cifar_pickle_of_python_2(pixels, [4, 0, 9]))
    source = ImageSource.open([tmp_path], labels="folders")
    assert_shows(source, pixels)
    assert source.labels == ["4", "0", "9"]


class Runs:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return print, ("ran",)


def test_pickle_that_would_run_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Runs(), "labels": [1]}))
    with pytest.raises(SetFileUnusable, match="could run code; nothing was run"):
        ImageSource.open([tmp_path])
    assert capsys.readouterr().out == ""


def test_stl10_is_read_column_by_column_and_unlabelled_pictures_serve_pretraining(tmp_path: Path) -> None:
    labelled, unlabelled = random_pictures(2, 96, 96, 3), random_pictures(3, 96, 96, 3, seed=1)
    (tmp_path / "train_X.bin").write_bytes(stl_pictures(labelled))
    (tmp_path / "train_y.bin").write_bytes(bytes([10, 1]))
    (tmp_path / "unlabeled_X.bin").write_bytes(stl_pictures(unlabelled))
    (tmp_path / "class_names.txt").write_text("airplane\nbird\n")
    source = ImageSource.open([tmp_path], labels="folders")
    assert_shows(source, np.concatenate([labelled, unlabelled]))
    assert source.labels == ["9", "airplane", None, None, None]
    assert len(open_sets([tmp_path], "training")) == 2


def test_folders_that_the_archives_unpack_to_are_looked_into(tmp_path: Path) -> None:
    pixels = random_pictures(2, 32, 32, 3)
    for folder, data in (("bin", cifar_records(pixels, [[1], [2]])), ("py", cifar_pickle(pixels, [1, 2]))):
        place = tmp_path / f"cifar-10-batches-{folder}"
        place.mkdir()
        (place / ("data_batch_1.bin" if folder == "bin" else "data_batch_1")).write_bytes(data)
    assert_shows(ImageSource.open([tmp_path]), pixels)  # once, although both versions are there


def test_a_file_beside_its_compressed_self_is_read_once(tmp_path: Path) -> None:
    write_mnist(tmp_path, [1, 2, 3])
    write_mnist(tmp_path, [1, 2, 3], compress=True)
    source = ImageSource.open([tmp_path, tmp_path / IMAGES, tmp_path])
    assert len(source) == 3


def test_a_test_file_that_is_given_itself_is_read(tmp_path: Path) -> None:
    write_mnist(tmp_path, [1, 2, 3], [5, 6])
    source = ImageSource.open([tmp_path / "t10k-images-idx3-ubyte"], labels="folders")
    assert source.labels == ["5", "6"]
    assert source.skipped == {}


def test_image_files_and_sets_go_together(tmp_path: Path) -> None:
    write_mnist(tmp_path / "set", [1, 2])
    (tmp_path / "set/notes.txt").write_text("a remark")
    write_pictures(tmp_path, "photos/cats/1.jpg")
    source = ImageSource.open([tmp_path / "photos", tmp_path / "set"], labels="folders")
    assert source.labels == ["cats", "1", "2"]
    assert source.ignored == {"text": 1}
    kept = ImageSource.open([tmp_path / "photos", tmp_path / "set"])
    assert kept.prepare(decode_size=14, cache_bytes=1 << 20)
    assert [pixels.shape for pixels in pixels_of(kept)[1:]] == [(14, 14, 3)] * 2
    assert kept.digest == source.digest


def test_labels_are_not_looked_at_where_none_are_asked_for(tmp_path: Path) -> None:
    write_mnist(tmp_path, [1, 2])
    (tmp_path / LABELS).unlink()
    assert ImageSource.open([tmp_path]).labels is None
    with pytest.raises(SetFileUnusable, match=re.escape(f"has no labels: expected {tmp_path / LABELS}")):
        ImageSource.open([tmp_path], labels="folders")


def test_a_folder_of_test_files_alone_is_nothing_to_train_on(tmp_path: Path) -> None:
    write_mnist(tmp_path, [], [1, 2])
    with pytest.raises(NoImagesFound, match="1 file for another purpose"):
        ImageSource.open([tmp_path])
    assert ImageSource.open([tmp_path], labels="folders", purpose="testing").labels == ["1", "2"]


def test_folders_with_the_names_of_set_files_are_folders(tmp_path: Path) -> None:
    (tmp_path / "meta").touch()
    write_pictures(tmp_path, "train/cats/1.jpg")
    for path in (tmp_path, tmp_path / "train"):
        assert ImageSource.open([path]).names == [str(tmp_path / "train/cats/1.jpg")]


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    write_pictures(tmp_path, "1.jpg")
    with pytest.raises(SourceNotFound, match=f"{IMAGES}: no such file or folder"):
        ImageSource.open([tmp_path, tmp_path / IMAGES])


# --- what is not what it should be


def test_idx_file_that_is_cut_off_anywhere_is_an_error_in_one_line(tmp_path: Path) -> None:
    whole = idx_pictures(digit_like([1, 2, 3]))
    for length in (0, 3, 4, 15, 16, 100, len(whole) - 1):
        (tmp_path / IMAGES).write_bytes(whole[:length])
        with pytest.raises(SetFileUnusable, match=IMAGES) as caught:
            ImageSource.open([tmp_path])
        assert "\n" not in str(caught.value)
    (tmp_path / IMAGES).write_bytes(whole + b"\0")
    with pytest.raises(SetFileUnusable, match=r"expected 3 x 28 x 28 = 2,352 bytes .* found 2,353"):
        ImageSource.open([tmp_path])


def test_compressed_file_that_is_cut_off_or_damaged_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(idx_pictures(random_pictures(3, 28, 28, 1)[..., 0]))
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for data in (whole[: len(whole) // 2], bytes(damaged), b"\x1f\x8b" + b"junk" * 9, b"no gzip"):
        (tmp_path / f"{IMAGES}.gz").write_bytes(data)
        with pytest.raises(SetFileUnusable, match=f"{IMAGES}.gz"):
            ImageSource.open([tmp_path])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\x00\x00\x08\x01\x00\x00\x00\x04" + bytes(8), "starts with the bytes 00 00 08 03, found 00 00 08 01"),
        (b"\x00\x00\x0d\x03" + bytes(12), "found 00 00 0d 03"),
        (b"\x89PNG" + bytes(12), "found 89 50 4e 47"),
        (b"\x00\x00\x08\x03" + bytes(12), "expected pictures, found 0 x 0 x 0"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "bytes of pictures as its header says, found 0"),
    ],
)
def test_another_file_under_the_name_is_an_error(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / IMAGES).write_bytes(header)
    with pytest.raises(SetFileUnusable, match=message):
        ImageSource.open([tmp_path])


def test_header_that_promises_more_than_memory_holds_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    header = b"\x00\x00\x08\x03" + b"\xff" * 12
    (tmp_path / f"{IMAGES}.gz").write_bytes(gzip.compress(header))
    with pytest.raises(SetFileUnusable, match="unpack it by gunzip"):
        ImageSource.open([tmp_path])


def test_labels_of_another_length_are_an_error(tmp_path: Path) -> None:
    write_mnist(tmp_path, [1, 2, 3])
    (tmp_path / LABELS).write_bytes(idx_labels([1, 2]))
    with pytest.raises(SetFileUnusable, match=f"{LABELS} has 2 labels, expected 3, one for each picture of"):
        ImageSource.open([tmp_path], labels="folders")


def test_cifar_batch_that_is_cut_off_or_another_file_is_an_error(tmp_path: Path) -> None:
    whole = cifar_records(random_pictures(2, 32, 32, 3), [[1], [2]])
    path = tmp_path / "data_batch_1.bin"
    for data in (b"", whole[:-1], whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(SetFileUnusable, match=r"multiple of 3,073 bytes"):
            ImageSource.open([tmp_path])
    path.write_bytes(cifar_records(random_pictures(2, 32, 32, 3), [[1], [77]]))
    with pytest.raises(SetFileUnusable, match="labels from 1 to 77 counted from 0, expected 0 to 9"):
        ImageSource.open([tmp_path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no pickle", "expected a whole pickle file"),
        (pickle.dumps([1, 2]), "expected a table of data and labels, found list"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}), "found no labels"),
        (pickle.dumps({"data": [[0] * 3072], "labels": [1]}), "expected an array of numbers, found list"),
        (pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}), "found 1 x 3072 of float64"),
        (pickle.dumps({"data": np.zeros((2, 3000), np.uint8), "labels": [1, 2]}), "found 2 x 3000 of uint8"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]}), "to be whole numbers"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), "has 1 labels, expected 2"),
    ],
)
def test_pickle_of_something_else_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(SetFileUnusable, match=message):
        ImageSource.open([tmp_path])


def test_stl10_files_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    (tmp_path / "train_X.bin").write_bytes(stl_pictures(random_pictures(2, 96, 96, 3)))
    for labels, message in ((None, "has no labels"), (b"\1", "has 1 labels, expected 2"), (b"\0\1", "from -1 to 0")):
        if labels is not None:
            (tmp_path / "train_y.bin").write_bytes(labels)
        with pytest.raises(SetFileUnusable, match=message):
            ImageSource.open([tmp_path], labels="folders")
    (tmp_path / "unlabeled_X.bin").write_bytes(bytes(27_647))
    with pytest.raises(SetFileUnusable, match=r"unlabeled_X\.bin: expected a multiple of 27,648"):
        ImageSource.open([tmp_path])


def test_a_large_file_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "unlabeled_X.bin"
    with open(path, "wb") as file:
        file.truncate(27_648 * 2_000)  # 55 MB, on most disks without a block
    (opened,) = open_sets([path], "pretraining").files
    base: object = opened.pixels_NHWC
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert sys.getsizeof(opened.pixels_NHWC) < 1000
    assert len(opened) == 2_000

"""Published sets of small pictures in their own files, each picture known by a path such as `FILE/00042`.

Read are MNIST and what has its format (`*images-idx3-ubyte`, with or without .gz), CIFAR-10 and CIFAR-100 (the binary
version, or the Python one), and STL-10 (`*_X.bin`). A given path is such a file, or the folder that it lies in.

Shapes: N pictures, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dino_index.errors import SetFileUnusable
from dino_index.image_bytes import DEFAULT_LIMITS, FileContent, ReadLimits, check_num_bytes
from dino_index.image_paths import absolute_path, is_url
from dino_training.set_formats import (
    GZIP_SUFFIX,
    as_image_file,
    read_cifar_batch,
    read_cifar_pickle,
    read_idx_labels,
    read_idx_pictures,
    read_stl_labels,
    read_stl_pictures,
)

Purpose = Literal["pretraining", "training", "testing"]
_Part = Literal["train", "unlabelled", "test"]

# Where the archives that the sets are published as, and torchvision, put the files.
_USUAL_FOLDERS = (
    "cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary", "cifar-100-python", "stl10_binary", "raw",
    "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw",
)  # fmt: skip
_IDX_PICTURES = re.compile(r"images([-.])idx3([-.])ubyte(?=(\.gz)?$)", re.IGNORECASE)

_Numbers = NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, eq=False)
class SetFile:
    """One file of pictures.

    pixels_NHWC: uint8. files: paths of all files that pictures and labels come from.
    """

    path: str
    pixels_NHWC: NDArray[np.uint8]
    read_labels: Callable[[], list[str] | None]
    """The class of each picture, None for a file of pictures without classes. Raises SetFileUnusable."""
    files: tuple[str, ...]
    mtime_ns: int

    def __len__(self) -> int:
        return len(self.pixels_NHWC)

    @property
    def names(self) -> Iterator[str]:
        return (os.path.join(self.path, f"{number:05}") for number in range(len(self)))


class SetPictures:
    """The pictures of some set files, in their order. May be asked by several threads at once."""

    def __init__(self, files: Sequence[SetFile] = (), num_left_out: int = 0) -> None:
        self.files = list(files)
        self.num_left_out = num_left_out
        """Set files that lie in the given folders and are for another purpose."""
        self.names = [name for file in files for name in file.names]
        self._by_path = {file.path: file for file in files}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sizes(self) -> array[int]:
        """Bytes of each picture as `read` gives it."""
        return array("q", [size for file in self.files for size in [len(self._bytes(file, 0))] * len(file)])

    def labels(self) -> list[str | None]:
        """The class of each picture, None where the set has none. Raises SetFileUnusable."""
        found: list[str | None] = []
        for file in self.files:
            found += file.read_labels() or [None] * len(file)
        return found

    def read(self, name: str, limits: ReadLimits = DEFAULT_LIMITS) -> FileContent:
        """A picture by its name as an image file. Raises ImageError: too_large."""
        path, number = os.path.split(name)
        file = self._by_path[path]
        data = self._bytes(file, int(number))
        check_num_bytes(len(data), limits)
        return FileContent(data=data, sha256=hashlib.sha256(data).digest(), size=len(data), mtime_ns=file.mtime_ns)

    @staticmethod
    def _bytes(file: SetFile, number: int) -> bytes:
        return as_image_file(file.pixels_NHWC[number])


def is_set_file(path: str) -> bool:
    """Whether a path, by its name and what lies beside it, is a file of pictures of a set."""
    return _opener(path) is not None and os.path.isfile(path)


def open_sets(paths: Iterable[str | os.PathLike[str]], purpose: Purpose) -> SetPictures:
    """The pictures of the set files among and directly in the given paths, each file once.

    Of a folder without set files, those in the folders that the sets' archives unpack to are taken. purpose: of files
    in folders, those that are for it by their names, and those whose names tell nothing; a file that is given itself
    is taken whatever it is for. Pretraining takes files for training and unlabelled ones.
    Raises SetFileUnusable for a file that is cut off or not what its name says.
    """
    chosen: dict[str, None] = {}
    num_left_out = 0
    for path in map(absolute_path, paths):
        if is_set_file(path):
            found = kept = [path]
        elif not is_url(path) and os.path.isdir(path):
            found = _files_in(path)
            kept = [file for file in found if _part_of(file) in _PARTS[purpose]]
        else:
            continue
        num_left_out += len(found) - len(kept)
        chosen |= dict.fromkeys(kept)
    return SetPictures([_open(path) for path in chosen], num_left_out)


_PARTS: dict[Purpose, tuple[_Part | None, ...]] = {
    "pretraining": ("train", "unlabelled", None),
    "training": ("train", None),
    "testing": ("test", None),
}


def _part_of(path: str) -> _Part | None:
    name = os.path.basename(path).lower()
    if "unlabeled" in name:
        return "unlabelled"
    if "t10k" in name or "test" in name:
        return "test"
    return "train" if "train" in name or name.startswith("data_batch") else None


def _files_in(folder: str) -> list[str]:
    for place in (folder, *(os.path.join(folder, name) for name in _USUAL_FOLDERS)):
        try:
            names = sorted(os.listdir(place))
        except OSError:  # not there; of the given one, listing its images says what is wrong
            continue
        # Whoever unpacks by gunzip -k, as torchvision does, has both.
        names = [name for name in names if name.removesuffix(GZIP_SUFFIX) == name or name[:-3] not in names]
        paths = [os.path.join(place, name) for name in names if not name.startswith(".")]
        if found := [path for path in paths if is_set_file(path)]:
            return found
    return []


def _open(path: str) -> SetFile:
    opener = _opener(path)
    assert opener is not None
    return opener(path)


def _opener(path: str) -> Callable[[str], SetFile] | None:
    """What opens a file of pictures of this name."""
    folder, name = os.path.split(path)
    if _IDX_PICTURES.search(name):
        return _open_idx
    if re.fullmatch(r"(data_batch_\d+|test_batch)\.bin", name):
        return _open_cifar10
    if re.fullmatch(r"data_batch_\d+|test_batch", name):
        return _open_cifar10_pickle
    # The names of the others are those of many files: what lies beside them tells.
    if name in ("train.bin", "test.bin") and os.path.isfile(os.path.join(folder, "fine_label_names.txt")):
        return _open_cifar100
    if name in ("train", "test") and os.path.isfile(os.path.join(folder, "meta")):
        return _open_cifar100_pickle
    return _open_stl10 if re.fullmatch(r"(train|test|unlabeled)_X\.bin", name) else None


def _open_idx(path: str) -> SetFile:
    folder, name = os.path.split(path)
    beside = _IDX_PICTURES.sub(r"labels\1idx1\2ubyte", name).removesuffix(GZIP_SUFFIX)
    candidates = [os.path.join(folder, beside + suffix) for suffix in ("", GZIP_SUFFIX)]
    label_file = next(filter(os.path.isfile, candidates), None)

    def read_numbers() -> _Numbers:
        if label_file is None:
            raise SetFileUnusable(f"{path} has no labels: expected {candidates[0]}, or the same with .gz")
        return read_idx_labels(label_file)

    return _set_file(path, read_idx_pictures(path), read_numbers, label_file or candidates[0])


def _open_cifar10(path: str) -> SetFile:
    pixels_NHWC, labels_N1 = read_cifar_batch(path, 1)
    return _set_file(
        path, pixels_NHWC, lambda: labels_N1[:, 0], names=_names_beside(path, "batches.meta.txt"), num_classes=10
    )


def _open_cifar100(path: str) -> SetFile:
    pixels_NHWC, labels_N2 = read_cifar_batch(path, 2)  # coarse, fine
    return _set_file(
        path, pixels_NHWC, lambda: labels_N2[:, 1], names=_names_beside(path, "fine_label_names.txt"), num_classes=100
    )


def _open_cifar10_pickle(path: str) -> SetFile:
    pixels_NHWC, labels_N = read_cifar_pickle(path, "labels")
    return _set_file(path, pixels_NHWC, lambda: labels_N, num_classes=10)


def _open_cifar100_pickle(path: str) -> SetFile:
    pixels_NHWC, labels_N = read_cifar_pickle(path, "fine_labels")
    return _set_file(path, pixels_NHWC, lambda: labels_N, num_classes=100)


def _open_stl10(path: str) -> SetFile:
    pixels_NHWC = read_stl_pictures(path)
    label_file = path.removesuffix("_X.bin") + "_y.bin"

    def read_numbers() -> _Numbers:
        if not os.path.isfile(label_file):
            raise SetFileUnusable(f"{path} has no labels: expected {label_file}")
        return read_stl_labels(label_file).astype(np.int64) - 1

    return _set_file(
        path,
        pixels_NHWC,
        read_numbers if _part_of(path) != "unlabelled" else None,
        label_file,
        names=_names_beside(path, "class_names.txt"),
        num_classes=10,
    )


def _set_file(
    path: str,
    pixels_NHWC: NDArray[np.uint8],
    read_numbers: Callable[[], _Numbers] | None,
    label_file: str | None = None,
    *,
    names: Sequence[str] = (),
    num_classes: int | None = None,
) -> SetFile:
    """read_numbers: the number of each picture's class; None for a file without classes. names: of the classes.

    label_file: None where labels are in the same file, whose only mark they then are, and are looked at at once.
    """

    def read_labels() -> list[str] | None:
        if read_numbers is None:
            return None
        numbers_N = read_numbers()
        source = label_file or path
        if len(numbers_N) != len(pixels_NHWC):
            raise SetFileUnusable(
                f"{source} has {len(numbers_N):,} labels, expected {len(pixels_NHWC):,}, one for each picture of "
                f"{path}; take both from the same set"
            )
        if num_classes is not None and (numbers_N.min() < 0 or numbers_N.max() >= num_classes):
            raise SetFileUnusable(
                f"{source} has labels from {numbers_N.min()} to {numbers_N.max()} counted from 0, expected 0 to "
                f"{num_classes - 1}: it is another file than its name says; fetch it again"
            )
        return [names[number] if number < len(names) else str(number) for number in numbers_N.tolist()]

    if read_numbers is not None and label_file is None:
        read_labels()
    return SetFile(
        path=path,
        pixels_NHWC=pixels_NHWC,
        read_labels=read_labels,
        files=tuple(file for file in (path, label_file) if file is not None and os.path.isfile(file)),
        mtime_ns=os.stat(path).st_mtime_ns,
    )


def _names_beside(path: str, name: str) -> list[str]:
    """Names of the classes by their number, from a file beside the pictures; numbers do where there is none."""
    try:
        with open(os.path.join(os.path.dirname(path), name), encoding="utf-8") as file:
            return file.read().split()
    except (OSError, UnicodeDecodeError):
        return []

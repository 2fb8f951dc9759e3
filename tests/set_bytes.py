"""Files of published sets, byte by byte as their descriptions have them, by other means than the reader's.

Written from the formats' own descriptions: IDX at yann.lecun.com/exdb/mnist, CIFAR at cs.toronto.edu/~kriz/cifar.html,
STL-10 at cs.stanford.edu/~acoates/stl10.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def random_pictures(number: int, height: int, width: int, channels: int, seed: int = 0) -> NDArray[np.uint8]:
    """pixels_NHWC."""
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, channels), np.uint8)


def digit_like(labels: Sequence[int], seed: int = 0, side: int = 28) -> NDArray[np.uint8]:
    """pixels_NHW of pictures that can be told apart: a bright bar whose place is the class, with noise."""
    rng = np.random.default_rng(seed)
    pixels_NHW = rng.integers(0, 60, (len(labels), side, side), np.uint8)
    for picture_HW, label in zip(pixels_NHW, labels, strict=True):
        begin = label * side // 10
        picture_HW[begin : begin + 4] = 250
    return pixels_NHW


def idx_pictures(pixels_NHW: NDArray[np.uint8]) -> bytes:
    data = bytearray(b"\x00\x00\x08\x03")
    for length in pixels_NHW.shape:
        data += int(length).to_bytes(4, "big")
    for picture in pixels_NHW.tolist():
        for row in picture:
            data += bytes(row)
    return bytes(data)


def idx_labels(labels: Sequence[int]) -> bytes:
    return b"\x00\x00\x08\x01" + len(labels).to_bytes(4, "big") + bytes(labels)


def write_mnist(
    folder: Path, train: Sequence[int], test: Sequence[int] = (), *, compress: bool = False, side: int = 28
) -> Path:
    """The four files of MNIST, pictures as `digit_like` draws them; without a test set two."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, labels, seed in (("train", train, 0), ("t10k", test, 1)):
        if labels:
            files = {
                f"{name}-images-idx3-ubyte": idx_pictures(digit_like(labels, seed, side)),
                f"{name}-labels-idx1-ubyte": idx_labels(labels),
            }
            for file, data in files.items():
                if compress:
                    (folder / f"{file}.gz").write_bytes(gzip.compress(data))
                else:
                    (folder / file).write_bytes(data)
    return folder


def cifar_records(pixels_NHWC: NDArray[np.uint8], labels: Sequence[Sequence[int]]) -> bytes:
    """A record each: its labels, 1,024 bytes of red, as many of green and of blue, row by row."""
    data = bytearray()
    for picture, own in zip(pixels_NHWC.tolist(), labels, strict=True):
        data += bytes(own)
        for channel in range(3):
            for row in picture:
                data += bytes(pixel[channel] for pixel in row)
    return bytes(data)


def cifar_pickle(pixels_NHWC: NDArray[np.uint8], labels: Sequence[int], label_key: str = "labels") -> bytes:
    """As Python 3 pickles it by the protocol of Python 2; keys are bytes in the published files."""
    data_NR = np.stack([np.concatenate([picture[..., c].ravel() for c in range(3)]) for picture in pixels_NHWC])
    names = [f"{number}.png".encode() for number in range(len(labels))]
    batch: dict[Any, Any] = {
        b"batch_label": b"a batch", label_key.encode(): list(labels), b"data": data_NR, b"filenames": names
    }  # fmt: skip
    return pickle.dumps(batch, protocol=2)


def cifar_pickle_of_python_2(pixels_NHWC: NDArray[np.uint8], labels: Sequence[int]) -> bytes:
    """As the published files are: text and bytes alike are 8-bit strings, which Python 3 no longer writes."""
    rows = b"".join(b"".join(picture[..., c].tobytes() for c in range(3)) for picture in pixels_NHWC)
    number = len(labels)
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    text = b"T" + len(rows).to_bytes(4, "little") + rows
    array = made + b"(K\x01K" + bytes([number]) + b"M\x00\x0c\x86" + kind + b"\x89" + text + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + listed + b"u."


def stl_pictures(pixels_NHWC: NDArray[np.uint8]) -> bytes:
    """Red, green and blue, each column after column."""
    data = bytearray()
    for picture in pixels_NHWC.tolist():
        for channel in range(3):
            for x in range(96):
                data += bytes(picture[y][x][channel] for y in range(96))
    return bytes(data)

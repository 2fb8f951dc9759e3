"""Pictures and labels as the files of published sets hold them: IDX, CIFAR's batches, STL-10's binary files.

Nothing is unpacked: pixels are views of the file where it lies, unless it is compressed or a pickle.

Shapes: N pictures, H height, W width, C channels: 1 (grey) or 3 (red, green, blue); L bytes of a label.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_index.errors import SetFileUnusable, TruthUnusable
from dino_training.evaluation.plain_pickles import as_array, as_list, read_plain_pickle

GZIP_SUFFIX = ".gz"
CIFAR_SIDE, STL_SIDE = 32, 96
_IDX_UBYTE = 8
# 60,000 pictures of 28 x 28 are 47 MB.
_MAX_UNPACKED_BYTES = 1 << 33
_CHUNK_BYTES = 1 << 20
_AGAIN = "fetch it again from where the set is published"


def read_idx_pictures(path: str) -> NDArray[np.uint8]:
    """pixels_NHWC of an IDX file of bytes with three dimensions, as MNIST has them, perhaps by gzip.

    Raises SetFileUnusable.
    """
    return _read_idx(path, 3, "pictures")[..., None]


def read_idx_labels(path: str) -> NDArray[np.uint8]:
    """labels_N of an IDX file of bytes with one dimension. Raises SetFileUnusable."""
    return _read_idx(path, 1, "labels")


def read_cifar_batch(path: str, label_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(pixels_NHWC, labels_NL) of a binary batch: a label of so many bytes, then a plane of each colour, row by row.

    Raises SetFileUnusable.
    """
    plane_bytes = 3 * CIFAR_SIDE**2
    records_NR = _read_records(path, label_bytes + plane_bytes)
    planes_NCHW = records_NR[:, label_bytes:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    return planes_NCHW.transpose(0, 2, 3, 1), records_NR[:, :label_bytes]


def read_cifar_pickle(path: str, label_key: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(pixels_NHWC, labels_N) of a batch of the Python version, read without running anything in it.

    label_key: `labels`, or `fine_labels` of CIFAR-100. Raises SetFileUnusable.
    """
    try:
        batch = read_plain_pickle(Path(path))
        if not isinstance(batch, dict):
            raise TruthUnusable(f"{path}: expected a table of data and labels, found {type(batch).__name__}")
        values = {_as_text(key): value for key, value in batch.items()}
        if missing := {"data", label_key} - values.keys():
            raise TruthUnusable(f"{path}: expected data and {label_key}, found no {' and no '.join(sorted(missing))}")
        data, labels = as_array(values["data"]), as_list(values[label_key])
    except TruthUnusable as error:
        raise SetFileUnusable(f"{error}; {_AGAIN}") from error
    if data.dtype != np.uint8 or data.ndim != 2 or not len(data) or data.shape[1] != 3 * CIFAR_SIDE**2:
        raise SetFileUnusable(
            f"{path}: expected data of N x {3 * CIFAR_SIDE**2} bytes, found {' x '.join(map(str, data.shape))} of "
            f"{data.dtype}; {_AGAIN}"
        )
    if not all(isinstance(label, int) for label in labels):
        raise SetFileUnusable(f"{path}: expected {label_key} to be whole numbers; {_AGAIN}")
    return data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1), np.array(labels, np.int64)


def read_stl_pictures(path: str) -> NDArray[np.uint8]:
    """pixels_NHWC of STL-10's `*_X.bin`: a plane of each colour, column by column. Raises SetFileUnusable."""
    return _read_records(path, 3 * STL_SIDE**2).reshape(-1, 3, STL_SIDE, STL_SIDE).transpose(0, 3, 2, 1)


def read_stl_labels(path: str) -> NDArray[np.uint8]:
    """labels_N of `*_y.bin`: a byte each, from 1 on. Raises SetFileUnusable."""
    return _read_records(path, 1)[:, 0]


def as_image_file(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """One picture as a PNM file, which is read, hashed and decoded as every other image file is."""
    height, width, channels = pixels_HWC.shape
    return b"P%d\n%d %d\n255\n" % (5 if channels == 1 else 6, width, height) + pixels_HWC.tobytes()


def _read_idx(path: str, num_dimensions: int, what: str) -> NDArray[np.uint8]:
    magic = bytes([0, 0, _IDX_UBYTE, num_dimensions])
    header_bytes = len(magic) + 4 * num_dimensions
    unpack = path.lower().endswith(GZIP_SUFFIX)
    try:
        with gzip.open(path, "rb") if unpack else open(path, "rb") as file:
            header = file.read(header_bytes)
            if header[: len(magic)] != magic:
                raise SetFileUnusable(
                    f"{path}: expected an IDX file of {what}, which starts with the bytes {magic.hex(' ')}, found "
                    f"{header[: len(magic)].hex(' ') or 'an empty file'}; {_AGAIN}"
                )
            if len(header) < header_bytes:
                raise SetFileUnusable(f"{path}: the file ends within its header, {len(header)} bytes; {_AGAIN}")
            shape = struct.unpack(f">{num_dimensions}I", header[len(magic) :])
            num_bytes = math.prod(shape)
            if not num_bytes:
                raise SetFileUnusable(f"{path}: expected {what}, found {' x '.join(map(str, shape))} of them")
            data = _unpack(path, file, num_bytes) if unpack else None
            found = os.fstat(file.fileno()).st_size - header_bytes if data is None else len(data)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    if found != num_bytes:
        raise SetFileUnusable(
            f"{path}: expected {' x '.join(map(str, shape))} = {num_bytes:,} bytes of {what} as its header says, found "
            f"{'more' if unpack and found > num_bytes else f'{found:,}'}; {_AGAIN}"
        )
    if data is None:
        return np.memmap(path, np.uint8, "r", header_bytes, shape)
    return np.frombuffer(data, np.uint8).reshape(shape)


def _unpack(path: str, file: Any, num_bytes: int) -> bytes:
    """So many bytes and at most one more, or fewer where the file ends before."""
    if num_bytes > _MAX_UNPACKED_BYTES:
        raise SetFileUnusable(
            f"{path}: its header promises {num_bytes:,} bytes, more than {_MAX_UNPACKED_BYTES:,}; unpack it by gunzip"
        )
    chunks = []
    left = num_bytes + 1
    while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)


def _read_records(path: str, record_bytes: int) -> NDArray[np.uint8]:
    """records_NR of a file that is nothing else, R bytes each."""
    try:
        num_bytes = os.path.getsize(path)
        if not num_bytes or num_bytes % record_bytes:
            raise SetFileUnusable(
                f"{path}: expected a multiple of {record_bytes:,} bytes, as many as each of its records has, found "
                f"{num_bytes:,}: the file is cut off, or another one; {_AGAIN}"
            )
        return np.memmap(path, np.uint8, "r", 0, (num_bytes // record_bytes, record_bytes))
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> SetFileUnusable:
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return SetFileUnusable(f"{path}: the compressed file is cut off or damaged ({error}); {_AGAIN}")
    return SetFileUnusable(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def _as_text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)

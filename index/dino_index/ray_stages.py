"""What runs on the nodes of a Ray cluster: tasks decode files, actors embed what was decoded.

Between the stages go Arrow tables, a row a file, which name files by `number` and hold what became of them pickled:
`FileFacts`, or (reason, message) of an ImageError. Shapes as in `embedding.py`.
"""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from dino_index.embedding import DecodedFile, decode_file
from dino_index.errors import DinoSearchError, NodeUnfit
from dino_index.image_bytes import ReadLimits
from dino_index.image_files import ListedFile
from dino_index.model_files import ModelSpec

_DECODED = pa.schema({"number": pa.int64(), "outcome": pa.binary(), "sha256": pa.binary(), "pixels": pa.large_binary()})
_EMBEDDED = pa.schema({"number": pa.int64(), "outcome": pa.binary(), "cls": pa.binary(), "gem": pa.binary()})


class KnownPictures:
    """Width and height of the pictures whose vectors are in the catalog, by sha256.

    Held in arrays, which all processes of a node read from the same memory.
    """

    def __init__(self, sizes: Mapping[bytes, tuple[int, int]]) -> None:
        digests = sorted(sizes)
        # NumPy takes trailing zero bytes for padding and leaves them out of what it gives back.
        self._digests_K = np.array(digests, "S32")
        self._sizes_K2 = np.array([sizes[digest] for digest in digests], np.int64).reshape(-1, 2)

    def find(self, sha256: bytes) -> tuple[int, int] | None:
        wanted = sha256.rstrip(b"\0")
        place = int(np.searchsorted(self._digests_K, wanted))
        if place == len(self._digests_K) or self._digests_K[place] != wanted:
            return None
        width, height = self._sizes_K2[place].tolist()
        return width, height


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What both stages are told. Weights and known pictures are objects of the cluster: each node fetches them once."""

    spec: ModelSpec
    device: Literal["cpu", "cuda"]
    batch_size: int
    """Pictures in one forward pass; 0 takes what suits the device."""
    limits: ReadLimits
    version: str
    """Of dino-search in the calling process."""
    weights: ray.ObjectRef[Any]
    """The bytes of the weights' file, as an array."""
    known: ray.ObjectRef[Any]
    """`KnownPictures`."""


def listed_files(paths: list[str], first_number: int) -> pa.Table:
    """The first stage's input: files with their numbers, from `first_number` on."""
    numbers = range(first_number, first_number + len(paths))
    return pa.table({"number": pa.array(numbers, pa.int64()), "path": [os.fsencode(path) for path in paths]})


def decode_files(files: pa.Table, settings: StageSettings) -> pa.Table:
    """First stage. Raises NodeUnfit."""
    _require_version(settings.version)
    find_embedded = ray.get(settings.known).find
    rows: list[tuple[int, bytes, bytes | None, bytes | None]] = []
    for number, path in zip(files["number"].to_pylist(), files["path"].to_pylist(), strict=True):
        file = ListedFile(os.fsdecode(path), 0, 0)
        decoded = decode_file(file, settings.spec.input_size, find_embedded, settings.limits)
        if isinstance(decoded, DecodedFile):
            pixels = None if decoded.pixels_HWC is None else decoded.pixels_HWC.tobytes()
            rows.append((number, pickle.dumps(decoded.facts), decoded.facts.sha256, pixels))
        else:
            reason = decoded.error.reason, str(decoded.error)
            rows.append((number, pickle.dumps(reason), None, None))
    return pa.table(list(map(list, zip(*rows, strict=True))), schema=_DECODED)


class FileEmbedder:
    """Second stage: an actor with one replica of the model, on one processor or GPU."""

    def __init__(self, settings: StageSettings) -> None:
        self._error: DinoSearchError | None = None
        try:
            self._load(settings)
        except DinoSearchError as error:
            # Kept for the first call: of an actor that cannot be made, Ray only hands on a text.
            self._error = error

    def _load(self, settings: StageSettings) -> None:
        from dino_index.backbones import Backbone, use_threads

        _require_version(settings.version)
        if settings.device == "cpu":
            use_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / settings.spec.weights_path.name
            ray.get(settings.weights).tofile(path)
            self._backbone = Backbone(replace(settings.spec, weights_path=path), device=settings.device)
        self._batch_size = settings.batch_size or self._backbone.batch_size

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Raises NodeUnfit, ModelError."""
        if self._error is not None:
            raise self._error
        digests = decoded["sha256"].to_pylist()
        # Copies within the table share a forward pass.
        new: dict[bytes, NDArray[np.uint8]] = {}
        for digest, pixels in zip(digests, decoded["pixels"], strict=True):
            if pixels.is_valid:
                new.setdefault(digest, self._square(pixels.as_buffer()))
        vectors = self._embed(new)
        cls, gem = ([pair and pair[kind] for pair in map(vectors.get, digests)] for kind in (0, 1))
        return pa.table([decoded["number"], decoded["outcome"], cls, gem], schema=_EMBEDDED)

    def _square(self, pixels: pa.Buffer) -> NDArray[np.uint8]:
        side = self._backbone.spec.input_size
        return np.frombuffer(pixels, np.uint8).reshape(side, side, 3)

    def _embed(self, pictures: Mapping[bytes, NDArray[np.uint8]]) -> dict[bytes, tuple[bytes, bytes]]:
        """Bytes of the CLS and GeM vectors by digest."""
        digests, squares = list(pictures), list(pictures.values())
        vectors: dict[bytes, tuple[bytes, bytes]] = {}
        for begin in range(0, len(digests), self._batch_size):
            part = slice(begin, begin + self._batch_size)
            cls_BD, gem_BD = self._backbone.embed(self._backbone.stack(squares[part]))
            pairs = [(cls_D.tobytes(), gem_D.tobytes()) for cls_D, gem_D in zip(cls_BD, gem_BD, strict=True)]
            vectors |= dict(zip(digests[part], pairs, strict=True))
        return vectors


def installed_version() -> str:
    """The version of dino-search here, `unknown` for files without an installation."""
    try:
        return importlib.metadata.version("dino-search")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _require_version(version: str) -> None:
    if installed_version() != version:
        raise NodeUnfit(
            f"node {socket.gethostname()} has dino-search {installed_version()}, the calling process "
            f"{version}: install the same version on all nodes"
        )

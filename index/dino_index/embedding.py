"""From files to vectors: decode workers feed one loop, which hands whole batches to forward passes, all bounded.

Only a fixed number of pictures is ever in memory, however large the collection is.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from dino_index.errors import ImageError
from dino_index.image_bytes import DEFAULT_LIMITS, FileContent, ReadLimits, read_file
from dino_index.image_files import ListedFile
from dino_index.images import decode

if TYPE_CHECKING:
    from dino_index.backbones import Backbone

_Given = TypeVar("_Given")
_Loaded = TypeVar("_Loaded")

_FIRST_BATCH_SIZE = 16
# Files that need no forward pass are recorded in larger transactions, but not without end.
_MAX_BATCHES_WITHOUT_FORWARD = 16


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file as it was read: raw sha256 of its bytes, size in bytes, and the whole picture's size in pixels."""

    sha256: bytes
    size: int
    mtime_ns: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class EmbeddedFile:
    """A file whose bytes have vectors: new ones, or None where they are in the catalog already."""

    file: ListedFile
    facts: FileFacts
    cls_D: NDArray[np.float16] | None
    gem_D: NDArray[np.float16] | None


@dataclass(frozen=True, slots=True)
class FailedFile:
    """A file that could not be used, and why."""

    file: ListedFile
    error: ImageError


@dataclass(frozen=True, slots=True)
class DecodedFile:
    """A file whose picture is in memory, or None where its bytes have vectors already."""

    file: ListedFile
    facts: FileFacts
    pixels_HWC: NDArray[np.uint8] | None


@dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
    """How files are embedded; no setting changes a vector."""

    batch_size: int = 0
    """Pictures in one forward pass; 0 takes what suits the device."""
    workers: int = 0
    """Threads that read and decode; 0 takes one for each processor that this process may use."""
    limits: ReadLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise ValueError(f"batch_size must be 0 or more, found {self.batch_size}")
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, found {self.workers}")

    @property
    def num_workers(self) -> int:
        return self.workers or num_processors()


def num_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def embed_files(
    files: Iterable[ListedFile],
    load_backbone: Callable[[], Backbone],
    input_size: int,
    find_embedded: Callable[[bytes], tuple[int, int] | None],
    settings: EmbeddingSettings,
    read: Callable[[str, ReadLimits], FileContent] = read_file,
) -> Generator[list[EmbeddedFile | FailedFile]]:
    """Outcomes of all files, in order, a batch at a time.

    load_backbone: called once, when the first picture needs a forward pass.
    find_embedded: (width, height) of bytes whose vectors are known, by sha256; called from several threads.
    read: content of a path, or ImageError; called from several threads.
    """
    backbone: Backbone | None = None
    batch: list[DecodedFile | FailedFile] = []
    # The distinct new pictures of the batch: copies share a forward pass.
    new: dict[bytes, NDArray[np.uint8]] = {}
    running: deque[Future[list[EmbeddedFile | FailedFile]]] = deque()

    def batch_size() -> int:
        return settings.batch_size or (backbone.batch_size if backbone else _FIRST_BATCH_SIZE)

    def num_ahead() -> int:
        return 2 * batch_size() * (backbone.num_devices if backbone else 1)

    def load(file: ListedFile) -> DecodedFile | FailedFile:
        return decode_file(file, input_size, find_embedded, settings.limits, read)

    def submit() -> None:
        # Put together here, so that a GPU's thread does nothing else than to keep it busy.
        pixels_BHWC = backbone.stack(list(new.values())) if backbone and new else None
        running.append(forward.submit(_embed, list(batch), list(new), pixels_BHWC, backbone))
        batch.clear()
        new.clear()

    with ExitStack() as stack:
        # Until a picture needs the model, batches hold only what needs no forward pass.
        forward, max_waiting = stack.enter_context(ThreadPoolExecutor(1)), 1
        for outcome in in_order(load, files, settings.num_workers, num_ahead):
            if isinstance(outcome, DecodedFile) and outcome.pixels_HWC is not None:
                new.setdefault(outcome.facts.sha256, outcome.pixels_HWC)
                outcome = DecodedFile(outcome.file, outcome.facts, None)
                if backbone is None:
                    # The model loads while the workers decode ahead.
                    backbone = load_backbone()
                    forward, max_waiting = stack.enter_context(backbone.forward_threads()), backbone.max_waiting
            batch.append(outcome)
            if len(new) >= batch_size() or len(batch) >= _MAX_BATCHES_WITHOUT_FORWARD * batch_size():
                submit()
            while len(running) > max_waiting:
                yield running.popleft().result()
        if batch:
            submit()
        while running:
            yield running.popleft().result()


def _embed(
    batch: Sequence[DecodedFile | FailedFile],
    digests: Sequence[bytes],
    pixels_BHWC: NDArray[np.uint8] | None,
    backbone: Backbone | None,
) -> list[EmbeddedFile | FailedFile]:
    """The batch's outcomes after one forward pass. digests: of the pictures in `pixels_BHWC`."""
    vectors: dict[bytes, tuple[NDArray[np.float16], NDArray[np.float16]]] = {}
    if pixels_BHWC is not None:
        assert backbone is not None
        cls_BD, gem_BD = backbone.embed(pixels_BHWC)
        vectors = dict(zip(digests, zip(cls_BD, gem_BD, strict=True), strict=True))
    return [
        item if isinstance(item, FailedFile)
        else EmbeddedFile(item.file, item.facts, *vectors.get(item.facts.sha256, (None, None)))
        for item in batch
    ]  # fmt: skip


def decode_file(
    file: ListedFile,
    input_size: int,
    find_embedded: Callable[[bytes], tuple[int, int] | None],
    limits: ReadLimits,
    read: Callable[[str, ReadLimits], FileContent] = read_file,
) -> DecodedFile | FailedFile:
    """What a forward pass needs of a file, or why it cannot be used; arguments as of `embed_files`."""
    try:
        content = read(file.path, limits)
        known = find_embedded(content.sha256)
        if known is not None:
            return DecodedFile(file, FileFacts(content.sha256, content.size, content.mtime_ns, *known), None)
        picture = decode(content.data, size=(input_size, input_size), limits=limits)
    except ImageError as error:
        return FailedFile(file, error)
    facts = FileFacts(content.sha256, content.size, content.mtime_ns, picture.width, picture.height)
    return DecodedFile(file, facts, picture.pixels_HWC)


def in_order(
    load: Callable[[_Given], _Loaded],
    items: Iterable[_Given],
    num_workers: int,
    ahead: Callable[[], int],
) -> Iterator[_Loaded]:
    """`load` of each item by worker threads, in the items' order, and so many items ahead of the caller."""
    pending: deque[Future[_Loaded]] = deque()
    workers = ThreadPoolExecutor(num_workers, "decode")
    try:
        for item in items:
            pending.append(workers.submit(load, item))
            while len(pending) >= ahead() + num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        workers.shutdown(wait=True, cancel_futures=True)

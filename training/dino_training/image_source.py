"""The images of a run as pixels, by position: decoded when asked for, or once into memory where all of them fit.

Shapes: H height, W width, C colour (red, green, blue).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from dino_index.embedding import num_processors
from dino_index.errors import ImageError, NoImagesFound
from dino_index.images import decode, read_file
from dino_index.shards import read_at
from dino_training.image_listing import ListedImages, list_images_of_run
from dino_training.set_files import Purpose

# Decoded to estimate what all images take.
_NUM_SAMPLED = 64
# Images that a thread decodes between two looks at how full the cache is.
_CHUNK = 32
# An array's own memory beside its pixels; counts for small images.
_ARRAY_BYTES = 160


class ImageSource:
    """The images of a run, by position 0..len-1, in a fixed order: from folders, files, manifests, tar shards, URLs and
    files of published sets.

    All that loads may be called from several threads at once. An image found unreadable is not tried again, so that
    the same image stands in for it in the whole run.

    names: absolute path, `SHARD.tar/MEMBER`, `SET-FILE/NUMBER` or URL. labels: one or None for each image; None if none
    were asked for.
    digest: hex sha256 over names and sizes, the same as long as the list is.
    ignored: files that are no image, by type. skipped: files and folders not looked at, by reason.
    """

    def __init__(self, listed: ListedImages) -> None:
        """Takes a list of at least one image; `open` makes it."""
        self.names: Sequence[str] = listed.names
        self.labels = listed.labels
        self.ignored = listed.ignored
        self.skipped = listed.skipped
        self.digest = _digest(zip(listed.names, listed.sizes, strict=True))
        self._listed = listed
        self._failures = listed.failures
        self._unreadable: set[int] = set()
        self._decode_size: int | None = None
        self._cache: list[NDArray[np.uint8] | None] | None = None

    @classmethod
    def open(
        cls, paths: Sequence[str | os.PathLike[str]], *, labels: str = "none", purpose: Purpose = "pretraining"
    ) -> ImageSource:
        """The images under the paths; what counts as one, `labels` and `purpose`, are as in
        `image_listing.list_images_of_run`.

        Raises SourceNotFound, ManifestError, BackendMissing, SetFileUnusable, LabelFileError, NoImagesFound.
        """
        listed = list_images_of_run(paths, labels=labels, purpose=purpose)
        if not listed.names:
            counts = listed.ignored + listed.skipped + _count_reasons(listed.failures.values())
            found = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "nothing"
            where = ", ".join(map(os.fsdecode, paths))
            raise NoImagesFound(f"expected images under {where}, found {found}; give folders of images, or .tar shards")
        return cls(listed)

    def __len__(self) -> int:
        """Images listed, unreadable ones included."""
        return len(self.names)

    @property
    def failures(self) -> dict[str, ImageError]:
        """By name: what could not be listed, and the images found unreadable so far."""
        return dict(self._failures)

    @property
    def num_unreadable(self) -> int:
        """How many `failures` there are; those of folders and shards are among them."""
        return len(self._failures)

    @property
    def num_readable(self) -> int:
        """Images listed and not found unreadable so far."""
        return len(self) - len(self._unreadable)

    def prepare(
        self,
        *,
        decode_size: int,
        cache_bytes: int,
        workers: int = 0,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> bool:
        """Has images decoded to a shorter side of at most decode_size pixels; whether all are now kept in memory.

        They are if all of them, decoded, fit into cache_bytes: what they take is estimated from a sample first.
        workers: threads that decode; 0 takes one for each processor. on_progress: given images done, and all.
        """
        self._decode_size, self._cache = decode_size, None
        pool = ThreadPoolExecutor(workers or num_processors(), "decode")
        try:
            if cache_bytes > 0 and self._estimate_bytes(pool) <= cache_bytes:
                self._cache = self._decode_all(pool, cache_bytes, on_progress)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return self._cache is not None

    def load(self, position: int) -> NDArray[np.uint8]:
        """Pixels of one image: uint8 HWC, sRGB. Not to be changed, as they may be the cache's. Raises ImageError."""
        if self._cache is not None and (kept := self._cache[position]) is not None:
            return kept
        if position in self._unreadable:
            known = self._failures[self.names[position]]
            raise ImageError(known.reason, str(known))
        try:
            return decode(self._read(position), max_short_side=self._decode_size).pixels_HWC
        except ImageError as error:
            # A new error: the caught one holds on to the stack, and so to the file's bytes.
            self._failures[self.names[position]] = ImageError(error.reason, str(error))
            self._unreadable.add(position)
            raise

    def load_readable(self, position: int) -> NDArray[np.uint8]:
        """Pixels of the image at this position or, if it cannot be read, of the next one that can, from the end to 0.

        Raises NoImagesFound if there is none.
        """
        for candidate in chain(range(position, len(self)), range(position)):
            if candidate not in self._unreadable:
                try:
                    return self.load(candidate)
                except ImageError:
                    continue
        reasons = ", ".join(f"{number} {reason}" for reason, number in _count_reasons(self.failures.values()).items())
        raise NoImagesFound(f"expected images, and none of the {len(self):,} listed can be read: {reasons}")

    def _read(self, position: int) -> bytes:
        member = position - self._listed.num_files
        if member < 0:
            return read_file(self.names[position]).data
        if member >= len(self._listed.offsets):
            return self._listed.sets.read(self.names[position]).data
        # By its place: the images of all shards come in any order, and the shards need not be remembered for that.
        shard = self._listed.shards[self._listed.shard_numbers[member]]
        return read_at(shard, self._listed.offsets[member], self._listed.sizes[position])

    def _estimate_bytes(self, pool: ThreadPoolExecutor) -> int:
        """What all decoded images take, from a seeded sample spread over them; unreadable ones take nothing."""
        num_sampled = min(_NUM_SAMPLED, len(self))
        bounds = np.linspace(0, len(self), num_sampled + 1).astype(np.int64)
        sampled = np.random.default_rng(0).integers(bounds[:-1], bounds[1:])
        return sum(pool.map(self._decoded_bytes, sampled.tolist())) * len(self) // num_sampled

    def _decoded_bytes(self, position: int) -> int:
        try:
            return self.load(position).nbytes + _ARRAY_BYTES
        except ImageError:
            return 0

    def _decode_all(
        self, pool: ThreadPoolExecutor, cache_bytes: int, on_progress: Callable[[int, int], None]
    ) -> list[NDArray[np.uint8] | None] | None:
        """Pixels by position, None for unreadable images; None in all if they do not fit."""
        cache: list[NDArray[np.uint8] | None] = [None] * len(self)

        def fill(start: int) -> int:
            num_bytes = 0
            for position in range(start, min(start + _CHUNK, len(self))):
                try:
                    pixels_HWC = self.load(position)
                except ImageError:
                    continue
                cache[position] = pixels_HWC
                num_bytes += pixels_HWC.nbytes + _ARRAY_BYTES
            return num_bytes

        num_bytes = done = 0
        for chunk_bytes in pool.map(fill, range(0, len(self), _CHUNK)):
            num_bytes += chunk_bytes
            if num_bytes > cache_bytes:
                return None
            done = min(done + _CHUNK, len(self))
            on_progress(done, len(self))
        return cache


def _digest(names_and_sizes: Iterable[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for name, size in names_and_sizes:
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _count_reasons(errors: Iterable[ImageError]) -> Counter[str]:
    return Counter(error.reason for error in errors)

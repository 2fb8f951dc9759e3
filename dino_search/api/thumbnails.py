"""Thumbnails by image id, kept in memory within a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict

from dino_index.errors import ImageError
from dino_index.image_bytes import ReadLimits, read_file
from dino_search.thumbnails import Thumbnail, thumbnail_of

SIDES = (96, 192, 384, 768)
QUALITY = 82
# What an entry takes beside the bytes of its picture.
_ENTRY_BYTES = 256

Key = tuple[bytes, int]
"""(sha256 of the original's bytes, side in pixels)"""


class ThumbnailCache:
    """The thumbnails that were asked for last. For several threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._known: OrderedDict[Key, Thumbnail] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, sha256: bytes, side: int, limits: ReadLimits) -> Thumbnail:
        """The thumbnail of a file that had these bytes when it was indexed.

        Raises ImageError: as `read_file` and `decode` do, and `vanished` where the file has other bytes by now.
        """
        key = sha256, side
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known
        content = read_file(path, limits)
        if content.sha256 != sha256:
            raise ImageError("vanished", "the file has other content since it was indexed; index it again")
        made = thumbnail_of(content.data, side=side, quality=QUALITY, limits=limits)
        with self._lock:
            if key not in self._known:
                self._known[key] = made
                self.num_bytes += len(made.jpeg) + _ENTRY_BYTES
            while self.num_bytes > self.max_bytes and self._known:
                _, dropped = self._known.popitem(last=False)
                self.num_bytes -= len(dropped.jpeg) + _ENTRY_BYTES
        return made

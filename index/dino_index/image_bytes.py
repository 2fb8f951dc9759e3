"""The bytes of one image: whatever a path leads to, opened without waiting, bounded, and hashed on the way.

A path is that of a file, of a member of a tar shard, or a URL: all that the catalog stores can be read here. Knows
nothing of pictures and imports nothing heavy for a plain file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass

from dino_index.errors import ImageError
from dino_index.image_paths import is_url, split_member

# O_NONBLOCK: opening a pipe that nobody writes to would otherwise wait for ever. Windows has none of the
# first three, and it alone has the others.
OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_NOINHERIT", 0)
)
_CHUNK_BYTES = 1 << 20
_SMALL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ReadLimits:
    """How large a file may be before it is refused unread.

    max_bytes: size of the file. max_pixels: width times height of the picture as its header claims it.
    Raises ValueError.
    """

    max_bytes: int = 256 * 1024 * 1024
    max_pixels: int = 200_000_000

    def __post_init__(self) -> None:
        for field, highest in (("max_bytes", 2**40), ("max_pixels", 2**40)):
            value = getattr(self, field)
            if not isinstance(value, int) or not 1 <= value <= highest:
                raise ValueError(f"{field} must be a whole number from 1 to {highest}, not {value!r}")


DEFAULT_LIMITS = ReadLimits()


@dataclass(frozen=True, slots=True)
class FileContent:
    """The bytes of one file.

    sha256: 32 bytes. mtime_ns: of the opened file or shard, taken before its first byte was read, so that a change
    in between shows up as one the next time; for a URL, its version (see `remote_files`).
    """

    data: bytes
    sha256: bytes
    size: int
    mtime_ns: int


def read_file(path: str | os.PathLike[str], limits: ReadLimits = DEFAULT_LIMITS) -> FileContent:
    """Content of a file, of a member of a tar shard (`/data/s.tar/a.jpg`) or of a URL, hashed.

    Raises ImageError: vanished, broken_link, permission, unreadable, not_a_file, too_large, empty; for a member that
    may lie behind a damaged place of its shard, truncated or corrupt.
    """
    name = os.fsdecode(path)
    if is_url(name):
        return _read_url(name, limits)
    try:
        # Before opening, because opening alone can have effects on a device.
        _check_regular(os.stat(path))
        descriptor = os.open(path, OPEN_FLAGS)
        try:
            return _read_descriptor(descriptor, limits)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Asked only now: a plain file costs nothing more, and a folder may be called `a.tar`.
        if isinstance(error, FileNotFoundError | NotADirectoryError) and (member := split_member(name)):
            from dino_index.shards import read_member

            return read_member(*member, limits)
        raise reading_error(error, path) from error
    except ValueError as error:  # a name with a null character
        raise ImageError("unreadable", f"no file can have this name: {error}") from error


def _read_url(url: str, limits: ReadLimits) -> FileContent:
    if member := split_member(url):
        from dino_index.shards import read_member

        return read_member(*member, limits)
    from dino_index.remote_files import read_remote

    data, version = read_remote(url, limits)
    return FileContent(data=data, sha256=hashlib.sha256(data).digest(), size=len(data), mtime_ns=version)


def _read_descriptor(descriptor: int, limits: ReadLimits) -> FileContent:
    status = os.fstat(descriptor)
    _check_regular(status)
    _check_not_too_large(status.st_size, limits)
    digest = hashlib.sha256()
    chunks: list[bytes] = []
    size = 0
    wanted = min(max(status.st_size, _SMALL_BYTES) + 1, _CHUNK_BYTES)  # a small file comes in one piece
    while chunk := os.read(descriptor, wanted):
        size += len(chunk)
        _check_not_too_large(size, limits)  # it may grow while it is read
        digest.update(chunk)
        chunks.append(chunk)
    check_num_bytes(size, limits)
    data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    return FileContent(data=data, sha256=digest.digest(), size=size, mtime_ns=status.st_mtime_ns)


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("not_a_file", "this is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not_a_file", "this is a pipe, socket or device, not a regular file")


def check_num_bytes(num_bytes: int, limits: ReadLimits) -> None:
    """Raises ImageError: empty, too_large."""
    if num_bytes == 0:
        raise ImageError("empty", "there are no bytes in it")
    _check_not_too_large(num_bytes, limits)


def _check_not_too_large(num_bytes: int, limits: ReadLimits) -> None:
    if num_bytes > limits.max_bytes:
        message = f"{num_bytes:,} bytes, more than the limit of {limits.max_bytes:,} (max_bytes)"
        raise ImageError("too_large", message)


def reading_error(error: OSError, path: str | os.PathLike[str]) -> ImageError:
    """Our error for one of the operating system."""
    if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ELOOP:
        if os.path.islink(path):
            return ImageError("broken_link", "the symbolic link leads to no file")
        return ImageError("vanished", "there is no such file (any more)")
    if isinstance(error, PermissionError):
        return ImageError("permission", "the operating system refuses to open it: check its permissions")
    return ImageError("unreadable", f"the storage failed: {error.strerror or error}")

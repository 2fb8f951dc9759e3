"""Tar shards read in place: which images they hold, and the bytes of one of them without reading the others.

A shard is an uncompressed tar archive, on a disk or behind a URL. Where its members' bytes begin is found once, by
hopping from header to header, and remembered as long as the shard stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import IO

from dino_index.errors import ImageError
from dino_index.image_bytes import DEFAULT_LIMITS, FileContent, ReadLimits, check_num_bytes, reading_error
from dino_index.image_files import has_image_name
from dino_index.image_paths import is_url

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
SIDECAR_SUFFIXES = (".cls", ".json")
_MAX_SIDECAR_BYTES = 1 << 20
# Of all shards that are remembered together; some 200 bytes each.
_MAX_REMEMBERED = 200_000


@dataclass(kw_only=True)
class Shard:
    """The images in a tar archive, in its order.

    names: as in the archive, without `./` and doubled `/`. sizes, offsets: in bytes, of and within the archive.
    mtime_ns: of the archive; of one behind a URL, its version (see `remote_files`).
    sidecars: (name, offset, size) of members that may say something about an image: `.cls` and `.json`.
    ignored: members that are no image by name, hidden ones, and earlier ones of the same name, by kind; sidecars too.
    damage: what ends the archive early or makes it none; the images before that place are listed.
    """

    path: str
    size: int
    mtime_ns: int
    names: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sidecars: list[tuple[str, int, int]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    damage: ImageError | None = None

    def only(self, numbers: Sequence[int]) -> Shard:
        """The same shard with some of its images."""
        return replace(
            self,
            names=[self.names[number] for number in numbers],
            sizes=array("q", [self.sizes[number] for number in numbers]),
            offsets=array("q", [self.offsets[number] for number in numbers]),
        )

    def path_of(self, number: int) -> str:
        """The path by which a member is known."""
        return member_path(self.path, self.names[number])

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Position by name."""
        return {name: number for number, name in enumerate(self.names)}


def member_path(shard: str, name: str) -> str:
    return f"{shard}/{name}" if is_url(shard) else os.path.join(shard, *name.split("/"))


def read_shard(path: str) -> Shard:
    """The images that a shard holds, as of now. Raises ImageError: vanished, permission, unreadable."""
    with _opened(path) as (file, size, mtime_ns):
        return _remembered(path, file, size, mtime_ns)


def find_member(path: str, name: str) -> tuple[Shard, int]:
    """A shard and the position of a member in it.

    Raises ImageError: vanished, permission, unreadable; truncated or corrupt for a member that may lie behind a
    damaged place.
    """
    shard = read_shard(path)
    return shard, _number_of(shard, name)


def read_member(path: str, name: str, limits: ReadLimits = DEFAULT_LIMITS) -> FileContent:
    """Content of one member, hashed. Raises ImageError as `find_member` does, and empty, too_large."""
    with _opened(path) as (file, size, mtime_ns):
        shard = _remembered(path, file, size, mtime_ns)
        number = _number_of(shard, name)
        data = _read(path, file, shard.offsets[number], shard.sizes[number], limits)
    return FileContent(data=data, sha256=hashlib.sha256(data).digest(), size=len(data), mtime_ns=mtime_ns)


def read_at(path: str, offset: int, num_bytes: int, limits: ReadLimits = DEFAULT_LIMITS) -> bytes:
    """Bytes of a shard's member whose place is known. Raises ImageError; fewer come back where the shard was cut."""
    check_num_bytes(num_bytes, limits)
    with _opened(path) as (file, _, _):
        return _read(path, file, offset, num_bytes, limits)


def read_sidecars(shard: Shard) -> Iterator[tuple[str, str, bytes | None]]:
    """(key, suffix, bytes) of what a shard says about its images; None for bytes that are too many.

    As WebDataset has it, the key is a member's name up to the first dot behind its folders: `a/1.jpg`, `a/1.cls` and
    `a/1.json` are of one sample. Raises ImageError.
    """
    if not shard.sidecars:
        return
    with _opened(shard.path) as (file, _, _):
        for name, offset, num_bytes in shard.sidecars:
            data = None
            if num_bytes <= _MAX_SIDECAR_BYTES:
                file.seek(offset)
                data = file.read(num_bytes)
            yield sample_key(name), "." + name.rpartition(".")[2], data


def sample_key(name: str) -> str:
    folder, slash, file_name = name.rpartition("/")
    return folder + slash + file_name.partition(".")[0]


def _read(path: str, file: IO[bytes], offset: int, num_bytes: int, limits: ReadLimits) -> bytes:
    check_num_bytes(num_bytes, limits)
    if is_url(path):
        from dino_index.remote_files import read_range

        return read_range(path, offset, num_bytes)
    file.seek(offset)
    return file.read(num_bytes)


def _number_of(shard: Shard, name: str) -> int:
    number = shard.numbers.get(name)
    if number is not None:
        return number
    if shard.damage is not None:
        raise ImageError(shard.damage.reason, f"{shard.path}: {shard.damage}")
    raise ImageError("vanished", f"the shard {shard.path} holds no image {name} (any more)")


@contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], int, int]]:
    """(file, size, time of change or version) of a shard; errors while it is open become ImageErrors."""
    if is_url(path):
        from dino_index.remote_files import open_remote

        with open_remote(path) as opened:
            yield opened
        return
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            yield file, status.st_size, status.st_mtime_ns
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise ImageError("vanished", f"there is no shard {path} (any more)") from error
        raise reading_error(error, path) from error


_remembered_shards: OrderedDict[tuple[str, int, int], Shard] = OrderedDict()
_remembering = threading.Lock()


def _remembered(path: str, file: IO[bytes], size: int, mtime_ns: int) -> Shard:
    """The shard as scanned before if it has not changed since. One thread scans while others wait."""
    key = path, size, mtime_ns
    with _remembering:
        shard = _remembered_shards.get(key)
        if shard is None:
            shard = _scan(path, file, size, mtime_ns)
            _remembered_shards[key] = shard
        _remembered_shards.move_to_end(key)
        num_members = sum(len(each.names) for each in _remembered_shards.values())
        while num_members > _MAX_REMEMBERED and len(_remembered_shards) > 1:
            _, forgotten = _remembered_shards.popitem(last=False)
            num_members -= len(forgotten.names)
        return shard


def forget_shards() -> None:
    """Empties the memory of scanned shards."""
    with _remembering:
        _remembered_shards.clear()


def _scan(path: str, file: IO[bytes], size: int, mtime_ns: int) -> Shard:
    shard = Shard(path=path, size=size, mtime_ns=mtime_ns)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            damage = _add_members(shard, file, tar)
    # tarfile lets the last three through from damaged extended headers.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        damage = str(error) or type(error).__name__
    if damage and not shard.names:
        message = f"expected an uncompressed tar archive, found none ({damage}); unpack it, or pack it anew as .tar"
        shard.damage = ImageError("corrupt", message)
    elif damage:
        num_images = len(shard.names)
        message = f"the shard is cut off or damaged ({damage}); the {num_images} images before that place are used"
        shard.damage = ImageError("truncated", message)
    return shard


def _add_members(shard: Shard, file: IO[bytes], tar: tarfile.TarFile) -> str | None:
    """What is wrong with the archive behind the last member that was added, None if nothing is."""
    latest: dict[str, tuple[int, int]] = {}
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte for each
            if not 0 <= member.size <= shard.size - member.offset_data:
                return f"it ends within {member.name}"
            name = _clean_name(member.name)
            if not member.isreg() or member.issparse() or name is None or not has_image_name(name):
                shard.ignored["shard member"] += not member.isdir()
                if name is not None and name.endswith(SIDECAR_SUFFIXES) and member.isreg() and not member.issparse():
                    shard.sidecars.append((name, member.offset_data, member.size))
                continue
            # As when a tar is unpacked, the last of several members with one name counts.
            shard.ignored["replaced shard member"] += latest.pop(name, None) is not None
            latest[name] = member.offset_data, member.size
        # tarfile ends silently at a header that is cut off or damaged; a whole archive ends with zeros.
        file.seek(tar.offset)
        return None if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else "its end mark is missing"
    finally:
        shard.ignored += Counter()  # drops the zeros
        for name, (offset, num_bytes) in latest.items():
            shard.names.append(name)
            shard.offsets.append(offset)
            shard.sizes.append(num_bytes)


def _clean_name(member_name: str) -> str | None:
    """The name of a member within its shard; None for what is hidden or leads out of it."""
    parts = [part for part in member_name.split("/") if part not in ("", ".")]
    if not parts or any(part.startswith(".") for part in parts):
        return None
    if "\0" in member_name:  # no path can hold it
        return None
    return "/".join(parts)

"""Which images lie under the paths of a run: folders, single files, manifests and tar shards.

Nothing is left out silently: what is no image is counted, what should be one and cannot be read is a failure.
"""

from __future__ import annotations

import csv
import json
import os
import stat
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from dino_index.catalog.portable_paths import encode_path
from dino_index.errors import ImageError, LabelFileError, SourceNotFound
from dino_index.image_files import IMAGE_EXTENSIONS, list_images
from dino_index.labels import FROM_FOLDERS, labels_from_csv, labels_from_folders

_MANIFESTS = (".txt", ".csv", ".jsonl")
_SHARDS = (".tar",)
_COMPRESSED_SHARDS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")


@dataclass(kw_only=True)
class ListedImages:
    """Images in a fixed order: single files, those in folders, members of shards.

    names: absolute path, or SHARD!member. sizes: bytes. labels: None if none were asked for.
    shards: paths. shard_numbers, offsets: of the members, which are the last of `names`: in which of the shards they
    lie, and where in it their bytes begin.
    ignored: files and members that are no image, by type. skipped: files and folders not looked at, by reason.
    failures: what should be an image, a folder or a shard and cannot be read to its end, by name.
    """

    names: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    labels: list[str | None] | None = None
    shards: list[str] = field(default_factory=list)
    shard_numbers: array[int] = field(default_factory=lambda: array("l"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    ignored: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    failures: dict[str, ImageError] = field(default_factory=dict)

    @property
    def num_files(self) -> int:
        """Images that are files of their own: the first of `names`."""
        return len(self.names) - len(self.offsets)

    def add_shard(self, shard: str) -> None:
        """Adds the images of a tar file; those before a damaged place, which becomes a failure."""
        self.shards.append(shard)
        num_before = len(self.names)
        try:
            with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                damage = self._add_members(file, tar)
        # tarfile lets these through from damaged extended headers.
        except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
            damage = str(error) or type(error).__name__
        except OSError as error:
            reason = "permission" if isinstance(error, PermissionError) else "unreadable"
            self.failures[shard] = ImageError(reason, f"the shard cannot be read: {error.strerror or error}")
            return
        num_images = len(self.names) - num_before
        if damage and not num_images:
            message = f"expected an uncompressed tar archive, found none ({damage}); unpack it, or pack it anew as .tar"
            self.failures[shard] = ImageError("corrupt", message)
        elif damage:
            message = f"the shard is cut off or damaged ({damage}); the {num_images} images before that place are used"
            self.failures[shard] = ImageError("truncated", message)

    def _add_members(self, file: IO[bytes], tar: tarfile.TarFile) -> str | None:
        """What is wrong with the archive behind the last member that was added, None if nothing is."""
        num_bytes = os.fstat(file.fileno()).st_size
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte for each
            if not 0 <= member.size <= num_bytes - member.offset_data:
                return f"it ends within {member.name}"
            if not member.isreg() or member.issparse() or not _is_image_name(member.name):
                self.ignored["shard member"] += not member.isdir()
                continue
            self.names.append(f"{self.shards[-1]}!{member.name}")
            self.sizes.append(member.size)
            self.shard_numbers.append(len(self.shards) - 1)
            self.offsets.append(member.offset_data)
        # tarfile ends silently at a header that is cut off or damaged; a whole archive ends with zeros.
        file.seek(tar.offset)
        return None if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else "its end mark is missing"


def list_sources(paths: Sequence[str | os.PathLike[str]], *, labels: str = "none") -> ListedImages:
    """The images under the given paths, each once however often it is given.

    Folders and single files are taken as by `list_images`, except for these files:
    - .tar: a shard, also when it lies directly in a given folder. Its members are images if their extension is one of
      an image and no part of their name is hidden; label members (WebDataset's `key.cls`, `key.json`) are not read.
    - given .txt, .csv or .jsonl: a manifest of image files and shards, by paths relative to it: one a line, in the
      column `path`, or in objects with the key `path`. The last two may have a `label` beside it.

    labels: `none`; `folders`, the first folder below a given one or inside a shard; or a CSV file with the columns path
    and label. What a manifest says goes before either; its label for a shard is that of every image in it.

    Raises SourceNotFound for a path that does not exist or cannot be listed, given or in a manifest, and for compressed
    archives; LabelFileError for a manifest or a CSV file that lacks what it should have.
    """
    given = [os.path.abspath(os.fsdecode(path)) for path in paths]
    files_and_folders, shards, own_labels = _sort_by_kind(given)
    shards_in_folders = {os.path.realpath(shard): shard for path in given for shard in _shards_directly_in(path)}
    listing = list_images(files_and_folders)
    found = ListedImages(ignored=listing.ignored, skipped=listing.skipped_folders + listing.skipped_files)
    found.ignored -= Counter(archive=len(shards_in_folders))  # as which they were counted
    found.failures = {failure.path: ImageError(failure.reason, failure.message) for failure in listing.failures}
    found.names = [file.path for file in listing.files]
    found.sizes = array("q", [file.size for file in listing.files])
    del listing
    for shard in ({os.path.realpath(shard): shard for shard in shards} | shards_in_folders).values():
        found.add_shard(shard)
    if labels != "none":
        found.labels = _labels(found, given, labels, own_labels)
    return found


def _sort_by_kind(given: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """(other files and folders, shards, label by path) with manifests replaced by what they name."""
    files_and_folders: list[str] = []
    shards: list[str] = []
    labels: dict[str, str] = {}
    for path in given:
        if not (path.lower().endswith(_MANIFESTS) and os.path.isfile(path)):
            (shards if _is_shard(path) else files_and_folders).append(path)
            continue
        for where, named, label in _read_manifest(path):
            named = os.path.normpath(os.path.join(os.path.dirname(path), named))
            _check_named(named, where)
            (shards if _is_shard(named) else files_and_folders).append(named)
            if label:
                labels[named] = label
    return files_and_folders, shards, labels


def _is_shard(path: str) -> bool:
    if path.lower().endswith(_COMPRESSED_SHARDS) and os.path.isfile(path):
        raise SourceNotFound(f"{path}: images are not read out of a compressed archive; unpack it, or pack it as .tar")
    return path.lower().endswith(_SHARDS) and os.path.isfile(path)


def _check_named(path: str, where: str) -> None:
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise SourceNotFound(f"{where}: expected an image file or a shard, and {path} is a folder")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceNotFound(f"{where}: expected an image file or a shard, found none at {path}: {reason}") from error


def _shards_directly_in(path: str) -> list[str]:
    try:
        names = sorted(os.listdir(path), key=os.fsencode)
    except OSError:  # a file, or `list_images` says what is wrong
        return []
    shards = [os.path.join(path, name) for name in names if name.lower().endswith(_SHARDS) and name[0] != "."]
    return [shard for shard in shards if os.path.isfile(shard) and os.path.getsize(shard)]


def _is_image_name(member_name: str) -> bool:
    parts = _parts(member_name)
    _, dot, extension = parts[-1].rpartition(".") if parts else ("", "", "")
    return dot != "" and extension.lower() in IMAGE_EXTENSIONS and not any(part.startswith(".") for part in parts)


def _parts(member_name: str) -> list[str]:
    return [part for part in member_name.split("/") if part not in ("", ".")]


def _read_manifest(path: str) -> Iterator[tuple[str, str, str | None]]:
    """(where it stands, path as written, label) for each image of a manifest."""
    read = {".txt": _read_lines, ".csv": _read_csv, ".jsonl": _read_jsonl}[os.path.splitext(path)[1].lower()]
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for line, named, label in read(file, path):
                where = f"{path}, line {line}"
                if not isinstance(named, str) or not named:
                    raise LabelFileError(f"{where}: expected a path, found {named!r}")
                if isinstance(label, bool) or not isinstance(label, str | int | None):
                    raise LabelFileError(f"{where}: expected a text or a whole number as label, found {label!r}")
                yield where, named, None if label is None else str(label)
    except OSError as error:
        raise SourceNotFound(f"the manifest {path} cannot be read: {error.strerror or error}") from error


def _read_lines(file: IO[str], path: str) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, line.rstrip("\r\n"), None


def _read_csv(file: IO[str], path: str) -> Iterator[tuple[int, Any, Any]]:
    rows = csv.DictReader(file)
    try:
        if "path" not in (rows.fieldnames or ()):
            found = ", ".join(rows.fieldnames or ()) or "nothing"
            raise LabelFileError(f"{path} must have the column path in its first line, found {found}")
        for row in rows:
            if any(row.values()):
                yield rows.line_num, row["path"], row.get("label")
    except csv.Error as error:
        raise LabelFileError(f"{path}, line {rows.line_num}: {error}") from error


def _read_jsonl(file: IO[str], path: str) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise LabelFileError(f"{path}, line {number}: expected JSON: {error}") from error
        if not isinstance(value, dict) or "path" not in value:
            raise LabelFileError(f"{path}, line {number}: expected an object with the key path, found {line.strip()}")
        yield number, value["path"], value.get("label")


def _labels(found: ListedImages, given: Sequence[str], labels: str, own_labels: dict[str, str]) -> list[str | None]:
    files = found.names[: found.num_files]
    by_name = labels_from_folders(given, files) if labels == FROM_FOLDERS else labels_from_csv(labels, given)
    result = [own_labels.get(name, by_name.get(name)) for name in files]
    for number, name in zip(found.shard_numbers, found.names[found.num_files :], strict=True):
        shard = found.shards[number]
        label = own_labels.get(shard, by_name.get(name))
        if label is None and labels == FROM_FOLDERS:
            first, *deeper = _parts(name[len(shard) + 1 :])
            label = encode_path(first) if deeper else None
        result.append(label)
    return [sys.intern(label) if label is not None else None for label in result]

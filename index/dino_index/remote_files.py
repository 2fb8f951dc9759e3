"""Files behind URLs (`s3://`, `gs://`, `https://` …), through fsspec and the package that it has for each scheme.

Nothing of it is imported before the first URL. Credentials are those that the scheme's own package finds in the
environment; none are kept.

A file's *version* is a whole number that stays the same while the file does: made of the ETag or checksum that its
server gives, else of the time of change, else -1, so that only the size can tell a change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import IO, Any

from dino_index.errors import BackendMissing, ImageError
from dino_index.image_bytes import ReadLimits, check_num_bytes

UNKNOWN_VERSION = -1
_CHECKSUMS = ("etag", "content-md5", "md5hash", "md5", "checksum", "sha256", "sha", "crc32c", "digest")
_TIMES = ("mtime", "lastmodified", "last_modified", "last-modified", "updated", "timemodified", "modified", "created")
_NUM_REQUESTS_AT_ONCE = 16
# Object stores, which list everything with a common beginning at once.
_FLAT_SCHEMES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"))
# A server may link from each folder to another one below it without end.
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What a server says about a URL. size: bytes, None if it does not say."""

    url: str
    size: int | None
    version: int
    is_folder: bool = False


def require_backend(url: str) -> None:
    """Raises BackendMissing for a URL whose scheme needs a package that is not installed, or is unknown."""
    _filesystem(url)


def describe(url: str) -> RemoteFile:
    """Size, version and kind of what a URL leads to. Raises ImageError: vanished, permission, unreadable."""
    with _remote_errors(url):
        filesystem, path = _filesystem(url)
        facts = filesystem.info(path)
        is_folder = facts.get("type") == "directory"
        if not is_folder and _is_http(url) and facts.get("mimetype") == "text/html":
            is_folder = True  # over HTTP a folder is a page of links
        return RemoteFile(url, _size(facts), version_of(facts), is_folder)


def describe_all(urls: list[str]) -> Iterator[RemoteFile | ImageError]:
    """`describe` of each URL, in order, several at a time."""

    def describe_or_fail(url: str) -> RemoteFile | ImageError:
        try:
            return describe(url)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(_NUM_REQUESTS_AT_ONCE, "describe") as pool:
        yield from pool.map(describe_or_fail, urls)


def list_folder(url: str) -> tuple[list[RemoteFile], dict[str, ImageError]]:
    """(all files below a URL, in the order of their URLs; folders below it that cannot be listed, and why).

    Raises ImageError for the folder itself: vanished, permission, unreadable.
    """
    failures: dict[str, ImageError] = {}
    with _remote_errors(url):
        filesystem, root = _filesystem(url)
        filesystem.invalidate_cache()
        if url.partition("://")[0] in _FLAT_SCHEMES:
            entries = list(filesystem.find(root, detail=True).values())
        else:
            entries = list(_walk(filesystem, url, root, failures))
    root = root.rstrip("/")
    files: list[RemoteFile] = []
    undescribed: list[RemoteFile] = []
    for facts in entries:
        file = RemoteFile(f"{url.rstrip('/')}/{_below(facts, root)}", _size(facts), version_of(facts))
        (undescribed if file.size is None else files).append(file)
    for outcome, file in zip(describe_all([file.url for file in undescribed]), undescribed, strict=True):
        # A file that cannot be described is kept: reading it says what is wrong.
        files.append(outcome if isinstance(outcome, RemoteFile) else file)
    return sorted(files, key=lambda file: file.url), failures


def _walk(filesystem: Any, url: str, root: str, failures: dict[str, ImageError]) -> Iterator[Mapping[str, Any]]:
    """What lies below a folder. fsspec's own walk would pass over folders that cannot be listed."""
    # Links of a web page are relative to the folder, which ends in a slash.
    end = "/" if _is_http(url) else ""
    pending, seen = [(root.rstrip("/"), 0)], set()
    while pending:
        folder, depth = pending.pop()
        seen.add(folder)
        try:
            listed = filesystem.ls(folder + end, detail=True)
        except Exception as error:
            if depth == 0:
                raise
            where = f"{url.rstrip('/')}/{folder[len(root.rstrip('/')) :].strip('/')}"
            failures[where] = ImageError(*_reason_and_message(error, where))
            continue
        for facts in sorted(listed, key=lambda facts: str(facts["name"]), reverse=True):
            name = str(facts["name"]).rstrip("/")
            # Web servers link to the same page sorted in another order.
            if name == folder or name[len(folder) :].startswith(("/?", "/#")):
                continue
            if facts.get("type") != "directory":
                yield facts
            elif name not in seen and depth < _MAX_DEPTH:
                pending.append((name, depth + 1))


def _below(facts: Mapping[str, Any], root: str) -> str:
    return str(facts["name"])[len(root) :].strip("/")


def read_remote(url: str, limits: ReadLimits) -> tuple[bytes, int]:
    """(bytes, version) of a file. Raises ImageError: vanished, permission, unreadable, not_a_file, too_large, empty."""
    with _remote_errors(url):
        filesystem, path = _filesystem(url)
        facts = filesystem.info(path)
        if facts.get("type") == "directory":
            raise ImageError("not_a_file", "this is a folder, not a file")
        size = _size(facts)
        if size is not None:
            check_num_bytes(size, limits)
            data = bytes(filesystem.cat_file(path))
        else:
            # Without a size, no more than the limit is taken in.
            with filesystem.open(path, "rb", **({"block_size": 0} if _is_http(url) else {})) as file:
                data = _read_at_most(file, limits.max_bytes + 1)
        check_num_bytes(len(data), limits)
        return data, version_of(facts)


def read_range(url: str, offset: int, num_bytes: int) -> bytes:
    """A part of a file. Raises ImageError: vanished, permission, unreadable."""
    with _remote_errors(url):
        filesystem, path = _filesystem(url)
        data = bytes(filesystem.cat_file(path, start=offset, end=offset + num_bytes))
        # A web server that knows no ranges sends everything.
        return data if len(data) <= num_bytes else data[offset : offset + num_bytes]


@contextmanager
def open_remote(url: str) -> Iterator[tuple[IO[bytes], int, int]]:
    """(seekable file, size, version). Raises ImageError: vanished, permission, unreadable, also while it is read."""
    with _remote_errors(url):
        filesystem, path = _filesystem(url)
        facts = filesystem.info(path)
        size = _size(facts)
        if size is None:
            raise ImageError("unreadable", f"{url}: its server does not say how large it is; copy it to a disk first")
        with filesystem.open(path, "rb") as file:
            yield file, size, version_of(facts)


def version_of(facts: Mapping[str, Any]) -> int:
    """The version of a file by what its server says about it."""
    by_name = {name.lower(): value for name, value in facts.items() if value}
    for name in _CHECKSUMS:
        if name in by_name:
            text = str(by_name[name]).removeprefix("W/").strip('"')
            return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2
    for name in _TIMES:
        if name in by_name and (time := _as_time(by_name[name])) is not None:
            return int(time.timestamp() * 1e6) * 1000
    return UNKNOWN_VERSION


def _as_time(value: Any) -> datetime | None:
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC)
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            return _as_time(parse(str(value)))
        except ValueError:
            continue
    return None


def _size(facts: Mapping[str, Any]) -> int | None:
    size = facts.get("size", facts.get("Size"))
    return int(size) if size is not None else None


def _read_at_most(file: Any, num_bytes: int) -> bytes:
    chunks, size = [], 0
    while size < num_bytes and (chunk := file.read(min(1 << 20, num_bytes - size))):
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, the URL as it wants it). Raises BackendMissing."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise _missing(scheme, "fsspec") from error
    try:
        filesystem, path = url_to_fs(url)
    except ImportError as error:
        raise _missing(scheme, str(error)) from error
    except ValueError as error:
        if "rotocol not known" in str(error):
            raise BackendMissing(f"{url}: no file system is known for {scheme}://; is it spelt right?") from error
        raise
    return filesystem, str(path)


def _missing(scheme: str, what: str) -> BackendMissing:
    return BackendMissing(
        f"reading {scheme}:// needs a package that is not installed ({what}): pip install 'dino-search[remote]'"
    )


@contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Whatever a file system's package raises, as ImageError."""
    try:
        yield
    except ImageError:
        raise
    except BackendMissing as error:
        raise ImageError("unreadable", str(error)) from error
    except Exception as error:
        raise ImageError(*_reason_and_message(error, url)) from error


def _reason_and_message(error: Exception, url: str) -> tuple[str, str]:
    # fsspec says "not found" for every failure over HTTP and hides the true one behind it.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    status = getattr(cause, "status", None)
    if status in (401, 403) or isinstance(cause, PermissionError):
        return "permission", f"{url}: its server refuses to give it; check the credentials in the environment"
    if status in (404, 410) or isinstance(cause, FileNotFoundError):
        return "vanished", "there is no such file (any more) behind this URL"
    if isinstance(cause, IsADirectoryError):
        return "not_a_file", "this is a folder, not a file"
    what = f"{type(cause).__name__}: {cause}".strip(": ")
    return "unreadable", f"{url} cannot be read: {' '.join(what.split())[:300]}"

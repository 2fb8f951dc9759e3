"""The paths that images are known by: files, members of tar shards (`/data/s.tar/a.jpg`) and URLs (`s3://bucket/a.jpg`).

All of them are absolute. What a URL leads to is asked for only where that is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

from dino_index.errors import ImageError

SHARD_SUFFIX = ".tar"
# Two letters at least: a single one is a drive of Windows.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_LOCAL_SCHEMES = ("file://", "local://")


def is_url(path: str) -> bool:
    return _SCHEME.match(path) is not None


def absolute_path(path: str | os.PathLike[str]) -> str:
    """The path as it is stored and compared: absolute, without `.`, `..` and a separator at its end.

    Of a URL only the separator at its end goes; `file://` URLs become plain paths.
    """
    given = os.fsdecode(path)
    if given.lower().startswith(_LOCAL_SCHEMES):
        given = unquote(given.partition("://")[2])
        given = given[1:] if os.name == "nt" and re.match(r"/[A-Za-z]:", given) else given
    if not is_url(given):
        return os.path.abspath(given)
    scheme, _, rest = given.partition("://")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


def separator_of(path: str) -> str:
    return "/" if is_url(path) else os.sep


def is_below(path: str, folder: str) -> bool:
    """Whether a path is the folder or lies in it; both absolute."""
    separator = separator_of(folder)
    return path == folder or path.startswith(folder.rstrip(separator) + separator)


def parent_of(path: str) -> str:
    """The folder, shard or URL that holds this path; the path itself at the top."""
    if not is_url(path):
        return os.path.dirname(path)
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{rest.rpartition('/')[0]}" if rest else path


def ancestors(path: str) -> Iterator[str]:
    """The path itself and all that holds it, nearest first."""
    while True:
        yield path
        above = parent_of(path)
        if above == path:
            return
        path = above


def is_shard_name(path: str) -> bool:
    return path.lower().endswith(SHARD_SUFFIX)


def split_member(path: str) -> tuple[str, str] | None:
    """(shard, member name with `/`) of a path that leads into a tar shard; None for any other.

    A local shard has to exist as a file; of a URL, the first part that ends in `.tar` is taken for one.
    """
    separator = separator_of(path)
    lowered, start = path.lower(), 0
    while (found := lowered.find(SHARD_SUFFIX + separator, start)) >= 0:
        start = found + len(SHARD_SUFFIX)
        if is_url(path) or os.path.isfile(path[:start]):
            return path[:start], path[start + 1 :].replace(separator, "/")
    return None


def is_gone(path: str) -> bool:
    """Whether what a stored path leads to is known not to be there (any more). Asks the server of a URL.

    False in doubt: an unreachable server, a damaged shard.
    """
    if not is_url(path) and os.path.lexists(path):
        return False
    member = split_member(path)
    try:
        if member is not None:
            from dino_index.shards import find_member

            find_member(*member)
        elif is_url(path):
            from dino_index.remote_files import describe

            describe(path)
        else:
            return True
    except ImageError as error:
        return error.reason == "vanished"
    return False

"""Which folders jobs read and write: folders of the server below allowed ones, uploads, reports."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from dino_index.errors import FolderRefused, OutputUnwritable, SourceNotFound, UploadRefused
from dino_index.image_paths import is_below
from dino_index.purging import UPLOADS_FOLDER

REPORTS_FOLDER = "jobs"
"""Of a home."""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_MAX_NAME_CHARACTERS = 100

Upload = tuple[str, BinaryIO]
"""The name that the client gave a picture, and its content."""


def allowed_folder(given: str, allowed: Sequence[str | Path]) -> str:
    """The real path of a folder that is one of the allowed ones or lies below, links resolved.

    What lies elsewhere is refused in the same words whether it exists or not.
    Raises FolderRefused, SourceNotFound.
    """
    roots = real_folders(allowed)
    lexical = os.path.normpath(given) if os.path.isabs(given) and "\0" not in given else None
    # A path out of the allowed folders is not even looked at. They may themselves be given as links.
    written = [*(os.path.abspath(root) for root in allowed), *roots]
    if lexical is None or not any(is_below(lexical, root) for root in written):
        raise _refusal(given, allowed)
    real = os.path.realpath(lexical)
    if not any(is_below(real, root) for root in roots):
        raise _refusal(given, allowed)
    if not os.path.isdir(real):
        raise SourceNotFound(f"expected a folder, found no such one: {given}")
    return real


def refuse_links_out(folder: str, allowed: Sequence[str | Path]) -> None:
    """Raises FolderRefused where something in a real folder is a link that leads out of the allowed ones.

    Indexing follows links. One that is made between this look and that is not seen.
    """
    roots = real_folders(allowed)
    pending, seen = [folder], {folder}
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                found = [(entry.path, entry.is_symlink(), entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError:
            continue  # indexing reports it
        for path, is_link, is_folder in found:
            real = os.path.realpath(path) if is_link else path
            if is_link and os.path.lexists(real) and not any(is_below(real, root) for root in roots):
                raise FolderRefused(f"{path} is a link that leads out of the folders that jobs may read; take it away")
            if (is_folder or (is_link and os.path.isdir(real))) and real not in seen:
                seen.add(real)
                pending.append(real)


def real_folders(folders: Iterable[str | Path]) -> list[str]:
    return [os.path.realpath(os.path.expanduser(folder)) for folder in folders]


def save_uploads(home: Path, uploads: Sequence[Upload], max_uploads: int) -> str:
    """Writes pictures into a folder of the home that nothing else is in; its name below the uploads.

    Raises UploadRefused, OutputUnwritable.
    """
    if not 0 < len(uploads) <= max_uploads:
        raise UploadRefused(f"expected 1 to {max_uploads} pictures, found {len(uploads)}")
    token = uuid4().hex
    folder = uploads_folder(home, token)
    digits = len(str(len(uploads)))
    try:
        folder.mkdir(parents=True)
        for number, (name, content) in enumerate(uploads, 1):
            with open(folder / f"{number:0{digits}}-{safe_name(name)}", "xb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OutputUnwritable(
            f"the pictures cannot be stored in {home / UPLOADS_FOLDER} ({error.strerror}); free some space"
        ) from error
    return token


def safe_name(name: str) -> str:
    """A client's file name as one that leads nowhere and means nothing to anybody else."""
    last = re.split(r"[/\\]", name)[-1]
    stem, dot, extension = _NOT_IN_NAMES.sub("_", last).rpartition(".")
    if not dot:
        stem, extension = extension, ""
    stem = stem.strip("._") or "picture"
    return (stem[:_MAX_NAME_CHARACTERS] + dot + extension[:10]).rstrip(".")


def uploads_folder(home: Path, token: str) -> Path:
    assert token.isalnum(), token
    return home / UPLOADS_FOLDER / token


def report_folder(home: Path, token: str) -> Path:
    assert token.isalnum(), token
    return home / REPORTS_FOLDER / token


def _refusal(given: str, allowed: Sequence[str | Path]) -> FolderRefused:
    if not allowed:
        return FolderRefused("this service indexes no folders of its own; send the pictures along instead")
    where = ", ".join(str(folder) for folder in allowed)
    return FolderRefused(f"expected the absolute path of a folder in {where}, found {given!r}")

"""The user's trash, as the XDG trash specification 1.0 lays it out on Linux and other free systems.

A file goes to the trash of the home folder where that is on the same file system, else to that of its own:
`$topdir/.Trash/$uid` where an administrator has made `.Trash`, else `$topdir/.Trash-$uid`.
https://specifications.freedesktop.org/trash-spec/1.0/
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from dino_index.errors import ActionUnsupported


@dataclass(frozen=True, kw_only=True)
class TrashPlace:
    """Where one file goes. file, info: in the trash. content: of the note about it."""

    file: str
    info: str
    content: bytes

    def claim(self) -> None:
        """Writes the note, which makes the name ours. Raises OSError where another program was faster."""
        descriptor = os.open(self.info, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            os.write(descriptor, self.content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Trash:
    """Raises ActionUnsupported on systems with another kind of trash."""

    def __init__(self) -> None:
        if os.name != "posix" or sys.platform == "darwin":
            raise ActionUnsupported(
                f"the trash of this system ({sys.platform}) is not supported; use --apply move --to FOLDER instead"
            )
        data = os.environ.get("XDG_DATA_HOME")
        self._home_trash = Path(data if data and os.path.isabs(data) else Path.home() / ".local" / "share") / "Trash"

    def place_for(self, path: str) -> TrashPlace:
        """A free place for a file; makes the trash where there is none. Raises OSError."""
        self._home_trash.mkdir(parents=True, exist_ok=True, mode=0o700)
        device = os.lstat(path).st_dev
        if self._home_trash.stat().st_dev == device:
            trash, named = self._home_trash, path
        else:
            top = _top_of(path, device)
            trash, named = _trash_of(top), os.path.relpath(path, top)
        for folder in ("files", "info"):
            (trash / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        stem, extension = os.path.splitext(os.path.basename(path))
        number, name = 1, stem + extension
        while os.path.lexists(trash / "files" / name) or os.path.lexists(trash / "info" / f"{name}.trashinfo"):
            number += 1
            name = f"{stem}.{number}{extension}"
        moment = datetime.now().strftime("%Y-%m-%dT%H:%M:%S")
        return TrashPlace(
            file=str(trash / "files" / name),
            info=str(trash / "info" / f"{name}.trashinfo"),
            content=f"[Trash Info]\nPath={quote(os.fsencode(named))}\nDeletionDate={moment}\n".encode(),
        )


def _top_of(path: str, device: int) -> str:
    """The folder that the file system of a path is mounted at."""
    top = os.path.dirname(os.path.realpath(path))
    while (above := os.path.dirname(top)) != top and os.stat(above).st_dev == device:
        top = above
    return top


def _trash_of(top: str) -> Path:
    shared = Path(top) / ".Trash"
    try:
        status = shared.lstat()
    except OSError:
        status = None
    # Only a real folder with the sticky bit, as the specification wants it checked.
    if status is not None and stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return shared / str(os.getuid())
    return Path(top) / f".Trash-{os.getuid()}"

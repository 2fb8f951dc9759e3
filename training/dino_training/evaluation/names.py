"""Pictures found by the names that files of truth call them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence


class PictureNames:
    """Which picture a name means: its path below the folder, else its file name, else that without the extension.

    A name that several pictures have means none of them.
    """

    def __init__(self, folder: str, paths: Sequence[str]) -> None:
        """paths: absolute, below the folder."""
        below = [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]
        self._tables = [
            _unambiguous(names)
            for names in (
                below,
                map(os.path.basename, below),
                (os.path.splitext(os.path.basename(b))[0] for b in below),
            )
        ]
        self.stems = [os.path.splitext(os.path.basename(name))[0] for name in below]

    def position_of(self, name: str) -> int | None:
        """Position of the picture among the paths; None where none is called so, or several are."""
        name = name.replace("\\", "/").removeprefix("./")
        for table in self._tables:
            if (position := table.get(name)) is not None:
                return position
        return None


def _unambiguous(names: Iterable[str]) -> dict[str, int]:
    table: dict[str, int] = {}
    repeated: set[str] = set()
    for position, name in enumerate(names):
        if table.setdefault(name, position) != position:
            repeated.add(name)
    return {name: position for name, position in table.items() if name not in repeated}

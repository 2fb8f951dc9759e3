"""Small memory file systems, to be filled up."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from requirements import require


@contextmanager
def mounted(point: Path, size: str) -> Iterator[Path]:
    """A disk of that size (`400k`, `2m`) at a new folder; skips the test where this user may not mount."""
    require(sys.platform == "linux" and shutil.which("mount"), "small file systems are mounted on Linux only")
    point.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "dino-search-test", str(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"this user may not mount: {done.stderr.splitlines()[:1]}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def fill(disk: Path, *, leave_kb: int = 0) -> Path:
    """A file that takes all space but a rest."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while shutil.disk_usage(disk).free > 1024 * leave_kb:
                file.write(bytes(4096))
        except OSError:
            assert leave_kb == 0
    return filler

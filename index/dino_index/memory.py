"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
# A limit above this is none.
_NO_LIMIT = 1 << 60


def available_bytes(cgroup: Path = _CGROUP) -> int:
    """Memory that can be had without swapping: of the machine, or of the container where that has less left."""
    available = [int(psutil.virtual_memory().available)]
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _number(cgroup / limit_name), _number(cgroup / used_name)
        if limit is not None and used is not None and limit < _NO_LIMIT:
            # Cached files count as used and are given up when memory is wanted.
            cached = _cached_files(cgroup / limit_name)
            available.append(max(0, limit - max(0, used - cached)))
    return min(available)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):  # no such limit, or `max`
        return None


def _cached_files(limit_file: Path) -> int:
    try:
        lines = (limit_file.parent / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    facts = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(facts.get("inactive_file") or facts.get("total_inactive_file") or 0)

"""The C library's allocator, told how to hold memory: glibc's, for others have no such settings."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

# Numbers of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_HIGHEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Freed blocks of any size stay with this process from now on; whether the allocator took that.

    Every step of training on a processor allocates the same hundreds of megabytes. glibc maps large blocks anew, and
    the system clears its pages at the first touch: an eighth of a step's time (ViT-Ti/8, bfloat16, one thread).
    """
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _HIGHEST) and mallopt(_M_TRIM_THRESHOLD, _HIGHEST))


def limit_arenas(number: int) -> bool:
    """Threads share `number` heaps from now on; whether the allocator took that. MALLOC_ARENA_MAX goes before.

    By itself glibc gives a process eight a processor, each of which keeps what its threads once needed at most: a
    service of ViT-S/16 on two processors held 9 % more memory, at the same rate.
    """
    mallopt = _mallopt()
    return mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ and bool(mallopt(_M_ARENA_MAX, number))


def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none

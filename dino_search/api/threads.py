"""Work of a request that is done outside of the event loop."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(threads: Executor, work: Callable[..., T], *args: Any) -> T:
    """What `work` gives back, done in one of the threads, in the caller's context (its trace)."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(threads, lambda: context.run(work, *args))

"""Stopping a long command: the first Ctrl-C or SIGTERM lets it finish what it is at, a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dino_search.commands.output import tell


@contextmanager
def stopping_on_signals(what_ends: str) -> Iterator[list[int]]:
    """Signals that have asked the command to stop. what_ends: `this batch`, for the remark to the user."""
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)
        tell(f"stopping after {what_ends}; once more to stop at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

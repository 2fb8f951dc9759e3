from __future__ import annotations

import subprocess
import sys

import pytest

from dino_training.allocator import keep_freed_memory

_COUNT_FAULTS = """
import resource, sys, torch
from dino_training.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "kept" else None)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()  # until the heap has found its size
print(faults())
"""


def _count(mode: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", _COUNT_FAULTS, mode], capture_output=True, text=True, check=True)
    answer, number = done.stdout.split()
    return answer, int(number)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_memory_that_was_freed_is_used_again_without_a_page_fault() -> None:
    (answer, kept), (_, given_back) = _count("kept"), _count("given back")
    if answer != "True":
        pytest.skip("the C library has no mallopt")
    assert kept * 10 < given_back


def test_elsewhere_nothing_is_asked_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dino_index.allocator import keep_freed_memory, limit_arenas

_COUNT_HEAPS = """
import re, sys, threading
from dino_index.allocator import limit_arenas
print(limit_arenas(2) if sys.argv[1] == "limited" else None)
here, done = threading.Barrier(17), threading.Barrier(17)
def hold():
    held = [bytes(5000) for _ in range(100)]
    here.wait()
    done.wait()
threads = [threading.Thread(target=hold) for _ in range(16)]
for thread in threads: thread.start()
here.wait()
# A thread's heap is 64 MiB of addresses, of which little is in use.
unnamed = re.findall("^(\\w+)-(\\w+) (?:---p|rw-p) 0+ 00:00 0 *$", open("/proc/self/maps").read(), re.MULTILINE)
sizes = [int(end, 16) - int(begin, 16) for begin, end in unnamed]
print(sum(size > 2**25 for size in sizes))
done.wait()
"""
_COUNT_FAULTS = """
import resource, sys, torch
from dino_index.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "kept" else None)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()  # until the heap has found its size
print(faults())
"""


def _count(script: str, mode: str, **environment: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", script, mode], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    answer, number = done.stdout.split()
    return answer, int(number)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_memory_that_was_freed_is_used_again_without_a_page_fault() -> None:
    (answer, kept), (_, given_back) = _count(_COUNT_FAULTS, "kept"), _count(_COUNT_FAULTS, "given back")
    if answer != "True":
        pytest.skip("the C library has no mallopt")
    assert kept * 10 < given_back


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_threads_share_the_heaps_they_are_given_unless_the_environment_says_otherwise() -> None:
    (answer, limited), (_, usual) = _count(_COUNT_HEAPS, "limited"), _count(_COUNT_HEAPS, "usual")
    if answer != "True":
        pytest.skip("the C library has no mallopt")
    assert limited <= 2 < usual
    answer, of_environment = _count(_COUNT_HEAPS, "limited", MALLOC_ARENA_MAX="6")
    assert (answer, of_environment > limited) == ("False", True)


def test_elsewhere_nothing_is_asked_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
    assert limit_arenas(2) is False

"""Accidents inside a command, arranged in its process before it starts: the code that meets them is the real one.

For the `prepare` of `forked_commands.CommandLine`; arguments are given with functools.partial.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn


def write_snapshots_early() -> None:
    """Every indexing run ends with writing a snapshot, not only one of thousands of images."""
    import dino_index.snapshot_store

    dino_index.snapshot_store._MIN_DELTA_TO_COMPACT = 1


def wait_for(path: Path) -> None:
    """Commands that wait for the same file start at the same moment."""
    while not path.exists():
        time.sleep(0.001)


def die_before(function: str) -> None:
    """The process is killed when it calls the function, given as `module:name`."""
    module, name = function.split(":")
    setattr(importlib.import_module(module), name, _die)


def die_in_the_middle_of_a_snapshot() -> None:
    _write_half_then(_die)


def hang_in_the_middle_of_a_snapshot() -> None:
    _write_half_then(_hang)


def _write_half_then(accident: Any) -> None:
    import faiss

    whole_writer = faiss.PyCallbackIOWriter  # type: ignore[attr-defined]

    def half_writer(write: Any) -> Any:
        def write_half(data: bytes) -> int:
            if len(data) < 1000:  # the header
                return int(write(data))
            write(data[: len(data) // 2])
            write.__self__.flush()
            accident()
            raise AssertionError("not reached")

        return whole_writer(write_half)

    faiss.PyCallbackIOWriter = half_writer  # type: ignore[attr-defined]


def die_in_the_middle_of_a_checkpoint(number: int) -> None:
    """The process is killed when half of its checkpoint of this number, counted from 1, is written."""
    import torch

    save, calls = torch.save, []

    def save_or_die(state: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) < number:
            save(state, file)
            return
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        _die()

    torch.save = save_or_die  # type: ignore[assignment]


def hang_in_training(step: int) -> None:
    """The forward pass of this step, counted from 1, takes a minute."""
    from dino_training.batches import Batch

    views, calls = Batch.views, []

    def views_or_hang(self: Batch, recipe: Any, device: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            _hang()
        return views(self, recipe, device)

    Batch.views = views_or_hang  # type: ignore[method-assign]


def fail_on_writing(folder: Path) -> None:
    """The process ends with status 99 when it makes, opens for writing, renames or removes anything in the folder."""
    changing = {"os.mkdir", "os.rename", "os.remove", "os.truncate"}

    def watch(event: str, arguments: Any) -> None:
        changes = event in changing or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        path = arguments[0] if changes else None
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(str(folder)):
            os._exit(99)

    sys.addaudithook(watch)


def hang_in_forward_pass(number: int) -> None:
    """The forward pass of this number, counted from 1, takes a minute."""
    from dino_index.backbones import Backbone

    embed, calls = Backbone.embed, []

    def embed_or_hang(self: Backbone, pixels_BHWC: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            _hang()
        return embed(self, pixels_BHWC)

    Backbone.embed = embed_or_hang  # type: ignore[method-assign]


def die_in_transaction(number: int) -> None:
    """The process is killed before it commits its batch of this number, counted from 1."""
    from dino_index.recording import BatchRecorder

    record, calls = BatchRecorder.record, []

    def record_or_die(self: BatchRecorder, *arguments: Any) -> Any:
        calls.append(1)
        counts = record(self, *arguments)
        if len(calls) == number:
            _die()
        return counts

    BatchRecorder.record = record_or_die  # type: ignore[method-assign, assignment]


def spoil_files_after_listing(folder: Path) -> None:
    """What is called "now …" in the folder becomes that between listing and reading."""
    indexing: Any = importlib.import_module("dino_index.indexing")
    list_sources = indexing.list_sources

    def list_then_spoil(*arguments: Any, **options: Any) -> Any:
        listing = list_sources(*arguments, **options)
        for path in sorted(folder.glob("now *")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            kind = path.name.split(" ", 1)[1].split(".")[0]
            if kind == "a folder":
                path.mkdir()
            elif kind == "a pipe":
                os.mkfifo(path)
            elif kind == "empty":
                path.touch()
            elif kind == "a link to nowhere":
                path.symlink_to("nowhere")
        return listing

    indexing.list_sources = list_then_spoil


def obey_file_permissions() -> None:
    """As for any other user, permissions count for root: the capabilities that pass them are given up."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, for capabilities 0..31 and 32..63
    dac_override, dac_read_search = 1 << 1, 1 << 2
    refused = libc.capget(version_3, sets)
    for position in range(3):
        sets[position] &= ~(dac_override | dac_read_search)
    if refused or libc.capset(version_3, sets):
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def _die(*_arguments: Any, **_options: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def _hang() -> None:
    time.sleep(60)

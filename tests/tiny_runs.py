"""Pretraining runs of a fraction of a second: pictures of noise, a backbone of one or two blocks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dino_training import Recipe
from dino_training.checkpoints import load_checkpoint

STEPS_PER_EPOCH = 3
TINY_RUN: dict[str, Any] = {
    "name": "tiny",
    "architecture": "vit_tiny_patch16_224",
    "architecture_args": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 1},
    "global_size": 16, "local_size": 8, "num_local_views": 2,
    "num_prototypes": 16, "head_hidden": 16, "head_bottleneck": 8,
    "batch_size": 8, "epochs": 2, "warmup_epochs": 0.0, "freeze_last_layer_epochs": 0.0, "learning_rate": 0.01,
    "num_evaluated": 8, "evaluate_every_epochs": 0.0, "log_every_steps": 1, "device": "cpu", "workers": 1,
    "precision": "float32",  # what follows must not hang on what this processor is fast at
}  # fmt: skip
"""Recipe values; with the pictures of `write_noise` an epoch has STEPS_PER_EPOCH steps."""


def tiny_recipe(**changed: Any) -> Recipe:
    return Recipe(**TINY_RUN | changed)


def write_tiny_recipe(path: Path, **changed: Any) -> Path:
    """The same as a recipe file, for the command."""
    path.write_text(yaml.safe_dump(TINY_RUN | changed), "utf-8")
    return path


def write_noise(folder: Path, number: int = 26, *, side: int = 16, seed: int = 0) -> Path:
    """Pictures, none like another."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for position in range(number):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{position:03}.png")
    return folder


def leave_out_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no sheets and write no report, which would take longer than everything else that they do."""
    for name in ("save_attention", "save_views", "write_report"):
        monkeypatch.setattr(f"dino_training.pretraining.{name}", lambda *arguments: None)


@contextmanager
def quick_runs() -> Iterator[None]:
    """No pictures, and one thread: two that wait for each other take longer where matrices are tiny."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        leave_out_pictures(patch)
        yield
    torch.set_num_threads(num_threads)


def without_pictures(*accidents: Callable[[], None]) -> Callable[[], None]:
    """The same for a command in a process of its own, as its `prepare`, and accidents to arrange there."""
    return partial(_prepare, accidents)


def become_process(rank: int, size: int, port: int) -> None:
    """What torchrun tells each process that it starts."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _prepare(accidents: tuple[Callable[[], None], ...]) -> None:
    leave_out_pictures(pytest.MonkeyPatch())
    for arrange in accidents:
        arrange()


def stop_after(num_steps: int) -> Callable[[], bool]:
    """A `should_stop` that asks for the stop after so many steps of this call."""
    left = [num_steps]

    def should_stop() -> bool:
        left[0] -= 1
        return left[0] <= 0

    return should_stop


def events(run: Path, event: str) -> list[dict[str, Any]]:
    """What metrics.jsonl says of this kind; speeds left out, as they differ each time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: row[key] for key in row if key != "images_per_second"} for row in rows if row["event"] == event]


def final_state(run: Path) -> dict[str, Any]:
    """Everything in the last checkpoint but the seconds that it took."""
    return {key: value for key, value in load_checkpoint(run).items() if key != "seconds"}


def assert_same(found: Any, expected: Any, where: str = "", /, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """The same values in the same nesting; tensors and floats to the last bit, unless rtol and atol allow more."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            found, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}", rtol=rtol, atol=atol)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{where}/{number}", rtol=rtol, atol=atol)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rtol, abs=atol), where
    else:
        assert found == expected, where

"""Runs in two processes, started as torchrun starts them: each with its rank, all with one address to meet at."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import sabotage
from dino_training import pretrain
from dino_training.distributed import ALONE, joined
from forked_commands import CommandLine, Finished
from sample_collections import save_tiny_model
from tiny_runs import (
    assert_same,
    become_process,
    events,
    final_state,
    leave_out_pictures,
    tiny_recipe,
    without_pictures,
    write_noise,
    write_tiny_recipe,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork")

SETTINGS: dict[str, Any] = {"drop_path": 0.0, "optimizer": "sgd", "learning_rate": 0.3, "momentum": 0.9}
"""Without random layers, which differ between processes, and without AdamW, which blows up gradients that are 0."""
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def dino_search(tmp_path: Path) -> Iterator[CommandLine]:
    commands = CommandLine(tmp_path / "output")
    yield commands
    commands.end()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_noise(tmp_path / "images")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def run_in_two(
    dino_search: CommandLine, *arguments: object, second: Callable[[], None] | None = None
) -> list[Finished]:
    """The command in two processes. second: what is arranged in the second of them."""
    port = free_port()
    prepared = [[partial(become_process, 0, 2, port)], [partial(become_process, 1, 2, port)]]
    if second is not None:
        prepared[1].append(second)  # type: ignore[arg-type]
    running = [dino_search.start("pretrain", *arguments, prepare=without_pictures(*one)) for one in prepared]
    return [one.wait() for one in running]


CASES: dict[str, dict[str, Any]] = {
    "centre by mean": {"centring": "mean", "center_init": "first_batch"},
    "sinkhorn": {"centring": "sinkhorn"},
    "infonce with a queue": {"loss": "infonce", "num_negatives": 20, "predictor": True},
    "in parts": {"gradient_accumulation": 2},
    "frozen teacher": {"loss": "infonce", "whiten_dim": 8},
    "from weights": {"init_head_warmup_epochs": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(
    images: Path, dino_search: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    settings = SETTINGS | CASES[case]
    if case == "frozen teacher":
        settings |= {"teacher": "frozen", "teacher_model": str(save_tiny_model(tmp_path / "teacher.safetensors"))}
    recipe = write_tiny_recipe(tmp_path / "tiny.yaml", **settings)
    run, alone, init = tmp_path / "run", tmp_path / "alone", None
    leave_out_pictures(monkeypatch)
    if case == "from weights":
        pretrain([images], tmp_path / "first", tiny_recipe(seed=7, epochs=1))
        init = tmp_path / "first" / "backbone.safetensors"
    done = run_in_two(
        dino_search, images, "--out", run, "--recipe", recipe, *(["--init", init] if init else []),
        # The teacher's embeddings are shared work; all else is written by the first process.
        second=None if case == "frozen teacher" else partial(sabotage.fail_on_writing, run),
    )  # fmt: skip
    assert [one.exit_code for one in done] == [0, 0], done
    assert [len(one.stdout.splitlines()) > 3 for one in done] == [True, False]

    pretrain([images], alone, tiny_recipe(**settings), init=init)
    found, expected = final_state(run), final_state(alone)
    for key in ("student", "teacher", "center", "negatives"):
        assert_same(found[key], expected[key], key, **CLOSE)
    for row, expected_row in zip(events(run, "step"), events(alone, "step"), strict=True):
        for key in ("loss", "grad_norm", *(["teacher_entropy", "mean_entropy"] if row["kl"] is not None else [])):
            assert row[key] == pytest.approx(expected_row[key], rel=1e-3, abs=1e-5), key
    if case == "frozen teacher":
        assert (run / "teacher_embeddings.npy").read_bytes() == (alone / "teacher_embeddings.npy").read_bytes()
        assert not list(run.glob("teacher_embeddings.*-*.json"))


def test_what_two_processes_began_one_goes_on_with_and_the_other_way_round(
    images: Path, dino_search: CommandLine, tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(tmp_path / "tiny.yaml", **SETTINGS, save_every_minutes=0.0)
    run = tmp_path / "run"
    command = (images, "--out", run, "--recipe", recipe)
    done = run_in_two(dino_search, *command, "--set", "epochs=1", second=partial(sabotage.fail_on_writing, run))
    assert [one.exit_code for one in done] == [0, 0], done
    assert dino_search.run("pretrain", *command, "--set", "epochs=2", "--resume").exit_code == 0
    done = run_in_two(
        dino_search, *command, "--set", "epochs=3", "--resume",
        second=partial(sabotage.fail_on_writing, run),
    )  # fmt: skip
    assert [one.exit_code for one in done] == [0, 0], done
    assert [row["step"] for row in events(run, "step")] == list(range(1, 10))


def test_a_batch_that_cannot_be_divided_is_refused_by_all(
    images: Path, dino_search: CommandLine, tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(tmp_path / "tiny.yaml", batch_size=7)
    done = run_in_two(dino_search, images, "--out", tmp_path / "run", "--recipe", recipe)
    assert [one.exit_code for one in done] == [1, 1]
    for one in done:
        assert "batch_size 7 must be a multiple of gradient_accumulation 1 times 2 processes" in one.stderr


def test_a_process_without_torchrun_is_alone() -> None:
    with joined(torch.device("cpu")) as processes:
        assert processes is ALONE
        assert processes.is_first
        assert processes.others(torch.zeros(1, 2, 3)) is None
        assert processes.from_first(lambda: "found") == "found"
        rows = torch.arange(6.0).view(2, 3)
        for same in (processes.gather(rows), processes.add_up(rows), processes.mean(rows)):
            assert torch.equal(same, rows)


def torchrun(*arguments: object, max_restarts: int = 0) -> list[str]:
    """The command line for `pretrain` in two processes."""
    launch = [
        "--nproc-per-node", 2, "--max-restarts", max_restarts, "--master-addr", "127.0.0.1",
        "--master-port", free_port(), "-m", "dino_search", "pretrain",
    ]  # fmt: skip
    return [sys.executable, "-m", "torch.distributed.run", *map(str, [*launch, *arguments])]


@pytest.mark.slow
def test_torchrun_starts_a_run(images: Path, tmp_path: Path) -> None:
    recipe, run = write_tiny_recipe(tmp_path / "tiny.yaml", **SETTINGS), tmp_path / "run"
    command = torchrun(images, "--out", run, "--recipe", recipe)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 6 steps") == 1
    pretrain([images], tmp_path / "alone", tiny_recipe(**SETTINGS))
    assert_same(final_state(run)["student"], final_state(tmp_path / "alone")["student"], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_after_a_killed_process_torchrun_goes_on_from_the_last_checkpoint(
    images: Path, tmp_path: Path, rank: int
) -> None:
    recipe = write_tiny_recipe(tmp_path / "tiny.yaml", epochs=6, save_every_minutes=0.0)
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = torchrun(images, "--out", run, "--recipe", recipe, "--resume", max_restarts=1)
    with open(tmp_path / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as launcher:
        wait_for_step(run, 4, launcher)
        of_rank = [
            process
            for process in psutil.Process(launcher.pid).children(recursive=True)
            if process.environ().get("RANK") == str(rank)
        ]
        of_rank[0].kill()
        assert launcher.wait(300) == 0, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert "going on from step" in text
    assert text.count("finished after 18 steps") == 1
    assert [row["step"] for row in events(run, "step")] == list(range(1, 19))

    subprocess.run(torchrun(images, "--out", whole, "--recipe", recipe), capture_output=True, timeout=300, check=True)
    assert events(run, "step") == events(whole, "step")
    assert_same(final_state(run), final_state(whole))


def wait_for_step(run: Path, step: int, launcher: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(events(run, "step")) < step:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)

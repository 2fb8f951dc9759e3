"""What `dino-search pretrain` promises: files, answers, exit codes, and to go on after whatever stopped it."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import sabotage
from dino_training import load_recipe
from dino_training.checkpoints import list_checkpoints, load_checkpoint
from forked_commands import CommandLine, Finished
from sample_collections import save_tiny_model, write_pictures
from small_disks import fill, mounted
from tiny_runs import (
    STEPS_PER_EPOCH,
    assert_same,
    events,
    final_state,
    without_pictures,
    write_noise,
    write_tiny_recipe,
)

NUM_QUICK_KILLS = 2
NUM_SLOW_KILLS = 25


@pytest.fixture
def dino_search(tmp_path: Path) -> Iterator[CommandLine]:
    commands = CommandLine(tmp_path / "output")
    yield commands
    commands.end()


@dataclass(frozen=True)
class Material:
    """Pictures and a tiny recipe; the command that trains on them."""

    images: Path
    recipe: Path

    def pretrain(self, run: Path, *options: object) -> list[object]:
        return ["pretrain", self.images, "--out", run, "--recipe", self.recipe, *options]


@pytest.fixture
def tiny(tmp_path: Path) -> Material:
    return Material(write_noise(tmp_path / "images"), write_tiny_recipe(tmp_path / "tiny.yaml"))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A run of 36 steps that saves a checkpoint after each."""
    folder = tmp_path_factory.mktemp("long")
    recipe = write_tiny_recipe(
        folder / "long.yaml", epochs=12, evaluate_every_epochs=5.0, save_every_minutes=0.0, drop_path=0.1
    )
    return Material(write_noise(folder / "images"), recipe)


def complaints(done: Finished) -> list[str]:
    """What was said on stderr but for progress and what was chosen."""
    return [line for line in done.stderr.splitlines() if not re.match(r"decoding \d|training \d|evaluating \d", line)]


def fail_in_one_line(done: Finished, *words: str) -> None:
    assert (done.exit_code, done.stdout) == (1, ""), done
    (line,) = complaints(done)
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def num_steps_logged(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text("utf-8").count('{"event": "step"') if log.exists() else 0


# --- what a run leaves


def test_a_run_leaves_weights_figures_pictures_and_a_report(
    tiny: Material, dino_search: CommandLine, tmp_path: Path
) -> None:
    (tiny.images / "bad.png").write_bytes(b"bad")
    (tiny.images / "cut off.png").write_bytes((tiny.images / "000.png").read_bytes()[:-50])
    run = tmp_path / "run"
    done = dino_search.run(*tiny.pretrain(run, "--set", "evaluate_every_epochs=1"))
    assert done.exit_code == 0, done
    first, figures, *places = done.stdout.splitlines()
    assert first == "finished after 6 steps, 48 images seen"
    assert re.fullmatch(r"copies found first: \d+\.\d% at the start, \d+\.\d% now", figures)
    assert f"weights    {run}/backbone.safetensors" in places
    assert f"report     {run}/report.html" in places
    assert places[-1] == f"try        dino-search index IMAGES --model {run}/backbone.safetensors -c NAME"
    assert complaints(done) == ["2 files could not be read and were left out"]

    assert sorted(path.name for path in run.iterdir() if path.name != "tensorboard") == [
        "attention", "backbone.safetensors", "best.safetensors", "checkpoints", "metrics.jsonl", "recipe.yaml",
        "report.html", "run.json", "views.png",
    ]  # fmt: skip
    steps, evaluations = events(run, "step"), events(run, "evaluation")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert steps[-1].items() >= {"epoch": 2.0, "images": 48, "skipped_steps": 0, "unreadable": 2}.items()
    assert steps[-1]["kl"] == pytest.approx(steps[-1]["loss"] - steps[-1]["teacher_entropy"], rel=1e-4)
    assert {path.name for path in (run / "attention").iterdir()} == {f"step-{step:08}.png" for step in (0, 3, 6)}
    with Image.open(run / "views.png") as views:
        assert min(views.size) > 100
    page = (run / "report.html").read_text("utf-8")
    assert all(words in page for words in ("tiny", "finished", "data:image/"))
    status = json.loads((run / "run.json").read_text("utf-8"))
    assert status.pop("started")
    assert status == {
        "status": "finished", "recipe": "tiny", "step": 6, "num_steps": 6, "images": 28, "unreadable": 2,
        "precision": status["precision"], "num_prototypes": 16, "best_step": status["best_step"], "device": "cpu",
        "warnings": [],
    }  # fmt: skip
    saved = load_recipe(run / "recipe.yaml")
    assert saved == load_recipe(tiny.recipe, ["evaluate_every_epochs=1"]).resolve(28)[0]


def test_tensorboard_files_are_written_where_it_is_installed(
    tiny: Material, dino_search: CommandLine, tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = dino_search.run(*tiny.pretrain(tmp_path / "run"), prepare=without_pictures())
    assert done.exit_code == 0, done
    found = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert {"step/loss", "step/learning_rate", "evaluation/copies_found"} <= set(found.Tags()["scalars"])
    assert [point.step for point in found.Scalars("step/loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("grey", [False, True])
def test_indexing_takes_what_a_run_exports(
    tiny: Material, dino_search: CommandLine, tmp_path: Path, grey: bool
) -> None:
    options = ["--set", "in_chans=1", "--set", "mean=[0.45]", "--set", "std=[0.22]"] if grey else []
    run, photos = tmp_path / "run", tmp_path / "photos"
    assert dino_search.run(*tiny.pretrain(run, *options), prepare=without_pictures()).exit_code == 0
    write_pictures(photos, *(f"{number}.jpg" for number in range(5)))
    done = dino_search.run("index", photos, "--model", run / "backbone.safetensors")
    assert done.exit_code == 0, done
    assert done.stdout.startswith("5 added, 0 updated")
    found = dino_search.run("search", photos / "3.jpg", "--json")
    assert json.loads(found.stdout)["results"][0]["path"] == str(photos / "3.jpg")


@pytest.mark.parametrize("num_folders", [1, 2])
def test_labels_of_two_kinds_give_the_figure_another_name(
    tiny: Material, dino_search: CommandLine, tmp_path: Path, num_folders: int
) -> None:
    for number, path in enumerate(sorted(tiny.images.iterdir())):
        folder = tiny.images / f"kind {number % num_folders}"
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    done = dino_search.run(*tiny.pretrain(tmp_path / "run", "--labels", "folders"), prepare=without_pictures())
    assert done.exit_code == 0, done
    assert ("k-NN accuracy: " in done.stdout) == (num_folders == 2)
    remark = "k-NN accuracy is left out: expected images of two labels or more"
    assert any(line.startswith(remark) for line in complaints(done)) == (num_folders == 1)
    figures = [row["knn_top1"] for row in events(tmp_path / "run", "evaluation")]
    assert all((figure is None) == (num_folders == 1) for figure in figures)


def test_a_frozen_teacher_is_asked_for_by_an_option(tiny: Material, dino_search: CommandLine, tmp_path: Path) -> None:
    # A name that YAML would take for something else.
    teacher = save_tiny_model(tmp_path / "mine: {the best} #1.safetensors")
    run = tmp_path / "run"
    command = tiny.pretrain(run, "--teacher", teacher, "--set", "whiten_dim=8")
    done = dino_search.run(*command, prepare=without_pictures())
    assert done.exit_code == 0, done
    assert load_recipe(run / "recipe.yaml").teacher_model == str(teacher)
    assert (run / "teacher_embeddings.npy").is_file()
    assert events(run, "step")[-1]["teacher_entropy"] is None
    again = dino_search.run(*command, "--resume", prepare=without_pictures())
    assert again.exit_code == 0, again


def test_a_model_of_the_home_is_a_teacher_and_a_start_by_its_name(
    tiny: Material, dino_search: CommandLine, tmp_path: Path, home: Path
) -> None:
    (home / "models").mkdir(parents=True)
    stored = save_tiny_model(home / "models" / "mine.tagged.safetensors")
    command = tiny.pretrain(tmp_path / "run", "--teacher", "mine", "--set", "whiten_dim=8")
    done = dino_search.run(*command, prepare=without_pictures())
    assert done.exit_code == 0, done
    assert load_recipe(tmp_path / "run" / "recipe.yaml").teacher_model == str(stored)
    ended = dino_search.run(*tiny.pretrain(tmp_path / "other", "--init", "mine"), prepare=without_pictures())
    # Found, and of another architecture than the recipe's.
    assert f"the weights {stored} do not fit the recipe's backbone" in ended.stderr


# --- what cannot be done

Trouble = Callable[[Material, Path], list[object]]


def no_images(tiny: Material, run: Path) -> list[object]:
    for path in tiny.images.iterdir():
        path.unlink()
    return tiny.pretrain(run)


def only_bad_images(tiny: Material, run: Path) -> list[object]:
    for path in tiny.images.iterdir():
        path.write_bytes(b"\x89PNG\r\n\x1a\nbad")
    return tiny.pretrain(run)


def unwritable(tiny: Material, run: Path) -> list[object]:
    run.write_text("a file")
    return tiny.pretrain(run / "below")


def of_another_architecture(tiny: Material, run: Path) -> list[object]:
    return tiny.pretrain(run, "--init", save_tiny_model(run.with_name("other.safetensors")))


TROUBLE: dict[str, tuple[Trouble, tuple[str, ...]]] = {
    "no images": (no_images, ("expected images under", "found nothing")),
    "a path that is not there": (
        lambda tiny, run: ["pretrain", tiny.images / "missing", "--out", run], ("missing: no such file",),
    ),
    "no image that can be read": (only_bad_images, ("none of the 26 listed can be read",)),
    "fewer images than a batch": (
        lambda tiny, run: tiny.pretrain(run, "--set", "batch_size=64"),
        ("a batch takes 64 images, found 26", "--set batch_size=26"),
    ),
    "no prototypes": (
        lambda tiny, run: tiny.pretrain(run, "--set", "num_prototypes=0"), ("num_prototypes must be 1 or more",),
    ),
    "an unknown key": (
        lambda tiny, run: tiny.pretrain(run, "--set", "learning=1"), ("--set: unknown recipe key 'learning'",),
    ),
    "an unknown recipe": (
        lambda tiny, run: ["pretrain", tiny.images, "--out", run, "--recipe", "tinny"], ("no recipe 'tinny'", "small"),
    ),
    "an unknown architecture": (
        lambda tiny, run: tiny.pretrain(run, "--set", "architecture=vit_gigantic"), ("vit_gigantic",),
    ),
    "arguments of no architecture": (
        lambda tiny, run: tiny.pretrain(run, "--set", "architecture_args={colour: red}"),
        ("architecture_args", "colour"),
    ),
    "weights of another architecture": (of_another_architecture, ("do not fit the recipe's backbone", "embed_dim")),
    "weights that are not there": (
        lambda tiny, run: tiny.pretrain(run, "--init", "missing.safetensors"), ("no model 'missing.safetensors'",),
    ),
    "a teacher that is not there": (
        lambda tiny, run: tiny.pretrain(run, "--teacher", "missing"), ("no teacher 'missing'",),
    ),
    "a device that is none": (lambda tiny, run: tiny.pretrain(run, "--device", "tpu"), ("device must be",)),
    "labels that are not there": (
        lambda tiny, run: tiny.pretrain(run, "--labels", "missing.csv"), ("missing.csv",),
    ),
    "a folder that cannot be written": (unwritable, ("cannot be written", "choose another --out")),
    "a folder without a run": (
        lambda tiny, run: tiny.pretrain(run, "--resume"), ("no checkpoint to resume from", "start without --resume"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TROUBLE)
def test_what_cannot_be_done_is_said_in_one_line(
    tiny: Material, dino_search: CommandLine, tmp_path: Path, kind: str
) -> None:
    arrange, words = TROUBLE[kind]
    done = dino_search.run(*arrange(tiny, tmp_path / "run"), prepare=without_pictures())
    fail_in_one_line(done, *words)
    assert not list_checkpoints(tmp_path / "run")


def test_a_run_is_not_overwritten_and_not_resumed_as_another(
    tiny: Material, dino_search: CommandLine, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert dino_search.run(*tiny.pretrain(run), prepare=without_pictures()).exit_code == 0
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fail_in_one_line(dino_search.run(*tiny.pretrain(run)), "holds a run already", "--resume")
    fail_in_one_line(
        dino_search.run(*tiny.pretrain(run, "--resume", "--set", "momentum=0.5")),
        "a resumed run keeps its recipe: momentum was 0.996, found 0.5",
    )
    (tiny.images / "new.png").write_bytes((tiny.images / "000.png").read_bytes())
    fail_in_one_line(dino_search.run(*tiny.pretrain(run, "--resume")), "not those that the run began with", "--init")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_a_run_that_diverges_says_so(tiny: Material, dino_search: CommandLine, tmp_path: Path) -> None:
    options = ("--set", "learning_rate=1e30", "--set", "epochs=4")
    done = dino_search.run(*tiny.pretrain(tmp_path / "run", *options), prepare=without_pictures())
    assert done.exit_code == 1
    *skipped, error = complaints(done)
    assert all(re.match(r"step \d+ skipped: loss ", line) for line in skipped)
    assert len(skipped) == 5
    assert error.startswith("error: loss or gradients were not finite in 5 steps in a row")


# --- signals


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on_with_resume(
    long: Material, dino_search: CommandLine, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    run = tmp_path / "run"
    running = dino_search.start(*long.pretrain(run, "--set", "save_every_minutes=60"), prepare=without_pictures())
    running.wait_until(lambda: num_steps_logged(run) >= 5)
    running.send(number)
    done = running.wait()
    assert done.exit_code == exit_code, done
    assert "stopping after this step and a checkpoint; once more to stop at once" in done.stderr
    assert done.stderr.splitlines()[-1] == "stopped; the same command with --resume goes on from there"
    num_steps = load_checkpoint(run)["step"]
    assert 5 <= num_steps < 36
    assert done.stdout.startswith(f"stopped after {num_steps} steps, {8 * num_steps} images seen\n")
    assert json.loads((run / "run.json").read_text("utf-8"))["status"] == "stopped"

    again = dino_search.run(*long.pretrain(run, "--resume"), prepare=without_pictures())
    assert again.exit_code == 0, again
    assert f"going on from step {num_steps}" in again.stderr
    assert [row["step"] for row in events(run, "step")] == list(range(1, 37))


def test_a_second_signal_stops_at_once_and_the_last_checkpoint_stays(
    long: Material, dino_search: CommandLine, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    hang = without_pictures(partial(sabotage.hang_in_training, 4))
    running = dino_search.start(*long.pretrain(run), prepare=hang)
    running.wait_until(lambda: (run / "checkpoints" / "step-00000003.pt").exists())
    running.send(signal.SIGTERM)
    running.wait_until(lambda: "stopping after this step" in running.stderr())
    running.send(signal.SIGTERM)
    done = running.wait(timeout_s=30)
    assert (done.exit_code, done.stdout) == (143, ""), done
    assert "Traceback" not in done.stderr
    assert load_checkpoint(run)["step"] == 3
    assert json.loads((run / "run.json").read_text("utf-8"))["status"] == "interrupted"


# --- kill -9


@pytest.fixture(scope="module")
def long_run(long: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the long run leaves when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    done = CommandLine(folder / "output").run(*long.pretrain(folder / "run"), prepare=without_pictures())
    assert done.exit_code == 0, done
    return folder / "run"


def goes_on_to_the_same_end(long: Material, run: Path, dino_search: CommandLine, expected: Path) -> None:
    options = ["--resume"] if list_checkpoints(run) else []
    done = dino_search.run(*long.pretrain(run, *options), prepare=without_pictures())
    assert done.exit_code == 0, done
    assert_same(final_state(run), final_state(expected))
    for event in ("step", "evaluation"):
        assert events(run, event) == events(expected, event)
    for name in ("backbone.safetensors", "best.safetensors"):
        assert (run / name).read_bytes() == (expected / name).read_bytes()
    assert not list(run.rglob("*.partial"))
    assert len(list_checkpoints(run)) == 2


def survives_a_kill(
    long: Material, dino_search: CommandLine, tmp_path: Path, expected: Path, number: int, num_kills: int
) -> None:
    """Killed in its own part of the run, at a moment that chance chooses within a step and its checkpoint."""
    rng = random.Random(1000 * num_kills + number)
    run = tmp_path / "run"
    target, delay_s = int((number + 0.5) / num_kills * 36), rng.uniform(0, 0.03)
    running = dino_search.start(*long.pretrain(run), prepare=without_pictures())
    running.wait_until(lambda: num_steps_logged(run) >= target)
    time.sleep(delay_s)
    running.send(signal.SIGKILL)
    done = running.wait()
    moment = f"kill {number} of {num_kills}: {delay_s:.4f} s after step {target}; exit {done.exit_code}"
    print(moment)
    if done.exit_code == 0:
        return  # too late
    assert done.exit_code == 137, moment
    if target > 2:
        assert load_checkpoint(run)["step"] >= target - 1, moment
    goes_on_to_the_same_end(long, run, dino_search, expected)


@pytest.mark.parametrize("number", range(NUM_QUICK_KILLS))
def test_a_killed_run_goes_on_to_the_same_end(
    long: Material, dino_search: CommandLine, tmp_path: Path, long_run: Path, number: int
) -> None:
    survives_a_kill(long, dino_search, tmp_path, long_run, number, NUM_QUICK_KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_SLOW_KILLS))
def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(
    long: Material, dino_search: CommandLine, tmp_path: Path, long_run: Path, number: int
) -> None:
    survives_a_kill(long, dino_search, tmp_path, long_run, number, NUM_SLOW_KILLS)


def test_a_run_killed_in_the_middle_of_a_checkpoint_has_the_two_before(
    long: Material, dino_search: CommandLine, tmp_path: Path, long_run: Path
) -> None:
    run = tmp_path / "run"
    die = without_pictures(partial(sabotage.die_in_the_middle_of_a_checkpoint, 6))
    assert dino_search.run(*long.pretrain(run), prepare=die).exit_code == 137
    assert [path.name for path in list_checkpoints(run)] == ["step-00000004.pt", "step-00000005.pt"]
    assert [path.name for path in (run / "checkpoints").glob("*.partial")] == ["step-00000006.partial"]
    goes_on_to_the_same_end(long, run, dino_search, long_run)


def test_a_damaged_checkpoint_is_told_and_the_one_before_goes_on(
    long: Material, dino_search: CommandLine, tmp_path: Path, long_run: Path
) -> None:
    run = tmp_path / "run"
    die = without_pictures(partial(sabotage.die_in_the_middle_of_a_checkpoint, 6))
    assert dino_search.run(*long.pretrain(run), prepare=die).exit_code == 137
    newest = list_checkpoints(run)[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    done = dino_search.run(*long.pretrain(run, "--resume", "--set", "epochs=2"), prepare=without_pictures())
    assert done.exit_code == 0, done
    assert "step-00000005.pt cannot be read" in done.stderr
    assert "going on from step 4" in done.stderr


# --- a full disk


@pytest.mark.mounts
@pytest.mark.parametrize("leave_kb", [0, 100])
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_with_space(
    tiny: Material, dino_search: CommandLine, tmp_path: Path, leave_kb: int
) -> None:
    with mounted(tmp_path / "disk", "3m") as disk:
        run = disk / "run"
        command = tiny.pretrain(run, "--set", "epochs=4", "--set", "save_every_minutes=0")
        stopped = dino_search.run(
            *command, prepare=without_pictures(partial(sabotage.die_in_the_middle_of_a_checkpoint, 6))
        )
        assert stopped.exit_code == 137
        filler = fill(disk, leave_kb=leave_kb)  # nothing fits any more, or all but a checkpoint does
        done = dino_search.run(*command, "--resume", prepare=without_pictures())
        assert (done.exit_code, done.stdout) == (1, ""), done
        error = complaints(done)[-1]
        assert error.startswith("error: ")
        assert "cannot be written" in error
        assert [line for line in complaints(done) if "error" in line] == [error]
        assert load_checkpoint(run)["step"] == 5
        assert load_recipe(run / "recipe.yaml").epochs == 4
        filler.unlink()
        done = dino_search.run(*command, "--resume", prepare=without_pictures())
        assert done.exit_code == 0, done
        assert [row["step"] for row in events(run, "step")] == list(range(1, 4 * STEPS_PER_EPOCH + 1))

"""The whole DINO training step, against the same step on ready-made tensors and against lightly-train.

ViT-Ti/8, two global views of 64 px and six local ones of 32 px, K 8192, batch 64. lightly-train runs in an environment
of its own: --lightly PATH/bin/python, with `lightly-train[timm]` installed there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from material import report, report_ratio, write_photographs
from torch import Tensor

from dino_training.batches import Batch
from dino_training.distributed import Processes
from dino_training.pretraining import Training
from dino_training.recipe import Recipe, load_recipe

WARMUP_STEPS = 3


@dataclass(frozen=True)
class ReadyBatch(Batch):
    """A batch whose views have been made before."""

    ready: tuple[Tensor, ...] = ()

    def views(self, recipe: Recipe, device: torch.device) -> list[Tensor]:
        return list(self.ready)

    def parts(self, num_parts: int) -> Iterator[Batch]:
        yield self


def images_per_second(photographs: Path, recipe: Recipe, num_steps: int, *, ready_made: bool) -> float:
    """Median over the steps after the first three."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        training = Training([photographs], run, recipe, processes=Processes())
        if ready_made:
            batch = next(training.loader.batches(0, 1))
            views = tuple(batch.views(recipe, torch.device("cpu")))
            ready = ReadyBatch(batch.positions_B, batch.squares, batch.colours, views)
            training.loader.batches = lambda first, last: (ready for _ in range(first, last))  # type: ignore[method-assign, assignment]
        training.loop(lambda: training.step >= WARMUP_STEPS + num_steps)
        training.close()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in rows if row["event"] == "step"]
    return float(statistics.median(rates[WARMUP_STEPS:]))


def lightly_images_per_second(python: str, precision: str, photographs: Path, batch_size: int, num_steps: int) -> float:
    script = Path(__file__).with_name("lightly_train_baseline.py")
    command = [python, str(script), "--images", str(photographs), "--batch-size", str(batch_size)]
    command += ["--steps", str(WARMUP_STEPS + num_steps), "--warmup-steps", str(WARMUP_STEPS)]
    command += ["--prototypes", "8192", "--local-views", "6", "--precision", precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return float(json.loads(done.stdout)["images_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lightly", metavar="PYTHON", help="interpreter of an environment with lightly-train")
    parser.add_argument(
        "--lightly-precision", choices=["32-true", "bf16-mixed"], default="32-true", help="its own choice is 32-true"
    )
    arguments = parser.parse_args()
    recipe = load_recipe(
        "small",
        [
            "global_size=64", "local_size=32", "num_local_views=6", "patch_drop=0", "num_prototypes=8192",
            "epochs=100", f"batch_size={arguments.batch_size}", "log_every_steps=1", "num_evaluated=8",
            "evaluate_every_epochs=0",
        ],
    )  # fmt: skip
    rates: dict[str, list[float]] = {"whole": [], "ready": [], "lightly": []}
    with tempfile.TemporaryDirectory() as name:
        photographs = Path(name) / "photographs"
        write_photographs(photographs, 1000, (64, 64))
        for _ in range(arguments.rounds):
            for kind, ready_made in (("whole", False), ("ready", True)):
                rates[kind].append(images_per_second(photographs, recipe, arguments.steps, ready_made=ready_made))
            if arguments.lightly:
                rates["lightly"].append(
                    lightly_images_per_second(
                        arguments.lightly,
                        arguments.lightly_precision,
                        photographs,
                        arguments.batch_size,
                        arguments.steps,
                    )
                )
    print(f"DINO, ViT-Ti/8, 2 x 64 px + 6 x 32 px, K 8192, batch {arguments.batch_size}")
    report("whole step", rates["whole"], "images/s")
    report("on ready-made tensors", rates["ready"], "images/s")
    report_ratio("whole / ready-made", rates["whole"], rates["ready"], ">= 0.85")
    if arguments.lightly:
        report("lightly-train", rates["lightly"], "images/s")
        report_ratio("whole / lightly-train", rates["whole"], rates["lightly"], ">= 3")


if __name__ == "__main__":
    main()

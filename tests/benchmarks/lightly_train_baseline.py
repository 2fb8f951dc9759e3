"""Training throughput of lightly-train's DINO, the baseline of the training benchmark.

Runs in an environment of its own that has `lightly-train[timm]`, and needs nothing of this project. It trains ViT-Ti/8
with two global views of 64 px and local views of 32 px through `lightly_train.pretrain`: its data loader, its
augmentations, its optimizer step; without its loggers, checkpoints and progress bar. The time runs from the end of the
last warm-up step to the end of the last step. One line of JSON goes to standard output, everything else to standard
error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HIDDEN_DIM = 2048
BOTTLENECK_DIM = 256
GLOBAL_SIZE = 64
LOCAL_SIZE = 32
PATCH_SIZE = 8
PREFETCHED_PER_WORKER = 2  # of a DataLoader, unless told otherwise


def repeats_for_one_epoch(folder: Path, steps: int, batch_size: int, workers: int) -> int:
    """How often to list the folder so that no epoch ends, and no worker runs dry, before the last step."""
    num_images = sum(1 for path in folder.rglob("*") if path.is_file())
    if num_images == 0:
        raise SystemExit(f"There are no images in {folder}.")
    num_batches = steps + 1 + workers * PREFETCHED_PER_WORKER
    return math.ceil(num_batches * batch_size / num_images)


def train(arguments: argparse.Namespace, out: Path) -> list[float]:
    """The times at which the steps ended, in seconds."""
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
    os.environ["LIGHTLY_TRAIN_CACHE_DIR"] = str(out / "cache")
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    import lightly_train  # type: ignore[import-not-found]
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(arguments.threads)
    ends: list[float] = []

    def note_end(*_: object) -> None:
        ends.append(time.perf_counter())

    register_optimizer_step_post_hook(note_end)  # lightly-train writes its arguments as JSON: no callback object passes
    repeats = repeats_for_one_epoch(arguments.images, arguments.steps, arguments.batch_size, arguments.workers)
    local_view = {"num_views": arguments.local_views, "view_size": (LOCAL_SIZE, LOCAL_SIZE)}
    lightly_train.pretrain(
        out=out / "run",
        data=[str(arguments.images)] * repeats,
        model="timm/vit_tiny_patch16_224",
        model_args={
            "patch_size": PATCH_SIZE,
            "img_size": GLOBAL_SIZE,
            "dynamic_img_size": True,
            "num_classes": 0,
            "pretrained": False,
        },
        method="dino",
        method_args={
            "hidden_dim": HIDDEN_DIM,
            "bottleneck_dim": BOTTLENECK_DIM,
            "output_dim": arguments.prototypes,
            "batch_norm": False,
            "norm_last_layer": True,
        },
        transform_args={
            "image_size": (GLOBAL_SIZE, GLOBAL_SIZE),
            "local_view": local_view if arguments.local_views else None,
        },
        optim="adamw",
        epochs=1,
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        accelerator="cpu",
        devices=1,
        precision=arguments.precision,
        loggers={"jsonl": None, "tensorboard": None},
        callbacks={
            "learning_rate_monitor": None,
            "early_stopping": None,
            "model_export": None,
            "model_checkpoint": None,
        },
        trainer_args={
            "max_steps": arguments.steps,
            "callbacks": [],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="with those of the warm-up")
    parser.add_argument("--warmup-steps", type=int, default=4, help="at least 1; they do not count")
    parser.add_argument("--prototypes", type=int, default=8192)
    parser.add_argument("--local-views", type=int, default=6)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if not 1 <= arguments.warmup_steps < arguments.steps:
        parser.error("--warmup-steps must be at least 1 and less than --steps")

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        ends = train(arguments, Path(out))
    if len(ends) != arguments.steps:
        raise SystemExit(f"lightly-train ran {len(ends)} steps instead of {arguments.steps}.")

    steps = arguments.steps - arguments.warmup_steps
    seconds = ends[-1] - ends[arguments.warmup_steps - 1]
    result = {
        "images_per_second": round(steps * arguments.batch_size / seconds, 2),
        "steps": steps,
        "seconds": round(seconds, 2),
        "lightly_train": version("lightly-train"),
        "torch": version("torch"),
        "timm": version("timm"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

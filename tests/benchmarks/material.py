"""What the benchmarks work on: photographs of given sizes, models with random weights, and paired timing."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "motorcycle_left", "retina", "rocket")


def write_photographs(folder: Path, number: int, size: tuple[int, int], quality: int = 92) -> list[Path]:
    """JPEG files of `size`, each another random piece of a real photograph; the same ones for the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    data = Path(skimage.__file__).parent / "data"
    originals = [Image.open(next(data.glob(f"{name}.*"))).convert("RGB") for name in PHOTOGRAPHS]
    paths = []
    for number_of_file in range(number):
        original = originals[number_of_file % len(originals)]
        frac = rng.uniform(0.6, 1.0)
        width, height = int(original.width * frac), int(original.height * frac)
        left = int(rng.integers(0, original.width - width + 1))
        top = int(rng.integers(0, original.height - height + 1))
        piece = original.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        paths.append(folder / f"{number_of_file:06d}.jpg")
        piece.save(paths[-1], "JPEG", quality=quality)
    return paths


def write_random_model(path: Path, architecture: str, **architecture_args: Any) -> Path:
    """A safetensors file of a timm architecture with seeded random weights, described in its metadata."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **architecture_args)
    description = {
        "architecture": architecture,
        "architecture_args": architecture_args,
        "input_size": architecture_args.get("img_size", 224),
    }
    save_file(model.state_dict(), path, metadata={"dino_search": json.dumps(description)})
    return path


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes, wall clock."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def report(name: str, values: list[float], unit: str) -> float:
    """Prints the median and the range of repeated measurements; returns the median."""
    median = statistics.median(values)
    print(f"{name:<58}{median:9.3f} {unit}  ({min(values):.3f} .. {max(values):.3f})")
    return median


def report_ratio(name: str, ours: list[float], baseline: list[float], target: str) -> None:
    """Prints the median of the ratios of pairs that were measured one after the other."""
    report(f"{name}  [{target}]", [a / b for a, b in zip(ours, baseline, strict=True)], "x")

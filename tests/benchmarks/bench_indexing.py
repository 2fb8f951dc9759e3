"""Indexing ImageNet-sized JPEG files end to end, against the forward pass alone and a plain DataLoader loop.

ViT-S/16 at 224 px, random weights. `--images N --rounds R --batch-size B`
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from material import report, report_ratio, write_photographs, write_random_model
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dino_index.backbones import Backbone
from dino_index.embedding import EmbeddingSettings
from dino_index.indexing import IndexOptions
from dino_index.model_files import resolve_model
from dino_search import Collection


class _Pictures(Dataset[torch.Tensor]):
    """Decoding as most scripts do it: Pillow, resize, a float tensor."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        picture = Image.open(self._paths[number]).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pixels_HWC = torch.from_numpy(np.asarray(picture, np.float32)) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return ((pixels_HWC - mean) / std).permute(2, 0, 1)


def plain_loop_rate(paths: list[Path]) -> float:
    """Images/s of timm and a DataLoader with two workers in float32."""
    model = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    start = time.perf_counter()
    with torch.inference_mode():
        for pictures_BCHW in DataLoader(_Pictures(paths), batch_size=32, num_workers=2):
            model(pictures_BCHW)
    return len(paths) / (time.perf_counter() - start)


def forward_rate(backbone: Backbone, number: int, batch_size: int) -> float:
    """Images/s of the model alone, on pixels that are ready."""
    size = backbone.spec.input_size
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), np.uint8)
    num_batches = max(1, number // batch_size)
    start = time.perf_counter()
    for _ in range(num_batches):
        backbone.embed(pixels_BHWC)
    return num_batches * batch_size / (time.perf_counter() - start)


def indexing_rate(photos: Path, home: Path, model: Path, settings: EmbeddingSettings) -> float:
    """Images/s of a first `index` into an empty home, from opening the collection to the last commit."""
    num_images = sum(1 for _ in photos.iterdir())
    with Collection.open(home=home, model=model) as collection:
        start = time.perf_counter()
        summary = collection.index(photos, IndexOptions(embedding=settings))
        assert summary.added == num_images
        return num_images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    settings = EmbeddingSettings(batch_size=arguments.batch_size, workers=arguments.workers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_photographs(folder / "photos", arguments.images, (500, 375))
        model = write_random_model(folder / "vits16.safetensors", "vit_small_patch16_224")
        backbone = Backbone(resolve_model(model))
        batch_size = arguments.batch_size or backbone.batch_size
        print(f"{arguments.images} JPEG files of 500x375, batch {batch_size}, {backbone.dtype}")
        backbone.embed(np.zeros((batch_size, 224, 224, 3), np.uint8))
        rates: dict[str, list[float]] = {"forward": [], "index": [], "plain": []}
        for round_number in range(arguments.rounds):
            rates["forward"].append(forward_rate(backbone, arguments.images, batch_size))
            home = folder / f"home-{round_number}"
            rates["index"].append(indexing_rate(folder / "photos", home, model, settings))
            rates["plain"].append(plain_loop_rate(paths))
    report("forward pass alone", rates["forward"], "images/s")
    report("dino-search index, end to end", rates["index"], "images/s")
    report("plain timm + DataLoader, float32", rates["plain"], "images/s")
    report_ratio("index / forward alone", rates["index"], rates["forward"], ">= 0.85")
    report_ratio("index / plain loop", rates["index"], rates["plain"], ">= 3 with AMX")


if __name__ == "__main__":
    main()

"""Whole commands: `--help`, `index` of an unchanged folder, a cold `search`, against their baselines in the same run.

10,000 images under ViT-S/16 at 224 px with random weights would take a quarter of an hour to embed, so their vectors
are random too and written as `index` writes them; the files are real, and so is everything that is timed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from material import report, report_ratio, seconds, write_photographs, write_random_model

from dino_index.backbones import Backbone
from dino_index.catalog import Catalog
from dino_index.collections import create_collection
from dino_index.embedding import EmbeddedFile, FileFacts
from dino_index.image_files import list_images
from dino_index.model_files import resolve_model
from dino_index.recording import BatchRecorder, Sources
from dino_index.snapshots import write_snapshot


def fill_collection(home: Path, photos: Path, model: Path) -> float:
    """Records every image of the folder with a random vector; returns seconds that its forward passes would take."""
    spec = resolve_model(model)
    backbone = Backbone(spec)
    pixels_BHWC = np.zeros((backbone.batch_size, spec.input_size, spec.input_size, 3), np.uint8)
    backbone.embed(pixels_BHWC)
    forward_s = seconds(lambda: backbone.embed(pixels_BHWC)) / len(pixels_BHWC)
    rng = np.random.default_rng(0)
    catalog = Catalog.open(home, create=True)
    assert catalog is not None
    files = list_images([photos]).files
    with catalog.writing() as session:
        collection = create_collection(session, "default", spec, backbone.dim)
        Sources.covering(session, collection, [str(photos)])
        items = []
        for file in files:
            digest = hashlib.sha256(Path(file.path).read_bytes()).digest()
            facts = FileFacts(digest, file.size, file.mtime_ns, 500, 375)
            vector = rng.standard_normal(backbone.dim).astype(np.float16)
            items.append(EmbeddedFile(file, facts, vector, vector))
        BatchRecorder(session, collection).record(items, None)
    write_snapshot(catalog, collection)
    catalog.close()
    return forward_s * len(files)


def write_files(paths: list[Path], folder: Path, number: int) -> None:
    """A folder of so many different JPEG files: the photographs in turn, each with a number behind its end."""
    folder.mkdir()
    contents = [path.read_bytes() for path in paths]
    for number_of_file in range(number):
        suffix = number_of_file.to_bytes(4, "little")
        (folder / f"{number_of_file:06d}.jpg").write_bytes(contents[number_of_file % len(contents)] + suffix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "dino_search"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {"DINO_SEARCH_HOME": str(folder / "home")}

        def run(*words: str) -> float:
            return seconds(lambda: subprocess.run(words, check=True, capture_output=True, env=environment))

        photographs = write_photographs(folder / "originals", 50, (500, 375))
        write_files(photographs, folder / "photos", arguments.images)
        query = write_photographs(folder / "queries", 60, (640, 480))[-1]
        model = write_random_model(folder / "vits16.safetensors", "vit_small_patch16_224")
        first_run_s = fill_collection(folder / "home", folder / "photos", model)
        times: dict[str, list[float]] = {"help": [], "unchanged": [], "imports": [], "search": []}
        for _ in range(arguments.rounds):
            times["help"].append(run(*command, "--help"))
            times["unchanged"].append(run(*command, "index", str(folder / "photos")))
            times["imports"].append(run(sys.executable, "-c", "import torch, timm, faiss"))
            times["search"].append(run(*command, "search", str(query)))
    report("dino-search --help  [< 0.5]", times["help"], "s")
    report(f"index of {arguments.images} unchanged files", times["unchanged"], "s")
    report_ratio(
        "  / the forward passes of a first run", times["unchanged"], [first_run_s] * arguments.rounds, "< 0.02"
    )
    report("python -c 'import torch, timm, faiss'", times["imports"], "s")
    report(f"cold search among {arguments.images} images", times["search"], "s")
    report_ratio("  / the imports", times["search"], times["imports"], "<= 1.5")


if __name__ == "__main__":
    main()

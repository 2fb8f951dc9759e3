"""Makes what ships beside the bundled weights for copy detection: whitening, background set, calibrations.

    python training/fit_bundled_copies.py --whiten TRAINING-IMAGES --calibrate PHOTOGRAPHS [--queries 400]

Whitening and the background come from the pictures that the weights were trained on, of which there are enough for
10 a dimension; the calibrations from edited copies of photographs, since low-resolution training pictures are no
measure of what people search with. Both folders and the weights decide the result. Run it for each new version of the
weights; the files are written to index/dino_index/weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dino_index.backbones import Backbone
from dino_index.catalog import Catalog
from dino_index.collections import find_collection
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_detection import DetectionOptions
from dino_index.copy_settings import latest_calibration
from dino_index.image_files import list_images
from dino_index.images import load_image
from dino_index.model_files import resolve_model
from dino_index.whitening import fit_whitening
from dino_search import Collection
from dino_search.copies import CopiesOptions

NUM_WHITENED = 8000
NUM_BACKGROUND = 1024
# The modes that people use; others are calibrated when they are first asked for.
MODES = [("none", "none"), ("none", "mirror"), ("query", "all")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whiten", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="left out: whitening and background alone")
    parser.add_argument("--queries", type=int, default=400)
    options = parser.parse_args()
    weights_path = resolve_model().weights_path
    descriptor = fit_descriptor(options.whiten)
    weights_path.with_suffix(".copies.safetensors").write_bytes(descriptor.to_bytes())
    if options.calibrate is None:
        return
    modes = fit_calibrations(options.calibrate, options.queries)
    weights_path.with_suffix(".calibration.json").write_text(json.dumps(modes, indent=1) + "\n", encoding="utf-8")


def fit_descriptor(folder: Path) -> CopyDescriptor:
    """Whitening and background of a random choice of the folder's images."""
    backbone = Backbone(resolve_model())
    side = backbone.spec.input_size
    files = list_images([folder]).files
    chosen = np.random.default_rng(0).permutation(len(files))[:NUM_WHITENED]

    def embed(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return backbone.embed(np.stack([load_image(files[i].path, size=(side, side)).pixels_HWC for i in part]))

    with backbone.forward_threads() as forward:
        parts = list(forward.map(embed, np.array_split(chosen, len(chosen) // backbone.batch_size)))
    joined = CopyDescriptor().vectors(*(np.concatenate(vectors) for vectors in zip(*parts, strict=True)))
    whitening = fit_whitening(joined)
    assert whitening is not None, f"{len(joined)} images are too few"
    print(f"whitening of {len(joined)} images", flush=True)
    return CopyDescriptor(whitening=whitening, background_BC=joined[:NUM_BACKGROUND])


def fit_calibrations(folder: Path, num_queries: int) -> dict[str, object]:
    """Calibrations by mode, as the catalog stores them."""
    with TemporaryDirectory() as home, Collection.open(home=home) as collection:
        collection.index(folder)
        for regions, variants in MODES:
            detection = DetectionOptions(regions=regions, variants=variants)
            done = collection.calibrate(CopiesOptions(detection=detection), num_queries=num_queries)
            print(f"{done.mode}: {done.summary}", *done.table, sep="\n  ", flush=True)
        catalog = Catalog.open(home)
        assert catalog is not None
        with catalog.reading() as session:
            latest = latest_calibration(session, find_collection(session, "default"))
        catalog.close()
    assert latest is not None
    return latest[1]


if __name__ == "__main__":
    main()

"""Verification: which share of edited copies it tells from the photographs most like them, by edit; and what it costs.

`bench_verification.py FOLDER` takes the photographs in FOLDER, no two of which may show the same; without it, the few
that scikit-image ships. A tenth of them serve as what others are pasted on, and are no references.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
from material import PHOTOGRAPHS
from numpy.typing import NDArray
from PIL import Image

from dino_index.backbones import Backbone
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.edits import EDITS, apply_edits, paste
from dino_index.images import load_image
from dino_index.model_files import resolve_model
from dino_index.verification import Patches, Verification, patches_of, verify

# Undone by variants of the query before anything is verified.
KINDS = [kind for kind in EDITS if kind not in ("mirror", "rotate_right")]
NUM_FALSE = 4


@dataclass(frozen=True)
class Pair:
    kinds: list[str]
    is_true: bool
    cosine: float
    found: Verification
    seconds: float
    """Of processor time, for verifying alone."""


def embed(backbone: Backbone, images: list[Image.Image]) -> tuple[list[Patches], NDArray[np.float32]]:
    """What is verified of each picture, and the vectors that bring candidates up."""
    patches, vectors = [], []
    for image in images:
        square = load_image(image, size=(backbone.spec.input_size,) * 2)
        cls_BD, gem_BD, patches_BhwP = backbone.embed_with_patches(square.pixels_HWC[None])
        patches.append(patches_of(square.pixels_HWC, patches_BhwP[0], width=square.width, height=square.height))
        vectors.append(CopyDescriptor().vectors(cls_BD, gem_BD))
    return patches, np.concatenate(vectors)


def edited(image: Image.Image, kinds: list[str], grounds: list[Image.Image], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    for kind in kinds:
        if kind == "paste":
            image = paste(image, rng, background=grounds[int(rng.integers(len(grounds)))])
        else:
            image = apply_edits(image, [kind], rng)
    return image


def verified_pairs(photographs: list[Image.Image], grounds: list[Image.Image], num_copies: int) -> Iterator[Pair]:
    backbone = Backbone(resolve_model())
    references, reference_vectors = embed(backbone, photographs)
    rng = np.random.default_rng(0)
    for number in range(num_copies):
        original = int(rng.integers(len(photographs)))
        num_edits = 1 if number % 2 else int(rng.integers(2, 4))
        kinds = [str(kind) for kind in rng.choice(KINDS, num_edits, replace=False)]
        queries, query_vectors = embed(backbone, [edited(photographs[original], kinds, grounds, number)])
        cosines = reference_vectors @ query_vectors[0]
        others = [int(other) for other in np.argsort(-cosines) if other != original][:NUM_FALSE]
        for candidate in (original, *others):
            begin = time.process_time()
            found = verify(queries[0], references[candidate])
            seconds = time.process_time() - begin
            yield Pair(kinds, candidate == original, float(cosines[candidate]), found, seconds)


def show(pairs: list[Pair]) -> None:
    measures = {
        "cosine": np.array([pair.cosine for pair in pairs]),
        "inliers": np.array([float(pair.found.num_inliers) for pair in pairs]),
        "score": np.array([pair.found.score for pair in pairs]),
    }
    is_true = np.array([pair.is_true for pair in pairs])
    found = {name: values > np.quantile(values[~is_true], 0.999) for name, values in measures.items()}
    print(f"{is_true.sum()} true pairs, {(~is_true).sum()} false ones; share found at one false pair in 1,000")
    print(f"{'':14} {'alone':>24}   {'with others':>24}")
    for kind in [*KINDS, "all"]:
        cells = []
        for alone in (True, False):
            chosen = np.array([p.is_true and kind in [*p.kinds, "all"] and (len(p.kinds) == 1) == alone for p in pairs])
            shares = (f"{name} {found[name][chosen].mean():.2f}" if chosen.any() else "-" for name in found)
            cells.append(f"{chosen.sum():4} " + " ".join(shares))
        print(f"{kind:14} " + " | ".join(cells))
    for lowest in (0.5, 0.7, 0.9, 0.95):
        passing = measures["score"] >= lowest
        print(
            f"score >= {lowest}: {passing[is_true].mean():.3f} of the true, {passing[~is_true].mean():.5f} of the false"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--copies", type=int, default=0, help="0: as many as there are photographs, at least 100")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(skimage.__file__).parent / "data"
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
    if arguments.folder is None:
        paths = [path for path in paths if path.stem in PHOTOGRAPHS]
    images = [Image.fromarray(load_image(path, max_short_side=400).pixels_HWC) for path in paths]
    photographs = [image for number, image in enumerate(images) if number % 10]
    pairs = list(verified_pairs(photographs, images[::10], arguments.copies or max(100, len(images))))
    show(pairs)
    print(f"{1000 * float(np.median([pair.seconds for pair in pairs])):.1f} ms of one processor a pair")


if __name__ == "__main__":
    main()

"""Peak memory of indexing 100,000 small images against 10,000, each in a process of its own.

A small ViT with random weights, so that it takes minutes: what grows with the collection does not depend on the
model, but for the vectors, which are not counted (none are held while indexing; the snapshot at the end is).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from material import write_random_model
from PIL import Image

_RUN = """
import resource, sys
from dino_search import Collection
summary = Collection.open(home=sys.argv[1], model=sys.argv[2]).index(sys.argv[3])
assert summary.failed == 0, summary
print(summary.added, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_small_images(folder: Path, number: int) -> None:
    """Different PNG files of 32x32."""
    rng = np.random.default_rng(0)
    for begin in range(0, number, 1000):
        subfolder = folder / f"{begin:06d}"
        subfolder.mkdir(parents=True)
        for row, pixels_HWC in enumerate(rng.integers(0, 256, (min(1000, number - begin), 32, 32, 3), np.uint8)):
            Image.fromarray(pixels_HWC).save(subfolder / f"{row:04d}.png", compress_level=1)


def peak_mb(photos: Path, home: Path, model: Path) -> tuple[int, float]:
    """(images indexed, highest resident memory of the process in MB)."""
    command = [sys.executable, "-c", _RUN, str(home), str(model), str(photos)]
    added, kilobytes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(added), int(kilobytes) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = {"img_size": 32, "patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3}
        model = write_random_model(folder / "small.safetensors", "vit_tiny_patch16_224", **size)
        peaks = []
        for number in (arguments.small, arguments.large):
            write_small_images(folder / f"photos-{number}", number)
            added, peak = peak_mb(folder / f"photos-{number}", folder / f"home-{number}", model)
            vectors_mb = added * 96 * 4 / 1e6
            print(f"{added:>7} images: peak {peak:.0f} MB, of which vectors of the snapshot {vectors_mb:.0f} MB")
            peaks.append(peak - vectors_mb)
    print(f"ratio, the vectors aside: {peaks[1] / peaks[0]:.2f}  [<= 1.3]")


if __name__ == "__main__":
    main()

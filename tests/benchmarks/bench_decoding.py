"""Decoding and resizing JPEG files, against plain Pillow: 12 megapixels (phone photographs) and 500x375."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from material import report, report_ratio, seconds, write_photographs
from PIL import Image

from dino_index.images import decode, read_file

SIDE = 224


def plain_pillow(path: Path) -> None:
    np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def ours(path: Path) -> None:
    decode(read_file(path).data, size=(SIDE, SIDE))


def milliseconds(action: Callable[[Path], None], paths: list[Path]) -> float:
    def all_of_them() -> None:
        for path in paths:
            action(path)

    return 1000 * seconds(all_of_them) / len(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        for size, number, target in (((4000, 3000), 7, ">= 4"), ((500, 375), 70, "no more than 1.1 times slower")):
            paths = write_photographs(Path(name) / f"{size[0]}", number, size)
            times: dict[str, list[float]] = {"plain": [], "ours": []}
            for _ in range(rounds):
                times["plain"].append(milliseconds(plain_pillow, paths))
                times["ours"].append(milliseconds(ours, paths))
            print(f"JPEG files of {size[0]}x{size[1]} to {SIDE}x{SIDE}, one thread")
            report("plain Pillow", times["plain"], "ms an image")
            report("dino-search", times["ours"], "ms an image")
            report_ratio("plain / ours", times["plain"], times["ours"], target)


if __name__ == "__main__":
    main()

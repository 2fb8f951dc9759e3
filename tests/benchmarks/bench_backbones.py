"""What backbones tell apart: weighted 20-NN of labelled folders, beside random weights, pixels and colour histograms.

    python tests/benchmarks/bench_backbones.py [--train DIR --val DIR] [--model NAME|FILE]... [--per-class 50]
        [--val-per-class 10] [--classes 10] [--side 32] [--input-size SIDE]

Folders of classes; without them pieces of scikit-image's photographs, a class each. All rows classify the same drawn
pictures. Without --model the bundled backbone is measured; the random weights are of its architecture. --side: pictures
are shrunk to squares of so many pixels before, which is what those of CIFAR are.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from material import PHOTOGRAPHS, write_photographs, write_random_model
from numpy.typing import NDArray
from PIL import Image

from dino_index.image_files import list_images
from dino_index.model_files import ModelSpec, resolve_model
from dino_index.snapshots import normalise
from dino_training.evaluation.classification import top_figures
from dino_training.evaluation.features import FeatureStore
from dino_training.evaluation.knn import KnnOptions, evaluate_knn
from dino_training.evaluation.labelled_images import draw_per_class
from dino_training.evaluation.results import Figure
from dino_training.evaluation.voting import NO_CLASS, knn_places

_K = 20
_PIXELS_SIDE = 16
_BINS = 8


def draw_pictures(source: Path, target: Path, classes: list[str], per_class: int, side: int) -> None:
    """Copies so many pictures of each class, at most, the same ones each time; shrunk where a side is given."""
    paths = [Path(file.path) for name in classes for file in list_images([source / name]).files]
    labels = [path.relative_to(source).parts[0] for path in paths]
    for row in draw_per_class(labels, per_class, seed=0).tolist():
        place = target / labels[row] / f"{row:07d}{paths[row].suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        if side:
            small = Image.open(paths[row]).convert("RGB").resize((side, side), Image.Resampling.BOX)
            small.save(place.with_suffix(".png"))
        else:
            place.write_bytes(paths[row].read_bytes())


def write_classes(folder: Path, first: int = 0) -> Path:
    """Pieces of each of scikit-image's photographs in a folder of its name. first: of the pieces that are drawn."""
    for number, path in enumerate(write_photographs(folder / "all", first + 200, (128, 96))):
        if number >= first:
            place = folder / PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
            place.mkdir(exist_ok=True)
            path.rename(place / path.name)
    for path in (folder / "all").iterdir():
        path.unlink()
    (folder / "all").rmdir()
    return folder


def pixels(image: Image.Image) -> NDArray[np.float32]:
    """Of the picture at 16 x 16, less their mean."""
    small = np.asarray(image.resize((_PIXELS_SIDE, _PIXELS_SIDE), Image.Resampling.BOX), np.float32).ravel()
    less_mean: NDArray[np.float32] = small - small.mean()
    return less_mean


def colours(image: Image.Image) -> NDArray[np.float32]:
    """How many pixels have each of 512 colours, as square roots: the cosine is then Bhattacharyya's coefficient."""
    counts, _ = np.histogramdd(np.asarray(image).reshape(-1, 3), bins=_BINS, range=[(0, 256)] * 3)
    roots: NDArray[np.float32] = np.sqrt(counts).ravel().astype(np.float32)
    return roots


def plain_knn(train: Path, val: Path, vector_of: Callable[[Image.Image], NDArray[np.float32]]) -> tuple[Figure, ...]:
    def read(folder: Path) -> tuple[NDArray[np.float32], list[str]]:
        paths = [Path(file.path) for file in list_images([folder]).files]
        vectors = [vector_of(Image.open(path).convert("RGB")) for path in paths]
        return normalise(np.stack(vectors)), [path.parent.name for path in paths]

    (train_ND, labels), (queries_QD, own) = read(train), read(val)
    numbers = {name: number for number, name in enumerate(sorted(set(labels)))}
    places = knn_places(
        train_ND, np.array([numbers[label] for label in labels]),
        queries_QD, np.array([numbers.get(label, NO_CLASS) for label in own]), ks=(_K,),
    )  # fmt: skip
    return tuple(top_figures(places[_K], str(_K), seed=0))


def model_knn(train: Path, val: Path, spec: ModelSpec) -> tuple[Figure, ...]:
    store = FeatureStore(spec)
    try:
        return tuple(evaluate_knn(store, train, val, KnnOptions(ks=(_K,))).figures)
    finally:
        store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--model", action="append", default=[], help="repeatable")
    parser.add_argument("--per-class", type=int, default=50, help="training pictures")
    parser.add_argument("--val-per-class", type=int, default=10)
    parser.add_argument("--classes", type=int, default=0, help="the first so many by name; 0 for all")
    parser.add_argument("--input-size", type=int, metavar="SIDE", help="of models; left out: each one's own")
    parser.add_argument("--side", type=int, default=0, help="shrink pictures to squares of so many pixels")
    options = parser.parse_args()
    assert (options.train is None) == (options.val is None), "expected --train and --val, found one of them"
    with tempfile.TemporaryDirectory() as name:
        source = options.train or write_classes(Path(name) / "pieces")
        classes = sorted(folder.name for folder in source.iterdir() if folder.is_dir())[: options.classes or None]
        train, val = Path(name) / "train", Path(name) / "val"
        draw_pictures(source, train, classes, options.per_class, options.side)
        others = options.val or write_classes(Path(name) / "others", first=200)
        draw_pictures(others, val, classes, options.val_per_class, options.side)
        bundled = resolve_model()
        arguments = {key: value for key, value in bundled.architecture_args.items() if key != "num_classes"}
        random = write_random_model(Path(name) / "random.safetensors", bundled.architecture, **arguments)
        print(f"weighted {_K}-NN, {len(classes)} classes, {options.per_class} training pictures of each")

        def show(what: str, figures: tuple[Figure, ...]) -> None:
            values = [f"{figure.keys[0]} {100 * figure.value:5.1f} %" for figure in figures]
            low, high = figures[0].interval
            print(f"{what:<40}{'  '.join(values)}  top1 within {100 * low:.1f} .. {100 * high:.1f}", flush=True)

        size: int | None = options.input_size
        for model in options.model or ["bundled"]:
            show(model, model_knn(train, val, resolve_model(model, input_size=size)))
        show("random weights", model_knn(train, val, resolve_model(random, input_size=size or bundled.input_size)))
        show(f"pixels at {_PIXELS_SIDE} x {_PIXELS_SIDE}", plain_knn(train, val, pixels))
        show(f"colour histograms of {_BINS**3}", plain_knn(train, val, colours))


if __name__ == "__main__":
    main()

"""The small-image experiments in full: pretraining, learning curve, attention, and DINO against supervision.

    python training/small_images.py --digits --out runs/digits
    python training/small_images.py /data/mnist --recipe mnist --out runs/mnist

A set is given as its published files or as a folder with `train` and `val`, each with a folder for each class.
--digits takes the 1,797 handwritten digits of scikit-learn instead, of which 500 are kept unseen; they are written as
IDX files, as MNIST's are, so that they go the same way. Written to --out: `run`, as `dino-search pretrain` does;
`knn.json`, `few_labels.json` and `.md`; `learning_curve.png`, `few_labels.png`, and `attention.png` of 16 unseen
images. What is there is used again: an interrupted experiment goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dino_index.attention import attention_maps
from dino_index.backbones import load_model
from dino_index.model_files import resolve_model
from dino_training import Recipe, load_recipe, pretrain
from dino_training.checkpoints import list_checkpoints
from dino_training.evaluation.features import FeatureStore
from dino_training.evaluation.few_labels import FewLabelsOptions, evaluate_few_labels, load_squares
from dino_training.evaluation.knn import evaluate_knn
from dino_training.evaluation.labelled_images import LabelledImages
from dino_training.evaluation.plots import draw_lines
from dino_training.export import WEIGHTS
from dino_training.pretraining import RECIPE, Progress
from dino_training.run_log import METRICS
from dino_training.sheets import NUM_ATTENTION_IMAGES, draw_attention
from dino_training.views import normalise

NUM_UNSEEN_DIGITS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, nargs="?", metavar="SET")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits in place of SET")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="mnist; digits with --digits")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=FewLabelsOptions.steps, help="of each supervised training")
    parser.add_argument("--draws", type=int, default=FewLabelsOptions.draws)
    arguments = parser.parse_args()
    if (arguments.set is None) != arguments.digits:
        parser.error("expected SET or --digits")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    folder = write_digits(out / "digits") if arguments.digits else arguments.set
    train, val = (folder / "train", folder / "val") if (folder / "train").is_dir() else (folder, folder)

    recipe = load_recipe(
        arguments.recipe or ("digits" if arguments.digits else "mnist"), ["labels=folders", *arguments.settings]
    )
    run = out / "run"
    summary = pretrain([train], run, recipe, resume=bool(list_checkpoints(run)), on_progress=_tell, on_remark=print)
    for warning in summary.warnings:
        print(warning)
    draw_learning_curve(run).save(out / "learning_curve.png")
    resolved = load_recipe(run / RECIPE)
    save_attention_of_unseen(run / WEIGHTS, resolved, val, out / "attention.png")
    store = FeatureStore(resolve_model(run / WEIGHTS))
    measured = evaluate_knn(store, train, val)
    store.close()
    (out / "knn.json").write_text(json.dumps(measured.to_json(), indent=2) + "\n", "utf-8")
    print(measured.to_markdown())
    options = FewLabelsOptions(steps=arguments.steps, draws=arguments.draws)
    compared = evaluate_few_labels(run / WEIGHTS, resolved, train, val, options, on_remark=print)
    (out / "few_labels.json").write_text(json.dumps(compared.to_json(), indent=2) + "\n", "utf-8")
    (out / "few_labels.md").write_text(compared.to_markdown(), "utf-8")
    compared.plot().save(out / "few_labels.png")
    print(compared.to_markdown())


def write_digits(folder: Path) -> Path:
    """scikit-learn's digits as four IDX files, shuffled by a fixed seed."""
    from sklearn.datasets import load_digits

    folder.mkdir(exist_ok=True)
    data = load_digits()
    order_N = np.random.default_rng(0).permutation(len(data.target))
    pixels_NHW = (data.images[order_N] * 255 / 16).round().astype(np.uint8)
    labels_N = data.target[order_N].astype(np.uint8)
    for name, part in (("train", slice(NUM_UNSEEN_DIGITS, None)), ("t10k", slice(NUM_UNSEEN_DIGITS))):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(as_idx(pixels_NHW[part]))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(as_idx(labels_N[part]))
    return folder


def as_idx(values: NDArray[np.uint8]) -> bytes:
    """An array of bytes as an IDX file: zeros, type, number of dimensions, their lengths, the values."""
    lengths = b"".join(length.to_bytes(4, "big") for length in values.shape)
    return bytes([0, 0, 8, values.ndim]) + lengths + values.tobytes()


def draw_learning_curve(run: Path) -> Image.Image:
    """k-NN accuracy and the share of images that an edited copy finds first, over the steps of a run."""
    events = [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]
    events = [event for event in events if event["event"] == "evaluation"]
    series = {
        words: [(event["step"], 100 * event[key]) for event in events]
        for key, words in (("knn_top1", "20-NN among training images"), ("copies_found", "edited copies found first"))
    }
    return draw_lines("pretraining without labels, %", "steps", series, y_range=(0, 100))


def save_attention_of_unseen(weights: Path, recipe: Recipe, val: Path, path: Path) -> None:
    """What [CLS] attends to in sixteen images that training has not seen."""
    unseen = LabelledImages.open(val, "val").subset(np.arange(NUM_ATTENTION_IMAGES))
    _, squares_NSSC = load_squares(unseen, recipe.input_size)
    pictures_BCSS = torch.from_numpy(squares_NSSC).permute(0, 3, 1, 2).float() / 255
    backbone = load_model(resolve_model(weights))
    with torch.inference_mode():
        maps_BHhw = attention_maps(backbone, normalise(pictures_BCSS, recipe))
    draw_attention(squares_NSSC, maps_BHhw).save(path)


def _tell(progress: Progress) -> None:
    if progress.activity == "evaluating" and progress.figures.get("knn_top1") is not None:
        print(f"step {progress.done} of {progress.total}: k-NN {progress.figures['knn_top1']:.1%}", flush=True)


if __name__ == "__main__":
    main()

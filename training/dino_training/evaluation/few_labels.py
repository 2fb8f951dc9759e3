"""Few labels: a backbone that was pretrained without any, against the same architecture trained on them alone.

A network that is trained on a few images of each class learns them by heart: its accuracy on them goes to 100 %, that
on unseen images does not follow. The pretrained backbone is not trained any further: its features are classified by
weighted k-NN and by logistic regression.

Shapes: N images, M of them with a label, Q unseen ones, L classes, D channels, S x S pixels, C = 3 colours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dino_index.backbones import choose_device, fastest_dtype, load_model
from dino_index.descriptors import global_token
from dino_index.model_files import resolve_model
from dino_index.snapshots import normalise as to_unit_length
from dino_training.batches import BatchLoader
from dino_training.evaluation.bootstrap import interval_of_mean
from dino_training.evaluation.classification import LabelledSets
from dino_training.evaluation.features import StrPath
from dino_training.evaluation.labelled_images import LabelledImages, draw_per_class
from dino_training.evaluation.plots import draw_lines
from dino_training.evaluation.results import EvaluationResult, Figure
from dino_training.evaluation.voting import knn_places
from dino_training.networks import build_backbone, parameter_groups, use_attention
from dino_training.recipe import Recipe
from dino_training.schedules import cosine
from dino_training.views import normalise, squash

_EMBEDDED_AT_A_TIME = 256
_L2 = 1e-3
_MAX_ITERATIONS = 200
_WARMUP_FRAC = 0.1
_WEIGHT_DECAY = 0.05

METHODS = {
    "dino_knn": "DINO, k-NN",
    "dino_logistic": "DINO, logistic regression",
    "dino_logistic_train": "DINO, logistic regression, on the labelled images",
    "supervised": "supervised",
    "supervised_train": "supervised, on the labelled images",
    "random_knn": "random weights, k-NN",
}
"""In words, by key in the JSON."""


@dataclass(frozen=True, kw_only=True)
class FewLabelsOptions:
    """shots: labelled images of each class. draws: how often they are drawn; figures are means over the draws."""

    shots: tuple[int, ...] = (1, 5, 10, 20)
    draws: int = 3
    k: int = 20
    """Neighbours that vote, but no more than a class has labelled images: further ones must be of other classes."""
    steps: int = 300
    """Of the supervised training, whatever the number of images."""
    batch_size: int = 32
    """Of the same: images, of which two views each."""
    learning_rate: float = 0.0005
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"shots must be 1 or more each, found {list(self.shots)}")
        for name in ("draws", "k", "steps", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be 1 or more, found {value}")


@dataclass(frozen=True, kw_only=True)
class FewLabelsResult(EvaluationResult):
    """Top-1 accuracy by method and by labelled images of each class."""

    def to_markdown(self) -> str:
        values = {figure.keys: figure for figure in self.figures}
        shots = list(dict.fromkeys(figure.keys[1] for figure in self.figures))
        lines = [
            self.protocol,
            "",
            f"| labels a class | {' | '.join(METHODS.values())} |",
            f"|{' ---: |' * (1 + len(METHODS))}",
        ]
        for shot in shots:
            cells = []
            for method in METHODS:
                figure = values[method, shot]
                low, high = figure.interval
                cells.append(f"{100 * figure.value:.1f} ({100 * low:.1f} .. {100 * high:.1f})")
            lines.append(f"| {shot} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", *(f"- {remark}" for remark in self.remarks)]) + "\n"

    def plot(self) -> Image.Image:
        series: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS.values()}
        for figure in self.figures:
            series[METHODS[figure.keys[0]]].append((int(figure.keys[1]), 100 * figure.value))
        return draw_lines(f"{self.protocol}, %", "labelled images of each class", series, y_range=(0, 100))


def evaluate_few_labels(
    weights: Path,
    recipe: Recipe,
    train: StrPath,
    val: StrPath,
    options: FewLabelsOptions | None = None,
    *,
    on_remark: Callable[[str], None] = lambda remark: None,
) -> FewLabelsResult:
    """Top-1 accuracy on `val` from few labels of `train`.

    weights: of the pretrained backbone. recipe: its own; views for the supervised training are its global ones, and so
    is the architecture. Folders of classes, or a published set (see `set_files`).
    Raises as `LabelledSets.open` and `resolve_model` do: EvaluationImpossible for fewer than two classes.
    """
    options = options or FewLabelsOptions()
    sets = LabelledSets.open(train, val, per_class=None, seed=options.seed)
    training, squares_NSSC = load_squares(sets.train, recipe.input_size)
    unseen, unseen_QSSC = load_squares(sets.val, recipe.input_size)
    sets = sets.with_train(training).with_val(unseen)
    num_classes, numbers_N, own_Q = len(sets.classes), sets.train_numbers, sets.val_numbers
    device = choose_device(recipe.device)
    pretrained = load_model(resolve_model(weights)).to(device)
    torch.manual_seed(recipe.seed)
    random = build_backbone(recipe, student=False).to(device)
    embedded = {
        name: [embed(backbone, squares, recipe) for squares in (squares_NSSC, unseen_QSSC)]
        for name, backbone in (("dino", pretrained), ("random", random))
    }
    right: dict[tuple[str, str], list[NDArray[np.bool_]]] = {}
    for shot in options.shots:
        k = min(options.k, shot)
        for draw in range(options.draws):
            rows_M = draw_per_class(sets.train.labels, shot, options.draws * options.seed + draw)
            own_M = numbers_N[rows_M]
            found: dict[str, NDArray[np.bool_]] = {}
            for name, (known_ND, asked_QD) in embedded.items():
                places = knn_places(known_ND[rows_M], own_M, asked_QD, own_Q, ks=(k,))
                found[f"{name}_knn"] = places[k] == 0
            known_ND, asked_QD = embedded["dino"]
            classify = fit_logistic(known_ND[rows_M], own_M, num_classes)
            found["dino_logistic"] = classify(asked_QD) == own_Q
            found["dino_logistic_train"] = classify(known_ND[rows_M]) == own_M
            learnt_MSSC = squares_NSSC[rows_M]
            network = train_supervised(learnt_MSSC, own_M, num_classes, recipe, options, seed=recipe.seed + draw)
            found["supervised"] = network.classify(unseen_QSSC) == own_Q
            found["supervised_train"] = network.classify(learnt_MSSC) == own_M
            for method, right_Q in found.items():
                right.setdefault((method, str(shot)), []).append(right_Q)
            words = ", ".join(f"{METHODS[method]} {100 * values_Q.mean():.1f} %" for method, values_Q in found.items())
            on_remark(f"{shot} a class, draw {draw + 1} of {options.draws}: {words}")
    return FewLabelsResult(
        protocol="few labels: top-1 accuracy, on unseen images unless said",
        figures=[
            _figure((method, str(shot)), right[method, str(shot)], options.seed)
            for method in METHODS
            for shot in options.shots
        ],
        facts={
            "model": str(weights),
            "shots": list(options.shots),
            "draws": options.draws,
            "k": options.k,
            "supervised_steps": options.steps,
            "classes": num_classes,
            "train": training.to_json(),
            "val": unseen.to_json(),
            "seed": options.seed,
        },
        remarks=_remarks(sets, options),
    )


def load_squares(images: LabelledImages, size: int) -> tuple[LabelledImages, NDArray[np.uint8]]:
    """The readable ones of the images, and squares_NSSC: each of them as a whole, squashed as indexing does."""
    images.source.prepare(decode_size=size, cache_bytes=0)
    images = images.checked()
    squares = [squash(images.load(number), size) for number in range(len(images))]
    return images, np.stack(squares) if squares else np.zeros((0, size, size, 3), np.uint8)


@torch.inference_mode()
def embed(backbone: nn.Module, squares_NSSC: NDArray[np.uint8], recipe: Recipe) -> NDArray[np.float32]:
    """cls_ND of unit length."""
    backbone.eval()
    forward_features: Callable[[Tensor], Tensor] = backbone.forward_features  # type: ignore[assignment]
    pictures = _pictures(backbone, squares_NSSC, recipe)
    parts = [global_token(backbone, forward_features(pictures_BCSS)) for pictures_BCSS in pictures]
    return to_unit_length(torch.cat(parts).float().cpu().numpy())


def fit_logistic(
    features_MD: NDArray[np.float32], classes_M: NDArray[np.int64], num_classes: int
) -> Callable[[NDArray[np.float32]], NDArray[np.int64]]:
    """A linear classifier: features of unit length to the number of a class.

    Mean cross-entropy with an L2 penalty on the weights, but not on the biases; convex, so that no seed matters.
    """
    scale = features_MD.shape[1] ** 0.5  # to the size of a layer-normalised token
    inputs_MD, targets_M = torch.from_numpy(features_MD) * scale, torch.from_numpy(classes_M)
    weight_LD = torch.zeros(num_classes, inputs_MD.shape[1], requires_grad=True)
    bias_L = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_LD, bias_L], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs_MD @ weight_LD.T + bias_L, targets_M) + _L2 / 2 * weight_LD.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    weight_LD, bias_L = weight_LD.detach(), bias_L.detach()

    def classify(features_QD: NDArray[np.float32]) -> NDArray[np.int64]:
        logits_QL = torch.from_numpy(features_QD) * scale @ weight_LD.T + bias_L
        found_Q: NDArray[np.int64] = logits_QL.argmax(dim=1).numpy()
        return found_Q

    return classify


class Supervised(nn.Module):
    """The recipe's backbone with a linear classifier on [CLS]."""

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = build_backbone(recipe, student=True)
        self.classifier = nn.Linear(int(self.backbone.num_features), num_classes)  # type: ignore[arg-type]

    def forward(self, pictures_BCSS: Tensor) -> Tensor:
        tokens_BD = global_token(self.backbone, self.backbone.forward_features(pictures_BCSS))  # type: ignore[operator]
        logits_BL: Tensor = self.classifier(tokens_BD)
        return logits_BL

    @torch.inference_mode()
    def classify(self, squares_NSSC: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The number of each whole image's class."""
        self.eval()
        parts = [self(pictures).argmax(dim=1) for pictures in _pictures(self, squares_NSSC, self.recipe)]
        found_N: NDArray[np.int64] = torch.cat(parts).cpu().numpy()
        return found_N


def train_supervised(
    squares_MSSC: NDArray[np.uint8],
    classes_M: NDArray[np.int64],
    num_classes: int,
    recipe: Recipe,
    options: FewLabelsOptions,
    *,
    seed: int,
) -> Supervised:
    """A network of the recipe's architecture, from random weights, on the recipe's two global views of each image."""
    batch_size = min(options.batch_size, len(squares_MSSC))
    views = replace(
        recipe,
        seed=seed,
        multi_crop=False,
        num_global_views=2,
        batch_size=batch_size,
        gradient_accumulation=1,
        edits={},
    )
    device = choose_device(recipe.device)
    torch.manual_seed(seed)
    network = Supervised(recipe, num_classes).to(device)
    use_attention(network, fused=device.type == "cuda")
    optimizer = torch.optim.AdamW(parameter_groups(network), fused=True)
    loader = BatchLoader(lambda position: squares_MSSC[position], len(squares_MSSC), views)
    targets_M = torch.from_numpy(classes_M).to(device)
    warmup_steps = round(_WARMUP_FRAC * options.steps)
    network.train()
    for step, batch in enumerate(loader.batches(0, options.steps)):
        for group in optimizer.param_groups:
            group["lr"] = cosine(options.learning_rate, 1e-6, step, options.steps, warmup_steps=warmup_steps)
            group["weight_decay"] = _WEIGHT_DECAY if group["decays"] else 0.0
        pictures_BCSS = torch.cat(batch.views(views, device))
        own_B = targets_M[torch.from_numpy(batch.positions_B)].repeat(views.num_global_views)
        with _autocast(device):
            logits_BL = network(pictures_BCSS)
        loss = F.cross_entropy(logits_BL.float(), own_B)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network


@contextmanager
def _autocast(device: torch.device) -> Iterator[None]:
    dtype = fastest_dtype(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


def _pictures(network: nn.Module, squares_NSSC: NDArray[np.uint8], recipe: Recipe) -> Iterator[Tensor]:
    """Normalised pictures, some at a time, on the network's device."""
    device = next(network.parameters()).device
    for start in range(0, len(squares_NSSC), _EMBEDDED_AT_A_TIME):
        part = torch.from_numpy(squares_NSSC[start : start + _EMBEDDED_AT_A_TIME]).to(device)
        yield normalise(part.permute(0, 3, 1, 2).float() / 255, recipe)


def _figure(keys: tuple[str, str], right: Sequence[NDArray[np.bool_]], seed: int) -> Figure:
    """The mean over draws. Of unseen images, which all draws share, each counts by how many draws got it right."""
    on_unseen = not keys[0].endswith("_train")
    values_Q = np.mean(right, axis=0) if on_unseen else np.concatenate(right).astype(np.float64)
    return Figure(keys=keys, value=float(values_Q.mean()), interval=interval_of_mean(values_Q, seed=seed))


def _remarks(sets: LabelledSets, options: FewLabelsOptions) -> list[str]:
    training, unseen = sets.train, sets.val
    remarks = [
        f"{len(training)} images to draw from, {len(unseen)} unseen ones, {len(sets.classes)} classes, mean of "
        f"{options.draws} draws; supervised: the same architecture, {options.steps} steps of {options.batch_size} "
        "images, two views each",
    ]
    if other := sorted(set(unseen.labels) - set(sets.classes)):
        remarks.append(f"classes without a training image, whose images count as wrong: {', '.join(other)}")
    if few := sorted(name for name, number in Counter(training.labels).items() if number < max(options.shots)):
        remarks.append(f"classes with fewer than {max(options.shots)} images, all of which are drawn: {', '.join(few)}")
    if unreadable := len(training.unreadable) + len(unseen.unreadable):
        remarks.append(f"{unreadable} files cannot be read and were left out")
    if unlabelled := training.num_unlabelled + unseen.num_unlabelled:
        remarks.append(f"{unlabelled} images have no class and were left out")
    return remarks

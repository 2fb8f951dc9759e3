"""Linear classification on frozen features (arXiv 2104.14294, section 4.1).

The protocol trains a linear layer on random parts of the training images, cut anew in every epoch, and judges it on the
middle of the others. The fast one computes the features of the middle of every image once, and tries many learning
rates side by side. Where a rate is chosen, that is done on images that are held out of the training set; the
others are looked at once, at the end.

Hyperparameters as facebookresearch/dino at 7c446df has them (eval_linear.py). Differences: the learning rate falls by
the step and not by the epoch; the rest of an epoch that fills no batch is left out; crops are bicubic.

Shapes: N training images, Q images to be classified, B of a batch, F features, R learning rates, L classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino_index.indexing import Progress
from dino_training.evaluation.classification import LabelledSets, places_of_logits
from dino_training.evaluation.features import FeatureStore, StrPath
from dino_training.evaluation.labelled_batches import TrainingBatches, crop_decode_size
from dino_training.evaluation.linear_heads import LinearHeads
from dino_training.evaluation.metrics import top_k_accuracy
from dino_training.evaluation.probe_features import FeatureKind, ProbeFeatures
from dino_training.evaluation.results import EvaluationResult
from dino_training.schedules import cosine, scaled_learning_rate

PUBLISHED_RATE = 0.001
SWEPT_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_HELD_OUT_FRAC = 0.1
# Decoded training images are kept in memory if all of them fit into so much.
_CACHE_BYTES = 4 * 10**9
_JUDGED_AT_A_TIME = 4096


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """How the classifier is trained."""

    fast: bool = False
    """On features that are computed once, of the middle of each image."""
    learning_rates: tuple[float, ...] | None = None
    """Peak rates for a batch of 256, scaled with the batch; None for the published one, or with `fast` for a sweep."""
    epochs: int = 100
    batch_size: int = 1024
    num_blocks: int | None = None
    """Last blocks whose [CLS] is taken; None for the paper's choice by architecture."""
    average_pool: bool | None = None
    """Whether the mean of the last block's patch tokens is taken, too; None as above."""
    per_class: int | None = None
    """Training images of each class that are used, drawn at random; None for all."""
    seed: int = 0
    """Of that draw, the held-out images, order, parts and initial weights, and of the confidence intervals."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "num_blocks", "per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, found {value}")
        rates = self.learning_rates
        if rates is not None and not (rates and all(0 < rate < math.inf for rate in rates)):
            raise ValueError(f"learning_rates must be numbers above 0, found {rates}")

    @property
    def rates(self) -> tuple[float, ...]:
        """Those that are tried, in rising order."""
        if self.learning_rates is not None:
            return tuple(sorted(set(self.learning_rates)))
        return SWEPT_RATES if self.fast else (PUBLISHED_RATE,)


def evaluate_linear(
    store: FeatureStore, train: StrPath, val: StrPath, options: LinearOptions | None = None
) -> EvaluationResult:
    """Top-1 and top-5 accuracy on `val` of a linear classifier trained on `train`.

    A class that only `val` has counts as always wrong, and is reported.
    Raises EvaluationImpossible for fewer than two classes to learn, nothing to judge, or blocks that the model has not;
    SourceNotFound, NoImagesFound, TruthUnusable, ModelError, OutOfMemory; ImageError for a training image that can no
    longer be read.
    """
    options = options or LinearOptions()
    sets = LabelledSets.open(train, val, per_class=options.per_class, seed=options.seed)
    features = ProbeFeatures(store, FeatureKind.of(store.backbone.model, options.num_blocks, options.average_pool))
    # Before a long training, so that what cannot be judged is said at once.
    judged, features_QF = features.of_centres(sets.val)
    sets = sets.with_val(judged)
    trained = (_train_fast if options.fast else _train)(features, sets, options, store)
    return trained.sets.result(
        "linear classification, fast" if options.fast else "linear classification",
        store,
        _logits(trained.heads, features_QF)[:, trained.place],
        {
            "fast": options.fast,
            "features": features.kind.name,
            "epochs": options.epochs,
            "batch_size": trained.batch_size,
            **trained.choice.to_json(),
        },
        trained.choice.remarks(trained.saw_all),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Trained:
    """The classifier: the head at a place. saw_all: whether no training image was held out of its training."""

    sets: LabelledSets
    heads: LinearHeads
    place: int
    choice: _Choice
    batch_size: int
    saw_all: bool


def _train_fast(features: ProbeFeatures, sets: LabelledSets, options: LinearOptions, store: FeatureStore) -> _Trained:
    train, features_NF = features.of_centres(sets.train)
    sets = sets.with_train(train)
    classes_N = sets.train_numbers

    def fit(rows: NDArray[np.int64], rates: tuple[float, ...]) -> LinearHeads:
        batch_size = min(options.batch_size, len(rows))
        heads = _heads(rates, features, sets, batch_size, store, options)
        batches = _batches_of(features_NF[rows], classes_N[rows], batch_size, options.epochs, options.seed)
        return _fit(heads, batches, options.epochs * (len(rows) // batch_size), store)

    everything = np.arange(len(classes_N))
    choice = _Choice.of(options.rates, classes_N, options.seed)
    if len(options.rates) > 1:
        heads = fit(choice.learnt_from, options.rates)
        choice = choice.made(heads, features_NF[choice.judged_on], classes_N[choice.judged_on])
    heads = fit(everything, (choice.rate,))
    batch_size = min(options.batch_size, len(classes_N))
    return _Trained(sets=sets, heads=heads, place=0, choice=choice, batch_size=batch_size, saw_all=True)


def _train(features: ProbeFeatures, sets: LabelledSets, options: LinearOptions, store: FeatureStore) -> _Trained:
    size, workers = store.spec.input_size, store.settings.workers
    sets.train.source.prepare(decode_size=crop_decode_size(size), cache_bytes=_CACHE_BYTES, workers=workers)
    sets = sets.with_train(sets.train.checked(workers))
    classes_N = sets.train_numbers
    choice = _Choice.of(options.rates, classes_N, options.seed)
    batches = TrainingBatches(
        sets.train.subset(choice.learnt_from), classes_N[choice.learnt_from],
        size=size, batch_size=options.batch_size, seed=options.seed, workers=workers,
    )  # fmt: skip
    heads = _heads(options.rates, features, sets, batches.batch_size, store, options)
    views = features.of_batches(batches(options.epochs))
    _fit(heads, views, options.epochs * batches.steps_per_epoch, store)
    if len(options.rates) > 1:
        # Read again for another view: cheap beside the epochs over all the others.
        seen, features_HF = features.of_centres(sets.train.subset(choice.judged_on))
        choice = choice.made(heads, features_HF, sets.numbers_of(seen.labels))
    return _Trained(
        sets=sets, heads=heads, place=options.rates.index(choice.rate), choice=choice,
        batch_size=batches.batch_size, saw_all=not choice.num_held_out,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Choice:
    """Which learning rate, and how it was chosen. learnt_from, judged_on: rows of the training images."""

    rates: tuple[float, ...]
    rate: float
    learnt_from: NDArray[np.int64]
    judged_on: NDArray[np.int64]
    num_held_out: int
    top1: tuple[float, ...] = ()
    """Of each rate on the images that it was chosen on; empty where there is one rate only."""

    @classmethod
    def of(cls, rates: tuple[float, ...], classes_N: NDArray[np.int64], seed: int) -> _Choice:
        everything = np.arange(len(classes_N))
        held_out = held_out_rows(classes_N, seed) if len(rates) > 1 else everything[:0]
        return cls(
            rates=rates,
            rate=rates[0],
            learnt_from=np.setdiff1d(everything, held_out),
            # With one image a class there is nothing else to look at than what was learnt.
            judged_on=held_out if len(held_out) else everything,
            num_held_out=len(held_out),
        )

    def made(self, heads: LinearHeads, features_HF: NDArray[np.float16], classes_H: NDArray[np.int64]) -> _Choice:
        """The best rate, on features and classes of `judged_on`; of several best ones, that of the lowest loss."""
        own_H = torch.from_numpy(classes_H)
        logits_HRL = _logits(heads, features_HF)
        places = [places_of_logits(logits_HL, own_H).numpy() for logits_HL in logits_HRL.unbind(dim=1)]
        top1 = tuple(top_k_accuracy(places_H, 1) for places_H in places)
        losses = [F.cross_entropy(logits_HL, own_H).nan_to_num(torch.inf).item() for logits_HL in logits_HRL.unbind(1)]
        best = max(range(len(top1)), key=lambda place: (top1[place], -losses[place]))
        return replace(self, rate=self.rates[best], top1=top1)

    def remarks(self, saw_all: bool) -> list[str]:
        if not self.top1:
            return []
        tried = ", ".join(map("{:g}".format, self.rates))
        where = (
            f"{self.num_held_out} training images held out"
            if self.num_held_out
            else "the training images themselves, as no class has one to hold out"
        )
        unseen = "" if saw_all else ", which the classifier has not learnt from"
        remarks = [f"learning rate {self.rate:g} of {tried} was chosen on {where}{unseen}"]
        if self.rate in (self.rates[0], self.rates[-1]):
            remarks.append("it is at the end of those tried: others beyond it may be better (--learning-rate)")
        return remarks

    def to_json(self) -> dict[str, Any]:
        top1 = {f"{rate:g}": value for rate, value in zip(self.rates, self.top1, strict=False)}
        return {"learning_rate": self.rate, "held_out": self.num_held_out, "held_out_top1": top1}


def held_out_rows(classes_N: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """A tenth of each class, at least one image of each that has two; in rising order, the same for the same seed."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in np.unique(classes_N).tolist():
        own = rng.permutation(np.flatnonzero(classes_N == number))
        if len(own) > 1:
            rows += own[: max(1, round(_HELD_OUT_FRAC * len(own)))].tolist()
    return np.array(sorted(rows), np.int64)


def _heads(
    rates: tuple[float, ...], features: ProbeFeatures, sets: LabelledSets, batch_size: int, store: FeatureStore,
    options: LinearOptions,
) -> LinearHeads:  # fmt: skip
    scaled = [scaled_learning_rate(rate, batch_size) for rate in rates]
    return LinearHeads(scaled, features.num_features, len(sets.classes), seed=options.seed, device=store.device)


def _fit(
    heads: LinearHeads,
    batches: Iterable[tuple[NDArray[np.float16], NDArray[np.int64]]],
    num_steps: int,
    store: FeatureStore,
) -> LinearHeads:
    """The heads after all batches; their learning rates fall to 0 along a cosine."""
    for step, (features_BF, classes_B) in enumerate(batches):
        features = torch.from_numpy(features_BF).to(store.device)
        heads.step(features, torch.from_numpy(classes_B).to(store.device), cosine(1.0, 0.0, step, num_steps))
        num_images = len(classes_B)
        store.on_progress(Progress(done=(step + 1) * num_images, total=num_steps * num_images, failed=0))
    return heads


def _batches_of(
    features_NF: NDArray[np.float16], classes_N: NDArray[np.int64], batch_size: int, num_epochs: int, seed: int
) -> Iterator[tuple[NDArray[np.float16], NDArray[np.int64]]]:
    for epoch in range(num_epochs):
        order = np.random.default_rng([seed, 0, epoch]).permutation(len(features_NF))
        for begin in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[begin : begin + batch_size]
            yield features_NF[rows], classes_N[rows]


def _logits(heads: LinearHeads, features_QF: NDArray[np.float16]) -> Tensor:
    """logits_QRL, on the processor."""
    parts = torch.split(torch.from_numpy(features_QF), _JUDGED_AT_A_TIME)
    return torch.cat([heads.logits(part.to(heads.device)).cpu() for part in parts])

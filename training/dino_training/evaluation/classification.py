"""What protocols that train a classifier share: two labelled sets, and the figures of how one is told by the other.

Shapes: N training images, Q images to be classified, L classes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_training.evaluation.bootstrap import interval_of_mean
from dino_training.evaluation.features import FeatureStore, StrPath
from dino_training.evaluation.labelled_images import (
    LabelledImages,
    require_classes,
    require_labelled,
)
from dino_training.evaluation.metrics import top_k_accuracy
from dino_training.evaluation.results import EvaluationResult, Figure
from dino_training.evaluation.voting import NO_CLASS, places_of

TOPS = (1, 5)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSets:
    """What is learnt from, and what is judged."""

    train: LabelledImages
    val: LabelledImages
    per_class: int | None
    seed: int

    @classmethod
    def open(cls, train: StrPath, val: StrPath, *, per_class: int | None, seed: int) -> LabelledSets:
        """per_class: training images of each class, drawn at random; None for all.

        Raises EvaluationImpossible for fewer than two classes to learn, or nothing to judge; as `LabelledImages.open`.
        """
        training, judged = LabelledImages.open(train, "train"), LabelledImages.open(val, "val")
        require_classes(training.classes, training.path)
        require_labelled(len(judged), len(judged.source), judged.path, training.path)
        if per_class is not None:
            training = training.drawn(per_class, seed)
        return cls(train=training, val=judged, per_class=per_class, seed=seed)

    def with_train(self, train: LabelledImages) -> LabelledSets:
        """After images were found to be unreadable. Raises EvaluationImpossible."""
        require_classes(train.classes, train.path)
        return replace(self, train=train)

    def with_val(self, val: LabelledImages) -> LabelledSets:
        """After images were found to be unreadable. Raises EvaluationImpossible."""
        require_labelled(len(val), val.source.num_readable, val.path, self.train.path)
        return replace(self, val=val)

    @property
    def classes(self) -> list[str]:
        """Of the training images; a class's number is its place here."""
        return self.train.classes

    @property
    def train_numbers(self) -> NDArray[np.int64]:
        """classes_N: of each training image."""
        return self.numbers_of(self.train.labels)

    @property
    def val_numbers(self) -> NDArray[np.int64]:
        """classes_Q: of each image to be judged; `NO_CLASS` for an image of a class without a training image."""
        return self.numbers_of(self.val.labels)

    def numbers_of(self, labels: Sequence[str]) -> NDArray[np.int64]:
        """Class number of each label, `NO_CLASS` where there is none."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        return np.array([numbers.get(label, NO_CLASS) for label in labels], np.int64)

    def result(
        self, protocol: str, store: FeatureStore, logits_QL: Tensor, facts: Mapping[str, Any], remarks: Sequence[str]
    ) -> EvaluationResult:
        """Top-1 and top-5 accuracy. logits_QL: of `val`; an image whose logits are not finite counts as wrong."""
        places_Q = places_of_logits(logits_QL, torch.from_numpy(self.val_numbers)).numpy()
        only_in_val = sorted(set(self.val.labels) - set(self.classes))
        return EvaluationResult(
            protocol=f"{protocol}, {store.spec.name}",
            figures=top_figures(places_Q, seed=self.seed),
            facts={
                **store.to_json(),
                **facts,
                "per_class": self.per_class,
                "seed": self.seed,
                "train": self.train.to_json(),
                "val": self.val.to_json(),
                "classes_only_in_val": only_in_val,
                "val_images_in_train": self._num_shared(),
            },
            remarks=[*self._remarks(only_in_val), *remarks],
        )

    def _num_shared(self) -> int:
        """Images to be judged that were learnt from."""
        learnt = {os.path.realpath(name) for name in self.train.names}
        return sum(os.path.realpath(name) in learnt for name in self.val.names)

    def _remarks(self, only_in_val: Sequence[str]) -> list[str]:
        remarks = [f"{len(self.train)} training images and {len(self.val)} others, {len(self.classes)} classes"]
        if only_in_val:
            num_lost = int((self.val_numbers == NO_CLASS).sum())
            remarks.append(
                f"{num_lost} images are of classes without a training image, and count as wrong: "
                f"{', '.join(only_in_val)}"
            )
        if num_shared := self._num_shared():
            remarks.append(f"{num_shared} of the others are training images as well (the same files)")
        for what, images in (("training", self.train), ("other", self.val)):
            if images.unreadable:
                remarks.append(f"{len(images.unreadable)} {what} files cannot be read and were left out")
            if images.num_unlabelled:
                remarks.append(f"{images.num_unlabelled} {what} images have no class and were left out")
        if self.per_class is not None and (
            few := [name for name, number in sorted(Counter(self.train.labels).items()) if number < self.per_class]
        ):
            remarks.append(f"classes with fewer than {self.per_class} images: {', '.join(few)}")
        return remarks


def top_figures(places_Q: NDArray[np.int64], *keys: str, seed: int) -> list[Figure]:
    """Top-1 and top-5 accuracy. places_Q: see `top_k_accuracy`. keys: what follows `top1` in the JSON."""
    return [
        Figure(
            keys=(f"top{top}", *keys),
            value=top_k_accuracy(places_Q, top),
            interval=interval_of_mean((places_Q >= 0) & (places_Q < top), seed=seed),
        )
        for top in TOPS
    ]


def places_of_logits(logits_QL: Tensor, classes_Q: Tensor) -> Tensor:
    """places_Q: how many classes are ahead of an image's own, ties by number; -1 for one of no class or no number."""
    finite_Q = torch.isfinite(logits_QL).all(dim=1)
    # Votes are above 0 where there is one for the class: for classifiers, always.
    votes_QL = logits_QL.nan_to_num() - logits_QL.nan_to_num().amin(dim=1, keepdim=True) + 1
    return torch.where(finite_Q, places_of(votes_QL, classes_Q), -1)

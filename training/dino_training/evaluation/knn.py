"""Weighted k-NN classification of one labelled folder by another (arXiv 2104.14294, section 4.1).

The class of a picture is the first folder below the given one, or what the files of a published set say (see
`dino_training.set_files`). Pictures go in as `index` reads them: the whole picture,
squashed to the model's input size, where the paper resizes its shorter side to 256 px and cuts out the middle 224.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_index.labels import labels_from_folders
from dino_index.snapshots import normalise
from dino_training.evaluation.classification import top_figures
from dino_training.evaluation.features import FeatureStore, Pictures, StrPath
from dino_training.evaluation.labelled_images import draw_per_class, require_classes, require_labelled
from dino_training.evaluation.results import EvaluationResult
from dino_training.evaluation.voting import KS, NO_CLASS, TEMPERATURE, knn_places


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """How queries are classified."""

    ks: tuple[int, ...] = KS
    temperature: float = TEMPERATURE
    per_class: int | None = None
    """Training images of each class that are used, drawn at random; None for all."""
    seed: int = 0
    """Of that draw and of the confidence intervals."""

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"each k must be 1 or more, found {list(self.ks)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, found {self.temperature}")
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"per_class must be 1 or more, found {self.per_class}")


def evaluate_knn(
    store: FeatureStore, train: StrPath, val: StrPath, options: KnnOptions | None = None
) -> EvaluationResult:
    """Top-1 and top-5 accuracy on `val` for each k.

    A class that only `val` has counts as always wrong, and is reported. With fewer training images than k all vote.
    Raises SourceNotFound, NoImagesFound, SetFileUnusable, ModelError; EvaluationImpossible for a training folder with
    fewer than two classes, and where no picture of `val` lies in a folder of its class.
    """
    options = options or KnnOptions()
    training = _Labelled.of(store.embed_folder(train, set_purpose="training"))
    queries = _Labelled.of(store.embed_folder(val, set_purpose="testing"))
    require_classes(training.classes, training.pictures.folder)
    require_labelled(len(queries.chosen), len(queries.pictures), queries.pictures.folder, training.pictures.folder)
    shots = training if options.per_class is None else training.drawn(options.per_class, options.seed)
    numbers = {name: number for number, name in enumerate(training.classes)}
    places = knn_places(
        normalise(shots.pictures.cls_ND[shots.chosen]),
        np.array([numbers[label] for label in shots.labels], np.int64),
        normalise(queries.pictures.cls_ND[queries.chosen]),
        np.array([numbers.get(label, NO_CLASS) for label in queries.labels], np.int64),
        ks=options.ks,
        temperature=options.temperature,
        device=store.device,
    )
    tops = [top_figures(places_Q, str(k), seed=options.seed) for k, places_Q in places.items()]
    figures = [figure for of_one_top in zip(*tops, strict=True) for figure in of_one_top]
    only_in_val = sorted(set(queries.classes) - set(training.classes))
    return EvaluationResult(
        protocol=f"weighted k-NN classification, {store.spec.name}",
        figures=figures,
        facts={
            **store.to_json(),
            "temperature": options.temperature,
            "per_class": options.per_class,
            "seed": options.seed,
            "train": shots.to_json(),
            "val": queries.to_json(),
            "classes_only_in_val": only_in_val,
        },
        remarks=_remarks(shots, queries, only_in_val, options),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Labelled:
    """Pictures and the classes of some of them. chosen: positions; labels: theirs, in that order."""

    pictures: Pictures
    chosen: NDArray[np.int64]
    labels: list[str]
    num_unlabelled: int

    @classmethod
    def of(cls, pictures: Pictures) -> _Labelled:
        in_folders = [path for path in pictures.paths if path not in pictures.labels]
        by_path = labels_from_folders([pictures.folder], in_folders) | pictures.labels
        chosen = [position for position, path in enumerate(pictures.paths) if path in by_path]
        return cls(
            pictures=pictures,
            chosen=np.array(chosen, np.int64),
            labels=[by_path[pictures.paths[position]] for position in chosen],
            num_unlabelled=len(pictures) - len(chosen),
        )

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.labels))

    def drawn(self, per_class: int, seed: int) -> _Labelled:
        """At most so many of each class; the same ones for the same seed and pictures."""
        rows = draw_per_class(self.labels, per_class, seed).tolist()
        return _Labelled(
            pictures=self.pictures,
            chosen=self.chosen[rows],
            labels=[self.labels[row] for row in rows],
            num_unlabelled=self.num_unlabelled,
        )

    def to_json(self) -> dict[str, Any]:
        used = {"used": len(self.chosen), "classes": len(self.classes), "unlabelled": self.num_unlabelled}
        return self.pictures.to_json() | used


def _remarks(train: _Labelled, val: _Labelled, only_in_val: Sequence[str], options: KnnOptions) -> list[str]:
    remarks = [
        f"{len(train.chosen)} training images and {len(val.chosen)} others, {len(train.classes)} classes",
    ]
    if only_in_val:
        num_lost = sum(label in set(only_in_val) for label in val.labels)
        remarks.append(
            f"{num_lost} images are of classes without a training image, and count as wrong: {', '.join(only_in_val)}"
        )
    for what, labelled in (("training", train), ("other", val)):
        if labelled.pictures.unreadable:
            remarks.append(f"{len(labelled.pictures.unreadable)} {what} files cannot be read and were left out")
        if labelled.num_unlabelled:
            remarks.append(f"{labelled.num_unlabelled} {what} images lie in no folder of a class and were left out")
    if large := [k for k in options.ks if k > len(train.chosen)]:
        remarks.append(f"k = {', '.join(map(str, large))}: all {len(train.chosen)} training images vote")
    if options.per_class is not None and (
        few := [name for name, number in sorted(Counter(train.labels).items()) if number < options.per_class]
    ):
        remarks.append(f"classes with fewer than {options.per_class} images: {', '.join(few)}")
    return remarks

"""Images that have a class, by position: the one way in which a path becomes what a classifier learns from.

What a path may be is `image_listing`'s: a folder of folders of classes, tar shards, a manifest, files of small pictures
(`set_files`); and the published sets that come with files of labels (`published_sets`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_index.catalog.portable_paths import encode_path
from dino_index.embedding import in_order, num_processors
from dino_index.errors import EvaluationImpossible, ImageError
from dino_training.evaluation.features import StrPath
from dino_training.evaluation.published_sets import Part, list_published_set
from dino_training.image_source import ImageSource
from dino_training.set_files import Purpose

_DECODED_AHEAD = 64
_PURPOSES: dict[Part, Purpose] = {"train": "training", "val": "testing"}


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImages:
    """The images below a path that have a class, as far as they are known to be readable.

    positions_N: in `source`. labels: of each of them, in that order. num_unlabelled: images without one, left out.
    """

    path: str
    source: ImageSource
    positions_N: NDArray[np.int64]
    labels: list[str]
    num_unlabelled: int

    @classmethod
    def open(cls, path: StrPath, part: Part) -> LabelledImages:
        """part: which half of a published set, where the path holds both.

        Raises SourceNotFound, ManifestError, BackendMissing, NoImagesFound; TruthUnusable for a published set whose
        files of labels cannot be used.
        """
        listed = list_published_set(path, part)
        if listed is None:
            source = ImageSource.open([os.fsdecode(path)], labels="folders", purpose=_PURPOSES[part])
        else:
            source = ImageSource(listed)
        labels = source.labels or []
        positions = [position for position, label in enumerate(labels) if label is not None]
        return cls(
            path=os.path.abspath(os.fsdecode(path)),
            source=source,
            positions_N=np.array(positions, np.int64),
            labels=[str(labels[position]) for position in positions],
            num_unlabelled=len(source) - len(positions),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.labels))

    @property
    def names(self) -> list[str]:
        """Absolute path, `SHARD.tar/MEMBER` or URL of each."""
        return [self.source.names[position] for position in self.positions_N.tolist()]

    @property
    def unreadable(self) -> dict[str, ImageError]:
        """By path: what could not be listed, or was found to be unreadable so far."""
        return self.source.failures

    def load(self, number: int) -> NDArray[np.uint8]:
        """Pixels of the image of that number, below len(self): uint8 HWC, sRGB; in any thread. Raises ImageError."""
        return self.source.load(int(self.positions_N[number]))

    def subset(self, numbers: NDArray[np.int64]) -> LabelledImages:
        return replace(
            self, positions_N=self.positions_N[numbers], labels=[self.labels[number] for number in numbers.tolist()]
        )

    def readable(self) -> LabelledImages:
        """Those that were not found to be unreadable so far."""
        failures = self.unreadable
        return self.subset(np.flatnonzero([name not in failures for name in self.names]))

    def checked(self, workers: int = 0) -> LabelledImages:
        """Those that can be read: each is decoded once."""
        for _ in in_order(self._is_readable, range(len(self)), workers or num_processors(), lambda: _DECODED_AHEAD):
            pass
        return self.readable()

    def drawn(self, per_class: int, seed: int) -> LabelledImages:
        """At most so many readable ones of each class; the same ones for the same seed and images."""
        return self.subset(draw_per_class(self.labels, per_class, seed, self._is_readable))

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": encode_path(self.path),
            "images": self.source.num_readable,
            "unreadable": [
                {"path": encode_path(path), "reason": f"{error.reason}: {error}"}
                for path, error in sorted(self.unreadable.items())
            ],
            "ignored": dict(sorted(self.source.ignored.items())),
            "used": len(self),
            "classes": len(self.classes),
            "unlabelled": self.num_unlabelled,
        }

    def _is_readable(self, number: int) -> bool:
        try:
            self.load(number)
        except ImageError:
            return False
        return True


def draw_per_class(
    labels: Sequence[str], per_class: int, seed: int, is_usable: Any = lambda row: True
) -> NDArray[np.int64]:
    """Rows of at most so many of each class, in rising order. is_usable: asked of each row before it is taken."""
    rng = np.random.default_rng(seed)
    kept: Counter[str] = Counter()
    rows = []
    for row in rng.permutation(len(labels)).tolist():
        if kept[labels[row]] < per_class and is_usable(row):
            kept[labels[row]] += 1
            rows.append(row)
    return np.array(sorted(rows), np.int64)


def require_classes(classes: Sequence[str], path: str) -> None:
    """Raises EvaluationImpossible where there are fewer than two classes to learn."""
    if len(classes) < 2:
        found = f"one ({classes[0]})" if classes else "none"
        raise EvaluationImpossible(
            f"expected two classes or more below {path}, each a folder with its pictures, found {found}: with one "
            "class every answer is right; name the folder that holds the folders of classes"
        )


def require_labelled(num_labelled: int, num_images: int, path: str, train_path: str) -> None:
    """Raises EvaluationImpossible where there is no image to judge."""
    if not num_labelled:
        raise EvaluationImpossible(
            f"expected pictures in folders of their classes below {path}, found {num_images} pictures, none of them "
            f"in a folder; sort them into folders named as in {train_path}"
        )

"""What a backbone is worth while it is trained: figures on a fixed set of images and one edited copy of each.

Shapes: N images, K neighbours, B of them in a batch, S x S pixels, D channels, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_index.edits import apply_edits
from dino_index.errors import ImageError, NoImagesFound
from dino_index.images import load_image
from dino_training.evaluation.voting import class_votes

Embed = Callable[[NDArray[np.uint8]], tuple[Tensor, Tensor]]

# The kinds of edit that copies go through in turn. Not among them: quarter turns, which ask for more than the
# views of a run ever show, and changes of size or shape, which squashing to a square undoes.
EDIT_KINDS = (
    "reencode", "crop", "grey", "blur", "caption", "overlay", "paste", "rotate_small", "mirror", "colour", "screenshot",
)  # fmt: skip
NUM_NEIGHBOURS = 20
_BATCH_SIZE = 64
_TIE = 1e-6  # cosines in float32 that are closer than this count as equal


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One evaluation. Nothing here depends on the loss, so that runs with different losses compare."""

    knn_top1: float | None
    """Share of images whose label their 20 nearest others vote for, by [CLS]; None without two labels or more."""
    copies_found: float
    """Share of images that are found first among all N by their edited copy, by [CLS] and GeM; 1/N by chance."""
    embedding_std: float
    """Spread of unit-length [CLS] over the images: about 1 in all directions, near 0 when they have collapsed."""

    @property
    def main(self) -> float:
        """The figure to choose the best checkpoint by: k-NN accuracy where there are labels, else copies found."""
        return self.copies_found if self.knn_top1 is None else self.knn_top1


class Probe:
    """Fixed images of a collection with an edited copy of each: the same in every run with the same seed."""

    def __init__(
        self,
        load: Callable[[int], NDArray[np.uint8]],
        num_images: int,
        labels: Sequence[str | None] | None,
        *,
        num_probed: int,
        size: int,
        seed: int,
    ) -> None:
        """Reads and edits the images once.

        load: uint8 pixels_HWC of the image at a position below num_images, of any size; one that raises ImageError
        is replaced by another and counted. labels: of each position, None for an image without one; with two labels or
        more, only labelled images are probed. size: S, the side that whole images are squashed to, as indexing does.
        Raises NoImagesFound: not one could be read.
        """
        rng = np.random.default_rng(seed)
        candidates = _labelled(labels) or list(range(num_images))
        pixels: list[NDArray[np.uint8]] = []
        copies: list[NDArray[np.uint8]] = []
        probed: list[int] = []
        self.num_unreadable = 0
        for position in rng.permutation(candidates).tolist():
            if len(probed) == num_probed:
                break
            try:
                image = Image.fromarray(load(position))
            except ImageError:
                self.num_unreadable += 1
                continue
            copy = _edited(image, EDIT_KINDS[len(probed) % len(EDIT_KINDS)], np.random.default_rng((seed, position)))
            pixels.append(_squash(image, size))
            copies.append(_squash(copy, size))
            probed.append(position)
        if not probed:
            raise NoImagesFound(f"none of {self.num_unreadable} images could be read to evaluate the run on")
        self.positions = tuple(probed)
        """Which images are probed, in the order of the pixels."""
        self.pixels_NSSC = np.stack(pixels)
        self.copies_NSSC = np.stack(copies)
        found = sorted({label for position in probed if labels and (label := labels[position]) is not None})
        self.labels_N = (
            torch.tensor([found.index(str(labels[position])) for position in probed])
            if labels and len(found) > 1
            else None
        )

    @property
    def num_probed(self) -> int:
        return len(self.positions)

    def figures(self, embed: Embed) -> Figures:
        """The figures of a backbone. embed: (cls_BD, gem_BD), any float type and device, of uint8 pixels_BSSC."""
        cls_ND, both_ND = _embed_all(embed, self.pixels_NSSC)
        _, copies_both_ND = _embed_all(embed, self.copies_NSSC)
        return Figures(
            knn_top1=None if self.labels_N is None else _knn_top1(cls_ND, self.labels_N),
            copies_found=_copies_found(copies_both_ND, both_ND),
            embedding_std=float(cls_ND.std(dim=0, correction=0).mean()) * cls_ND.shape[1] ** 0.5,
        )


def _labelled(labels: Sequence[str | None] | None) -> list[int]:
    """Positions with a label, if there is more than one label to tell apart."""
    if labels is None or len(set(labels) - {None}) < 2:
        return []
    return [position for position, label in enumerate(labels) if label is not None]


def _edited(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """A copy after an edit of this kind and, half of the time, one of another."""
    kinds = [kind]
    if rng.random() < 0.5:
        kinds.append(str(rng.choice([other for other in EDIT_KINDS if other != kind])))
    return apply_edits(image, kinds, rng)


def _squash(image: Image.Image, size: int) -> NDArray[np.uint8]:
    return load_image(image, size=(size, size)).pixels_HWC


def _embed_all(embed: Embed, pixels_NSSC: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """[CLS], and [CLS] beside GeM: float32 on the processor, unit length (each half alone before they are joined)."""
    parts = [_embed_batch(embed, batch) for batch in _batches(pixels_NSSC)]
    cls_ND = torch.cat([cls_BD for cls_BD, _ in parts])
    gem_ND = torch.cat([gem_BD for _, gem_BD in parts])
    return cls_ND, torch.cat([cls_ND, gem_ND], dim=1) * 0.5**0.5


def _embed_batch(embed: Embed, pixels_BSSC: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    cls_BD, gem_BD = (vectors.detach().float().cpu() for vectors in embed(pixels_BSSC))
    return F.normalize(cls_BD, dim=1), F.normalize(gem_BD, dim=1)


def _batches(pixels_NSSC: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(pixels_NSSC), _BATCH_SIZE):
        yield pixels_NSSC[start : start + _BATCH_SIZE]


def _copies_found(copies_ND: Tensor, images_ND: Tensor) -> float:
    """Share of copies whose own image is strictly the most similar of all."""
    scores_NN = copies_ND @ images_ND.T
    own_N = scores_NN.diagonal().clone()
    others_N = scores_NN.fill_diagonal_(-torch.inf).amax(dim=1)
    return float((own_N > others_N + _TIE).float().mean())


def _knn_top1(cls_ND: Tensor, labels_N: Tensor) -> float:
    """Leave-one-out accuracy of the vote that `dino_index.knn.vote` counts, for all images at once."""
    scores_NN = (cls_ND @ cls_ND.T).fill_diagonal_(-torch.inf)
    scores_NK, neighbours_NK = scores_NN.topk(min(NUM_NEIGHBOURS, len(cls_ND) - 1))
    votes_NL = class_votes(scores_NK, labels_N[neighbours_NK], int(labels_N.max()) + 1)
    return float((votes_NL.argmax(dim=1) == labels_N).float().mean())

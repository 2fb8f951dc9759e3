"""Pictures of labelled images as a classifier sees them: random parts to learn from, the middle to be judged.

Shapes: B images, S side of a picture, H x W an image, C = 3 colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_index.embedding import in_order, num_processors
from dino_index.errors import ImageError
from dino_training.evaluation.labelled_images import LabelledImages
from dino_training.views import resized_crop

# The protocol resizes the shorter side to 256 px and cuts out the middle 224.
_RESIZE_FRAC = 256 / 224
_SCALE, _ASPECT_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_DECODED_AHEAD = 64


def centre_decode_size(size: int) -> int:
    """Shorter side in pixels at which images are decoded for `centre_view`."""
    return round(size * _RESIZE_FRAC)


def crop_decode_size(size: int) -> int:
    """Shorter side in pixels at which the smallest random part of an image is not enlarged."""
    return math.ceil(size / math.sqrt(_SCALE[0]))


def centre_view(pixels_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle square of an image as an S x S picture, with a margin of 1/16 left out at its shorter side's ends."""
    height, width = pixels_HWC.shape[:2]
    side = min(height, width) / _RESIZE_FRAC
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    image = Image.fromarray(pixels_HWC).resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.array(image)


def centre_views(images: LabelledImages, size: int, workers: int = 0) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(number, pixels_SSC) of each image that can be read, in order, prepared ahead by threads."""

    def load(number: int) -> tuple[int, NDArray[np.uint8]] | None:
        try:
            return number, centre_view(images.load(number), size)
        except ImageError:  # which the images' source keeps
            return None

    for loaded in in_order(load, range(len(images)), workers or num_processors(), lambda: _DECODED_AHEAD):
        if loaded is not None:
            yield loaded


class TrainingBatches:
    """Random parts of images, mirrored half of the time, epoch after epoch in another order.

    Everything follows from the seed, the epoch and an image's number. The rest of an epoch that fills no batch is left
    out of it; with fewer images than a batch takes, all of them are the batch.
    """

    def __init__(
        self,
        images: LabelledImages,
        classes_N: NDArray[np.int64],
        *,
        size: int,
        batch_size: int,
        seed: int,
        workers: int = 0,
    ) -> None:
        """images: readable ones, one or more. classes_N: the class number of each."""
        self._images = images
        self._classes_N = classes_N
        self._size = size
        self.batch_size = min(batch_size, len(images))
        self._seed = seed
        self._workers = workers or num_processors()

    @property
    def steps_per_epoch(self) -> int:
        return len(self._images) // self.batch_size

    def __call__(self, num_epochs: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """(pixels_BSSC, classes_B) of each step. Raises ImageError for an image that can no longer be read."""
        num_steps, taken = num_epochs * self.steps_per_epoch, self._taken(num_epochs)
        views = in_order(lambda view: self._view(*view), taken, self._workers, lambda: self.batch_size)
        numbers = (number for _, number in self._taken(num_epochs))
        for _ in range(num_steps):
            pixels = [next(views) for _ in range(self.batch_size)]
            yield np.stack(pixels), self._classes_N[[next(numbers) for _ in range(self.batch_size)]]

    def _taken(self, num_epochs: int) -> Iterator[tuple[int, int]]:
        """(epoch, number of the image) of each view."""
        for epoch in range(num_epochs):
            order = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._images))
            for number in order[: self.steps_per_epoch * self.batch_size].tolist():
                yield epoch, number

    def _view(self, epoch: int, number: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng([self._seed, 1, epoch, number])
        try:
            pixels_HWC = self._images.load(number)
        except ImageError as error:
            message = f"{self._images.names[number]} could be read when training began, and no longer can: {error}"
            raise ImageError(error.reason, message) from error
        image = resized_crop(Image.fromarray(pixels_HWC), self._size, _SCALE, _ASPECT_RATIO, rng)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(image)

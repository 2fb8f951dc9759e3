"""Batches of views: which images come when, and the threads that prepare them ahead of the model.

Everything follows from the seed, the epoch and an image's position: nothing depends on timing, on the number of threads
or processes, or on where a run was resumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_index.embedding import num_processors
from dino_training.recipe import Recipe
from dino_training.views import ViewsOfImage, cut_views, recolour

# Batches that are prepared while the model computes.
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """One process's share of a step's images, in as many parts as gradients are accumulated over.

    positions_B: of the images. squares: for each view, uint8 B x S x S x 3. colours: for each view, B x P.
    """

    positions_B: NDArray[np.int64]
    squares: list[Tensor]
    colours: list[Tensor]

    def parts(self, num_parts: int) -> Iterator[Batch]:
        """The batch in parts of equal size, in order."""
        size = len(self.positions_B) // num_parts
        for start in range(0, size * num_parts, size):
            part = slice(start, start + size)
            yield Batch(
                self.positions_B[part], [view[part] for view in self.squares], [view[part] for view in self.colours]
            )

    def views(self, recipe: Recipe, device: torch.device) -> list[Tensor]:
        """Normalised pictures of each view, on the device, after their colours have changed."""
        return [
            recolour(squares.to(device, non_blocking=True), colours.to(device, non_blocking=True), recipe)
            for squares, colours in zip(self.squares, self.colours, strict=True)
        ]


class BatchLoader:
    """The batches of a run from any step on."""

    def __init__(
        self,
        load: Callable[[int], NDArray[np.uint8]],
        num_images: int,
        recipe: Recipe,
        *,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        """load: pixels of the image at a position, called by several threads."""
        self._load = load
        self._num_images = num_images
        self._recipe = recipe
        self._rank = rank
        self._num_processes = num_processes
        self._epoch_of_order = -1
        self._order_of_epoch: NDArray[np.int64] = np.empty(0, np.int64)
        self.steps_per_epoch = num_images // recipe.batch_size
        """Steps in which every image comes at most once; the rest of an epoch's order is left out."""

    def positions(self, step: int) -> NDArray[np.int64]:
        """Positions of this process's images in a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        start = step_in_epoch * self._recipe.batch_size
        whole = order[start : start + self._recipe.batch_size]
        # Part after part, so that accumulation, too, sees the parts that several processes would see together.
        parts = whole.reshape(self._recipe.gradient_accumulation, self._num_processes, -1)
        return parts[:, self._rank].reshape(-1)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps first_step .. last_step - 1, prepared ahead by threads."""
        workers = ThreadPoolExecutor(self._recipe.workers or num_processors(), "views")
        pending: deque[tuple[NDArray[np.int64], list[Future[ViewsOfImage]]]] = deque()
        next_step = first_step
        try:
            for _ in range(first_step, last_step):
                while next_step < last_step and len(pending) <= _BATCHES_AHEAD:
                    positions_B = self.positions(next_step)
                    epoch = next_step // self.steps_per_epoch
                    futures = [workers.submit(self._prepare, epoch, position) for position in positions_B.tolist()]
                    pending.append((positions_B, futures))
                    next_step += 1
                positions_B, futures = pending.popleft()
                yield _stack(positions_B, [future.result() for future in futures])
        finally:
            workers.shutdown(wait=True, cancel_futures=True)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._epoch_of_order != epoch:
            self._epoch_of_order = epoch
            self._order_of_epoch = np.random.default_rng([self._recipe.seed, 0, epoch]).permutation(self._num_images)
        return self._order_of_epoch

    def _prepare(self, epoch: int, position: int) -> ViewsOfImage:
        rng = np.random.default_rng([self._recipe.seed, 1, epoch, position])
        background = None
        if "paste" in self._recipe.edits:
            background = self._load(int(rng.integers(self._num_images)))
        return cut_views(self._load(position), self._recipe, rng, background)


def _stack(positions_B: NDArray[np.int64], images: list[ViewsOfImage]) -> Batch:
    num_views = len(images[0].squares)
    squares = [torch.from_numpy(np.stack([image.squares[view] for image in images])) for view in range(num_views)]
    colours_BVP = torch.from_numpy(np.stack([image.colour_VP for image in images]))
    return Batch(positions_B, squares, list(colours_BVP.unbind(dim=1)))

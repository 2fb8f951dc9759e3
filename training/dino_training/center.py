"""The center: a running mean of the teacher's outputs, subtracted so that no prototype comes to dominate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_training.losses import sinkhorn
from dino_training.recipe import Recipe


class Center(nn.Module):
    """Turns the teacher's outputs into targets and follows their mean (arXiv 2104.14294, equation 4).

    Shapes: G views that the teacher saw, B images, K prototypes (or channels of the projection).
    """

    value: Tensor
    num_updates: Tensor

    def __init__(self, width: int, recipe: Recipe) -> None:
        super().__init__()
        self.centring = recipe.centring
        self.of_probabilities = recipe.center_of == "probabilities"
        self.starts_at_first_batch = recipe.center_init == "first_batch"
        self.momentum = recipe.center_momentum
        # Probabilities are divided by the center, so that nothing is subtracted where each has the same.
        self.register_buffer("value", torch.full((width,), 1 / width if self.of_probabilities else 0.0))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def distributions(
        self, logits_GBK: Tensor, temperature: float, add_up: Callable[[Tensor], Tensor] = lambda part: part
    ) -> Tensor:
        """targets_GBK: the teacher's centred and sharpened softmax, float32.

        add_up: sums a tensor over all processes; Sinkhorn needs it where there are several.
        """
        logits_GBK = logits_GBK.float()
        if self.centring == "sinkhorn":
            return sinkhorn(logits_GBK, temperature, add_up)
        if self.centring == "none":
            return F.softmax(logits_GBK / temperature, dim=-1)
        if self.of_probabilities:
            return F.softmax(logits_GBK / temperature - self.value.clamp(min=1e-12).log(), dim=-1)
        return F.softmax((logits_GBK - self.value) / temperature, dim=-1)

    def projections(self, projections_GBC: Tensor) -> Tensor:
        """Teacher projections minus the center, of unit length: targets of the losses without prototypes."""
        if self.centring == "none":
            return projections_GBC
        return F.normalize(projections_GBC - self.value, dim=-1, eps=1e-6)

    def observe(self, outputs_GBK: Tensor, temperature: float) -> Tensor:
        """What the center averages, as its mean over one part of a batch."""
        outputs_GBK = outputs_GBK.float()
        if self.of_probabilities:
            outputs_GBK = F.softmax(outputs_GBK / temperature, dim=-1)
        return outputs_GBK.mean(dim=(0, 1))

    @property
    def awaits_first_batch(self) -> bool:
        """Whether `begin` is still to be called."""
        return self.starts_at_first_batch and self.num_updates.item() == 0

    @torch.no_grad()
    def begin(self, batch_mean_K: Tensor) -> None:
        """Starts at the mean of the first batch, or of a part of it, before its loss is taken."""
        self.value.copy_(batch_mean_K)

    @torch.no_grad()
    def update(self, batch_mean_K: Tensor) -> None:
        """Moves on by the mean over the whole batch, after the loss has been taken with the old value."""
        # A first batch in parts has begun with the mean of a part.
        self.value.lerp_(batch_mean_K, 1.0 if self.awaits_first_batch else 1 - self.momentum)
        self.num_updates += 1

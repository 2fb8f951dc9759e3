"""Linear classifiers on fixed features, one for each of several learning rates, trained side by side.

All of them see the same batches, so that one matrix product serves all; none of them knows of the others. Logistic
regression needs no automatic differentiation: the gradient at the logits is softmax minus one-hot.

Shapes: R learning rates, B images, F features, L classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MOMENTUM = 0.9
_INITIAL_STD = 0.01


class LinearHeads:
    """Weights of R classifiers, and a step of SGD with momentum .9 and no weight decay for all of them."""

    def __init__(
        self,
        learning_rates: Sequence[float],
        num_features: int,
        num_classes: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        """learning_rates: peak rate of each, already scaled with the batch. Every head starts from the same weights."""
        generator = torch.Generator().manual_seed(seed)
        initial_FL = torch.empty(num_features, num_classes).normal_(0, _INITIAL_STD, generator=generator)
        num_heads = len(learning_rates)
        # One matrix, heads side by side: the product over all of them is one call.
        self._weights_FRL = initial_FL[:, None].repeat(1, num_heads, 1).to(device)
        self._biases_RL = torch.zeros(num_heads, num_classes, device=device)
        self._momentum_FRL = torch.zeros_like(self._weights_FRL)
        self._momentum_RL = torch.zeros_like(self._biases_RL)
        self._rates_R1 = torch.tensor(learning_rates, device=device)[:, None]

    @property
    def device(self) -> torch.device:
        return self._weights_FRL.device

    def logits(self, features_BF: Tensor) -> Tensor:
        """logits_BRL."""
        products = features_BF.float() @ self._weights_FRL.flatten(1)
        return products.view(len(features_BF), *self._biases_RL.shape) + self._biases_RL

    def step(self, features_BF: Tensor, classes_B: Tensor, factor: float = 1.0) -> Tensor:
        """losses_R: the mean cross-entropy of each head on the batch, before it learnt from it.

        factor: share of the peak learning rate. A head whose numbers become infinite stays so and harms no other.
        """
        features_BF = features_BF.float()
        log_probs_BRL = torch.log_softmax(self.logits(features_BF), dim=-1)
        own_BR1 = classes_B[:, None, None].expand(-1, len(self._rates_R1), 1)
        losses_R = -log_probs_BRL.gather(2, own_BR1).mean(dim=0)[:, 0]
        gradient_BRL = log_probs_BRL.exp_()
        gradient_BRL.scatter_add_(2, own_BR1, torch.full_like(own_BR1, -1, dtype=gradient_BRL.dtype))
        gradient_BRL /= len(features_BF)
        rates_R1 = self._rates_R1 * factor
        self._momentum_FRL.mul_(_MOMENTUM).add_((features_BF.T @ gradient_BRL.flatten(1)).view_as(self._weights_FRL))
        self._momentum_RL.mul_(_MOMENTUM).add_(gradient_BRL.sum(dim=0))
        self._weights_FRL.sub_(rates_R1 * self._momentum_FRL)
        self._biases_RL.sub_(rates_R1 * self._momentum_RL)
        return losses_R

"""Values that change from step to step: learning rate, weight decay, momentum, teacher temperature.

Each function takes the step, counted from 0, so that a resumed run needs no state.
"""

from __future__ import annotations

import math


def cosine(start: float, end: float, step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """A half cosine from `start` to `end` over `num_steps`, after a linear rise from 0 to `start`.

    As facebookresearch/dino at 7c446df (utils.cosine_scheduler): the rise includes both its ends, and the cosine
    stops one step short of `end`.
    """
    if step < warmup_steps:
        return start * step / max(1, warmup_steps - 1)
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear(start: float, end: float, step: int, num_steps: int) -> float:
    """A straight line from `start` at step 0 to `end` at step `num_steps`, and `end` from there on."""
    return end if step >= num_steps else start + (end - start) * step / num_steps


def scaled_learning_rate(learning_rate: float, batch_size: int) -> float:
    """The linear scaling rule (arXiv 1706.02677): a recipe's rate is for 256 images a step."""
    return learning_rate * batch_size / 256

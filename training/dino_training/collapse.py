"""Collapse: a teacher that says the same of every image, recognised and named while there is time to stop.

The teacher's output is a distribution over K prototypes for each image. Without collapse it differs between images: the
entropy of the batch's mean distribution is higher than the mean entropy of single images.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

# Steps over which the figures are averaged, and which have to pass before anything is said.
WINDOW_STEPS = 50
# Share of ln K above which a distribution counts as uniform, and below which as one single prototype.
UNIFORM_FRAC = 0.99
SINGLE_FRAC = 0.05
# Share of ln K by which the mean distribution must be wider than those of single images.
LEAST_DIFFERENCE_FRAC = 0.01
# Mean deviation of unit-length projections, where 1 is spread over the whole sphere.
LEAST_SPREAD = 0.02


@dataclass(frozen=True)
class Collapse:
    """Which kind of collapse, what was seen, and what to change."""

    kind: str
    message: str


class CollapseWatch:
    """Follows the figures of each step and names each kind of collapse once."""

    def __init__(self, num_prototypes: int | None, *, ignore_steps: int) -> None:
        """num_prototypes: K, or None for a loss without prototypes. ignore_steps: how long a flat start is usual."""
        self._num_prototypes = num_prototypes
        self._ignore_steps = ignore_steps
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=WINDOW_STEPS)
        self._named: set[str] = set()

    def observe(self, step: int, *, entropy: float, mean_entropy: float, spread: float) -> Collapse | None:
        """A collapse that was not named before, or None.

        entropy: mean entropy of the teacher's output for an image; mean_entropy: entropy of its mean over the batch;
        both nan without prototypes. spread: deviation of the projections over the batch.
        """
        if step < self._ignore_steps:
            return None
        self._recent.append((entropy, mean_entropy, spread))
        if len(self._recent) < WINDOW_STEPS:
            return None
        entropy, mean_entropy, spread = (sum(values) / len(values) for values in zip(*self._recent, strict=True))
        found = name_collapse(self._num_prototypes, entropy=entropy, mean_entropy=mean_entropy, spread=spread)
        if found is None or found.kind in self._named:
            return None
        self._named.add(found.kind)
        return found


def name_collapse(num_prototypes: int | None, *, entropy: float, mean_entropy: float, spread: float) -> Collapse | None:
    """The collapse that these figures are of, as `CollapseWatch` has them; None for none.

    They are to be means over many steps: single batches vary.
    """
    ln_k = math.log(num_prototypes) if num_prototypes and num_prototypes > 1 else None
    if ln_k is None:
        if spread < LEAST_SPREAD:
            return Collapse(
                "constant",
                f"collapse: every image gets the same projection (spread {spread:.3f}); "
                "use a momentum teacher, a predictor or loss infonce, and a lower learning_rate",
            )
        return None
    of_most = f"entropy {entropy:.3f}, at most ln K = {ln_k:.3f}"
    if entropy > UNIFORM_FRAC * ln_k:
        return Collapse(
            "uniform",
            f"collapse to the uniform distribution: every image gets all prototypes alike ({of_most}; the loss "
            "stays near ln K); lower teacher_temperature or num_prototypes, keep sharpening on, raise batch_size",
        )
    if mean_entropy < SINGLE_FRAC * ln_k:
        return Collapse(
            "single_dimension",
            f"collapse to a single dimension: every image gets the same prototype ({of_most}, of the mean "
            f"{mean_entropy:.3f}); keep centring on, raise teacher_temperature, lower learning_rate",
        )
    if mean_entropy - entropy < LEAST_DIFFERENCE_FRAC * ln_k:
        return Collapse(
            "constant",
            f"collapse to one distribution: every image gets the same output ({of_most}, of the mean "
            f"{mean_entropy:.3f}); use a momentum teacher with a higher momentum, and a lower learning_rate",
        )
    return None

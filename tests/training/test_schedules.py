"""Schedules against those of facebookresearch/dino at 7c446df (utils.cosine_scheduler, DINOLoss), as arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dino_training.schedules import cosine, linear, scaled_learning_rate

values = st.floats(0, 10)


def reference_cosine(base: float, final: float, num_steps: int, warmup_steps: int) -> NDArray[np.float64]:
    warmup = np.linspace(0, base, warmup_steps) if warmup_steps > 0 else np.array([])
    steps = np.arange(num_steps - warmup_steps)
    falling = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps)))
    return np.concatenate((warmup, falling))


@given(values, values, st.integers(1, 40), st.data())
def test_cosine_is_the_reference_schedule(start: float, end: float, num_steps: int, data: st.DataObject) -> None:
    warmup_steps = data.draw(st.integers(0, num_steps - 1))
    found = [cosine(start, end, step, num_steps, warmup_steps=warmup_steps) for step in range(num_steps)]
    np.testing.assert_allclose(found, reference_cosine(start, end, num_steps, warmup_steps), atol=1e-9)


def test_cosine_rises_from_zero_and_falls_to_its_end() -> None:
    rates = [cosine(1.0, 0.1, step, 100, warmup_steps=10) for step in range(101)]
    assert rates[0] == 0
    assert rates[9] == rates[10] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_cosine_stays_at_its_end_after_the_last_step() -> None:
    assert cosine(0.04, 0.4, 250, 100) == pytest.approx(0.4)


def test_a_warm_up_as_long_as_the_run_is_no_error() -> None:
    assert [cosine(2.0, 1.0, step, 3, warmup_steps=3) for step in range(3)] == [0, 1, 2]


@given(values, values, st.integers(0, 40), st.integers(0, 60))
def test_linear_goes_from_start_to_end_and_stays(start: float, end: float, num_steps: int, step: int) -> None:
    line = np.concatenate((np.linspace(start, end, num_steps + 1), np.full(61, end)))
    assert linear(start, end, step, num_steps) == pytest.approx(line[step] if num_steps else end)


@pytest.mark.parametrize(("batch_size", "expected"), [(256, 0.0005), (1024, 0.002), (64, 0.000125)])
def test_the_learning_rate_grows_with_the_batch(batch_size: int, expected: float) -> None:
    assert math.isclose(scaled_learning_rate(0.0005, batch_size), expected)

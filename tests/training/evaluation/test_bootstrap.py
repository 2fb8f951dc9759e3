from __future__ import annotations

import numpy as np
import pytest

from dino_training.evaluation import bootstrap
from dino_training.evaluation.bootstrap import interval_of_mean, intervals_of


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    low, high = interval_of_mean(np.arange(1000) < 300)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.006)
    assert high == pytest.approx(0.3 + half, abs=0.006)


def test_the_interval_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(3).random(200)
    assert interval_of_mean(values, seed=1) == interval_of_mean(values, seed=1) != interval_of_mean(values, seed=2)


def test_memory_for_draws_is_bounded_without_changing_the_kind_of_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).random(200)
    whole = interval_of_mean(values)
    monkeypatch.setattr(bootstrap, "_MAX_DRAWN", 1000)
    assert interval_of_mean(values) == pytest.approx(whole)


def test_equal_values_leave_nothing_open() -> None:
    assert interval_of_mean(np.ones(5)) == (1.0, 1.0)


def test_figures_of_all_queries_together_are_drawn_in_the_same_way() -> None:
    values = np.random.default_rng(0).random(500)

    def mean_and_double(times: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[float, float]:
        assert times.sum() == 500
        share = float((values * times).sum() / times.sum())
        return share, 2 * share

    single, double = intervals_of(mean_and_double, 500)
    assert single == pytest.approx(interval_of_mean(values), abs=0.005)
    assert double == pytest.approx((2 * single[0], 2 * single[1]))

"""Score normalisation against a background set."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from dino_index.score_normalisation import (
    MAX_BACKGROUND,
    MIN_BACKGROUND,
    biases,
    extended_queries,
    extended_references,
    size_correction,
)
from dino_index.snapshots import normalise


def unit(number: int, seed: int, dim: int = 16) -> NDArray[np.float32]:
    return normalise(np.random.default_rng(seed).normal(0, 1, (number, dim)).astype(np.float32))


def test_one_more_channel_computes_cosine_less_bias() -> None:
    queries, references, background = unit(5, 1), unit(20, 2), unit(MIN_BACKGROUND, 3)
    biases_Q = biases(queries, background)
    scores = extended_queries(queries, biases_Q) @ extended_references(references).T
    assert np.allclose(scores, queries @ references.T - biases_Q[:, None], atol=1e-6)


def test_the_bias_is_the_mean_of_the_third_to_twelfth_nearest() -> None:
    queries, background = unit(4, 1), unit(100, 2)
    expected = np.sort(queries @ background.T, axis=1)[:, ::-1][:, 2:12].mean(axis=1)
    assert biases(queries, background) == pytest.approx(expected, abs=1e-6)


def test_up_to_two_copies_of_the_query_in_the_background_change_its_bias_little() -> None:
    query, background = unit(1, 1), unit(100, 2)
    with_copies = np.concatenate([background[:-2], query, query])
    assert abs(biases(query, with_copies)[0] - biases(query, background)[0]) < 0.15
    assert biases(query, np.repeat(query, 100, axis=0))[0] == pytest.approx(1)


def test_a_query_like_everything_is_taken_down_more_than_one_like_nothing() -> None:
    background = normalise(unit(200, 4) + np.float32(2) * unit(1, 5))
    common, rare = normalise(background[:1] + np.float32(0.1) * unit(1, 6)), unit(1, 7)
    assert biases(common, background)[0] > biases(rare, background)[0] + 0.3


@pytest.mark.parametrize("dim", [16, 64])
def test_a_part_of_the_background_takes_about_as_much_off_as_all_of_it(dim: int) -> None:
    queries, background = unit(100, 1, dim), unit(MAX_BACKGROUND, 2, dim)
    whole = biases(queries, background).mean()
    assert size_correction(background) == 0
    for number in (64, 100, 400, 1000):
        part = background[:number]
        raw = biases(queries, part).mean()
        assert whole - raw > 0.02
        assert abs(raw + size_correction(part) - whole) < 0.3 * (whole - raw) + 0.01


def test_the_correction_falls_as_the_background_grows_and_is_none_for_pictures_all_alike() -> None:
    background = unit(1000, 3)
    corrections = [size_correction(background[:number]) for number in (64, 250, 1000)]
    assert all(smaller > larger > 0 for smaller, larger in pairwise(corrections))
    assert size_correction(np.repeat(unit(1, 4), 100, axis=0)) == pytest.approx(0, abs=1e-6)

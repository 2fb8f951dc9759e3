"""Whitening of copy vectors."""

from __future__ import annotations

import numpy as np
import pytest

from dino_index.whitening import MIN_IMAGES_PER_DIMENSION, fit_reference_whitening, fit_whitening

DIM = 8


def stretched(num_vectors: int) -> np.ndarray:
    """Vectors that vary ten times as much in one direction as in the others, about a mean that is not zero."""
    vectors_ND = np.random.default_rng(0).normal(0, 1, (num_vectors, DIM))
    vectors_ND[:, 0] *= 10
    return (vectors_ND + 3).astype(np.float32)


def spread(vectors_ND: np.ndarray) -> np.ndarray:
    variances: np.ndarray = np.linalg.eigvalsh(np.cov(vectors_ND, rowvar=False))
    return variances


def test_full_whitening_gives_all_directions_the_same_variance() -> None:
    vectors_ND = stretched(2000)
    whitening = fit_whitening(vectors_ND, power=1, shrinkage=0)
    assert whitening is not None
    variances = spread((vectors_ND - whitening.mean_D) @ whitening.projection_DD)
    assert variances == pytest.approx(variances.mean(), rel=1e-3)


def test_half_of_it_keeps_the_order_and_narrows_the_ratio_to_its_root() -> None:
    vectors_ND = stretched(2000)
    whitening = fit_whitening(vectors_ND, power=0.5, shrinkage=0)
    assert whitening is not None
    before = spread(vectors_ND)
    after = spread((vectors_ND - whitening.mean_D) @ whitening.projection_DD)
    assert after[-1] / after[0] == pytest.approx((before[-1] / before[0]) ** 0.5, rel=1e-3)


def test_whitened_vectors_are_unit_length() -> None:
    vectors_ND = stretched(200)
    whitening = fit_whitening(vectors_ND)
    assert whitening is not None
    assert np.linalg.norm(whitening.apply(vectors_ND), axis=1) == pytest.approx(1, abs=1e-5)


def test_no_power_leaves_angles_about_the_mean_as_they_are() -> None:
    vectors_ND = stretched(200)
    whitening = fit_whitening(vectors_ND, power=0, shrinkage=0)
    assert whitening is not None
    centred = vectors_ND - whitening.mean_D
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    whitened = whitening.apply(vectors_ND)
    assert np.allclose(whitened @ whitened.T, centred @ centred.T, atol=1e-4)


def test_the_scale_of_the_vectors_does_not_matter() -> None:
    vectors_ND = stretched(200)
    small, large = fit_whitening(vectors_ND), fit_whitening(1000 * vectors_ND)
    assert small is not None
    assert large is not None
    assert np.allclose(small.apply(vectors_ND), large.apply(1000 * vectors_ND), atol=1e-3)


def test_too_few_vectors_teach_nothing() -> None:
    enough = MIN_IMAGES_PER_DIMENSION * DIM
    assert fit_whitening(stretched(enough)) is not None
    assert fit_whitening(stretched(enough - 1)) is None


def test_equal_vectors_teach_nothing() -> None:
    assert fit_whitening(np.ones((200, DIM), np.float32)) is None


def test_the_reference_whitening_takes_no_mean_off_and_evens_out_all_directions() -> None:
    vectors_ND = stretched(2000)
    whitening = fit_reference_whitening(vectors_ND)
    assert whitening is not None
    assert not whitening.mean_D.any()
    whitened_ND = vectors_ND @ whitening.projection_DD
    assert whitened_ND.T @ whitened_ND / len(vectors_ND) == pytest.approx(np.eye(DIM), abs=1e-3)
    assert fit_reference_whitening(vectors_ND[: MIN_IMAGES_PER_DIMENSION * DIM - 1]) is None


def test_the_reference_whitening_raises_the_smallest_variances() -> None:
    vectors_ND = stretched(2000)
    vectors_ND[:, -1] = 0
    whitening = fit_reference_whitening(vectors_ND)
    assert whitening is not None
    assert np.isfinite(whitening.projection_DD).all()
    largest = np.linalg.eigvalsh(vectors_ND.T.astype(float) @ vectors_ND / len(vectors_ND)).max()
    assert np.linalg.norm(whitening.projection_DD[:, 0]) == pytest.approx((1e-5 * largest) ** -0.5, rel=1e-3)


def test_reduced_vectors_keep_the_directions_of_the_largest_variance() -> None:
    vectors_ND = stretched(2000)
    whitening = fit_whitening(vectors_ND, power=0)
    assert whitening is not None
    reduced = whitening.reduced(1)
    assert abs(reduced.projection_DD[0, 0]) == pytest.approx(1, abs=1e-3)
    assert reduced.apply(vectors_ND[:5]).shape == (5, 1)
    all_of_it = whitening.reduced(DIM)
    assert np.array_equal(all_of_it.projection_DD, whitening.projection_DD)

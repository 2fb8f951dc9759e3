from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dino_index.descriptors import gem
from dino_index.model_files import Pooling


def gem_by_hand(tokens_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """g = (mean_n clamp(x_n/|x_n|, 1e-6)^4)^(1/4), then g/|g|, one number after another."""
    num_tokens, dim = tokens_ND.shape
    pooled = np.zeros(dim)
    for channel in range(dim):
        total = 0.0
        for token in tokens_ND:
            total += max(token[channel] / np.sqrt((token**2).sum()), 1e-6) ** 4
        pooled[channel] = (total / num_tokens) ** 0.25
    return np.asarray(pooled / np.sqrt((pooled**2).sum()))


def tokens(batch: int, num_tokens: int, dim: int, seed: int = 0) -> torch.Tensor:
    scales = torch.linspace(0.1, 30, num_tokens)[:, None]
    return torch.randn(batch, num_tokens, dim, generator=torch.Generator().manual_seed(seed)) * scales


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.integers(0, 100))
def test_gem_is_the_formula(batch: int, num_tokens: int, dim: int, seed: int) -> None:
    tokens_BND = tokens(batch, num_tokens, dim, seed)
    expected = np.stack([gem_by_hand(tokens_ND.double().numpy()) for tokens_ND in tokens_BND])
    np.testing.assert_allclose(gem(tokens_BND, "normalised").numpy(), expected, rtol=1e-4, atol=1e-6)


def test_the_reference_pools_tokens_as_they_are() -> None:
    # eval_copy_detection.py of facebookresearch/dino at 7c446df, on (B, D, H, W).
    tokens_BND = tokens(2, 9, 12)
    maps_BDHW = tokens_BND.transpose(1, 2).reshape(2, 12, 3, 3)
    expected = torch.nn.functional.avg_pool2d(maps_BDHW.clamp(min=1e-6).pow(4), (3, 3)).pow(1.0 / 4).reshape(2, -1)
    torch.testing.assert_close(gem(tokens_BND, "reference"), expected)


def test_normalised_pooling_has_unit_length_and_ignores_the_scale_of_a_token() -> None:
    tokens_BND = tokens(4, 16, 24)
    pooled_BD = gem(tokens_BND, "normalised")
    torch.testing.assert_close(pooled_BD.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(gem(tokens_BND * torch.rand(4, 16, 1).add(0.5), "normalised"), pooled_BD)


def test_the_two_poolings_differ_in_more_than_length() -> None:
    tokens_BND = tokens(1, 16, 24)
    reference = torch.nn.functional.normalize(gem(tokens_BND, "reference"), dim=1)
    assert float((reference * gem(tokens_BND, "normalised")).sum()) < 0.99


@pytest.mark.parametrize("pooling", ["normalised", "reference"])
def test_the_order_of_tokens_does_not_matter(pooling: Pooling) -> None:
    tokens_BND = tokens(1, 16, 24)
    torch.testing.assert_close(gem(tokens_BND.flip(1), pooling), gem(tokens_BND, pooling))

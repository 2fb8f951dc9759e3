from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino_training import losses
from dino_training.center import Center
from dino_training.recipe import Recipe

Floats = NDArray[np.float64]

G, B, K = 2, 5, 7


def outputs(seed: int, *, offset: float = 0.0) -> Tensor:
    return offset + torch.randn(G, B, K, generator=torch.Generator().manual_seed(seed))


def center(**changed: Any) -> Center:
    return Center(K, Recipe(**changed))


def floats(tensor: Tensor) -> Floats:
    values: Floats = tensor.double().numpy()
    return values


def softmax(values: Floats) -> Floats:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def mean_entropy(targets_GBK: Tensor) -> float:
    return losses.entropy(targets_GBK).mean().item()


def test_the_center_is_a_running_mean_of_raw_outputs() -> None:
    found = center(center_momentum=0.8)
    expected = np.zeros(K)
    for step in range(5):
        logits = outputs(step, offset=0.3)
        found.update(found.observe(logits, 0.04))
        batch_mean = np.zeros(K)
        for g in range(G):
            for b in range(B):
                batch_mean += floats(logits)[g, b] / (G * B)
        expected = 0.8 * expected + (1 - 0.8) * batch_mean
        np.testing.assert_allclose(floats(found.value), expected, atol=1e-6)


def test_targets_are_centred_and_sharpened_with_the_center_of_the_steps_before() -> None:
    found = center()
    first, second = outputs(1), outputs(2)
    np.testing.assert_allclose(floats(found.distributions(first, 0.04)), softmax(floats(first) / 0.04), atol=1e-5)
    found.update(found.observe(first, 0.04))
    old = 0.1 * floats(first).mean(axis=(0, 1))
    observed = found.observe(second, 0.04)
    targets = found.distributions(second, 0.04)
    np.testing.assert_allclose(floats(targets), softmax((floats(second) - old) / 0.04), atol=1e-5)
    found.update(observed)
    assert not torch.allclose(found.distributions(second, 0.04), targets, atol=1e-3)


def test_parts_of_a_batch_average_to_the_whole_batch() -> None:
    found = center()
    logits = torch.cat([outputs(1), outputs(2)], dim=1)
    parts = [found.observe(part, 0.04) for part in logits.chunk(2, dim=1)]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, found.observe(logits, 0.04))


def test_a_center_starts_from_zero_unless_the_first_batch_is_asked_for() -> None:
    assert not center().awaits_first_batch
    assert not center().value.any()
    found = center(center_init="first_batch")
    logits = outputs(1, offset=3.0)
    assert found.awaits_first_batch
    found.begin(found.observe(logits, 0.04))
    np.testing.assert_allclose(floats(found.value), floats(logits).mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(
        floats(found.distributions(logits, 0.04)),
        softmax((floats(logits) - floats(logits).mean(axis=(0, 1))) / 0.04),
        atol=1e-4,
    )
    found.update(found.observe(logits, 0.04))
    assert not found.awaits_first_batch


def test_a_first_batch_in_parts_ends_with_the_center_of_the_whole() -> None:
    found = center(center_init="first_batch")
    parts = [found.observe(outputs(seed, offset=seed), 0.04) for seed in (1, 2)]
    for part in parts:
        assert found.awaits_first_batch
        found.begin(part)
    found.update((parts[0] + parts[1]) / 2)
    torch.testing.assert_close(found.value, (parts[0] + parts[1]) / 2)
    found.update(torch.zeros(K))
    torch.testing.assert_close(found.value, 0.9 * (parts[0] + parts[1]) / 2)


def test_a_restored_center_goes_on_and_does_not_begin_again() -> None:
    found = center(center_init="first_batch")
    found.begin(found.observe(outputs(1), 0.04))
    found.update(found.observe(outputs(2), 0.04))
    restored = center(center_init="first_batch")
    restored.load_state_dict(found.state_dict())
    assert not restored.awaits_first_batch
    assert torch.equal(restored.value, found.value)


def test_a_center_of_probabilities_is_divided_out() -> None:
    found = center(center_of="probabilities", center_momentum=0.5)
    assert found.value.tolist() == pytest.approx([1 / K] * K)
    expected = np.full(K, 1 / K)
    for step in range(4):
        logits = outputs(step)
        plain = softmax(floats(logits) / 0.2)
        divided = plain / expected
        targets = floats(found.distributions(logits, 0.2))
        np.testing.assert_allclose(targets, divided / divided.sum(axis=-1, keepdims=True), atol=1e-5)
        found.update(found.observe(logits, 0.2))
        expected = 0.5 * expected + 0.5 * plain.mean(axis=(0, 1))
        np.testing.assert_allclose(floats(found.value), expected, atol=1e-6)


@pytest.mark.parametrize("center_of", ["logits", "probabilities"])
def test_centring_takes_away_what_all_images_have_in_common(center_of: str) -> None:
    found = center(center_of=center_of, center_momentum=0.0)
    logits = outputs(1)
    logits[..., 3] += 2.0  # a prototype that every image likes best
    before = found.distributions(logits, 0.5).mean(dim=(0, 1))
    found.update(found.observe(logits, 0.5))
    after = found.distributions(logits, 0.5).mean(dim=(0, 1))
    assert losses.entropy(after) > losses.entropy(before)
    assert after[3] < 0.6 * before[3]


def test_without_centring_the_center_is_followed_but_not_used() -> None:
    found = center(centring="none")
    found.update(found.observe(outputs(1, offset=3.0), 0.04))
    assert found.value.any()
    logits = outputs(2)
    np.testing.assert_allclose(floats(found.distributions(logits, 0.04)), softmax(floats(logits) / 0.04), atol=1e-5)
    assert torch.equal(found.projections(logits), logits)


def test_sinkhorn_balances_instead_of_centring() -> None:
    found = center(centring="sinkhorn")
    found.update(found.observe(outputs(1, offset=3.0), 0.04))
    logits = outputs(2)
    calls = 0

    def add_up(part: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return part

    assert torch.equal(found.distributions(logits, 0.1, add_up), losses.sinkhorn(logits, 0.1))
    assert calls >= losses.SINKHORN_ITERATIONS


def test_projections_are_centred_and_scaled_to_unit_length() -> None:
    found = center()
    found.update(torch.linspace(-1, 1, K))
    projections = F.normalize(outputs(1), dim=-1)
    targets = floats(found.projections(projections))
    for g in range(G):
        for b in range(B):
            shifted = floats(projections)[g, b] - 0.1 * np.linspace(-1, 1, K)
            np.testing.assert_allclose(targets[g, b], shifted / math.sqrt((shifted**2).sum()), atol=1e-5)


def test_a_lower_temperature_sharpens() -> None:
    found = center()
    logits = F.normalize(outputs(1), dim=-1)
    entropies = [
        mean_entropy(found.distributions(logits, temperature)) for temperature in (0.04, 0.07, 0.1, 1.0, 100.0)
    ]
    assert entropies == sorted(entropies)
    assert entropies[0] < 0.2 * math.log(K)
    assert entropies[-1] == pytest.approx(math.log(K), rel=1e-4)


def test_targets_are_float32_whatever_precision_the_outputs_have() -> None:
    logits = outputs(1).bfloat16()
    for centring in ("mean", "sinkhorn", "none"):
        assert center(centring=centring).distributions(logits, 0.04).dtype == torch.float32
    assert center().observe(logits, 0.04).dtype == torch.float32

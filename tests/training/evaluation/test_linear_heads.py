from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from dino_training.evaluation.linear_heads import LinearHeads

RATES = (0.01, 0.3, 5.0)


def batches(
    num_steps: int = 12, size: int = 16, num_features: int = 5, num_classes: int = 4
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, num_features, generator=generator),
            torch.randint(num_classes, (size,), generator=generator),
        )
        for _ in range(num_steps)
    ]


def trained(rates: tuple[float, ...]) -> tuple[LinearHeads, list[Tensor]]:
    heads = LinearHeads(rates, 5, 4, seed=1)
    return heads, [heads.step(*batch, factor=1 - step / 12) for step, batch in enumerate(batches())]


def test_all_rates_at_once_are_each_rate_alone() -> None:
    together, losses = trained(RATES)
    features = torch.randn(7, 5)
    for place, rate in enumerate(RATES):
        alone, losses_alone = trained((rate,))
        torch.testing.assert_close(together.logits(features)[:, place], alone.logits(features)[:, 0])
        torch.testing.assert_close(torch.stack(losses)[:, place], torch.stack(losses_alone)[:, 0])


@pytest.mark.parametrize("rate", RATES)
def test_a_head_learns_as_by_automatic_differentiation(rate: float) -> None:
    heads, losses = trained((rate,))
    layer = torch.nn.Linear(5, 4)
    start = LinearHeads((rate,), 5, 4, seed=1)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.copy_(start.logits(torch.eye(5))[:, 0].T)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=0.0)
    for step, (features, classes) in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / 12)
        loss = F.cross_entropy(layer(features), classes)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert losses[step].item() == pytest.approx(loss.item(), rel=1e-4)
    features = torch.randn(7, 5)
    torch.testing.assert_close(heads.logits(features)[:, 0], layer(features).detach(), rtol=1e-4, atol=1e-4)


def test_training_on_everything_ends_at_the_maximum_of_the_likelihood() -> None:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(300, 4, generator=generator)
    noisy = features @ torch.randn(4, 3, generator=generator) + torch.randn(300, 3, generator=generator)
    classes = noisy.argmax(dim=1)
    heads = LinearHeads((0.5,), 4, 3, seed=0)
    for step in range(600):
        heads.step(features, classes, factor=1 - step / 600)
    oracle = LogisticRegression(C=1e9, tol=1e-8, max_iter=1000).fit(features.numpy(), classes.numpy())
    found = torch.softmax(heads.logits(features)[:, 0], dim=1)
    torch.testing.assert_close(
        found, torch.from_numpy(oracle.predict_proba(features.numpy())).float(), rtol=0, atol=2e-3
    )


def test_a_rate_that_diverges_harms_no_other() -> None:
    healthy, _ = trained((0.01,))
    heads, _ = trained((0.01, float("inf")))
    features = torch.randn(7, 5)
    logits = heads.logits(features)
    assert not torch.isfinite(logits[:, 1]).all()
    torch.testing.assert_close(logits[:, 0], healthy.logits(features)[:, 0])

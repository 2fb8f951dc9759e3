"""The losses against Algorithm 1 and the equations of arXiv 2104.14294, in loops over float64 numbers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dino_training import losses
from dino_training.center import Center
from dino_training.recipe import Recipe

Floats = NDArray[np.float64]

B, K, C = 5, 7, 6


def rows(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(rows(*shape, seed=seed), dim=-1)


def probs(*shape: int, seed: int) -> Tensor:
    return F.softmax(rows(*shape, seed=seed, scale=2.0), dim=-1)


def floats(tensor: Tensor) -> Floats:
    values: Floats = tensor.detach().double().numpy()
    return values


def softmax(values: Floats) -> Floats:
    powers = np.exp(values - values.max())
    shares: Floats = powers / powers.sum()
    return shares


def naive_h(target: Floats, logits: Floats, temperature: float) -> float:
    """H(target, softmax(logits / temperature)) of one image."""
    student = softmax(logits / temperature)
    return -sum(float(target[k]) * math.log(student[k]) for k in range(len(target)))


def naive_multi_crop(student: Floats, targets: Floats, temperature: float) -> float:
    """The mean over images of equation 3, divided by the number of its terms."""
    terms = [
        naive_h(targets[g, b], student[v, b], temperature)
        for g in range(len(targets))
        for v in range(len(student))
        for b in range(student.shape[1])
        if v != g
    ]
    return sum(terms) / len(terms)


def naive_infonce(query: Floats, keys: list[Floats], positive: int, temperature: float) -> float:
    scores = [float(query @ key) / temperature for key in keys]
    return math.log(sum(math.exp(score) for score in scores)) - scores[positive]


def naive_swav(logits: Floats, temperature: float) -> Floats:
    """Listing 1 of arXiv 2006.09882 for one view, with a sum or a division at a time."""
    num_rows, num_prototypes = logits.shape
    shares = np.exp((logits.T - logits.max()) / temperature).tolist()
    total = sum(map(sum, shares))
    shares = [[share / total for share in of_prototype] for of_prototype in shares]
    for _ in range(3):
        shares = [[share / sum(of_prototype) / num_prototypes for share in of_prototype] for of_prototype in shares]
        of_rows = [sum(shares[k][b] for k in range(num_prototypes)) for b in range(num_rows)]
        shares = [[shares[k][b] / of_rows[b] / num_rows for b in range(num_rows)] for k in range(num_prototypes)]
    balanced: Floats = np.array(shares).T * num_rows
    return balanced


# --- distributions over prototypes


def test_two_views_give_the_loss_of_algorithm_1() -> None:
    t1, t2, s1, s2 = (rows(B, K, seed=seed) for seed in range(4))
    center_K = rows(K, seed=9)
    tps, tpt = 0.1, 0.04
    center = Center(K, Recipe())
    center.value.copy_(center_K)
    targets_GBK = center.distributions(torch.stack([t1, t2]), tpt)
    found = losses.cross_entropy(torch.stack([s1, s2]), targets_GBK, tps).item()

    def h(teacher: Tensor, student: Tensor) -> float:
        shifted = (floats(teacher) - floats(center_K)) / tpt
        return float(np.mean([naive_h(softmax(shifted[b]), floats(student)[b], tps) for b in range(B)]))

    assert found == pytest.approx(h(t1, s2) / 2 + h(t2, s1) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("num_teacher", "num_student"), [(2, 2), (2, 3), (2, 4), (2, 5), (2, 6), (1, 2), (1, 4), (3, 5)]
)
def test_cross_entropy_is_the_mean_over_pairs_of_different_views(num_teacher: int, num_student: int) -> None:
    student = rows(num_student, B, K, seed=1).requires_grad_()
    targets = probs(num_teacher, B, K, seed=2)
    loss = losses.cross_entropy(student, targets, 0.1)
    assert loss.item() == pytest.approx(naive_multi_crop(floats(student), floats(targets), 0.1), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    # The gradient of H(t, softmax(s / T)) by s is (softmax(s / T) - t) / T.
    pairs = num_teacher * (num_student - 1)
    expected = np.zeros(student.shape)
    for v in range(num_student):
        for b in range(B):
            for g in range(num_teacher):
                if g != v:
                    student_probs = softmax(floats(student)[v, b] / 0.1)
                    expected[v, b] += (student_probs - floats(targets)[g, b]) / 0.1 / (pairs * B)
    assert student.grad is not None
    np.testing.assert_allclose(floats(student.grad), expected, atol=1e-6)


@pytest.mark.parametrize("num_student", [2, 4])
def test_kl_is_cross_entropy_minus_the_entropy_of_the_targets_with_the_same_gradients(num_student: int) -> None:
    targets = probs(2, B, K, seed=3)
    gradients, values = [], []
    for compare in (losses.kl_divergence, losses.cross_entropy):
        student = rows(num_student, B, K, seed=4).requires_grad_()
        loss = compare(student, targets, 0.2)
        loss.backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        gradients.append(student.grad)
        values.append(loss.item())
    entropy = np.mean([-sum(p * math.log(p) for p in row) for row in floats(targets).reshape(-1, K)])
    assert values[0] == pytest.approx(values[1] - entropy, abs=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1])


@given(st.integers(0, 1000), st.sampled_from([0.05, 0.1, 1.0]))
@settings(max_examples=25)
def test_kl_is_zero_where_student_and_teacher_agree_and_positive_elsewhere(seed: int, temperature: float) -> None:
    logits_BK = rows(B, K, seed=seed)
    targets_BK = F.softmax(logits_BK / temperature, dim=-1)
    same = losses.kl_divergence(logits_BK.expand(3, B, K), targets_BK.expand(2, B, K), temperature)
    assert abs(same.item()) < 1e-5
    other = losses.kl_divergence(rows(3, B, K, seed=seed + 1), targets_BK.expand(2, B, K), temperature)
    assert other.item() > 0


def test_entropy_counts_impossible_outcomes_as_nothing() -> None:
    found = losses.entropy(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]]))
    assert found.tolist() == pytest.approx([0.0, math.log(4), math.log(2)])


# --- projections


@pytest.mark.parametrize(("num_teacher", "num_student"), [(2, 2), (2, 5), (1, 3)])
def test_squared_distance_is_the_mean_over_pairs(num_teacher: int, num_student: int) -> None:
    student, teacher = unit(num_student, B, C, seed=1), unit(num_teacher, B, C, seed=2)
    terms = [
        sum((floats(student)[v, b, c] - floats(teacher)[g, b, c]) ** 2 for c in range(C))
        for g in range(num_teacher)
        for v in range(num_student)
        for b in range(B)
        if v != g
    ]
    assert losses.squared_distance(student, teacher).item() == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("num_others", [0, 4])
@pytest.mark.parametrize("num_queued", [0, 9])
@pytest.mark.parametrize("num_student", [2, 4])
def test_infonce_finds_each_image_among_all_keys(num_others: int, num_queued: int, num_student: int) -> None:
    student, teacher = unit(num_student, B, C, seed=1), unit(2, B, C, seed=2)
    others, queue = unit(2, num_others, C, seed=3), unit(num_queued, C, seed=4)
    found = losses.infonce(
        student, teacher, 0.2,
        others_GNC=others if num_others else None, negatives_NC=queue if num_queued else None,
    )  # fmt: skip
    terms = []
    for g in range(2):
        keys = [*floats(teacher)[g], *floats(others)[g], *floats(queue)]
        terms += [
            naive_infonce(floats(student)[v, b], keys, b, 0.2) for v in range(num_student) if v != g for b in range(B)
        ]
    assert found.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_infonce_of_two_processes_averages_to_that_of_one_with_the_whole_batch() -> None:
    student, teacher, queue = unit(4, 6, C, seed=1), unit(2, 6, C, seed=2), unit(3, C, seed=3)
    whole = losses.infonce(student, teacher, 0.2, negatives_NC=queue)
    halves = [(slice(0, 3), slice(3, 6)), (slice(3, 6), slice(0, 3))]
    parts = [
        losses.infonce(student[:, own], teacher[:, own], 0.2, others_GNC=teacher[:, other], negatives_NC=queue)
        for own, other in halves
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_contrast_with_stored_leaves_the_image_itself_out_of_the_negatives() -> None:
    student, teacher = unit(3, B, C, seed=1), unit(B, C, seed=2)
    stored = torch.cat([teacher, unit(6, C, seed=3)])
    own = torch.arange(B)
    drawn = torch.tensor([0, 2, 7, 2, 9, 4, 10])
    same = own[:, None] == drawn[None, :]
    found = losses.contrast_with_stored(student, teacher, stored[drawn], same, 0.07)
    terms = []
    for v in range(3):
        for b in range(B):
            keys = [floats(teacher)[b], *[floats(stored)[n] for n in drawn.tolist() if n != b]]
            terms.append(naive_infonce(floats(student)[v, b], keys, 0, 0.07))
    assert found.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_contrast_with_stored_has_finite_gradients_where_every_negative_is_the_image_itself() -> None:
    student = unit(2, 1, C, seed=1).requires_grad_()
    loss = losses.contrast_with_stored(
        student, unit(1, C, seed=2), unit(3, C, seed=3), torch.ones(1, 3, dtype=torch.bool), 0.1
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_distance_to_stored_is_the_mean_over_views_and_images() -> None:
    student, teacher = unit(3, B, C, seed=1), unit(B, C, seed=2)
    terms = [((floats(student)[v, b] - floats(teacher)[b]) ** 2).sum() for v in range(3) for b in range(B)]
    assert losses.distance_to_stored(student, teacher).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest_neighbour() -> None:
    features = rows(B, C, seed=5, scale=3.0)
    directions = [row / math.sqrt(sum(value**2 for value in row)) for row in floats(features)]
    expected = -np.mean(
        [
            math.log(min(math.sqrt(((directions[a] - directions[b]) ** 2).sum()) for b in range(B) if b != a))
            for a in range(B)
        ]
    )
    assert losses.koleo(features).item() == pytest.approx(expected, rel=1e-4)


def test_koleo_takes_no_image_for_its_own_neighbour() -> None:
    opposite = torch.tensor([[1.0], [-3.0]]) * unit(1, C, seed=1)
    assert losses.koleo(opposite).item() == pytest.approx(-math.log(2))


def test_a_step_down_koleo_spreads_features() -> None:
    features = (torch.ones(B, C) + 0.1 * rows(B, C, seed=6)).requires_grad_()
    losses.koleo(features).backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    assert losses.koleo(features - 0.01 * features.grad) < losses.koleo(features)


def test_koleo_is_finite_for_equal_images_and_zero_for_a_single_one() -> None:
    same = torch.ones(3, C, requires_grad=True)
    loss = losses.koleo(same)
    loss.backward()  # type: ignore[no-untyped-call]
    assert math.isfinite(loss.item())
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()
    assert losses.koleo(torch.ones(1, C)).item() == 0


# --- Sinkhorn-Knopp


@pytest.mark.parametrize("temperature", [0.04, 0.07, 0.5])
def test_sinkhorn_is_swavs_loop_on_each_view(temperature: float) -> None:
    logits = F.normalize(rows(2, 11, C, seed=1), dim=-1) @ unit(K, C, seed=2).T
    found = losses.sinkhorn(logits, temperature)
    expected = [naive_swav(floats(view), temperature) for view in logits]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@given(st.integers(0, 1000), st.sampled_from([0.3, 0.5, 1.0]))
@settings(max_examples=25)
def test_sinkhorn_gives_each_image_one_and_each_prototype_nearly_the_same(seed: int, temperature: float) -> None:
    num_images = 40
    logits = F.normalize(rows(2, num_images, C, seed=seed), dim=-1) @ unit(K, C, seed=seed + 1).T
    logits[..., 0] += 1.0  # a prototype that every image likes best
    shares = losses.sinkhorn(logits, temperature)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(2, num_images))
    of_prototypes = shares.sum(dim=1) * K / num_images
    assert (of_prototypes - 1).abs().max() < 0.15
    unbalanced = F.softmax(logits / temperature, dim=-1).sum(dim=1) * K / num_images
    assert (of_prototypes - 1).abs().max() < 0.3 * (unbalanced - 1).abs().max()


@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
def test_sinkhorn_does_not_change_with_what_all_logits_have_in_common(offset: float) -> None:
    logits = rows(1, B, K, seed=3).double()
    torch.testing.assert_close(losses.sinkhorn(logits + offset, 0.04), losses.sinkhorn(logits, 0.04))


def test_sinkhorn_stays_finite_at_extreme_logits() -> None:
    logits = rows(2, B, K, seed=3, scale=1e4)
    shares = losses.sinkhorn(logits, 0.01)
    assert torch.isfinite(shares).all()
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(2, B))


def in_two_processes(call: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """Results of `call(rank, add_up)` in two threads whose add_up sums over both."""
    barrier = threading.Barrier(2, timeout=20)
    given_in: list[Tensor] = [torch.empty(0)] * 2
    results: list[Tensor] = [torch.empty(0)] * 2

    def run(rank: int) -> None:
        def add_up(part: Tensor) -> Tensor:
            given_in[rank] = part
            barrier.wait()
            total = given_in[0] + given_in[1]
            barrier.wait()
            return total

        results[rank] = call(rank, add_up)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_sinkhorn_in_two_processes_equals_one_with_the_whole_batch() -> None:
    logits = rows(2, 8, K, seed=4)
    logits[:, 4:] += 2.0  # so that a process's own highest value differs
    halves = [logits[:, :4], logits[:, 4:]]
    parts = in_two_processes(lambda rank, add_up: losses.sinkhorn(halves[rank], 0.1, add_up))
    torch.testing.assert_close(torch.cat(parts, dim=1), losses.sinkhorn(logits, 0.1))
    alone = torch.cat([losses.sinkhorn(half, 0.1) for half in halves], dim=1)
    assert (alone - torch.cat(parts, dim=1)).abs().max() > 0.01

from __future__ import annotations

import math

import pytest

from dino_training.collapse import WINDOW_STEPS, Collapse, CollapseWatch, name_collapse

K = 64
LN_K = math.log(K)
# entropy of single images, of their mean; spread of the projections
HEALTHY = (0.4 * LN_K, 0.8 * LN_K, 0.7)
UNIFORM = (0.999 * LN_K, LN_K, 0.7)
SINGLE = (0.0, 0.01 * LN_K, 0.7)
CONSTANT = (0.5 * LN_K, 0.5 * LN_K + 0.001, 0.7)


def watch(*, ignore_steps: int = 0) -> CollapseWatch:
    return CollapseWatch(K, ignore_steps=ignore_steps)


def observe(
    watched: CollapseWatch, figures: tuple[float, float, float], *, first: int = 0, num_steps: int = WINDOW_STEPS
) -> list[tuple[int, Collapse]]:
    """What is named while the figures stay the same, with the step."""
    entropy, mean_entropy, spread = figures
    found = [
        (step, watched.observe(step, entropy=entropy, mean_entropy=mean_entropy, spread=spread))
        for step in range(first, first + num_steps)
    ]
    return [(step, collapse) for step, collapse in found if collapse is not None]


@pytest.mark.parametrize(
    ("figures", "kind", "advice"),
    [
        (UNIFORM, "uniform", "sharpening"),
        (SINGLE, "single_dimension", "centring"),
        (CONSTANT, "constant", "momentum teacher"),
    ],
)
def test_a_collapse_is_named_with_advice(figures: tuple[float, float, float], kind: str, advice: str) -> None:
    ((step, collapse),) = observe(watch(), figures)
    assert step == WINDOW_STEPS - 1
    assert collapse.kind == kind
    assert advice in collapse.message
    assert "collapse" in collapse.message
    assert f"{LN_K:.3f}" in collapse.message


def test_nothing_is_named_where_outputs_differ_between_images() -> None:
    assert observe(watch(), HEALTHY, num_steps=300) == []


def test_without_prototypes_a_constant_projection_is_named() -> None:
    spread_out, constant = (math.nan, math.nan, 0.5), (math.nan, math.nan, 0.001)
    watched = CollapseWatch(None, ignore_steps=0)
    assert observe(watched, spread_out) == []
    found = observe(watched, constant, first=WINDOW_STEPS, num_steps=2 * WINDOW_STEPS)
    assert [collapse.kind for _, collapse in found] == ["constant"]


def test_each_kind_is_named_once_although_it_comes_back() -> None:
    watched = watch()
    found = []
    for number, figures in enumerate((UNIFORM, CONSTANT, UNIFORM, SINGLE, CONSTANT, HEALTHY, UNIFORM)):
        found += observe(watched, figures, first=200 * number, num_steps=200)
    assert [collapse.kind for _, collapse in found] == ["uniform", "constant", "single_dimension"]


def test_a_flat_start_is_not_named() -> None:
    watched = watch(ignore_steps=150)
    assert observe(watched, UNIFORM, num_steps=150) == []
    assert observe(watched, HEALTHY, first=150, num_steps=300) == []


def test_a_collapse_that_outlasts_the_start_is_named() -> None:
    ((step, collapse),) = observe(watch(ignore_steps=150), UNIFORM, num_steps=300)
    assert (step, collapse.kind) == (150 + WINDOW_STEPS - 1, "uniform")


def test_single_steps_do_not_count_as_a_collapse() -> None:
    watched = watch()
    for start in range(0, 400, 40):
        assert observe(watched, HEALTHY, first=start, num_steps=39) == []
        assert observe(watched, CONSTANT, first=start + 39, num_steps=1) == []


def test_a_resumed_watch_waits_until_it_has_seen_enough() -> None:
    ((step, _),) = observe(watch(ignore_steps=100), UNIFORM, first=1000, num_steps=100)
    assert step == 1000 + WINDOW_STEPS - 1


@pytest.mark.parametrize(
    ("entropy", "mean_entropy", "kind"),
    [(6.92, 6.93, "uniform"), (0.01, 0.02, "single_dimension"), (3.0, 3.01, "constant"), (3.0, 5.0, None)],
)
def test_means_over_steps_are_named_without_a_watch(entropy: float, mean_entropy: float, kind: str | None) -> None:
    found = name_collapse(1024, entropy=entropy, mean_entropy=mean_entropy, spread=1.0)
    assert (found.kind if found is not None else None) == kind

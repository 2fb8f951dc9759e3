from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_index.knn import vote

neighbours = st.lists(st.tuples(st.floats(-1, 1), st.sampled_from("abcd")), min_size=1, max_size=30)
temperatures = st.floats(0.02, 10)


def unzipped(found: list[tuple[float, str]]) -> tuple[list[float], list[str]]:
    return [score for score, _ in found], [label for _, label in found]


@given(neighbours, temperatures)
def test_probabilities_are_those_of_the_formula(found: list[tuple[float, str]], temperature: float) -> None:
    weights: dict[str, float] = {}
    for score, label in found:
        weights[label] = weights.get(label, 0) + math.exp(score / temperature)
    expected = {label: weight / sum(weights.values()) for label, weight in weights.items()}
    assert dict(vote(*unzipped(found), temperature)) == pytest.approx(expected)


@given(neighbours, temperatures)
def test_probabilities_sum_to_one_and_fall(found: list[tuple[float, str]], temperature: float) -> None:
    probabilities = [probability for _, probability in vote(*unzipped(found), temperature)]
    assert math.fsum(probabilities) == pytest.approx(1)
    assert probabilities == sorted(probabilities, reverse=True)


def test_a_near_neighbour_outvotes_many_far_ones_at_a_low_temperature() -> None:
    scores, labels = [0.9] + [0.5] * 19, ["cat"] + ["dog"] * 19
    assert vote(scores, labels, 0.07)[0][0] == "cat"
    assert vote(scores, labels, 1.0)[0][0] == "dog"


def test_equal_votes_are_ordered_by_label() -> None:
    assert vote([0.5, 0.5, 0.5], ["b", "c", "a"], 0.07) == [("a", 1 / 3), ("b", 1 / 3), ("c", 1 / 3)]


def test_a_tiny_temperature_does_not_overflow() -> None:
    (label, probability), _ = vote([1.0, 0.9], ["near", "far"], 1e-3)
    assert (label, round(probability, 9)) == ("near", 1.0)


@pytest.mark.parametrize("temperature", [0, -0.07])
def test_the_temperature_must_be_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        vote([1.0], ["a"], temperature)

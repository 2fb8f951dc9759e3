"""Whole protocols on generated pictures, against slow versions that start from the same embeddings."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dino_index.errors import EvaluationImpossible
from dino_index.images import load_image
from dino_index.snapshots import normalise
from dino_training.evaluation import rankings
from dino_training.evaluation.features import FeatureStore
from dino_training.evaluation.rankings import judge_all, judge_by_cosine, judge_candidates, truth_figures
from dino_training.evaluation.retrieval import (
    RetrievalOptions,
    evaluate_holidays,
    evaluate_revisited,
    evaluate_truth,
)
from dino_training.evaluation.truth import NamedTruth, QueryTruth
from sample_collections import write_pictures


def vectors_by_name(store: FeatureStore, folder: Path) -> dict[str, NDArray[np.float32]]:
    pictures = store.embed_folder(folder)
    return dict(zip((Path(path).stem for path in pictures.paths), normalise(pictures.cls_ND), strict=True))


def ranking(
    query: NDArray[np.float32], references: dict[str, NDArray[np.float32]], matches: set[str], ignored: set[str]
) -> list[tuple[float, bool]]:
    """(score, is match), best first, ties with non-matches first."""
    rows = [
        (round(float(query @ vector), 6), name in matches) for name, vector in references.items() if name not in ignored
    ]
    return sorted(rows, key=lambda row: (-row[0], row[1]))


def slow_average_precision(rows: list[tuple[float, bool]], num_matches: int) -> float:
    found, total = 0, 0.0
    for number, (_, correct) in enumerate(rows, 1):
        found += correct
        total += found / number if correct else 0
    return total / num_matches


def slow_trapezoids(rows: list[tuple[float, bool]], num_matches: int) -> float:
    found, total = 0, 0.0
    for rank, (_, correct) in enumerate(rows):
        if correct:
            total += ((found / rank if rank else 1.0) + (found + 1) / (rank + 1)) / 2
            found += 1
    return total / num_matches


def random_truth(rng: np.random.Generator, num_queries: int, num_references: int) -> list[QueryTruth]:
    truth = []
    for query in range(num_queries):
        kind = rng.choice(3, num_references, p=[0.8, 0.1, 0.1])
        truth.append(
            QueryTruth(
                query=query,
                matches=frozenset(np.flatnonzero(kind == 1).tolist() if query % 4 else ()),
                ignored=frozenset(np.flatnonzero(kind == 2).tolist()),
            )
        )
    return truth


@pytest.mark.parametrize("seed", range(5))
def test_rankings_with_ties_and_junk_agree_with_a_slow_version(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Of few different directions, so that many scores are equal.
    kinds = normalise(rng.standard_normal((6, 4)).astype(np.float32))
    references, queries = kinds[rng.integers(6, size=40)], kinds[rng.integers(6, size=12)]
    truth = random_truth(rng, 12, 40)
    figures = {figure.keys[0]: figure.value for figure in truth_figures(judge_by_cosine(queries, references, truth))}
    rows = [
        ranking(
            queries[query.query], {str(n): vector for n, vector in enumerate(references)},
            set(map(str, query.matches)), set(map(str, query.ignored)),
        )
        for query in truth
    ]  # fmt: skip
    matched = [(row, len(query.matches)) for row, query in zip(rows, truth, strict=True) if query.matches]
    together = sorted((pair for row in rows for pair in row), key=lambda pair: (-pair[0], pair[1]))
    num_matches = sum(len(query.matches) for query in truth)
    assert figures["map"] == pytest.approx(np.mean([slow_average_precision(*each) for each in matched]))
    assert figures["micro_ap"] == pytest.approx(slow_average_precision(together, num_matches))
    assert figures["rank1"] == pytest.approx(np.mean([row[0][1] for row, _ in matched]))


def test_a_list_of_all_candidates_is_the_whole_ranking() -> None:
    rng = np.random.default_rng(0)
    for query in random_truth(rng, 8, 30):
        scores = rng.integers(0, 5, 30).astype(np.float32)
        order = rng.permutation(30)
        whole = judge_all(scores, query, 30)
        listed = judge_candidates(scores[order].tolist(), order.tolist(), query)
        assert whole.ranks_R.tolist() == listed.ranks_R.tolist()
        assert whole.scores_K.tolist() == listed.scores_K.tolist()
        assert whole.correct_K.tolist() == listed.correct_K.tolist()


def test_fewer_candidates_change_no_rank_and_keep_the_best_pairs() -> None:
    rng = np.random.default_rng(1)
    query = QueryTruth(query=0, matches=frozenset({3, 11, 20}), ignored=frozenset({5}))
    scores = rng.integers(0, 6, 40).astype(np.float32)
    whole, cut = judge_all(scores, query, 40), judge_all(scores, query, 7)
    assert cut.ranks_R.tolist() == whole.ranks_R.tolist()
    assert cut.scores_K.tolist() == whole.scores_K[:7].tolist()
    assert cut.correct_K.tolist() == whole.correct_K[:7].tolist()


def test_products_in_parts_give_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    queries, references = (normalise(rng.standard_normal((number, 8)).astype(np.float32)) for number in (9, 50))
    truth = random_truth(rng, 9, 50)
    whole = truth_figures(judge_by_cosine(queries, references, truth))
    monkeypatch.setattr(rankings, "_MAX_PRODUCTS", 120)
    assert truth_figures(judge_by_cosine(queries, references, truth)) == whole


def test_any_truth_is_evaluated_by_the_cosine_of_cls(tmp_path: Path, store: FeatureStore) -> None:
    write_pictures(tmp_path / "r", *(f"r{number}.jpg" for number in range(12)))
    write_pictures(tmp_path / "q", *(f"q{number}.jpg" for number in range(6)), seed=8)
    named = NamedTruth(
        matches={"q0": {"r8", "r1"}, "q1": {"r9"}, "q2": {"r3", "r4"}, "q3": set(), "q4": {"r2"}},
        junk={"q2": {"r10", "r7"}},
    )
    result = evaluate_truth(store, tmp_path / "q", tmp_path / "r", named)
    references, queries = vectors_by_name(store, tmp_path / "r"), vectors_by_name(store, tmp_path / "q")
    rows = {
        name: ranking(queries[name], references, matches, named.junk.get(name, set()))
        for name, matches in named.matches.items()
    }
    precisions = [
        slow_average_precision(rows[name], len(matches)) for name, matches in named.matches.items() if matches
    ]
    assert result.to_json()["map"] == pytest.approx(np.mean(precisions))
    together = sorted((pair for row in rows.values() for pair in row), key=lambda pair: (-pair[0], pair[1]))
    assert result.to_json()["micro_ap"] == pytest.approx(slow_average_precision(together, 6))
    # q0 and r8 are the same picture, as are q1 and r9, and q2 and r10, which is junk.
    assert rows["q0"][0][1]
    assert result.to_json()["queries_not_in_truth"] == 1


def test_holidays_leaves_each_query_out_of_its_own_ranking(tmp_path: Path, store: FeatureStore) -> None:
    groups = {"1000": 3, "1001": 2, "1002": 4, "1003": 1}
    names = [f"{group}{number:02}" for group, size in groups.items() for number in range(size)]
    write_pictures(tmp_path, *(f"{name}.jpg" for name in names), "holiday.jpg")
    result = evaluate_holidays(store, tmp_path)
    vectors = vectors_by_name(store, tmp_path)
    precisions = []
    for group in ("1000", "1001", "1002"):
        matches = {name for name in names if name.startswith(group)} - {f"{group}00"}
        rows = ranking(vectors[f"{group}00"], vectors, matches, {f"{group}00"})
        precisions.append(slow_trapezoids(rows, len(matches)))
    assert result.to_json()["map"] == pytest.approx(np.mean(precisions))
    assert (result.facts["num_queries"], result.facts["num_distractors"]) == (3, 1)


def test_other_names_are_no_holidays(tmp_path: Path, store: FeatureStore) -> None:
    write_pictures(tmp_path, "a.jpg", "100000.jpg")
    with pytest.raises(EvaluationImpossible, match="INRIA Holidays"):
        evaluate_holidays(store, tmp_path)


GND: list[dict[str, Any]] = [
    {"bbx": [10.0, 5.0, 60.0, 50.0], "easy": [0, 4], "hard": [2, 7], "junk": [5]},
    {"bbx": None, "easy": [], "hard": [1], "junk": [0, 3]},
    {"bbx": [-5.0, 0.0, 500.0, 40.0], "easy": [6], "hard": [], "junk": []},
]


def test_revisited_sets_are_evaluated_as_their_protocol_says(tmp_path: Path, store: FeatureStore) -> None:
    """Queries are cropped; hard ones are junk in Easy, easy ones in Hard; what is not in the list is not ranked."""
    write_pictures(tmp_path / "jpg", *(f"place_{number}.jpg" for number in range(9)), "not_listed.jpg", seed=30)
    write_pictures(tmp_path / "jpg", *(f"query_{number}.jpg" for number in range(3)), seed=60)
    listed = [f"place_{number}" for number in range(9)]
    path = tmp_path / "gnd.pkl"
    path.write_bytes(
        pickle.dumps({"imlist": listed, "qimlist": [f"query_{n}" for n in range(3)], "gnd": GND}, protocol=2)
    )
    result = evaluate_revisited(store, tmp_path / "jpg", tmp_path / "jpg", path).to_json()
    vectors = vectors_by_name(store, tmp_path / "jpg")
    references = {name: vectors[name] for name in listed}
    parts = {
        "easy": (["easy"], ["junk", "hard"]),
        "medium": (["easy", "hard"], ["junk"]),
        "hard": (["hard"], ["junk", "easy"]),
    }
    for difficulty, (right, passed_over) in parts.items():
        precisions, first_five = [], []
        for number, entry in enumerate(GND):
            pixels = load_image(tmp_path / f"jpg/query_{number}.jpg").pixels_HWC
            if entry["bbx"] is not None:
                left, top, right_side, bottom = (max(0, int(value)) for value in entry["bbx"])
                pixels = pixels[top:bottom, left:right_side]
            square = load_image(_image(pixels), size=(32, 32)).pixels_HWC
            query = normalise(store.backbone.embed(square[None])[0])[0]
            matches = {listed[position] for kind in right for position in entry[kind]}
            ignored = {listed[position] for kind in passed_over for position in entry[kind]}
            if matches:
                rows = ranking(query, references, matches, ignored)
                precisions.append(slow_trapezoids(rows, len(matches)))
                places = min(max(place for place, row in enumerate(rows, 1) if row[1]), 5)
                first_five.append(sum(correct for _, correct in rows[:places]) / places)
        assert result[difficulty]["map"] == pytest.approx(np.mean(precisions)), difficulty
        assert result[difficulty]["mp"]["5"] == pytest.approx(np.mean(first_five)), difficulty
        assert result["num_queries"][difficulty] == len(precisions)


def _image(pixels: NDArray[np.uint8]) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def test_pictures_that_a_revisited_set_lacks_are_listed(tmp_path: Path, store: FeatureStore) -> None:
    write_pictures(tmp_path / "jpg", "a.jpg", "b.jpg", "q.jpg")
    entry = {"bbx": [0, 0, 20, 20], "easy": [0, 2], "hard": [], "junk": [1]}
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps({"imlist": ["a", "b", "lost"], "qimlist": ["q", "away"], "gnd": [entry, entry]}))
    result = evaluate_revisited(store, tmp_path / "jpg", tmp_path / "jpg", path)
    assert result.facts["missing"] == {"queries": ["away"], "references": ["lost"]}
    assert result.to_json()["easy"]["map"] == 1.0
    assert "hard" not in result.to_json()
    (tmp_path / "jpg/q.jpg").write_bytes(b"broken")
    with pytest.raises(EvaluationImpossible, match="2 queries"):
        evaluate_revisited(store, tmp_path / "jpg", tmp_path / "jpg", path)


def test_scales_are_added_up(tmp_path: Path, store: FeatureStore) -> None:
    write_pictures(tmp_path, "100000.jpg", "100001.jpg", "100100.jpg", "100101.jpg", "100102.jpg")
    options = RetrievalOptions(scales=(1.0, 1.5, 0.5))
    result = evaluate_holidays(store, tmp_path, options)
    assert result.facts["input_sizes"] == [32, 48, 16]
    total = np.sum(
        [store.at_size(size).embed_folder(tmp_path).cls_ND.astype(np.float64) for size in (32, 48, 16)], axis=0
    )
    vectors = normalise(total.astype(np.float32))
    scores = vectors @ vectors.T
    expected = [
        slow_trapezoids(sorted(((float(scores[0, n]), n == 1) for n in range(1, 5)), reverse=True), 1),
        slow_trapezoids(sorted(((float(scores[2, n]), n > 2) for n in (0, 1, 3, 4)), reverse=True), 2),
    ]
    assert result.to_json()["map"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("scales", [(), (0.0,), (float("nan"),), (1.0, 9.0)])
def test_scales_out_of_range_are_wrong_usage(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="scales must be"):
        RetrievalOptions(scales=scales)

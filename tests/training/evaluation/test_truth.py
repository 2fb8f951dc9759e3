from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dino_index.errors import EvaluationImpossible, TruthUnusable
from dino_training.evaluation.features import Pictures
from dino_training.evaluation.names import PictureNames
from dino_training.evaluation.truth import NamedTruth, find_truth, read_isc_truth, read_truth


def pictures(folder: Path, *names: str) -> Pictures:
    """As if they had been embedded."""
    vectors = np.zeros((len(names), 2), np.float16)
    return Pictures(
        folder=str(folder), paths=[str(folder / name) for name in names], sha256=[name.encode() for name in names],
        cls_ND=vectors, gem_ND=vectors, unreadable={}, ignored=Counter(),
    )  # fmt: skip


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_add_up_and_an_empty_reference_matches_nothing(tmp_path: Path) -> None:
    truth = read_truth(written(tmp_path / "t.csv", "query,reference", "a.jpg,1.jpg", "a.jpg,2.jpg", "b.jpg,", "c.jpg"))
    assert truth.matches == {"a.jpg": {"1.jpg", "2.jpg"}, "b.jpg": set(), "c.jpg": set()}
    assert truth.junk == {}


def test_junk_is_a_mark_on_the_row_or_another_name(tmp_path: Path) -> None:
    rows = ["query,reference,junk", "a,1,", "a,2,1", "a,3,True", "a,4,0", "b,5,6.jpg"]
    truth = read_truth(written(tmp_path / "t.csv", *rows))
    assert truth.matches == {"a": {"1", "4"}, "b": {"5"}}
    assert truth.junk == {"a": {"2", "3"}, "b": {"6.jpg"}}


def test_quoted_names_a_byte_order_mark_and_spaces_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeffreference, query\n"a, b.jpg", q.jpg\n', encoding="utf-8")
    assert read_truth(path).matches == {"q.jpg": {"a, b.jpg"}}


@pytest.mark.parametrize(
    "lines", [["query;reference", "a;b"], ["query,reference,label", "a,b,c"], ["query,reference", "a,b,c"], ["a,b"],
              ["query,reference", ",b"], ["query,reference"], [""]]
)  # fmt: skip
def test_other_files_are_refused_in_one_line(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(TruthUnusable) as caught:
        read_truth(written(tmp_path / "t.csv", *lines))
    assert "t.csv" in str(caught.value)
    assert "expected" in str(caught.value) or "must have the columns" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_truth_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TruthUnusable, match=r"gone\.csv"):
        read_truth(tmp_path / "gone.csv")


@pytest.mark.parametrize("header", [[], ["query_id,reference_id"]])
def test_isc_files_are_read_with_and_without_their_header(tmp_path: Path, header: list[str]) -> None:
    truth = read_isc_truth(written(tmp_path / "gt.csv", *header, "Q00001,R000007", "Q00002,"))
    assert truth.matches == {"Q00001": {"R000007"}, "Q00002": set()}


def test_isc_files_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TruthUnusable, match="line 2"):
        read_isc_truth(written(tmp_path / "gt.csv", "Q1,R1", "Q1,R2,0.5"))
    with pytest.raises(TruthUnusable, match="no rows"):
        read_isc_truth(written(tmp_path / "gt.csv", "query_id,reference_id"))


def test_pictures_are_found_by_path_then_name_then_stem(tmp_path: Path) -> None:
    names = PictureNames(str(tmp_path), [str(tmp_path / name) for name in ("a/1.jpg", "b/1.jpg", "b/2.png", "3.jpg")])
    found = {name: names.position_of(name) for name in ("a/1.jpg", "./b/1.jpg", "2.png", "2", "3", "b\\2.png")}
    assert found == {"a/1.jpg": 0, "./b/1.jpg": 1, "2.png": 2, "2": 2, "3": 3, "b\\2.png": 2}
    assert names.position_of("1.jpg") is None  # two are called so
    assert names.position_of("4.jpg") is None


def test_what_is_not_there_is_listed_and_left_out(tmp_path: Path) -> None:
    named = NamedTruth(matches={"q1": {"r1", "gone"}, "lost": {"r1"}, "q2": set()}, junk={"q1": {"r2", "away"}})
    queries, references = pictures(tmp_path / "q", "q1.jpg", "q2.jpg", "q3.jpg"), pictures(tmp_path, "r1.jpg", "r2.jpg")
    truth = find_truth(named, queries, references)
    assert [(query.query, set(query.matches), set(query.ignored)) for query in truth.queries] == [
        (0, {0}, {1}), (1, set(), set()),
    ]  # fmt: skip
    assert truth.missing_queries == ["lost"]
    assert truth.missing_references == ["away", "gone"]
    assert truth.not_in_truth == 1
    facts = truth.to_json()
    assert facts["missing"] == {"queries": ["lost"], "references": ["away", "gone"]}
    assert (facts["num_queries"], facts["num_queries_with_match"], facts["num_matches"]) == (2, 1, 1)
    assert len(truth.remarks()) == 4


def test_all_queries_are_searched_with_where_a_set_says_so(tmp_path: Path) -> None:
    queries, references = pictures(tmp_path / "q", "q1.jpg", "q2.jpg"), pictures(tmp_path, "r1.jpg")
    truth = find_truth(NamedTruth(matches={"q2": {"r1"}}), queries, references, search_all=True)
    assert [(query.query, set(query.matches)) for query in truth.queries] == [(0, set()), (1, {0})]
    assert truth.not_in_truth == 0


def test_a_query_is_left_out_of_its_own_ranking_by_whatever_path(tmp_path: Path) -> None:
    folder, link = tmp_path / "photos", tmp_path / "link"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(b"")
    os.symlink(folder, link)
    named = NamedTruth(matches={"a.jpg": {"a.jpg", "b.jpg"}})
    truth = find_truth(named, pictures(link, "a.jpg"), pictures(folder, "a.jpg", "b.jpg"))
    assert (set(truth.queries[0].matches), set(truth.queries[0].ignored)) == ({1}, {0})
    assert truth.own_references == [str(link / "a.jpg")]


def test_truth_without_a_match_that_is_there_is_an_error(tmp_path: Path) -> None:
    queries, references = pictures(tmp_path / "q", "q1.jpg"), pictures(tmp_path, "r1.jpg")
    for matches in ({"q1": set[str]()}, {"q1": {"gone"}}, {"lost": {"r1"}}):
        with pytest.raises(EvaluationImpossible, match="expected a query with a match") as caught:
            find_truth(NamedTruth(matches=matches), queries, references)
        assert "\n" not in str(caught.value)

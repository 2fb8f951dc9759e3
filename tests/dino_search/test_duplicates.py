"""Finding duplicates, on given vectors: which files make a group, what is said of pairs, and what is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import select

from dino_index.catalog import ImageRow
from dino_index.copy_decisions import Decision, Verdict
from dino_index.embedding import EmbeddedFile, FileFacts
from dino_index.image_files import ListedFile
from dino_index.recording import BatchRecorder, remove_images
from dino_search.duplicate_results import Duplicates
from dino_search.duplicates import CopyRule, DuplicateOptions, find_duplicates, fixed_rule
from vector_shelf import VectorShelf

DIM = 8


@pytest.fixture
def shelf(home: Path) -> VectorShelf:
    return VectorShelf(home, DIM)


def at(angle: float) -> NDArray[np.float64]:
    """A vector in a plane; two of them have the cosine of the difference of their angles (degrees)."""
    vector = np.zeros(DIM)
    vector[:2] = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return vector


def digest(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()


def fill(shelf: VectorShelf, *images: tuple[str, str, float], **facts: Mapping[str, int]) -> None:
    """Images as (name, content, angle); facts: size, mtime_ns, width and height by name without extension."""
    outcomes = []
    for name, content, angle in images:
        path = shelf.files / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        known = {"size": 1, "mtime_ns": 1, "width": 1, "height": 1} | dict(facts.get(path.stem, {}))
        of_file = FileFacts(digest(content), known["size"], known["mtime_ns"], known["width"], known["height"])
        vector_D = at(angle).astype(np.float16)
        outcomes.append(
            EmbeddedFile(ListedFile(str(path), known["size"], known["mtime_ns"]), of_file, vector_D, vector_D)
        )
    with shelf.catalog.writing() as session:
        BatchRecorder(session, shelf.collection).record(outcomes, None)


def found_in(
    shelf: VectorShelf, *, rule: CopyRule | None = None, verdicts: Mapping[Any, Verdict] | None = None, **options: Any
) -> Duplicates:
    return find_duplicates(
        shelf.catalog, "default", DuplicateOptions(**options), rule or fixed_rule(0.95), verdicts=verdicts
    )


def names(found: Duplicates) -> list[list[str]]:
    return [[Path(file.path).stem for file in group.files] for group in found.groups]


def said(one: str, other: str, verdict: Verdict) -> dict[tuple[bytes, bytes], Verdict]:
    left, right = sorted((digest(one), digest(other)))
    return {(left, right): verdict}


def test_nothing_and_one_image_have_no_duplicates(shelf: VectorShelf) -> None:
    assert found_in(shelf).to_json() | {"model": ""} == {
        "collection": "default", "model": "", "images": 0, "failed": 0, "group_by": "components",
        "keep": "resolution", "remarks": [], "groups": [],
    }  # fmt: skip
    fill(shelf, ("a.jpg", "a", 0))
    assert names(found_in(shelf)) == []


def test_copies_and_equal_files_are_one_group(shelf: VectorShelf) -> None:
    fill(shelf, ("a.jpg", "a", 0), ("b.jpg", "b", 10), ("c.jpg", "a", 0), ("other.jpg", "o", 90))
    (group,) = found_in(shelf).groups
    assert [Path(file.path).stem for file in group.files] == ["a", "c", "b"]
    assert [file.identical for file in group.files] == [False, True, False]
    assert [file.keep for file in group.files] == [True, False, False]
    assert [file.score for file in group.files] == pytest.approx([1, 1, np.cos(np.radians(10))], abs=1e-3)
    assert group.min_score == pytest.approx(np.cos(np.radians(10)), abs=1e-3)
    assert not group.chained


def test_a_chain_is_marked_and_taken_apart_by_other_groupings(shelf: VectorShelf) -> None:
    fill(shelf, *((f"{number}.jpg", str(number), angle) for number, angle in enumerate((0, 14, 30, 44))))
    (group,) = found_in(shelf).groups
    assert len(group.files) == 4
    assert group.chained
    assert group.min_score == pytest.approx(np.cos(np.radians(44)), abs=1e-3)
    assert [file.direct for file in group.files] == [True, True, False, False]
    assert names(found_in(shelf, linkage="star")) == [["0", "1", "2"]]
    assert all(not group.chained for group in found_in(shelf, linkage="complete").groups)
    assert sorted(map(sorted, names(found_in(shelf, linkage="complete")))) == [["0", "1"], ["2", "3"]]


def test_ten_thousand_identical_images_are_one_group(shelf: VectorShelf) -> None:
    fill(shelf, *((f"{number:05d}.jpg", "same", 0) for number in range(10_000)))
    found = found_in(shelf)
    (group,) = found.groups
    assert len(group.files) == 10_000
    assert sum(file.identical for file in group.files) == 9_999
    assert found.pairs is not None
    assert len(found.pairs) == 9_999


def test_files_of_equal_vectors_but_other_bytes_are_copies_and_not_identical(shelf: VectorShelf) -> None:
    fill(shelf, *((f"{number:03d}.jpg", str(number), 0) for number in range(200)))
    found = found_in(shelf)
    (group,) = found.groups
    assert len(group.files) == 200
    assert not any(file.identical for file in group.files)
    assert [remark.split(":")[0][-14:] for remark in found.remarks] == ["by the hundred"]
    for linkage in ("star", "complete"):
        assert [len(group.files) for group in found_in(shelf, linkage=linkage).groups] == [200]


def test_a_person_joins_what_scores_low_and_parts_what_scores_high(shelf: VectorShelf) -> None:
    fill(shelf, ("a.jpg", "a", 0), ("b.jpg", "b", 5), ("c.jpg", "c", 60), ("d.jpg", "d", 120))
    verdicts = said("a", "b", "not_copy") | said("c", "d", "copy") | said("a", "unknown", "copy")
    found = found_in(shelf, verdicts=verdicts)
    assert names(found) == [["c", "d"]]
    assert not found.groups[0].chained
    assert all(file.direct for file in found.groups[0].files)
    assert found.pairs is not None
    assert [(Path(m.query).stem, Path(m.reference).stem, m.decision, m.reason, m.verdict)
            for m in found.pairs.matches()] == [
        ("a", "b", "different", "verdict", "not_copy"), ("c", "d", "copy", "verdict", "copy"),
    ]  # fmt: skip


@pytest.mark.parametrize("linkage", ["components", "star", "complete"])
def test_what_a_person_parted_is_not_joined_over_a_third(shelf: VectorShelf, linkage: str) -> None:
    fill(shelf, ("a.jpg", "a", 0), ("b.jpg", "b", 4), ("c.jpg", "c", 9))
    (group,) = found_in(shelf, verdicts=said("a", "c", "not_copy"), linkage=linkage).groups
    assert sorted(Path(file.path).stem for file in group.files) == ["a", "b"]


def test_files_in_one_folder_are_no_pair_when_told(shelf: VectorShelf) -> None:
    fill(shelf, ("one/a.jpg", "a", 0), ("one/b.jpg", "b", 5), ("one/c.jpg", "a", 0))
    assert names(found_in(shelf, ignore_same_folder=True)) == []
    assert names(found_in(shelf)) == [["a", "c", "b"]]
    # One in another folder is a copy of all three, and so they are one group.
    fill(shelf, ("two/d.jpg", "d", 8))
    assert [sorted(group) for group in names(found_in(shelf, ignore_same_folder=True))] == [["a", "b", "c", "d"]]


def test_equal_files_in_two_folders_are_a_pair(shelf: VectorShelf) -> None:
    fill(shelf, ("one/a.jpg", "a", 0), ("two/b.jpg", "a", 0))
    assert names(found_in(shelf, ignore_same_folder=True)) == [["a", "b"]]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [("resolution", "big"), ("size", "heavy"), ("oldest", "old"), ("newest", "new"), ("path", "a")],
)
def test_the_policy_chooses_what_to_keep(shelf: VectorShelf, keep: str, expected: str) -> None:
    files = ["old.jpg", "big.jpg", "new.jpg", "heavy.jpg", "a.jpg"]
    fill(
        shelf, *((name, name, number) for number, name in enumerate(files)),
        big={"width": 20, "height": 10, "mtime_ns": 5}, heavy={"size": 100, "mtime_ns": 5},
        old={"mtime_ns": 1}, new={"mtime_ns": 9}, a={"mtime_ns": 5},
    )  # fmt: skip
    assert names(found_in(shelf, keep=keep))[0][0] == expected


def test_without_a_difference_that_counts_the_oldest_and_then_the_path_decide(shelf: VectorShelf) -> None:
    fill(shelf, ("c.jpg", "x", 0), ("b.jpg", "x", 0), ("a.jpg", "x", 0), a={"mtime_ns": 3})
    assert names(found_in(shelf))[0][0] == "b"


def test_uncertain_pairs_are_listed_and_not_grouped(shelf: VectorShelf) -> None:
    def decide(score: float) -> tuple[Decision, float | None]:
        return ("copy", 0.99) if score >= 0.99 else ("uncertain", 0.5) if score >= 0.8 else ("different", 0.0)

    fill(shelf, ("a.jpg", "a", 0), ("b.jpg", "b", 5), ("c.jpg", "c", 30))
    rule = CopyRule(decide=decide, lowest_score=0.8)
    found = found_in(shelf, rule=rule)
    assert names(found) == [["a", "b"]]
    assert found.pairs is not None
    rows = [
        (Path(m.query).stem, Path(m.reference).stem, m.rank, m.decision, m.precision) for m in found.pairs.matches()
    ]
    assert rows == [("a", "b", 1, "copy", 0.99), ("a", "c", 2, "uncertain", 0.5), ("b", "c", 1, "uncertain", 0.5)]
    few = found_in(shelf, rule=rule, min_score=0.95)
    assert names(few) == names(found)
    assert few.pairs is not None
    assert len(few.pairs) == 1


def test_images_that_are_removed_meanwhile_are_left_out(shelf: VectorShelf) -> None:
    fill(shelf, ("a.jpg", "a", 0), ("b.jpg", "b", 2), ("c.jpg", "c", 4), ("x.jpg", "x", 80), ("y.jpg", "y", 82))
    with shelf.catalog.reading() as session:
        ids = {row.path: row.id for row in session.scalars(select(ImageRow))}

    def remove(done_frac: float) -> None:
        with shelf.catalog.writing() as session:
            remove_images(session, shelf.collection, [ids["a.jpg"], ids["x.jpg"]])

    found = find_duplicates(shelf.catalog, "default", DuplicateOptions(), fixed_rule(0.95), on_progress=remove)
    assert names(found) == [["b", "c"]]
    assert [group.group for group in found.groups] == [1]
    assert found.pairs is not None
    assert [(Path(m.query).stem, Path(m.reference).stem) for m in found.pairs.matches()] == [("b", "c")]


def test_a_pair_names_its_contents_for_verdicts(shelf: VectorShelf) -> None:
    fill(shelf, ("a.jpg", "a", 0), ("b.jpg", "b", 5))
    pairs = found_in(shelf).pairs
    assert pairs is not None
    (match,) = pairs.matches()
    assert (match.query_sha256, match.reference_sha256) == (digest("a").hex(), digest("b").hex())
    assert match.score == match.cosine == pytest.approx(np.cos(np.radians(5)), abs=1e-3)


@pytest.mark.parametrize("copy_score", [0.0, 1.01, float("nan")])
def test_a_copy_score_out_of_range_is_refused(copy_score: float) -> None:
    with pytest.raises(ValueError, match="copy score must be above 0"):
        fixed_rule(copy_score)

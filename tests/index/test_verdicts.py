"""Verdicts outlive collections, and nothing of them is lost."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from catalog_rows import an_image, fill
from databases import created_catalog, open_catalog
from dino_index import verdicts
from dino_index.catalog import Catalog
from dino_index.copy_decisions import Verdict
from dino_index.verdicts import (
    Pair,
    RecordedVerdict,
    VerdictCounts,
    drop_verdicts,
    forget_verdict,
    load_verdicts,
    ordered_pair,
    record_verdicts,
    recorded_verdicts,
)

pytestmark = pytest.mark.usefixtures("database")

A, B, C, D = (bytes([value]) * 32 for value in (0, 1, 0x7F, 0xFF))
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def a_verdict(pair: Pair, decision: Verdict = "copy", note: str = "", at: datetime = AT) -> RecordedVerdict:
    return RecordedVerdict(pair=pair, decision=decision, note=note, decided_at=at)


def record(catalog: Catalog, *recorded: RecordedVerdict) -> VerdictCounts:
    with catalog.writing() as session:
        return record_verdicts(session, recorded)


@pytest.fixture
def catalog(home: Path) -> Catalog:
    return created_catalog(home)


def test_a_pair_in_both_directions_is_one_pair(catalog: Catalog) -> None:
    assert ordered_pair(B, A) == ordered_pair(A, B) == (A, B)
    assert record(catalog, a_verdict(ordered_pair(D, A)), a_verdict(ordered_pair(A, D), "not_copy")).added == 1
    with catalog.reading() as session:
        assert load_verdicts(session) == {(A, D): "not_copy"}


def test_recording_counts_what_is_new_what_changes_and_what_stays(catalog: Catalog) -> None:
    assert record(catalog, a_verdict((A, B)), a_verdict((A, C))) == VerdictCounts(added=2)
    later = AT.replace(year=2027)
    counts = record(
        catalog,
        a_verdict((A, B), at=later),
        a_verdict((A, C), "not_copy", at=later),
        a_verdict((B, C), note="Ä", at=later),
    )
    assert counts == VerdictCounts(added=1, changed=1, unchanged=1)
    with catalog.reading() as session:
        found = {item.pair: (item.decision, item.note, item.decided_at) for item in recorded_verdicts(session)}
    assert found == {(A, B): ("copy", "", AT), (A, C): ("not_copy", "", later), (B, C): ("copy", "Ä", later)}


def test_loading_gives_the_asked_pairs_alone(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(bytes([0, number // 256, number % 256]) + bytes(29), D) for number in range(1200)]
    record(catalog, *(a_verdict(pair) for pair in pairs))
    asked = [*pairs[::2], (A, B), (B, D)]
    for most in (10_000, 100):  # asking part by part, and reading all
        monkeypatch.setattr(verdicts, "_MAX_PAIRS_ASKED", most)
        with catalog.reading() as session:
            assert load_verdicts(session, asked) == dict.fromkeys(pairs[::2], "copy")
            assert load_verdicts(session, []) == {}
    with catalog.reading() as session:
        assert len(load_verdicts(session)) == 1200


def test_verdicts_of_a_collection_are_those_with_a_picture_of_it(catalog: Catalog) -> None:
    fill(catalog, 1)
    with catalog.writing() as session:
        session.add(an_image("b.jpg", sha256=B))
    record(catalog, a_verdict((A, B)), a_verdict((B, C)), a_verdict((A, C)))
    with catalog.reading() as session:
        assert [item.pair for item in recorded_verdicts(session, 1)] == [(A, B), (B, C)]
        assert recorded_verdicts(session, 2) == []


def test_of_two_who_record_at_once_both_are_kept(catalog: Catalog, home: Path) -> None:
    pairs = [(bytes([number]) * 32, D) for number in range(40)]
    barrier = threading.Barrier(2)
    counts = []

    def work(mine: list[Pair]) -> None:
        own = open_catalog(home)
        barrier.wait(timeout=20)
        for pair in mine:
            counts.append(record(own, a_verdict(pair)))

    threads = [threading.Thread(target=work, args=(part,)) for part in (pairs[:30], pairs[10:][::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(count.added for count in counts) == 40
    assert sum(count.unchanged for count in counts) == 20
    with catalog.reading() as session:
        assert set(load_verdicts(session)) == set(pairs)


def test_dropping_takes_pairs_with_a_named_picture_on_either_side(catalog: Catalog) -> None:
    record(catalog, a_verdict((A, B)), a_verdict((B, C)), a_verdict((C, D)))
    with catalog.writing() as session:
        assert drop_verdicts(session, [B]) == 2
    with catalog.reading() as session:
        assert load_verdicts(session) == {(C, D): "copy"}


def test_one_decision_can_be_taken_back(catalog: Catalog) -> None:
    record(catalog, a_verdict((A, B)), a_verdict((B, C)))
    with catalog.writing() as session:
        assert forget_verdict(session, (A, B))
        assert not forget_verdict(session, (A, B))
    with catalog.reading() as session:
        assert load_verdicts(session) == {(B, C): "copy"}

"""People's durable decisions on pairs of pictures, in the catalog: keyed by the pictures' bytes alone.

They are no part of any collection: indexing again, another model and `remove` leave them, and one of the pictures, or
both, may never have been indexed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from sqlalchemy import ColumnElement, delete, insert, or_, select, tuple_
from sqlalchemy.orm import Session

from dino_index.catalog import ImageRow, VerdictRow, bound_parts
from dino_index.copy_decisions import Verdict

Pair = tuple[bytes, bytes]
"""The sha256 of two pictures' bytes, the lower one first."""

# Beyond this many pairs, reading the whole table is quicker than asking for them one part after the other.
_MAX_PAIRS_ASKED = 5_000


@dataclass(frozen=True, kw_only=True)
class RecordedVerdict:
    """One decision. pair: in order; see `ordered_pair`."""

    pair: Pair
    decision: Verdict
    note: str = ""
    decided_at: datetime


@dataclass(frozen=True, kw_only=True)
class VerdictCounts:
    """What recording verdicts came to. changed: decision or note was another; unchanged ones keep their time."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0


def ordered_pair(one: bytes, other: bytes) -> Pair:
    """The two digests as a key that is the same in both directions."""
    assert len(one) == len(other) == 32, (len(one), len(other))
    return (one, other) if one <= other else (other, one)


def load_verdicts(session: Session, pairs: Collection[Pair] | None = None) -> Mapping[Pair, Verdict]:
    """The decision by ordered pair, of those pairs that have one. pairs: in order; None for all that there are."""
    columns = select(VerdictRow.first_sha256, VerdictRow.second_sha256, VerdictRow.decision)
    if pairs is None or len(pairs) > _MAX_PAIRS_ASKED:
        rows = list(session.execute(columns))
        wanted = None if pairs is None else set(pairs)
        return {
            (first, second): cast(Verdict, decision)
            for first, second, decision in rows
            if wanted is None or (first, second) in wanted
        }
    found: dict[Pair, Verdict] = {}
    key = tuple_(VerdictRow.first_sha256, VerdictRow.second_sha256)
    for part in bound_parts(list(pairs)):
        for first, second, decision in session.execute(columns.where(key.in_(part))):
            found[first, second] = cast(Verdict, decision)
    return found


def recorded_verdicts(session: Session, collection_id: int | None = None) -> list[RecordedVerdict]:
    """All that is recorded, oldest first. collection_id: only of pairs of which it has a picture."""
    wanted = select(VerdictRow).order_by(VerdictRow.decided_at, VerdictRow.first_sha256, VerdictRow.second_sha256)
    if collection_id is not None:
        of_collection = select(ImageRow.sha256).where(
            ImageRow.collection_id == collection_id, ImageRow.sha256.is_not(None)
        )
        wanted = wanted.where(
            or_(VerdictRow.first_sha256.in_(of_collection), VerdictRow.second_sha256.in_(of_collection))
        )
    return [
        RecordedVerdict(
            pair=(row.first_sha256, row.second_sha256), decision=cast(Verdict, row.decision), note=row.note,
            decided_at=row.decided_at,
        )
        for row in session.scalars(wanted)
    ]  # fmt: skip


def record_verdicts(session: Session, verdicts: Iterable[RecordedVerdict]) -> VerdictCounts:
    """Adds decisions, or puts them in the place of earlier ones on the same pair; the last one for a pair counts.

    session: a writing one. Writers follow one after the other, so nothing that another process records is lost.
    """
    latest = {verdict.pair: verdict for verdict in verdicts}
    key = tuple_(VerdictRow.first_sha256, VerdictRow.second_sha256)
    added = changed = unchanged = 0
    for part in bound_parts(list(latest)):
        known = {
            (row.first_sha256, row.second_sha256): row
            for row in session.scalars(select(VerdictRow).where(key.in_(part)))
        }
        new = []
        for pair in part:
            verdict, row = latest[pair], known.get(pair)
            if row is None:
                new.append(
                    {
                        "first_sha256": pair[0], "second_sha256": pair[1], "decision": verdict.decision,
                        "note": verdict.note, "decided_at": verdict.decided_at,
                    }
                )  # fmt: skip
            elif (row.decision, row.note) != (verdict.decision, verdict.note):
                row.decision, row.note, row.decided_at = verdict.decision, verdict.note, verdict.decided_at
                changed += 1
            else:
                unchanged += 1
        if new:
            session.execute(insert(VerdictRow), new)
            added += len(new)
    session.flush()
    return VerdictCounts(added=added, changed=changed, unchanged=unchanged)


def forget_verdict(session: Session, pair: Pair) -> bool:
    """Takes back the decision on a pair; False where there was none. session: a writing one."""
    row = session.get(VerdictRow, pair)
    if row is not None:
        session.delete(row)
        session.flush()
    return row is not None


def drop_verdicts(session: Session, digests: Iterable[bytes]) -> int:
    """Forgets all decisions in which one of these pictures, by sha256, has a part; how many those were."""
    num_dropped = 0
    for part in bound_parts(sorted(digests)):
        named: ColumnElement[bool] = or_(VerdictRow.first_sha256.in_(part), VerdictRow.second_sha256.in_(part))
        pairs = session.execute(select(VerdictRow.first_sha256, VerdictRow.second_sha256).where(named)).all()
        session.execute(delete(VerdictRow).where(named), execution_options={"synchronize_session": False})
        num_dropped += len(pairs)
    return num_dropped

"""A collection's whitening and calibration in the catalog: frozen versions, of which the latest is in use.

Both belong to the collection's present model. Those of a model that it had before stay, and are in use again when it
gets that model back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from dino_index.catalog import CalibrationRow, WhiteningRow
from dino_index.collections import CollectionInfo

SINGLE_IMAGES = "image_sha256"
"""Tensor of a whitening's data, uint8 (N, 32): the sha256 of the images whose own vectors are in it."""

_Table = type[WhiteningRow] | type[CalibrationRow]


def latest_whitening(session: Session, collection: CollectionInfo) -> tuple[int, bytes] | None:
    """(version, safetensors bytes); None where none was learned."""
    row = session.get(WhiteningRow, (collection.id, collection.model_id, _latest(session, WhiteningRow, collection)))
    return (row.version, row.data) if row else None


def add_whitening(
    session: Session, collection: CollectionInfo, data: bytes, facts: Mapping[str, Any], *, after: int
) -> tuple[int, bytes]:
    """Adds the next version, and gives back what is the latest then.

    session: a writing one.
    data: of a safetensors file; the tensor `SINGLE_IMAGES` says of which images it has vectors, for purges to find.
    after: the version that was the latest when learning began, 0 for none. Where another process has added one since,
    that one is given back and nothing is added; so this can be repeated.
    """
    if (latest := latest_whitening(session, collection)) is not None and latest[0] > after:
        return latest
    version = after + 1
    session.add(
        WhiteningRow(
            collection_id=collection.id, model_id=collection.model_id, version=version, data=data, facts=dict(facts)
        )
    )
    session.flush()
    return version, data


def latest_calibration(session: Session, collection: CollectionInfo) -> tuple[int, dict[str, Any]] | None:
    """(version, value); None where there was none yet."""
    version = _latest(session, CalibrationRow, collection)
    row = session.get(CalibrationRow, (collection.id, collection.model_id, version))
    return (row.version, row.value) if row else None


def add_calibration(
    session: Session, collection: CollectionInfo, value: Mapping[str, Any], *, after: int
) -> tuple[int, dict[str, Any]]:
    """Adds the next version as `add_whitening` does, and gives back what is the latest then."""
    if (latest := latest_calibration(session, collection)) is not None and latest[0] > after:
        return latest
    version = after + 1
    session.add(
        CalibrationRow(collection_id=collection.id, model_id=collection.model_id, version=version, value=dict(value))
    )
    session.flush()
    return version, dict(value)


def drop_whitenings(session: Session, digests: Collection[bytes]) -> int:
    """Forgets every whitening that holds vectors of one of these images, by sha256; how many those were.

    Calibrations of the same collection and model go with them, as the scores that they are about came from there.
    """
    wanted = set(digests)
    num_dropped = 0
    keys = select(WhiteningRow.collection_id, WhiteningRow.model_id, WhiteningRow.version)
    for key in session.execute(keys).all() if wanted else ():
        # One at a time: such a row is some megabytes.
        row = session.get_one(WhiteningRow, tuple(key))
        if wanted.isdisjoint(_images_in(row.data)):
            session.expunge(row)
            continue
        session.delete(row)
        here = CalibrationRow.collection_id == row.collection_id, CalibrationRow.model_id == row.model_id
        session.execute(delete(CalibrationRow).where(*here))
        session.flush()
        num_dropped += 1
    return num_dropped


def _images_in(data: bytes) -> set[bytes]:
    """The sha256 of each image whose vector is in a whitening's data."""
    from safetensors.numpy import load

    digests_N32 = load(data).get(SINGLE_IMAGES)
    return set() if digests_N32 is None else {digest.tobytes() for digest in digests_N32}


def _latest(session: Session, table: _Table, collection: CollectionInfo) -> int:
    """The highest version; 0 where there is none."""
    here = table.collection_id == collection.id, table.model_id == collection.model_id
    return session.scalars(select(func.coalesce(func.max(table.version), 0)).where(*here)).one()

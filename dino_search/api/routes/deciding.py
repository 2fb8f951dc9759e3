"""`/verdicts`: what people decided about pairs."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import CollectionRow, ImageRow
from dino_index.errors import CollectionNotFound, RequestInvalid, ScopeMissing, VerdictNotFound
from dino_index.verdicts import RecordedVerdict, forget_verdict, ordered_pair, record_verdicts
from dino_search.api.access import Read, Write, current_key, require_collection
from dino_search.api.problems import documented
from dino_search.api.requests import engine_of
from dino_search.api.schemas import PairGiven, VerdictCounts, Verdicts, VerdictsRequest
from dino_search.api.stored_images import image_file
from dino_search.verdicts import listed_verdicts

router = APIRouter(tags=["verdicts"])

MAX_VERDICTS = 1000


@router.put("/verdicts", response_model=VerdictCounts, responses=documented(404, 409), dependencies=[Write])
async def put_verdicts(request: Request, asked: VerdictsRequest) -> Any:
    """Records decisions on pairs, all or none. They go before every score, and before earlier ones on the same pair."""
    engine = engine_of(request)

    def record(session: Session) -> dict[str, int]:
        now = datetime.now(UTC)
        verdicts = [
            RecordedVerdict(pair=_pair_of(session, each), decision=each.decision, note=each.note, decided_at=now)
            for each in asked.verdicts
        ]
        return asdict(record_verdicts(session, verdicts))

    await engine.catalog.in_thread(engine.catalog.create)
    return await engine.catalog.in_thread(engine.catalog.write, record)


@router.get("/verdicts", response_model=Verdicts, responses=documented(404), dependencies=[Read])
async def list_verdicts(
    request: Request,
    collection: Annotated[
        str | None, Query(min_length=1, max_length=255, description="Only on pairs with an image of it.")
    ] = None,
    cursor: Annotated[int, Query(ge=0, le=2**31, description="How many to leave out.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_VERDICTS)] = 100,
) -> Any:
    """Decisions, oldest first. A key that is for some collections has to name one."""
    engine = engine_of(request)
    key = current_key()
    told = None if key is None else key.collections
    if collection is None and told is not None:
        raise ScopeMissing(f"this key is not for all collections; name one: {', '.join(told)}", scope="read")
    try:
        found = await engine.catalog.in_thread(
            engine.catalog.read, lambda session: listed_verdicts(session, collection, told=told)
        )
    except CollectionNotFound:
        if collection is not None:
            raise
        found = []
    end = cursor + limit
    return {
        "verdicts": [row.to_json() for row in found[cursor:end]],
        "next_cursor": end if end < len(found) else None,
    }


@router.delete("/verdicts", status_code=204, responses=documented(404, 409), dependencies=[Write])
async def delete_verdict(request: Request, pair: Annotated[PairGiven, Query()]) -> Response:
    """Takes back the decision on a pair."""

    def forget(session: Session) -> None:
        if not forget_verdict(session, _pair_of(session, pair)):
            raise VerdictNotFound("expected a pair that somebody decided about; GET /verdicts lists them")

    engine = engine_of(request)
    await engine.catalog.in_thread(engine.catalog.write, forget)
    return Response(status_code=204)


def _pair_of(session: Session, given: PairGiven) -> tuple[bytes, bytes]:
    """Raises RequestInvalid, ImageNotFound, ScopeMissing."""
    digests = []
    for name, sha256, image_id in (
        ("query", given.query_sha256, given.query_id),
        ("reference", given.reference_sha256, given.reference_id),
    ):
        if (sha256 is None) == (image_id is None):
            raise RequestInvalid(f"verdicts: expected exactly one of {name}_sha256 and {name}_id")
        if image_id is not None:
            image = image_file(session, image_id)
            require_collection(image.collection)
            digests.append(image.sha256)
        else:
            digests.append(bytes.fromhex(sha256 or ""))
    if digests[0] == digests[1]:
        raise RequestInvalid("verdicts: expected two different pictures, found one and the same twice")
    _require_reached(session, digests)
    return ordered_pair(digests[0], digests[1])


def _require_reached(session: Session, digests: list[bytes]) -> None:
    """Raises ScopeMissing where the request's key is for collections of which none has either picture."""
    key = current_key()
    if key is None or key.collections is None:
        return
    reached = (
        select(ImageRow.id)
        .join(CollectionRow, CollectionRow.id == ImageRow.collection_id)
        .where(ImageRow.sha256.in_(digests), CollectionRow.name.in_(key.collections))
    )
    if session.scalar(reached.limit(1)) is None:
        raise ScopeMissing("this key is for collections that have neither of the two pictures", scope="write")

"""`/collections`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from dino_index.errors import CollectionNotFound
from dino_search.api.access import Read
from dino_search.api.engine import summaries
from dino_search.api.problems import documented
from dino_search.api.requests import engine_of
from dino_search.api.schemas import Collections

router = APIRouter(tags=["collections"])


@router.get("/collections", response_model=Collections, responses=documented(), dependencies=[Read])
async def list_collections(request: Request) -> Any:
    """All collections, by name."""
    engine = engine_of(request)
    try:
        return {"collections": await engine.in_catalog_thread(engine.read, summaries)}
    except CollectionNotFound:  # nothing has been indexed yet
        return {"collections": []}

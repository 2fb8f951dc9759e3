"""`POST /search`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from dino_search.api.access import Read
from dino_search.api.bodies import documented_body
from dino_search.api.pictures import parse, picture_of, read_body
from dino_search.api.problems import documented
from dino_search.api.requests import answered, client_of, engine_of
from dino_search.api.schemas import SearchRequest, SearchResults

router = APIRouter(tags=["search"], dependencies=[Read])


@router.post(
    "/search",
    response_model=SearchResults,
    responses=documented(404, 409, 413, 415),
    openapi_extra=documented_body(SearchRequest, {"collection": "default", "image_id": 1, "k": 5}),
)
async def search(request: Request) -> Any:
    """The images most like a picture."""
    body = await read_body(request)
    asked = parse(SearchRequest, body.fields)
    picture = picture_of(body, asked)
    found = await answered(
        request,
        engine_of(request).search(
            [picture], client=client_of(request), collection=asked.collection, k=asked.k,
            min_score=asked.min_score, filters=asked.filter,
        ),
    )  # fmt: skip
    return found[0]

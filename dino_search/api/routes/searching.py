"""`POST /search`, `/search/batch`, `/classify`, `/embed` and `/attention`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from dino_index.errors import DinoSearchError, RequestInvalid
from dino_search.api import attention as attending
from dino_search.api.access import Read
from dino_search.api.bodies import documented_body
from dino_search.api.pictures import Picture, RequestBody, parse, picture_from, picture_of, read_body
from dino_search.api.problems import documented
from dino_search.api.requests import answered, engine_of, resolved, settings_of, whose
from dino_search.api.schemas import (
    AttentionMaps,
    AttentionRequest,
    BatchRequest,
    BatchResults,
    Classifications,
    ClassifyRequest,
    Embedding,
    EmbedRequest,
    PictureGiven,
    SearchRequest,
    SearchResults,
)
from dino_search.api.threads import in_thread
from dino_search.neighbours import classify_by

router = APIRouter(tags=["search"], dependencies=[Read])

_PROBLEMS = documented(404, 409, 413, 415)


@router.post(
    "/search",
    response_model=SearchResults,
    responses=_PROBLEMS,
    openapi_extra=documented_body(SearchRequest, {"image_id": 1, "k": 5, "filter": ["width >= 640"]}),
)
async def search(request: Request) -> Any:
    """The images most like a picture."""
    body = await read_body(request)
    asked = parse(SearchRequest, body.fields)
    picture = await resolved(request, picture_of(body, asked))
    found = await answered(
        request,
        engine_of(request).search(
            [picture], **whose(request, asked.collection), k=asked.k,
            min_score=asked.min_score, filters=asked.filter,
        ),
    )  # fmt: skip
    return found[0]


@router.post(
    "/search/batch",
    response_model=BatchResults,
    responses=_PROBLEMS,
    openapi_extra=documented_body(
        BatchRequest,
        {"queries": [{"image_id": 1}, {"image_id": 2}], "k": 5},
        files={"image": "Picture files; the field comes once for each."},
        several=True,
    ),
)
async def search_batch(request: Request) -> Any:
    """The images most like each of several pictures.

    What is wrong with a picture is said in its place; where it is so of all of them, it is the answer.
    """
    most = settings_of(request).max_batch_images
    body = await read_body(request, max_files=most)
    asked = parse(BatchRequest, body.fields)
    pictures = [await resolved(request, picture) for picture in _pictures_of(body, asked, most)]
    answers = await answered(
        request,
        engine_of(request).search_each(
            pictures, **whose(request, asked.collection), k=asked.k,
            min_score=asked.min_score, filters=asked.filter,
        ),
    )  # fmt: skip
    good = [each for each in answers if not isinstance(each, DinoSearchError)]
    if not good:
        assert isinstance(answers[0], DinoSearchError)
        raise answers[0]
    common = {"collection": good[0].collection, "model": good[0].model}
    queries = [
        common | {"query": picture.name, "status": "failed", "reason": str(each), "results": []}
        if isinstance(each, DinoSearchError)
        else each.to_json()
        for picture, each in zip(pictures, answers, strict=True)
    ]
    return common | {"queries": queries}


@router.post(
    "/classify",
    response_model=Classifications,
    responses=_PROBLEMS,
    openapi_extra=documented_body(ClassifyRequest, {"image_id": 1, "k": 20}),
)
async def classify(request: Request) -> Any:
    """The label of a picture, by weighted vote of its nearest labelled images."""
    body = await read_body(request)
    asked = parse(ClassifyRequest, body.fields)
    picture = await resolved(request, picture_of(body, asked))
    found = await answered(
        request,
        engine_of(request).search(
            [picture], **whose(request, asked.collection), k=asked.k, labelled=True,
            filters=asked.filter,
        ),
    )  # fmt: skip
    return classify_by(
        found, collection=found[0].collection, model=found[0].model, k=asked.k, temperature=asked.temperature
    )


@router.post(
    "/embed",
    response_model=Embedding,
    responses=_PROBLEMS,
    openapi_extra=documented_body(EmbedRequest, {"image_id": 1}),
)
async def embed(request: Request) -> Any:
    """The vector of a picture under a collection's model."""
    body = await read_body(request)
    asked = parse(EmbedRequest, body.fields)
    picture = await resolved(request, picture_of(body, asked))
    info, vector = await answered(
        request,
        engine_of(request).embed(picture, **whose(request, asked.collection)),
    )
    return {
        "query": picture.name, "collection": info.name, "model": info.model_name, "fingerprint": info.fingerprint,
        "dim": info.dim, "embedding": vector,
    }  # fmt: skip


@router.post(
    "/attention",
    response_model=AttentionMaps,
    responses={
        200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
        **_PROBLEMS,
    },
    openapi_extra=documented_body(AttentionRequest, {"image_id": 1, "format": "maps"}),
)
async def attention(request: Request) -> Any:
    """Where a collection's model looks in a picture."""
    body = await read_body(request)
    asked = parse(AttentionRequest, body.fields)
    picture = await resolved(request, picture_of(body, asked))
    engine = engine_of(request)
    seen = await answered(
        request,
        attending.attention_of(engine, picture, **whose(request, asked.collection)),
    )
    maps_Hhw = seen.maps_Hhw
    if asked.head is not None and asked.head >= len(maps_Hhw):
        raise RequestInvalid(f"head: expected one of the {len(maps_Hhw)} heads, 0 to {len(maps_Hhw) - 1}, "
                             f"found {asked.head}")  # fmt: skip
    if asked.format == "overlay":
        png = await in_thread(engine.decoders, attending.overlay_of, engine, seen, asked.head)
        return Response(png, media_type="image/png")
    if asked.head is not None:
        maps_Hhw = maps_Hhw[asked.head : asked.head + 1]
    return {"collection": seen.collection, "model": seen.model, "maps": maps_Hhw.tolist()}


def _pictures_of(body: RequestBody, asked: BatchRequest, most: int) -> list[Picture]:
    """Raises RequestInvalid, ImageError."""
    if body.is_form:
        if body.files.keys() - {"image"} or asked.queries:
            raise RequestInvalid("expected pictures as files in the field 'image', found something else")
        pictures = [picture_from(PictureGiven(), upload) for upload in body.files.get("image", [])]
    else:
        pictures = [picture_from(given) for given in asked.queries]
    if not 1 <= len(pictures) <= most:
        raise RequestInvalid(f"expected 1 to {most} pictures, found {len(pictures)}")
    return pictures

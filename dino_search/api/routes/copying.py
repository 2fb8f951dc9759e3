"""`POST /copies`, `POST /compare` and `GET /duplicates`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from dino_index.copy_detection import DetectionOptions
from dino_index.errors import RequestInvalid
from dino_search.api.access import Read
from dino_search.api.bodies import documented_body
from dino_search.api.pictures import parse, picture_from, picture_of, read_body
from dino_search.api.problems import documented
from dino_search.api.requests import answered, resolved, settings_of, whose
from dino_search.api.schemas import (
    CompareRequest,
    Copies,
    CopiesRequest,
    CopyMatch,
    CopyRules,
    Duplicates,
)
from dino_search.copies import CopiesOptions
from dino_search.duplicates import DuplicateOptions

router = APIRouter(tags=["copies"], dependencies=[Read])

_PROBLEMS = documented(404, 409, 413, 415)
MAX_GROUPS = 500


@router.post(
    "/copies",
    response_model=Copies,
    responses=_PROBLEMS,
    openapi_extra=documented_body(CopiesRequest, {"image_id": 1, "k": 5, "verify": 1}),
)
async def copies(request: Request) -> Any:
    """Which images a picture is an edited copy of, and how sure that is."""
    body = await read_body(request)
    asked = parse(CopiesRequest, body.fields)
    picture = await resolved(request, picture_of(body, asked))
    options = _options(request, asked, k=asked.k, verify=asked.verify, match_share=asked.match_share)
    return await answered(
        request,
        request.app.state.copying.copies(
            picture,
            options,
            **whose(request, asked.collection),
            min_score=asked.min_score,
        ),
    )


@router.post(
    "/compare",
    response_model=CopyMatch,
    responses=_PROBLEMS,
    openapi_extra=documented_body(
        CompareRequest,
        {"a": {"image_id": 1}, "b": {"image_id": 2}},
        files={"a": "A picture file.", "b": "Another."},
    ),
)
async def compare(request: Request) -> Any:
    """Whether one picture is an edited copy of the other, by a collection's model and calibration."""
    body = await read_body(request, max_files=2)
    asked = parse(CompareRequest, body.fields)
    if unknown := sorted(body.files.keys() - {"a", "b"}):
        raise RequestInvalid(f"expected files in the fields 'a' and 'b', found files in {', '.join(unknown)}")
    pictures = []
    for name, given in (("a", asked.a), ("b", asked.b)):
        uploads = body.files.get(name, [])
        if len(uploads) > 1:
            raise RequestInvalid(f"expected one file in the field {name!r}, found {len(uploads)}")
        pictures.append(await resolved(request, picture_from(given, uploads[0] if uploads else None, file=name)))
    options = _options(request, asked, k=1, verify=asked.verify, match_share=0.5)
    match = await answered(
        request,
        request.app.state.copying.compare(*pictures, options, **whose(request, asked.collection)),
    )
    return match.to_json()


@router.get("/duplicates", response_model=Duplicates, responses=documented(404, 409))
async def duplicates(
    request: Request,
    collection: Annotated[str | None, Query(min_length=1, max_length=255)] = None,
    group: Annotated[
        Literal["components", "star", "complete"],
        Query(description="components: all that is connected; star: all are copies of one; complete: of each other."),
    ] = "components",
    keep: Annotated[
        Literal["resolution", "size", "oldest", "newest", "path"], Query(description="Which file of a group to keep.")
    ] = "resolution",
    target_precision: Annotated[float, Query(gt=0, lt=1)] = 0.99,
    copy_score: Annotated[
        float | None, Query(gt=0, le=1, description="Call copies from this cosine on instead.")
    ] = None,
    ignore_same_folder: bool = False,
    unchecked: Annotated[bool, Query(description="Decide by stored embeddings alone.")] = False,
    cursor: Annotated[int, Query(ge=0, le=2**31, description="The group after which to begin.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_GROUPS)] = 50,
) -> Any:
    """What a collection holds more than once, in groups.

    The first request for a state of the collection may take longer than allowed; the search goes on, so ask again.
    """
    options = DuplicateOptions(linkage=group, keep=keep, ignore_same_folder=ignore_same_folder, checked=not unchecked)
    found = await answered(
        request,
        request.app.state.duplicating.duplicates(
            options,
            collection=whose(request, collection)["collection"],
            target_precision=target_precision,
            copy_score=copy_score,
        ),
    )
    shown = found.groups[cursor : cursor + limit]
    end = cursor + len(shown)
    return found.with_groups(shown).to_json() | {
        "num_groups": len(found.groups),
        "next_cursor": end if end < len(found.groups) else None,
    }


def _options(request: Request, asked: CopyRules, *, k: int, verify: int, match_share: float) -> CopiesOptions:
    return CopiesOptions(
        detection=DetectionOptions(k=k, regions=asked.regions, variants=asked.variants, num_verified=verify),
        target_precision=asked.target_precision,
        copy_score=asked.copy_score,
        match_share=match_share,
        limits=settings_of(request).limits,
    )

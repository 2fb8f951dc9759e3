"""`GET /images/{id}/thumbnail`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response

from dino_search.api.access import Read, require_collection
from dino_search.api.problems import documented
from dino_search.api.requests import answered, engine_of
from dino_search.api.stored_images import image_file
from dino_search.api.threads import in_thread
from dino_search.api.thumbnails import SIDES

router = APIRouter(tags=["images"], dependencies=[Read])

ImageIdInPath = Annotated[int, Path(ge=1, le=2**63 - 1, description="Id of an image.")]


@router.get(
    "/images/{image_id}/thumbnail",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
        304: {"description": "The client has it already."},
        **documented(404, 413, 415),
    },
)
async def thumbnail(
    request: Request,
    image_id: ImageIdInPath,
    side: Annotated[int, Query(ge=1, le=SIDES[-1], description="Longer side in pixels; rounded up.")] = 192,
) -> Response:
    """A small JPEG of an image, upright and without any metadata."""
    engine = engine_of(request)
    rounded = next(each for each in SIDES if each >= side)
    image = await engine.catalog.in_thread(engine.catalog.read, lambda session: image_file(session, image_id))
    require_collection(image.collection)
    # Of the bytes that were indexed: another file under the same id is another thumbnail.
    etag = f'"{image.sha256.hex()[:32]}-{rounded}"'
    headers = {"ETag": etag, "Cache-Control": "private, max-age=3600"}
    if etag in [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    made = await answered(
        request,
        in_thread(engine.decoders, engine.thumbnails.get, image.path, image.sha256, rounded, engine.settings.limits),
    )  # fmt: skip
    return Response(made.jpeg, media_type="image/jpeg", headers=headers)

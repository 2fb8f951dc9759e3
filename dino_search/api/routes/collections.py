"""`/collections` and the images in each."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response

from dino_index.errors import CollectionNotFound, RequestInvalid
from dino_search.api import cataloguing
from dino_search.api.access import Admin, Read, Write, reaches_collection, require_collection
from dino_search.api.bodies import documented_body
from dino_search.api.pictures import from_base64, parse, read_body
from dino_search.api.problems import documented
from dino_search.api.requests import answered, client_of, engine_of, settings_of
from dino_search.api.schemas import (
    CollectionRequest,
    Collections,
    CollectionSummary,
    ImageFacts,
    Images,
    UploadFields,
    UploadRequest,
    Uploads,
)

router = APIRouter(tags=["collections"])

CollectionInPath = Annotated[str, Path(min_length=1, max_length=255, description="Name of a collection.")]
ImageIdInPath = Annotated[int, Path(ge=1, le=2**63 - 1, description="Id of an image.")]
MAX_IMAGES = 1000
# A PNG of one pixel, for the documentation.
_ONE_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNwaDgAAAKEAYEml6crAAAAAElFTkSuQmCC"


@router.get("/collections", response_model=Collections, responses=documented(), dependencies=[Read])
async def list_collections(request: Request) -> Any:
    """All collections, by name."""
    engine = engine_of(request)
    try:
        found = await engine.catalog.in_thread(engine.catalog.read, cataloguing.summaries)
    except CollectionNotFound:  # nothing has been indexed yet
        found = []
    return {"collections": [each for each in found if reaches_collection(each["collection"])]}


@router.post(
    "/collections",
    response_model=CollectionSummary,
    status_code=201,
    responses=documented(404, 409),
    dependencies=[Admin],
)
async def create_collection(request: Request, asked: CollectionRequest) -> Any:
    """Makes an empty collection, to send pictures to."""
    require_collection(asked.collection)
    return await answered(request, cataloguing.create(engine_of(request), asked.collection, asked.model))


@router.get(
    "/collections/{collection}", response_model=CollectionSummary, responses=documented(404), dependencies=[Read]
)
async def show_collection(request: Request, collection: CollectionInPath) -> Any:
    """One collection."""
    engine = engine_of(request)
    return await engine.catalog.in_thread(engine.catalog.read, lambda session: cataloguing.summary(session, collection))


@router.delete("/collections/{collection}", status_code=204, responses=documented(404), dependencies=[Admin])
async def delete_collection(request: Request, collection: CollectionInPath) -> Response:
    """Removes a collection with all that is known of its images. Pictures stay where they are, uploaded ones go."""
    await cataloguing.delete(engine_of(request), request.app.state.uploads, collection)
    return Response(status_code=204)


@router.get("/collections/{collection}/images", response_model=Images, responses=documented(404), dependencies=[Read])
async def list_images(
    request: Request,
    collection: CollectionInPath,
    cursor: Annotated[int, Query(ge=0, le=2**63 - 1, description="The image id after which to begin.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_IMAGES)] = 100,
    filters: Annotated[
        list[str] | None, Query(alias="filter", max_length=32, description="Conditions such as `status = failed`.")
    ] = None,
) -> Any:
    """The images of a collection by id, failed ones included."""
    engine = engine_of(request)
    return await engine.catalog.in_thread(
        engine.catalog.read, lambda session: cataloguing.images(session, collection, cursor, limit, filters or ())
    )


@router.post(
    "/collections/{collection}/images",
    response_model=Uploads,
    status_code=201,
    responses=documented(404, 409, 413, 415),
    dependencies=[Write],
    openapi_extra=documented_body(
        UploadRequest,
        {
            "pictures": [
                {
                    "image_base64": _ONE_PIXEL,
                    "name": "one.png",
                }
            ],
            "label": "bridge",
        },
        files={"image": "Picture files; the field comes once for each."},
        several=True,
    ),
)
async def add_images(request: Request, collection: CollectionInPath) -> Any:
    """Keeps pictures in the service's home and adds them to the collection at once.

    What is no usable picture is reported in its place; where none is, that is the answer.
    """
    most = settings_of(request).max_batch_images
    body = await read_body(request, max_files=most)
    if body.is_form:
        asked: UploadFields = parse(UploadFields, body.fields)
        if body.files.keys() - {"image"}:
            raise RequestInvalid("expected files in the field 'image', found some in another one")
        files = body.files.get("image", [])
    else:
        asked = sent = parse(UploadRequest, body.fields)
        files = [(each.name, from_base64(each.image_base64)) for each in sent.pictures]
    if not 1 <= len(files) <= most:
        raise RequestInvalid(f"expected 1 to {most} pictures, found {len(files)}")
    info, images = await answered(
        request,
        request.app.state.uploads.add(files, client=client_of(request), collection=collection, label=asked.label),
    )
    counts = Counter(image.status for image in images)
    return {
        "collection": info.name, "added": counts["added"], "skipped": counts["skipped"], "failed": counts["failed"],
        "images": images,
    }  # fmt: skip


@router.get(
    "/collections/{collection}/images/{image_id}",
    response_model=ImageFacts,
    responses=documented(404),
    dependencies=[Read],
)
async def show_image(request: Request, collection: CollectionInPath, image_id: ImageIdInPath) -> Any:
    """One image of a collection."""
    engine = engine_of(request)
    return await engine.catalog.in_thread(
        engine.catalog.read, lambda session: cataloguing.image(session, collection, image_id)
    )


@router.delete(
    "/collections/{collection}/images/{image_id}", status_code=204, responses=documented(404), dependencies=[Write]
)
async def delete_image(request: Request, collection: CollectionInPath, image_id: ImageIdInPath) -> Response:
    """Drops an image from the collection; its file stays, unless it was uploaded."""
    await request.app.state.uploads.remove(image_id, collection)
    return Response(status_code=204)

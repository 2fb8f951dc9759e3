"""The web page at `/`, and its files below `/web/`: for everybody, as what it asks of the API has keys of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

INDEX = "index.html"

# By name rather than by the machine's registry of types, which may call JavaScript plain text.
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, kw_only=True)
class PageFile:
    """One file of the page. etag: of its bytes, quoted."""

    data: bytes
    media_type: str
    etag: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """The files of the page by name. What is not among them cannot be asked for."""
    found = {}
    for file in files("dino_search").joinpath("web").iterdir():
        media_type = _MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None and file.is_file():
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            found[file.name] = PageFile(data=data, media_type=media_type, etag=f'"{digest[:32]}"')
    return found


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page."""
    return _answer(request, page_files()[INDEX])


@router.api_route("/web/{name}", methods=["GET", "HEAD"])
async def page_file(request: Request, name: str) -> Response:
    """A file that the page loads."""
    file = page_files().get(name)
    if file is None:
        raise HTTPException(404, "there is no such file of the page")
    return _answer(request, file)


def _answer(request: Request, file: PageFile) -> Response:
    # Asked for again each time, so that a page and its modules are never of two versions.
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)

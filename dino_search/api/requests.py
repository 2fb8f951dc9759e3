"""What all operations do with a request: who sent it, and giving up where the client has gone or time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypedDict, TypeVar

from fastapi import Request

from dino_index.errors import FetchingOff, NotReady, RequestTimedOut
from dino_search.api.access import require_collection
from dino_search.api.engine import Engine
from dino_search.api.pictures import Picture
from dino_search.api.settings import ServiceSettings

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody is there any more to be answered."""


def engine_of(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def settings_of(request: Request) -> ServiceSettings:
    settings: ServiceSettings = request.app.state.settings
    return settings


def client_of(request: Request) -> str:
    """Whose share of the queue a request takes: that of its key, else of its address."""
    key = getattr(request.state, "api_key", None)
    return f"key {key.id}" if key is not None else f"address {request.client.host if request.client else ''}"


class Whose(TypedDict):
    """What the engine asks of every request. client: whose share of the queue it takes."""

    client: str
    collection: str


def whose(request: Request, collection: str | None) -> Whose:
    """Who asks, and which collection is meant. Raises an error where the request's key is not for that one."""
    name = collection or settings_of(request).collection
    require_collection(name)
    return {"client": client_of(request), "collection": name}


async def resolved(request: Request, picture: Picture) -> Picture:
    """The picture, fetched where it is named by URL. Raises FetchingOff, and as the app's `fetch_picture` does."""
    if picture.url is None:
        return picture
    fetch = getattr(request.app.state, "fetch_picture", None)
    if fetch is None or not settings_of(request).fetch_urls:
        raise FetchingOff("image_url: this service fetches no pictures (fetch_urls); send the picture itself")
    data: bytes = await answered(request, fetch(picture.url))
    return Picture(name=picture.name, data=data)


async def answered(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives back, which is cancelled when the client goes or the time for requests is over.

    The request's body has been read. Raises RequestTimedOut, ClientGone, and what the work raises.
    """
    timeout_s = settings_of(request).request_timeout_s
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            try:
                return task.result()
            except asyncio.CancelledError as error:  # by the engine's end
                raise NotReady("the service is about to end") from error
        if gone.done():
            raise ClientGone
        raise RequestTimedOut(f"not done within {timeout_s:g} s (request_timeout_s); try again, or ask for less")
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""`create_app`: the one place that puts the service together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

# Before torch, which would share its OpenMP with it: then the threads of both count together, and with more of them
# than there are processors a pass for a picture that comes alone takes 1.6 times as long.
import faiss  # noqa: F401
from fastapi import FastAPI
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from starlette.requests import ClientDisconnect

from dino_search.api import problems
from dino_search.api.access import AccessControl
from dino_search.api.copying import Copying
from dino_search.api.draining import InFlight
from dino_search.api.duplicating import Duplicating
from dino_search.api.engine import Engine
from dino_search.api.job_runner import JobRunner
from dino_search.api.jobs import JobOptions, Jobs
from dino_search.api.keys import ApiKeys
from dino_search.api.metrics import MeasuredRequests, Metrics
from dino_search.api.middleware import MiddlewareOptions, add_middleware
from dino_search.api.requests import ClientGone
from dino_search.api.routes import collections, copying, deciding, images, jobs, page, probes, searching
from dino_search.api.settings import ServiceSettings
from dino_search.api.tracing import Tracing
from dino_search.api.uploads import Uploads
from dino_search.api.url_fetching import FetchOptions, UrlFetcher

_DESCRIPTION = """Search by image, copy detection and k-NN classification in your own pictures.

Errors are `application/problem+json` (RFC 9457) with a stable `type`."""


def create_app(settings: ServiceSettings) -> FastAPI:
    """The service as an ASGI application; its lifespan loads and releases everything."""
    tracing = Tracing.from_environment()
    metrics = Metrics(tracing)
    engine = Engine(settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # The service answers meanwhile: /livez that it lives, /readyz why it is not ready yet.
        runner.start()
        warming = asyncio.create_task(engine.warm_up())
        try:
            yield
        finally:
            warming.cancel()
            await asyncio.to_thread(runner.stop)
            await asyncio.to_thread(app.state.access.close)
            await asyncio.gather(warming, return_exceptions=True)
            for part in (app.state.uploads, app.state.duplicating, app.state.copying, engine):
                await asyncio.to_thread(part.close)
            await asyncio.to_thread(tracing.shut_down)

    app: FastAPI = FastAPIOffline(
        title="dino-search",
        version=version("dino-search"),
        description=_DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.settings = settings
    app.state.engine = engine
    app.state.copying = Copying(engine)
    app.state.duplicating = Duplicating(engine)
    app.state.uploads = Uploads(engine)
    app.state.access = AccessControl(ApiKeys(settings.home, settings.database), settings.keys)
    app.state.jobs = Jobs(
        settings.home,
        settings.database,
        JobOptions(
            max_running=settings.max_jobs,
            index_folders=settings.index_folders,
            device=settings.device,
            max_pixels=settings.limits.max_pixels,
            max_bytes=settings.limits.max_bytes,
            stop_s=max(1.0, settings.drain_s / 2),
            log_level=settings.log_level,
            log_format=settings.log_format,
            vector_store=settings.vector_store,
        ),
    )
    runner = JobRunner(app.state.jobs)
    app.state.fetch_picture = UrlFetcher(
        FetchOptions(
            enabled=settings.fetch_urls,
            hosts=settings.fetch_hosts,
            timeout_s=settings.fetch_timeout_s,
            max_bytes=settings.fetch_max_bytes,
        )
    ).fetch
    problems.add_handlers(app)
    for gone in (ClientGone, ClientDisconnect):
        app.add_exception_handler(gone, _answer_nobody)
    for module in (searching, copying, collections, images, deciding, jobs, probes, page):
        app.include_router(module.router)
    app.add_middleware(InFlight, engine=engine)
    app.add_middleware(MeasuredRequests, metrics=metrics, tracing=tracing)
    add_middleware(
        app,
        MiddlewareOptions(
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
            cors_origins=settings.cors_origins,
        ),
    )
    return app


async def _answer_nobody(request: object, error: Exception) -> Response:
    """What is written for a client that has gone reaches nobody; the status is for the log."""
    return Response(status_code=499)

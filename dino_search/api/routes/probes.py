"""`/livez`, `/readyz` and `/metrics`: for whoever runs the service, without a key."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request
from fastapi.responses import Response

from dino_index.errors import DinoSearchError
from dino_search.api.jobs import Jobs
from dino_search.api.metrics import Metrics
from dino_search.api.problems import documented
from dino_search.api.requests import engine_of
from dino_search.api.schemas import Live, Ready
from dino_search.api.threads import in_thread

logger = logging.getLogger(__name__)
router = APIRouter(tags=["operations"])


@router.get("/livez", response_model=Live)
async def livez() -> Live:
    """The service runs."""
    return Live(status="live")


@router.get("/readyz", response_model=Ready, responses={503: documented(503)[503]})
async def readyz(request: Request) -> Ready:
    """The service can answer; otherwise the problem's `reasons` say why not."""
    engine = engine_of(request)
    await in_thread(engine.probes, engine.check_ready)
    return Ready(status="ready", collections=engine.loaded_collections())


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """What Prometheus reads."""
    engine = engine_of(request)
    await in_thread(engine.probes, _count_jobs, request.app.state.jobs, engine.metrics)
    text, media_type = engine.metrics.written(request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": media_type})


def _count_jobs(jobs: Jobs, metrics: Metrics) -> None:
    try:
        counts = jobs.counts()
    except DinoSearchError as error:
        # Metrics are wanted most when something is away.
        logger.debug("jobs were not counted: %s", error)
        metrics.jobs.clear()
        return
    for status, number in counts.items():
        metrics.jobs.labels(status).set(number)

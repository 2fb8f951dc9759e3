"""Metrics of one service, in a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dino_search.api.tracing import Tracing

STAGES = ("decode", "queue", "forward", "search", "catalog")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PICTURES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What is measured, and how it is written out."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.registry = CollectorRegistry()
        self._tracing = tracing or Tracing.off()
        registry = self.registry
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "dino_search_requests", "Requests that were answered.", ["operation", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "dino_search_request_seconds", "From a request's head to the end of its answer.", ["operation"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.stage_seconds = Histogram(
            "dino_search_stage_seconds",
            "Time in each stage of a request.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "dino_search_batch_size", "Pictures in one forward pass.", buckets=_PICTURES, registry=registry
        )
        self.queue_depth = Gauge(
            "dino_search_queue_depth", "Pictures that were let in and have no vector yet.", registry=registry
        )
        self.rejected = Counter("dino_search_rejected", "Requests refused because too many waited.", registry=registry)
        self.failures = Counter(
            "dino_search_failures", "Requests that ended with a problem.", ["reason"], registry=registry
        )
        self.index_images = Gauge(
            "dino_search_index_images", "Images that searches can find.", ["collection"], registry=registry
        )
        self.index_age = Gauge(
            "dino_search_index_age_seconds", "Since the vectors in use were last looked up and current.",
            ["collection"], registry=registry,
        )  # fmt: skip
        self.jobs = Gauge("dino_search_jobs", "Jobs in the catalog.", ["status"], registry=registry)
        for stage in STAGES:
            self.stage_seconds.labels(stage)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage; in a trace it is a span."""
        begin = time.perf_counter()
        with self._tracing.span(f"dino_search.{name}"):
            try:
                yield
            finally:
                self.stage_seconds.labels(name).observe(time.perf_counter() - begin)

    def written(self, accept: str = "") -> tuple[bytes, str]:
        """(text, media type) as Prometheus reads it; OpenMetrics where the reader accepts that."""
        if "application/openmetrics-text" in accept:
            return generate_openmetrics(self.registry), OPENMETRICS  # type: ignore[no-untyped-call]
        text: bytes = generate_latest(self.registry)
        return text, "text/plain; version=0.0.4; charset=utf-8"


class MeasuredRequests:
    """ASGI middleware: counts and times requests by operation and status, as spans where traces are on."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._tracing.request_span(scope) as span:
            try:
                await self._app(scope, receive, watched)
            finally:
                operation = operation_of(scope)
                # Without an answer the client has gone, which nginx calls 499.
                self._metrics.requests.labels(operation, str(status or 499)).inc()
                self._metrics.request_seconds.labels(operation).observe(time.perf_counter() - begin)
                span.name_request(operation, status)


def operation_of(scope: Scope) -> str:
    """Name of the operation that a request went to; `other` where it went to none: paths are without number."""
    route = scope.get("route")
    return route.name if isinstance(route, Route) else "other"

"""Traces by OpenTelemetry: on where its SDK is installed and `OTEL_EXPORTER_OTLP_ENDPOINT` says where they go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import Scope

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class RequestSpan:
    """The span of one request; it does nothing where traces are off."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def name_request(self, operation: str, status: int) -> None:
        """What the request turned out to be."""
        if self._span is None:
            return
        self._span.update_name(operation)
        self._span.set_attribute("http.response.status_code", status)


class Tracing:
    """Where spans go."""

    def __init__(self, tracer: Any = None, shut_down: Callable[[], None] = lambda: None) -> None:
        """tracer: OpenTelemetry's; None for no traces. shut_down: sends what is left."""
        self._tracer = tracer
        self.shut_down = shut_down

    @classmethod
    def off(cls) -> Tracing:
        return cls()

    @classmethod
    def from_environment(cls) -> Tracing:
        """As OpenTelemetry's own variables say; off without an endpoint or without the SDK."""
        if not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
            return cls()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            return cls()
        name = os.environ.get("OTEL_SERVICE_NAME", "dino-search")
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider.get_tracer("dino_search"), provider.shutdown)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A span inside of the present one."""
        if self._tracer is None:
            yield
            return
        with self._tracer.start_as_current_span(name):
            yield

    @contextmanager
    def request_span(self, scope: Scope) -> Iterator[RequestSpan]:
        """The span of a whole request, in the trace that its `traceparent` names."""
        if self._tracer is None:
            yield RequestSpan()
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        with self._tracer.start_as_current_span(
            "request", context=extract(headers), kind=SpanKind.SERVER, attributes=attributes
        ) as span:
            yield RequestSpan(span)

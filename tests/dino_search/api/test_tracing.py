"""Traces of a service as a collector of OpenTelemetry receives them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from running_service import running_service
from sample_collections import index_files, jpeg

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """(URL, spans that were received so far) of a collector on this machine."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in sent.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="collector")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_request_and_its_stages_are_spans_of_the_callers_trace(
    home: Path, photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_files(home, tiny_model, photos)
    with collector() as (url, spans):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        with running_service(home) as service:
            service.http.post(
                "/search", files={"image": jpeg(700)}, headers={"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
            ).raise_for_status()
        # The end of the service sends what is left.
    ours = {span.name: span for span in spans if span.trace_id.hex() == TRACE_ID}
    assert {"search", "dino_search.decode", "dino_search.search"} <= ours.keys()
    request = ours["search"]
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    attributes = {each.key: each.value for each in request.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert ours["dino_search.decode"].parent_span_id == request.span_id


def test_a_collector_that_is_away_costs_no_request(
    home: Path, photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_files(home, tiny_model, photos)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with running_service(home) as service:
        assert service.http.post("/search", files={"image": jpeg(700)}).status_code == 200

"""`image_url` from end to end: what a client names leads to no other server than it may, whatever the operation."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dino_search.api.url_fetching import FetchOptions, UrlFetcher, is_public, resolve_by_system
from running_service import RunningService, is_problem, running_service
from sample_collections import index_files, jpeg, write_pictures

# The one address of this machine that stands for the internet, and what lies inside.
OUTSIDE, INSIDE = "127.0.0.77", "127.0.0.1"
NAMES = {"pictures.test": OUTSIDE, "inside.test": INSIDE}
OPERATIONS = ["/search", "/search/batch", "/classify", "/embed", "/attention", "/copies", "/compare"]


class Pages(BaseHTTPRequestHandler):
    """A picture at every path of every address of this machine; `/to/URL` leads on. asked: (address, path)."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.connection.getsockname()[0], self.path))
        self.send_response(302 if self.path.startswith("/to/") else 200)
        if self.path.startswith("/to/"):
            self.send_header("Location", self.path[4:])
        self.end_headers()
        if not self.path.startswith("/to/"):
            self.wfile.write(jpeg(1))

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _nothing_asked() -> None:
    Pages.asked.clear()


@pytest.fixture(scope="module")
def fetching(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, port: int) -> Iterator[RunningService]:
    """A service whose list of hosts names, by mistake, what lies inside, too."""
    folder = tmp_path_factory.mktemp("fetching")
    write_pictures(folder / "photos", "1.jpg", "2.jpg")
    index_files(folder / "home", tiny_model, folder / "photos", labels="folders")
    hosts = [*NAMES, INSIDE, "localhost", "2130706433", "0x7f000001", "0"]
    listed = [*(f"{host}:{port}" for host in hosts), "169.254.169.254"]

    async def resolve(host: str, number: int) -> Sequence[str]:
        return [NAMES[host]] if host in NAMES else await resolve_by_system(host, number)

    with running_service(folder / "home", fetch_urls=True, fetch_hosts=listed, fetch_timeout_s=2) as running:
        running.app.state.fetch_picture = UrlFetcher(
            FetchOptions(enabled=True, hosts=listed, timeout_s=2),
            resolve=resolve,
            allow_address=lambda address: str(address) == OUTSIDE or is_public(address),
        ).fetch
        yield running


def body_of(operation: str, url: str) -> dict[str, Any]:
    special: dict[str, dict[str, Any]] = {
        "/search/batch": {"queries": [{"image_url": url}]},
        "/compare": {"a": {"image_id": 1}, "b": {"image_url": url}, "copy_score": 0.9},
    }
    return special.get(operation, {"image_url": url})


def test_all_operations_with_urls_are_tried_here(fetching: RunningService) -> None:
    paths = fetching.http.get("/openapi.json").json()["paths"]
    with_url = {
        path
        for path, operations in paths.items()
        for operation in operations.values()
        if "image_url" in str(operation.get("requestBody", ""))
    }
    assert with_url == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_is_fetched_where_that_is_not_switched_on(service: RunningService, port: int, operation: str) -> None:
    for url in (f"http://{INSIDE}:{port}/a.jpg", "https://example.org/a.jpg", "file:///etc/passwd", "nonsense"):
        assert is_problem(service.http.post(operation, json=body_of(operation, url)), 403, "fetching-off")
    assert Pages.asked == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_picture_of_a_listed_host_is_fetched_once(fetching: RunningService, port: int, operation: str) -> None:
    answer = fetching.http.post(operation, json=body_of(operation, f"http://pictures.test:{port}/a.jpg"))
    # Two pictures are too few to call copies without being told from which score on, and to vote.
    assert answer.status_code in (200, 409), answer.text
    assert Pages.asked == [(OUTSIDE, "/a.jpg")]


# What is listed is refused for its address, and the rest for not being listed.
FORBIDDEN = [
    "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://2130706433:{port}/", "http://0x7f000001:{port}/",
    "http://0:{port}/", "http://inside.test:{port}/", "http://169.254.169.254/latest/meta-data/",
    "http://[::1]:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://[::ffff:7f00:1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/", "http://0177.0.0.1:{port}/", "http://127.1:{port}/", "http://10.0.0.1/",
    "http://[fd00:ec2::254]/latest/", "http://metadata.google.internal/", "http://user@127.0.0.1:{port}/",
    "http://pictures.test:{port}@127.0.0.1:{port}/", "http://127.0.0.1:{port}#@pictures.test:{port}/",
    "file:///etc/passwd", "gopher://127.0.0.1:{port}/_GET", "ftp://127.0.0.1/a.jpg", "data:image/png;base64,AAAA",
    "dict://127.0.0.1:{port}/", "HTTP://LOCALHOST:{port}/",
]  # fmt: skip


@pytest.mark.parametrize("url", [*FORBIDDEN, "//127.0.0.1:{port}/", "", "nonsense"])
def test_no_url_leads_into_the_network_of_the_service(fetching: RunningService, port: int, url: str) -> None:
    answer = fetching.http.post("/search", json={"image_url": url.replace("{port}", str(port))})
    assert is_problem(answer, 403, "fetch-refused"), answer.text
    assert Pages.asked == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_operation_asks_inside(fetching: RunningService, port: int, operation: str) -> None:
    answer = fetching.http.post(operation, json=body_of(operation, f"http://inside.test:{port}/a.jpg"))
    assert is_problem(answer, 403, "fetch-refused"), answer.text
    assert Pages.asked == []


@pytest.mark.parametrize("url", FORBIDDEN)
def test_no_redirect_leads_into_the_network_of_the_service(fetching: RunningService, port: int, url: str) -> None:
    leads_on = f"http://pictures.test:{port}/to/{url.replace('{port}', str(port))}"
    answer = fetching.http.post("/search", json={"image_url": leads_on})
    # What httpx takes for no URL is not even looked at.
    assert is_problem(answer, 403, "fetch-refused") or is_problem(answer, 422, "fetch-failed"), answer.text
    assert [address for address, _ in Pages.asked] == [OUTSIDE]

from __future__ import annotations

import asyncio
import ipaddress
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import requirements
from dino_index.errors import FetchError, FetchFailed, FetchRefused
from dino_search.api.url_fetching import FetchOptions, UrlFetcher, is_public

PICTURE = bytes(range(256)) * 40
MAX_BYTES = len(PICTURE)
TIMEOUT_S = 1.0


class Pages(BaseHTTPRequestHandler):
    """What the web server of these tests has. `asked`: (host asked for, path)."""

    asked: list[tuple[str, str]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.asked.append((self.headers["Host"], self.path))
        name, _, argument = self.path.strip("/").partition("/")
        getattr(self, "send_" + name.split("?")[0])(argument)

    def send_picture(self, _argument: str) -> None:
        self.answer(200, PICTURE, {"Content-Length": str(len(PICTURE))})

    def send_large(self, _argument: str) -> None:
        self.answer(200, PICTURE, {"Content-Length": str(MAX_BYTES + 1)})

    def send_endless(self, _argument: str) -> None:
        self.answer(200, PICTURE + b"x", {"Connection": "close"})
        self.close_connection = True

    def send_short(self, _argument: str) -> None:
        self.answer(200, PICTURE[:10], {"Content-Length": "100"})
        self.close_connection = True

    def send_packed(self, _argument: str) -> None:
        self.answer(200, b"x", {"Content-Encoding": "gzip", "Content-Length": "1"})

    def send_slow(self, _argument: str) -> None:
        self.answer(200, b"", {"Content-Length": "1000"})
        for _ in range(20):
            time.sleep(TIMEOUT_S / 5)
            try:
                self.wfile.write(b"x")
            except OSError:
                return
        self.close_connection = True

    def send_to(self, argument: str) -> None:
        self.answer(302, b"", {"Location": argument or "/a", "Content-Length": "0"})

    def send_a(self, _argument: str) -> None:
        self.send_status("404")

    def send_nowhere(self, _argument: str) -> None:
        self.answer(302, b"", {"Content-Length": "0"})

    def send_status(self, argument: str) -> None:
        self.answer(int(argument), b"", {"Content-Length": "0"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def port(server: ThreadingHTTPServer) -> int:
    Pages.asked = []
    return int(server.server_port)


Addresses = Mapping[str, Sequence[str]]
HERE: Addresses = {"pictures.test": ["127.0.0.1"], "a.cdn.test": ["127.0.0.1"]}


def fetch(
    url: str,
    port: int,
    *,
    addresses: Addresses = HERE,
    hosts: Sequence[str] | None = None,
    allow: Callable[[str], bool] = lambda address: True,
    enabled: bool = True,
) -> bytes:
    """What is fetched; names lead where `addresses` says, one answer after the other, the last one for good."""
    answers = {host: list(found) for host, found in addresses.items()}
    Pages.asked = []

    async def resolve(host: str, _port: int) -> Sequence[str]:
        if host not in answers:
            raise OSError("no such name")
        found = answers[host]
        return (found.pop(0) if len(found) > 1 else found[0]).split()

    if hosts is None:
        hosts = [f"pictures.test:{port}", f"*.cdn.test:{port}"]
    options = FetchOptions(enabled=enabled, hosts=hosts, timeout_s=TIMEOUT_S, max_bytes=MAX_BYTES, max_redirects=2)
    fetcher = UrlFetcher(options, resolve=resolve, allow_address=lambda address: allow(str(address)))
    return asyncio.run(fetcher.fetch(url))


def test_a_picture_of_a_listed_host_is_fetched(port: int) -> None:
    assert fetch(f"http://pictures.test:{port}/picture?a=b#c", port) == PICTURE
    assert Pages.asked == [(f"pictures.test:{port}", "/picture?a=b")]
    assert fetch(f"http://A.CDN.test:{port}/picture", port) == PICTURE


def test_nothing_is_fetched_unless_it_is_switched_on(port: int) -> None:
    assert FetchOptions().enabled is False
    with pytest.raises(FetchRefused, match="switched off"):
        fetch(f"http://pictures.test:{port}/picture", port, enabled=False)


def test_the_connection_goes_to_the_address_that_was_looked_at(port: int) -> None:
    """A name that leads somewhere else when it is asked for again is not asked for again."""
    looked_at = []

    def allow(address: str) -> bool:
        looked_at.append(address)
        return address == "127.0.0.1"

    rebinding = {"pictures.test": ["127.0.0.1", "127.9.9.9"]}
    assert fetch(f"http://pictures.test:{port}/picture", port, addresses=rebinding, allow=allow) == PICTURE
    assert looked_at == ["127.0.0.1"]


SECRET = "http://127.0.0.1:{port}/picture"
REFUSED = [
    "ftp://pictures.test/a", "file:///etc/passwd", "gopher://pictures.test/", "data:image/png;base64,AA",
    "//pictures.test/a",
    "pictures.test/a", "", "http://", "http:///a", "javascript:alert(1)", "dict://pictures.test:11211/",
    # other hosts, and hosts in disguise
    SECRET, "http://localhost:{port}/picture", "http://[::1]:{port}/picture", "http://0:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f.1:{port}/", "http://0177.0.0.1:{port}/", "http://127.1:{port}/", "http://[::ffff:127.0.0.1]:{port}/",
    "http://169.254.169.254/latest/meta-data/", "http://metadata.google.internal/", "http://①②⑦.⓪.⓪.①:{port}/",
    "http://pictures.test.evil.test:{port}/", "http://evilpictures.test:{port}/", "http://cdn.test:{port}/",
    "http://evilcdn.test:{port}/",
    # what one reader of URLs takes for the host and another does not
    "http://pictures.test:{port}@127.0.0.1:{port}/", "http://user:pw@pictures.test:{port}/picture",
    "http://127.0.0.1:{port}\\@pictures.test:{port}/",
    "http://127.0.0.1:{port}#@pictures.test:{port}/", "http://127.0.0.1:{port}?@pictures.test:{port}/",
    "http://pictures.test:{port}\\.evil.test/",
    "http://pictures.test:{port} @evil.test/", "http://pictures.test:{port}\r\nHost: evil.test/",
    "http://pictures.test\t:{port}/", "http://pictures.test%00.evil.test:{port}/",
    # other ports of a listed host
    "http://pictures.test/picture", "https://pictures.test/picture", "http://pictures.test:22/",
    "http://pictures.test:65536/", "http://pictures.test:-1/",
    "http://pictures.test:{port}/" + "a" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("url", REFUSED, ids=lambda url: url[:50])
def test_other_urls_are_refused_before_anything_is_asked_for(port: int, url: str) -> None:
    with pytest.raises(FetchRefused):
        fetch(url.replace("{port}", str(port)), port)
    assert Pages.asked == []


@pytest.mark.parametrize(
    "url", [url for url in REFUSED if url.isprintable() and url.isascii()], ids=lambda url: url[:50]
)
def test_redirects_are_looked_at_as_the_first_url_is(port: int, url: str) -> None:
    location = url.replace("{port}", str(port))
    with pytest.raises(FetchError):
        fetch(f"http://pictures.test:{port}/to/{location}", port)
    # Those that name no host lead to the same one.
    assert {host for host, _ in Pages.asked} <= {f"pictures.test:{port}"}
    assert not any(path.startswith("/picture") for _, path in Pages.asked)


def test_a_redirect_to_a_listed_host_is_followed(port: int) -> None:
    assert fetch(f"http://pictures.test:{port}/to/http://a.cdn.test:{port}/picture", port) == PICTURE
    assert [host for host, _ in Pages.asked] == [f"pictures.test:{port}", f"a.cdn.test:{port}"]
    assert fetch(f"http://pictures.test:{port}/to//picture", port) == PICTURE


def test_a_redirect_may_lead_to_no_other_address_than_any_url(port: int) -> None:
    moving = {"pictures.test": ["127.0.0.1", "10.0.0.1"]}
    with pytest.raises(FetchRefused, match="an address that pictures are not fetched from"):
        fetch(f"http://pictures.test:{port}/to//picture", port, addresses=moving, allow=lambda text: text[:3] == "127")
    assert len(Pages.asked) == 1


def test_redirects_end(port: int) -> None:
    url = f"http://pictures.test:{port}"
    assert fetch(f"{url}/to//to//picture", port) == PICTURE
    with pytest.raises(FetchFailed, match="at most 2 redirects"):
        fetch(f"{url}/to//to//to//picture", port)


@pytest.mark.parametrize(
    ("path", "message"),
    [("large", "at most"), ("endless", "at most"), ("short", "did not send"), ("packed", "packed"), ("slow", "within"),
     ("status/404", "status 404"), ("status/204", "status 204"), ("nowhere", "nowhere")],
)  # fmt: skip
def test_what_sends_no_whole_picture_within_the_limits_fails(port: int, path: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(FetchFailed, match=message):
        fetch(f"http://pictures.test:{port}/{path}", port)
    assert time.monotonic() - begun < TIMEOUT_S + 1


def test_hosts_that_do_not_answer_fail(port: int) -> None:
    with pytest.raises(FetchFailed, match="has no address"):
        fetch("http://unknown.test/a", port, hosts=["unknown.test"])
    with pytest.raises(FetchFailed, match="does not answer"):
        fetch("http://pictures.test:1/a", port, hosts=["pictures.test:1"])


def test_another_address_is_tried_where_one_does_not_answer(port: int) -> None:
    several = {"pictures.test": ["127.0.0.99 127.0.0.1"]}
    assert fetch(f"http://pictures.test:{port}/picture", port, addresses=several) == PICTURE


def test_tls_asks_for_the_name_and_believes_no_other(tmp_path: Path) -> None:
    requirements.require(shutil.which("openssl"), "needs openssl, to make certificates")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=pictures.test"
    names = ["-addext", "subjectAltName=DNS:pictures.test"]
    subprocess.run([*make.split(), *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    asked_for: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda _socket, name, _context: asked_for.append(name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    trusting = ssl.create_default_context(cafile=certificate)

    async def resolve(_host: str, _port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    def fetch_as(name: str, tls: ssl.SSLContext | None) -> bytes:
        options = FetchOptions(enabled=True, hosts=["*.test:" + str(server.server_port)], timeout_s=5)
        fetcher = UrlFetcher(options, tls=tls, resolve=resolve, allow_address=lambda address: True)
        return asyncio.run(fetcher.fetch(f"https://{name}:{server.server_port}/picture"))

    Pages.asked = []
    try:
        assert fetch_as("pictures.test", trusting) == PICTURE
        for name, tls in (("other.test", trusting), ("pictures.test", None)):
            with pytest.raises(FetchFailed):
                fetch_as(name, tls)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked_for == ["pictures.test", "other.test", "pictures.test"]
    assert len(Pages.asked) == 1


PRIVATE = [
    "127.0.0.1", "127.255.255.255", "0.0.0.0", "0.1.2.3", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
    "192.88.99.1",
    "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1", "fe80::1", "fe80::1%1",
    "fec0::1",
    "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::1", "2002:7f00:1::", "2001:0:7f00:1::", "::ffff:0:127.0.0.1", "100::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public_are_refused(port: int, address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    options = FetchOptions(enabled=True, hosts=["pictures.test"], timeout_s=TIMEOUT_S)

    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["8.8.8.8", address]  # one that is public does not help

    with pytest.raises(FetchRefused, match="an address that pictures are not fetched from"):
        asyncio.run(UrlFetcher(options, resolve=resolve).fetch("https://pictures.test/a"))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "193.99.144.80", "2a00:1450:4001:80b::200e", "2606:4700::1111"]
)
def test_public_addresses_are_not(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["http://a.test", "*", "*.", "a.*.test", "a.test/b", "", "a b", "a.test:port"])
def test_a_list_of_hosts_that_says_something_else_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="fetched from is"):
        FetchOptions(hosts=[host])

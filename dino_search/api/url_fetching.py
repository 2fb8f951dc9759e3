"""Pictures from URLs that clients name: off unless told, from listed hosts, and from public addresses alone.

A name is resolved here, every address is looked at, and the connection goes to the very address that was looked at, so
that a name server cannot answer differently the second time. Each redirect passes through all of that again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from dino_index.errors import FetchFailed, FetchRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its addresses, as the operating system gives them. Raises OSError."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_URL_CHARACTERS = 2048
_MAX_ADDRESSES_TRIED = 3
_PRINTABLE = re.compile(r"[!-~]+")
_PATTERN = re.compile(r"(?:\*\.)?[a-z0-9_.-]+(?::\d{1,5})?|\[[0-9a-f:.]+\](?::\d{1,5})?")
# What stands for an IPv4 address, or leads to one, and would smuggle in one that is not public.
_TRANSLATED = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "::/96",
        "::ffff:0:0/96",
        "::ffff:0:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2001::/32",
        "2002::/16",
    )
)
# Relays, and shared or documentation ranges that older tables of Python call global.
_MORE_SPECIAL = tuple(ipaddress.IPv4Network(text) for text in ("192.88.99.0/24", "192.0.0.0/24", "100.64.0.0/10"))


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """What may be fetched, and how large and slow it may be."""

    enabled: bool = False
    hosts: Sequence[str] = ()
    """`images.example.org`, or `*.example.org` for all names below it; `:PORT` after it where it is another than the
    scheme's own."""
    timeout_s: float = 10.0
    """For all of it, redirects included."""
    max_bytes: int = 32 * 1024 * 1024
    max_redirects: int = 3

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not _PATTERN.fullmatch(host.lower()):
                raise ValueError(
                    f"a host that pictures may be fetched from is images.example.org or *.example.org, found {host!r}"
                )


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet at large: not private, loopback, link-local, multicast or reserved."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None or address.is_site_local or any(address in network for network in _TRANSLATED):
            return False
    elif any(address in network for network in _MORE_SPECIAL):
        return False
    is_special = (
        address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
        or address.is_reserved or address.is_unspecified
    )  # fmt: skip
    return address.is_global and not is_special


async def resolve_by_system(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class UrlFetcher:
    """Fetches pictures, each with connections of its own.

    tls: which certificates are believed; None for those that httpx comes with.
    resolve, allow_address: to be replaced by tests, which have no other host than this one.
    """

    def __init__(
        self,
        options: FetchOptions,
        *,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve_by_system,
        allow_address: Callable[[Address], bool] = is_public,
    ) -> None:
        self._options = options
        self._tls = tls
        self._resolve = resolve
        self._allow_address = allow_address

    async def fetch(self, url: str) -> bytes:
        """The content at a URL.

        Raises FetchRefused for what is not to be asked for; FetchFailed for what gives no content.
        """
        if not self._options.enabled:
            raise FetchRefused("fetching pictures by URL is switched off; send the picture itself")
        try:
            async with asyncio.timeout(self._options.timeout_s):
                return await self._follow(url)
        except TimeoutError as error:
            raise FetchFailed(
                f"expected the picture within {self._options.timeout_s:g} s, found it slower; send the picture itself"
            ) from error

    async def _follow(self, url: str) -> bytes:
        for _ in range(self._options.max_redirects + 1):
            target = self._checked(url)
            content, location = await self._fetch_one(target)
            if location is None:
                return content
            try:
                url = str(target.join(location))
            except httpx.InvalidURL as error:
                raise FetchRefused("the server leads on to what is no URL") from error
        raise FetchFailed(f"expected at most {self._options.max_redirects} redirects, found more")

    def _checked(self, url: str) -> httpx.URL:
        """The URL, of a listed host. Raises FetchRefused."""
        if len(url) > _MAX_URL_CHARACTERS or not _PRINTABLE.fullmatch(url) or "\\" in url:
            raise FetchRefused(f"expected a URL of up to {_MAX_URL_CHARACTERS} ASCII characters, found something else")
        try:
            parsed = httpx.URL(url)
            host = parsed.raw_host.decode("ascii").lower().rstrip(".")
        except (httpx.InvalidURL, UnicodeError) as error:
            raise FetchRefused("expected a URL, found something else") from error
        if parsed.scheme not in _DEFAULT_PORTS:
            raise FetchRefused(f"expected an http or https URL, found {parsed.scheme or 'no scheme'}")
        if parsed.userinfo:
            raise FetchRefused("expected a URL without a user name or password")
        port = parsed.port or _DEFAULT_PORTS[parsed.scheme]
        if not any(_matches(pattern.lower(), host, port, parsed.scheme) for pattern in self._options.hosts):
            raise FetchRefused(f"pictures are not fetched from {host}:{port}; send the picture itself")
        return parsed.copy_with(fragment=None)

    async def _fetch_one(self, url: httpx.URL) -> tuple[bytes, str | None]:
        """(content, None), or (nothing, where a redirect leads)."""
        addresses = await self._addresses(url)
        for number, address in enumerate(addresses, 1):
            transport = _PinnedTransport(address, self._tls)
            # Without the environment, which may name a proxy that would resolve the name again.
            client = httpx.AsyncClient(transport=transport, trust_env=False, timeout=self._options.timeout_s)
            headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "dino-search"}
            try:
                async with client, client.stream("GET", url, headers=headers) as answer:
                    return await self._read(answer)
            except httpx.ConnectError as error:
                if number == len(addresses):
                    raise FetchFailed(f"{url.host} does not answer") from error
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
                raise FetchFailed(f"{url.host} did not send the picture ({type(error).__name__})") from error
        raise AssertionError("there is an address")

    async def _addresses(self, url: httpx.URL) -> Sequence[str]:
        """The addresses of the URL's host, if all of them may be asked. Raises FetchRefused, FetchFailed."""
        port = url.port or _DEFAULT_PORTS[url.scheme]
        try:
            found = await self._resolve(url.host, port)
        except (OSError, UnicodeError) as error:
            raise FetchFailed(f"{url.host} has no address") from error
        for text in found:
            try:
                is_allowed = self._allow_address(ipaddress.ip_address(text))
            except ValueError:
                is_allowed = False
            if not is_allowed:
                raise FetchRefused(f"{url.host} leads to an address that pictures are not fetched from")
        if not found:
            raise FetchFailed(f"{url.host} has no address")
        return found[:_MAX_ADDRESSES_TRIED]

    async def _read(self, answer: httpx.Response) -> tuple[bytes, str | None]:
        if answer.status_code in _REDIRECTS:
            if "location" not in answer.headers:
                raise FetchFailed("the server leads on to nowhere")
            return b"", answer.headers["location"]
        if answer.status_code != 200:
            raise FetchFailed(f"expected the picture, found status {answer.status_code}")
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            # A little that is packed can be very much.
            raise FetchFailed("expected the picture as it is, found it packed")
        said = answer.headers.get("content-length", "")
        if said.isascii() and said.isdigit() and int(said[:20]) > self._options.max_bytes:
            raise self._too_large()
        content = bytearray()
        async for part in answer.aiter_raw():
            content += part
            if len(content) > self._options.max_bytes:
                raise self._too_large()
        return bytes(content), None

    def _too_large(self) -> FetchFailed:
        return FetchFailed(f"expected a picture of at most {self._options.max_bytes} bytes, found more")


class _PinnedTransport(httpx.AsyncBaseTransport):
    """Connects to one address, whatever name a request has; the name stays what is asked for and what TLS checks."""

    def __init__(self, address: str, tls: ssl.SSLContext | None) -> None:
        self._address = address
        self._inner = httpx.AsyncHTTPTransport(verify=True if tls is None else tls, trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        extensions: dict[str, Any] = dict(request.extensions)
        if request.url.scheme == "https":
            extensions["sni_hostname"] = request.url.raw_host.decode("ascii")
        pinned = httpx.Request(
            request.method, request.url.copy_with(host=self._address), headers=request.headers,
            stream=request.stream, extensions=extensions,
        )  # fmt: skip
        return await self._inner.handle_async_request(pinned)

    async def aclose(self) -> None:
        await self._inner.aclose()


def _matches(pattern: str, host: str, port: int, scheme: str) -> bool:
    """Whether a listed host, with its port or the scheme's own, is the one."""
    name, colon, number = pattern.rpartition(":")
    if not colon or name.endswith(":") or (name.startswith("[") and not name.endswith("]")):
        name, number = pattern, str(_DEFAULT_PORTS[scheme])
    name = name.strip("[]").rstrip(".")
    if str(port) != number:
        return False
    return host.endswith(name[1:]) if name.startswith("*.") else host == name

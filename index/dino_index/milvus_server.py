"""A Milvus server: where it is, calls that outlast its restarts, and its errors in words that say what to do."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from dino_index.errors import VectorStoreError, VectorStoreUnavailable

if TYPE_CHECKING:
    from pymilvus import MilvusClient

logger = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMES = ("milvus+http", "milvus+https")
CALL_TIMEOUT_S = 10.0
"""For calls that take milliseconds where all is well."""
BRIEFLY_S, PATIENTLY_S = 5.0, 60.0
"""How long a call is tried again: while somebody waits for an answer, and at the end of long work."""
PING_TIMEOUT_S = 3.0
"""For the question whether a server answers at all, and for making a connection."""
_AWAY_S = 15.0
# Who waits behind one that has just failed is told at once, so that waits do not add up.
_REST_S = 2.0
# A connection that was lost without a word is found dead after 15 s, and made anew within seconds once the network is
# back: by itself gRPC waits up to two minutes between its attempts, and for 20 s in each.
_CONNECTION_OPTIONS = {
    "grpc.keepalive_time_ms": 10_000, "grpc.keepalive_timeout_ms": 5_000, "grpc.initial_reconnect_backoff_ms": 500,
    "grpc.min_reconnect_backoff_ms": 3_000, "grpc.max_reconnect_backoff_ms": 3_000,
}  # fmt: skip
_FIRST_WAIT_S, _MAX_WAIT_S = 0.1, 5.0
_DEFAULT_PORT = 19530
_EXPECTED = "milvus+http://USER:PASSWORD@HOST:PORT?db=NAME (also milvus+https; signs in a password as %XX)"

_CONNECT_FAILED = 2
_COLLECTION_NOT_FOUND, _NOT_LOADED, _DATABASE_NOT_FOUND, _PARAMETER_INVALID = 100, 101, 800, 1100
# What a server says in words alone, or under a code that means many things.
_REFUSALS = {
    "auth check failure": "correct user and password in the URL",
    "UNAUTHENTICATED": "correct user and password in the URL",
    "permission deny": "let the server's administrator grant this user the rights on collections",
    "UNIMPLEMENTED": "name the port of Milvus' gRPC interface (19530 unless set otherwise)",
    "database not found": "create it, or correct ?db= in the URL",
    # 2.3.5 stays stuck when there is space again.
    "No space left on device": (
        "free space on its disk, restart it, then run the same command again: the catalog has all that was recorded, "
        "and the server gets what it lacks"
    ),
}


@dataclass(frozen=True, kw_only=True)
class MilvusAddress:
    """What a URL says. Raises VectorStoreError for one that makes no sense, without repeating it: it has a password."""

    uri: str
    user: str = ""
    password: str = field(default="", repr=False)
    database: str = ""

    @classmethod
    def parse(cls, url: str) -> MilvusAddress:
        try:
            parts = urlsplit(url)
            port = parts.port or _DEFAULT_PORT
            options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        except ValueError as error:
            raise VectorStoreError(f"the URL of the vector store makes no sense; expected {_EXPECTED}") from error
        wrong = (
            f"found the scheme {parts.scheme!r}" if parts.scheme not in SCHEMES
            else "found no host" if not parts.hostname
            else "found something between host and ?db=" if parts.path not in ("", "/") or parts.fragment
            else f"found the option {min(options.keys() - {'db'})!r}" if options.keys() - {"db"}
            else ""
        )  # fmt: skip
        if wrong:
            raise VectorStoreError(f"the URL of the vector store makes no sense: expected {_EXPECTED}, {wrong}")
        host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
        return cls(
            uri=f"{parts.scheme.removeprefix('milvus+')}://{host}:{port}",
            user=unquote(parts.username or ""), password=unquote(parts.password or ""),
            database=options.get("db", ""),
        )  # fmt: skip

    @property
    def place(self) -> str:
        """The URL without user and password, for messages and to know the server again."""
        return f"milvus+{self.uri}" + (f"?{urlencode({'db': self.database})}" if self.database else "")


class CollectionGone(Exception):
    """The server has no collection of the name that it was asked for."""


class MilvusServer:
    """A connection that is made when it is needed, and again where it was lost. For any number of threads."""

    def __init__(self, address: MilvusAddress) -> None:
        self._address = address
        self._client: MilvusClient | None = None
        self._lock = threading.Lock()
        self._failed_at = self._answered_at = -math.inf
        self._silence: VectorStoreUnavailable | None = None
        """What the last call ended with, if the server said nothing at all."""

    @property
    def seems_away(self) -> bool:
        """Whether a call has just failed: one that can wait need not try yet."""
        return time.monotonic() - self._failed_at < _AWAY_S

    def ping(self, *, patience_s: float = 0) -> None:
        """Raises VectorStoreErrors where the server does not answer, after a few seconds where it is silent."""
        self._raise_if_resting(patience_s)
        self._try(_ping, patience_s)

    def ping_after_silence(self) -> None:
        """As `ping`, unless it has just answered: before calls that others wait for, which may hang for longer."""
        if time.monotonic() - self._answered_at > 1:
            self.ping()

    @property
    def place(self) -> str:
        return self._address.place

    def version(self) -> str:
        """Raises VectorStoreErrors, soon."""
        return self.call(lambda client: str(client.get_server_version(timeout=PING_TIMEOUT_S)), patience_s=0)

    def call(self, work: Callable[[MilvusClient], T], *, patience_s: float = BRIEFLY_S) -> T:
        """What `work` makes of a client; tried again after growing waits while the server is away or starting.

        work: comes to the same when it is done twice. Raises CollectionGone, VectorStoreError; VectorStoreUnavailable
        when it is still away after `patience_s`.
        """
        self._raise_if_resting(patience_s)
        if self._silence is not None and patience_s <= BRIEFLY_S:
            # It tells within seconds what the work may tell only after its own timeout.
            self._try(_ping, patience_s)
        return self._try(work, patience_s)

    def _raise_if_resting(self, patience_s: float) -> None:
        silence = self._silence
        if silence is not None and patience_s <= BRIEFLY_S and time.monotonic() - self._failed_at < _REST_S:
            raise VectorStoreUnavailable(str(silence)) from silence

    def _try(self, work: Callable[[MilvusClient], T], patience_s: float) -> T:
        import_client()
        from grpc import FutureTimeoutError, RpcError
        from pymilvus import MilvusException

        deadline, wait_s = time.monotonic() + patience_s, _FIRST_WAIT_S
        while True:
            try:
                result = work(self._connected())
            # A call that is not answered in time raises gRPC's own error.
            except (MilvusException, RpcError, FutureTimeoutError) as error:
                self._raise_refusal(error)
                if time.monotonic() + wait_s > deadline:
                    raise self._failed(error) from error
                if wait_s > 1:
                    logger.warning("Milvus at %s: %s; trying again in %.0f s", self.place, _in_a_line(error), wait_s)
            else:
                self._silence, self._answered_at = None, time.monotonic()
                return result
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _MAX_WAIT_S)

    def _failed(self, error: Exception) -> VectorStoreUnavailable:
        failure = VectorStoreUnavailable(
            f"the Milvus server at {self.place} does not answer as it should ({_in_a_line(error)}); see that it runs, "
            "can be reached and has space on its disk, then run the same command again: the catalog has all that was "
            "recorded, and the server gets what it lacks"
        )
        # The server's own errors have its numbers.
        code = getattr(error, "code", None)
        is_silence = not isinstance(code, int) or code == _CONNECT_FAILED
        self._failed_at, self._silence = time.monotonic(), failure if is_silence else None
        return failure

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _connected(self) -> MilvusClient:
        with self._lock:
            if self._client is None:
                from pymilvus import MilvusClient

                address = self._address
                self._client = MilvusClient(
                    address.uri, user=address.user, password=address.password, db_name=address.database,
                    timeout=PING_TIMEOUT_S, grpc_options=_CONNECTION_OPTIONS, dedicated=True,
                )  # fmt: skip
            return self._client

    def _raise_refusal(self, error: Exception) -> None:
        """Raises what no waiting would help against."""
        code, message = getattr(error, "code", None), str(getattr(error, "message", error))
        if code == _COLLECTION_NOT_FOUND:
            raise CollectionGone(message) from error
        for words, advice in _REFUSALS.items():
            if words in message:
                raise VectorStoreError(
                    f"the Milvus server at {self.place} refuses: {_in_a_line(error)}; {advice}"
                ) from error
        if code == _PARAMETER_INVALID:
            raise VectorStoreError(
                f"the Milvus server at {self.place} cannot do what is asked of it: {_in_a_line(error)}"
            ) from error


def import_client() -> None:
    """Imports pymilvus, quietly. Raises VectorStoreError where it is not installed."""
    # It would read a file .env of the present folder into the environment.
    os.environ.setdefault("PYTHON_DOTENV_DISABLED", "1")
    try:
        import pymilvus  # noqa: F401
    except ImportError as error:
        raise VectorStoreError(
            "vectors in Milvus need a package that is not installed; run: pip install 'dino-search[distributed]'"
        ) from error
    # Each error is logged with a traceback before it is raised.
    for name in ("pymilvus", "pymilvus.milvus_client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _ping(client: MilvusClient) -> None:
    client.list_collections(timeout=PING_TIMEOUT_S)


def _in_a_line(error: Exception) -> str:
    details: Any = getattr(error, "details", None)
    text = str(getattr(error, "message", "") or (details() if callable(details) else "") or error)
    return " ".join(text.split())[:200]

"""Who may do what: `Read`, `Write` and `Admin` are put on routes as `dependencies=[Read]`.

A key comes as `Authorization: Bearer KEY` or `X-API-Key: KEY`. One that is bound to collections reaches no other: the
collection in a path or query is looked at here, any other is told to `require_collection` where it becomes known.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from dino_index.errors import DinoSearchError, KeyRefused, ScopeMissing, TooManyAttempts
from dino_search.api.keys import ApiKey, ApiKeys, Scope, find_key

logger = logging.getLogger(__name__)

KeyMode = Literal["auto", "required", "off"]
"""`auto`: keys are needed as soon as there is one, revoked ones included."""

_COLLECTION_PARAMETERS = ("collection", "c")
_current_key: ContextVar[ApiKey | None] = ContextVar("dino_search_api_key", default=None)


class AccessControl:
    """What the service knows of its keys. Lives in `app.state.access`.

    cache_s: how long a key that was revoked may go on. max_failures: wrong keys of one client in `failures_s` seconds
    that are answered as such; then it is told to wait.
    """

    def __init__(
        self,
        keys: ApiKeys,
        mode: KeyMode = "auto",
        *,
        cache_s: float = 3.0,
        max_failures: int = 10,
        failures_s: float = 60.0,
        note_uses_every_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self.mode = mode
        self._cache_s = cache_s
        self._clock = clock
        self._note_uses_every_s = note_uses_every_s
        self._failures = FailureCounts(max_failures, failures_s, clock)
        self._lock = threading.Lock()
        self._known: list[ApiKey] = []
        self._read_at: float | None = None
        self._has_had_keys = False
        self._used_at: dict[int, datetime] = {}
        self._noted_at = clock()

    async def admit(self, given: str | None, scope: Scope, client: str) -> ApiKey | None:
        """The key that allows this; None where none is needed.

        Raises KeyRefused, TooManyAttempts, ScopeMissing, CatalogErrors.
        """
        if self.mode == "off":
            return None
        if self._read_at is None or self._clock() - self._read_at >= self._cache_s:
            await run_in_threadpool(self._read)
        if not self.keys_needed and given is None:
            return None
        key = None if given is None else find_key(given, self._known)
        now = datetime.now(UTC)
        if key is None or not key.is_valid(now):
            if not self.keys_needed:
                return None
            raise self._refusal(given, key, client)
        self._used_at[key.id] = now
        if not key.allows(scope):
            raise ScopeMissing(
                f"expected a key with the scope {scope}, found one with the scope {key.scope}", scope=scope
            )
        return key

    @property
    def keys_needed(self) -> bool:
        """As of the last look at the catalog."""
        return self.mode == "required" or (self.mode == "auto" and self._has_had_keys)

    def has_keys(self) -> bool:
        """Whether there is any key by now. Raises CatalogErrors."""
        self._read()
        return self._has_had_keys

    def close(self) -> None:
        """Records the last uses, and releases the catalog."""
        self._note_uses()
        self._keys.close()

    def _read(self) -> None:
        with self._lock:
            if self._read_at is not None and self._clock() - self._read_at < self._cache_s:
                return
            self._known = self._keys.listed()
            # For good: a catalog that vanishes, or is emptied, must not open the service to everybody.
            self._has_had_keys |= bool(self._known)
            self._read_at = self._clock()
            is_due = self._clock() - self._noted_at >= self._note_uses_every_s and bool(self._used_at)
            if is_due:
                self._noted_at = self._clock()
        if is_due:
            # Aside, as it waits for whoever writes to the catalog.
            threading.Thread(target=self._note_uses, name="note-key-uses", daemon=True).start()

    def _note_uses(self) -> None:
        used, self._used_at = self._used_at, {}
        try:
            self._keys.note_uses(used)
        except DinoSearchError as error:
            logger.debug("the last uses of keys were not recorded: %s", error)

    def _refusal(self, given: str | None, key: ApiKey | None, client: str) -> DinoSearchError:
        if given is None:
            return KeyRefused(
                "expected an API key, found none; send it as Authorization: Bearer KEY or as X-API-Key: KEY"
            )
        wait_s = self._failures.note(client)
        which = "unknown" if key is None else key.status(datetime.now(UTC))
        logger.warning("a key that is %s was refused (%s...)", which, key.prefix if key else "not ours")
        if wait_s is not None:
            return TooManyAttempts(
                f"too many wrong API keys came from {client}; try again in {wait_s:.0f} s", retry_after_s=wait_s
            )
        return KeyRefused("expected a valid API key, found one that is unknown, revoked or expired")


class FailureCounts:
    """How often each client failed lately. Of very many clients, those that failed longest ago are forgotten."""

    _MAX_CLIENTS = 10_000

    def __init__(self, max_failures: int, period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_failures = max_failures
        self._period_s = period_s
        self._clock = clock
        self._failed_at: OrderedDict[str, deque[float]] = OrderedDict()

    def note(self, client: str) -> float | None:
        """Counts one more; in how many seconds the client may fail again, None while it may."""
        now, name = self._clock(), _network_of(client)
        times = self._failed_at.setdefault(name, deque(maxlen=self._max_failures))
        self._failed_at.move_to_end(name)
        while len(self._failed_at) > self._MAX_CLIENTS:
            self._failed_at.popitem(last=False)
        while times and now - times[0] >= self._period_s:
            times.popleft()
        if len(times) == self._max_failures:
            return max(1.0, self._period_s - (now - times[0]))
        times.append(now)
        return None


def require_collection(name: str) -> None:
    """Raises ScopeMissing where the request's key is bound to other collections."""
    key = _current_key.get()
    if key is not None and not key.reaches(name):
        raise ScopeMissing(f"this key is not for the collection {name!r}", scope=key.scope)


def reaches_collection(name: str) -> bool:
    """Whether the request's key, if any, is for this collection."""
    key = _current_key.get()
    return key is None or key.reaches(name)


def current_key() -> ApiKey | None:
    """The key of the request that is being answered; None without one."""
    return _current_key.get()


_bearer = HTTPBearer(auto_error=False, description="An API key, as `dino-search keys add` prints it.")
_header = APIKeyHeader(name="X-API-Key", auto_error=False)


class _Requires:
    """A dependency that lets those pass whose key has the scope.

    Asynchronous although it seldom waits: what runs in a thread could not set the request's context.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope: Scope = scope

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
        header: Annotated[str | None, Security(_header)] = None,
    ) -> None:
        access: AccessControl = request.app.state.access
        given = bearer.credentials if bearer is not None else header
        key = await access.admit(given, self._scope, request.client.host if request.client else "unknown")
        _current_key.set(key)
        request.state.api_key = key
        for name in _COLLECTION_PARAMETERS:
            for collection in (request.path_params.get(name), *request.query_params.getlist(name)):
                if collection is not None:
                    require_collection(str(collection))


Read = Depends(_Requires("read"))
Write = Depends(_Requires("write"))
Admin = Depends(_Requires("admin"))


def _network_of(client: str) -> str:
    """The address; of IPv6 the part that one customer has."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return client

"""Running the service: uvicorn, from the first request to the last."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from dino_index.allocator import limit_arenas
from dino_index.embedding import num_processors
from dino_index.errors import SettingsInvalid
from dino_search.api.app import create_app
from dino_search.api.checking import has_keys
from dino_search.api.connections import timed_connections
from dino_search.api.engine import Engine
from dino_search.api.json_logs import configure_logging, toggle_debug_on_signal
from dino_search.api.settings import ServiceSettings

logger = logging.getLogger(__name__)

# Longer than proxies keep an idle connection to reuse it, which would then be closed under their hands.
_KEEP_ALIVE_S = 75


class Server(uvicorn.Server):
    """uvicorn's server, which on the first SIGTERM or Ctrl-C takes no new work, finishes what it has, and ends well.

    The ports stay open meanwhile, so that /readyz says to whoever deals requests out that no more should come.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_s: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_s = drain_s
        self._asked_at: float | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own sends the signal once more at the end, which would end the process by it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.drain(at_once=self._asked_at is not None)

    def drain(self, *, at_once: bool = False) -> None:
        """Ends the service after what is in flight, or at once. In any thread."""
        self._engine.is_draining = True
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            logger.info("ending after what is in flight; once more to end at once")
        if at_once:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._asked_at is not None and not self.should_exit:
            late = time.monotonic() - self._asked_at > self._drain_s
            if late or not self._engine.num_in_flight:
                self.should_exit = True
        return await super().on_tick(counter)


def run_service(settings: ServiceSettings) -> None:
    """Serves until the process is told to end."""
    require_safe_address(settings)
    limit_arenas(num_processors())
    configure_logging(settings.log_level, settings.log_format)
    toggle_debug_on_signal(settings.log_level)
    make_server(settings).run()


def require_safe_address(settings: ServiceSettings) -> None:
    """Raises SettingsInvalid where other machines could reach a service that asks for no key, and nobody wanted that.

    Raises CatalogErrors, too.
    """
    if not settings.is_public or settings.allow_public_without_keys or settings.keys == "required":
        return
    if settings.keys == "off" or not has_keys(settings):
        raise SettingsInvalid(
            f"other machines can reach {settings.host}, and this service asks for no key; make one: dino-search keys "
            "add NAME, or let everybody do everything: dino-search serve --allow-public-without-keys"
        )


def make_server(settings: ServiceSettings, **options: Any) -> Server:
    """A server that is ready to run. options: uvicorn's own."""
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        http=timed_connections(settings.body_timeout_s),
        log_config=None,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        lifespan="on",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        **options,
    )
    return Server(config, app.state.engine, settings.drain_s)

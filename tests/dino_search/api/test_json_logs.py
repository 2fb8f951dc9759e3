from __future__ import annotations

import io
import json
import logging
import os
import signal
from collections.abc import Iterator
from datetime import datetime

import pytest

from dino_search.api.json_logs import configure_logging, redacted, request_id, toggle_debug_on_signal

KEY = "ds_Ab3-_" + "x" * 38


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    names = ("dino_search", "dino_index", "dino_training", "uvicorn", "uvicorn.access", "uvicorn.error")
    before = root.handlers[:], root.level, {name: logging.getLogger(name).level for name in names}
    handler = signal.getsignal(signal.SIGUSR1)
    yield
    root.handlers, root.level = before[0], before[1]
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)
    signal.signal(signal.SIGUSR1, handler)


def test_a_line_is_an_object_with_the_request_it_belongs_to() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    token = request_id.set("r1")
    logging.getLogger("dino_search.access").info("two\nlines %s", "é", extra={"facts": {"status": 200, "path": "/a"}})
    request_id.reset(token)
    try:
        raise ValueError("inner")
    except ValueError:
        logging.getLogger("dino_index").exception("it failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {
        "level": "info", "logger": "dino_search.access", "message": "two\nlines é", "request_id": "r1", "status": 200,
        "path": "/a",
    }  # fmt: skip
    assert "request_id" not in second
    assert "ValueError: inner" in second["exception"]


def test_text_is_one_line_whatever_clients_send() -> None:
    stream = io.StringIO()
    configure_logging("info", "text", stream)
    logging.getLogger("dino_search").info("GET %s", "/a\n2026 ERROR forged\x1b[31m", extra={"facts": {"path": "/\r\n"}})
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(r"INFO dino_search: GET /a\n2026 ERROR forged\x1b[31m path=/\r\n")


def test_other_packages_are_heard_from_warnings_on_even_when_debugging() -> None:
    stream = io.StringIO()
    configure_logging("debug", "text", stream)
    logging.getLogger("httpcore.http11").debug("headers")
    logging.getLogger("httpcore.http11").warning("trouble")
    logging.getLogger("dino_index.a").debug("ours")
    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.access").info("a second line")
    assert [line.split(": ", 1)[1] for line in stream.getvalue().splitlines()] == ["trouble", "ours", "started"]


def test_a_signal_switches_debugging_on_and_off() -> None:
    stream = io.StringIO()
    configure_logging("warning", "text", stream)
    toggle_debug_on_signal("warning")
    for number in range(3):
        logging.getLogger("dino_search.a").debug("debug %d", number)
        logging.getLogger("dino_search.a").info("info %d", number)
        os.kill(os.getpid(), signal.SIGUSR1)
    written = [line.split(": ", 1)[1] for line in stream.getvalue().splitlines()]
    assert written == [
        "the log level is debug now", "debug 1", "info 1", "the log level is warning now", "the log level is debug now",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_is_written(form: str) -> None:
    stream = io.StringIO()
    configure_logging("info", form, stream)  # type: ignore[arg-type]
    logger = logging.getLogger("dino_search")
    logger.info("headers %s", {"Authorization": f"Bearer {KEY}", "X-API-Key": "other-secret"})
    logger.info("database postgresql://me:hush-hush@host/db", extra={"facts": {"url": "https://u:hush-hush@a/b"}})
    try:
        raise RuntimeError(f"key {KEY} password=hush-hush")
    except RuntimeError:
        logger.exception("failed")
    written = stream.getvalue()
    assert KEY[8:] not in written
    assert "other-secret" not in written
    assert "hush-hush" not in written
    assert "postgresql://***@host/db" in written


@pytest.mark.parametrize("text", ["ds_short", "http://host/a:b@c", "a b c", "scope read", "/photos/ds_1.jpg"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of debug, info, warning, error, found 'loud'"):
        configure_logging("loud")

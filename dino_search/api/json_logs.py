"""Logs of the service on stderr: text for people or a JSON object a line, with the request that they belong to.

What is logged here shows no API key, no password of a database and no credentials of a URL, wherever they come from.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")

request_id: ContextVar[str | None] = ContextVar("dino_search_request_id", default=None)
"""Of the request that is being answered."""

# The level is for these. Other packages log what clients sent, headers with keys included, when they are told to debug.
_OURS = ("dino_search", "dino_index", "dino_training", "uvicorn")
_QUIET = ("uvicorn.access",)  # the middleware's line says the same, and the request's id
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\bds_[A-Za-z0-9_-]{6}[A-Za-z0-9_-]{10,}"), "ds_***"),
    (re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]*(?=@)"), "***"),
    (
        re.compile(r"(?i)\b(authorization|x-api-key)(['\"]?\s*[:=,]\s*['\"]?)(?:bearer\s+|basic\s+)?[^\s'\",)]+"),
        r"\1\2***",
    ),
    (re.compile(r"(?i)\b(password|passwd|pwd|secret|token)=[^\s&'\"]+"), r"\1=***"),
)  # fmt: skip


def configure_logging(level: str = "info", form: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Sends all logs to one place, by default stderr, from `level` on. Others than our packages: warnings and worse.

    uvicorn is to be run with `log_config=None`. Raises ValueError for a level of no use.
    """
    if level not in LEVELS:
        raise ValueError(f"the log level must be one of {', '.join(LEVELS)}, found {level!r}")
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    for before in root.handlers[:]:
        root.removeHandler(before)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in (*_OURS, *_QUIET, "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING if name in _QUIET else logging.NOTSET)
    set_level(level)


def set_level(level: str) -> None:
    """Changes from where on our packages log."""
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())


def toggle_debug_on_signal(level: str = "info") -> None:
    """Has SIGUSR1 switch between debugging and `level`; only in the main thread, and where there is such a signal."""
    if not hasattr(signal, "SIGUSR1"):
        return

    def toggle(_number: int, _frame: FrameType | None) -> None:
        is_debugging = logging.getLogger(_OURS[0]).level == logging.DEBUG
        set_level(level if is_debugging else "debug")
        chosen = level if is_debugging else "debug"
        logging.getLogger("dino_search").warning("the log level is %s now", chosen)

    signal.signal(signal.SIGUSR1, toggle)


def redacted(text: str) -> str:
    """The text without what looks like a key, a password or other credentials."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class JsonLines(logging.Formatter):
    """A JSON object a line: time, level, logger, message, request_id, what the call put into `facts`, exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redacted(record.getMessage()),
        }
        if (asked := request_id.get()) is not None:
            entry["request_id"] = asked
        for name, value in _facts(record):
            entry[name] = redacted(value) if isinstance(value, str) else value
        if record.exc_info:
            entry["exception"] = redacted(self.formatException(record.exc_info))
        return json.dumps(entry, default=str)


class TextLines(logging.Formatter):
    """One line for people, where the message has one; control characters are shown escaped."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        line = f"{time}Z {record.levelname} {record.name}: {_in_one_line(redacted(record.getMessage()))}"
        line += "".join(f" {name}={_in_one_line(redacted(str(value)))}" for name, value in _facts(record))
        if (asked := request_id.get()) is not None:
            line += f" request_id={asked}"
        if record.exc_info:
            line += "\n" + redacted(self.formatException(record.exc_info))
        return line


def _facts(record: logging.LogRecord) -> Iterable[tuple[str, Any]]:
    facts = getattr(record, "facts", None)
    return facts.items() if isinstance(facts, dict) else ()


def _in_one_line(text: str) -> str:
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)

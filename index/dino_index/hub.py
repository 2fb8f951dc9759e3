"""Files fetched from the Hugging Face hub, or from another server of its kind that `HF_ENDPOINT` names.

The hub's client reads its settings when it is imported, and repeats what fails for minutes. It therefore runs as a
process of its own, with settings of its own, that is ended when nothing arrives for a while.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_index.errors import HubUnavailable, ModelNotFound, OutputUnwritable

TIMEOUT_VARIABLE = "DINO_SEARCH_HUB_TIMEOUT"
DEFAULT_TIMEOUT_S = 10.0
_DEFAULT_ENDPOINT = "https://huggingface.co"
# For the client itself to start, which takes a second on an idle machine.
_START_TIMEOUT_S = 60.0
_POLL_EVERY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class FetchedFile:
    """A file of a hub repository, on this machine."""

    path: Path
    commit: str | None
    """Of the repository, in which the file is."""


def fetch_file(
    repository: str,
    file_names: Sequence[str],
    folder: Path,
    *,
    timeout_s: float,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> FetchedFile:
    """The first of the files that the repository has, downloaded into `folder`.

    timeout_s: how long the hub may keep silent. on_progress: told bytes that have arrived, and all of them.
    Raises HubUnavailable, ModelNotFound (no such repository or file), OutputUnwritable.
    """
    command = [sys.executable, "-m", "dino_index.hub_client", repository, "main", str(folder), str(timeout_s)]
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "client.log", "wb") as log,
        subprocess.Popen(
            [*command, *file_names], env=_client_environment(folder, timeout_s), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        ) as client,
    ):  # fmt: skip
        try:
            facts = _follow(client, folder, timeout_s, on_progress)
        finally:
            client.kill()
    if "path" in facts:
        return FetchedFile(path=Path(facts["path"]), commit=facts.get("commit"))
    at = f"{repository} at {endpoint()}"
    if facts.get("kind") == "missing":
        raise ModelNotFound(f"expected weights in {at}: {facts['error']}")
    if facts.get("kind") == "gated":
        raise HubUnavailable(
            f"{at} is given only to those who have accepted its terms: accept them there, then set HF_TOKEN "
            f"or run: hf auth login ({facts['error']})"
        )
    if facts.get("kind") == "storage":
        raise OutputUnwritable(f"{folder} cannot hold what {at} has: {facts['error']}")
    problem = facts.get("error") or f"the client ended with status {client.returncode}: {_last_line(folder)}"
    raise HubUnavailable(f"{at} cannot be reached: {problem}")


def endpoint() -> str:
    """The address of the hub that is asked."""
    return os.environ.get("HF_ENDPOINT", _DEFAULT_ENDPOINT).rstrip("/")


def hub_timeout_s() -> float:
    """How long the hub may keep silent: `DINO_SEARCH_HUB_TIMEOUT` in seconds, else 10. Raises HubUnavailable."""
    given = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_S))
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise HubUnavailable(f"{TIMEOUT_VARIABLE} must be a number of seconds above 0, found {given!r}")
    return timeout_s


def _follow(
    client: subprocess.Popen[str], folder: Path, timeout_s: float, on_progress: Callable[[int, int | None], None]
) -> dict[str, Any]:
    """Everything that the client said until its end, or until nothing has arrived for too long."""
    lines: list[str] = []
    assert client.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(client.stdout,), daemon=True)
    reader.start()
    facts: dict[str, Any] = {}
    seen, last_change = (0, 0), time.monotonic()
    while True:
        ended = client.poll() is not None
        if ended:
            reader.join()
        facts = {key: value for line in list(lines) for key, value in _parse(line).items()}
        if ended:
            return facts
        num_bytes = _bytes_in(folder)
        if (len(lines), num_bytes) != seen:
            seen, last_change = (len(lines), num_bytes), time.monotonic()
        if "size" in facts:
            on_progress(num_bytes, facts["size"])
        patience_s = timeout_s if "ready" in facts else _START_TIMEOUT_S
        if time.monotonic() - last_change > patience_s:
            return facts | {"error": f"nothing has arrived for {patience_s:g} s"}
        time.sleep(_POLL_EVERY_S)


def _client_environment(folder: Path, timeout_s: float) -> dict[str, str]:
    seconds = str(max(1, math.ceil(timeout_s)))
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Its transfers have caches and time limits of their own.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": seconds,
        "HF_HUB_DOWNLOAD_TIMEOUT": seconds,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def _bytes_in(folder: Path) -> int:
    """Size of what has been downloaded: of all files but the client's log."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if name.endswith(".log") or os.path.islink(path):
                continue
            try:
                total += os.path.getsize(path)
            except OSError:  # renamed meanwhile
                continue
    return total


def _parse(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _last_line(folder: Path) -> str:
    lines = (folder / "client.log").read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy_files import CHECKOUT, DEPLOY, dockerfile_steps, output_of
from requirements import require


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    require(hadolint.exists(), "hadolint, of the development tools")
    assert output_of(hadolint, "--no-color", DEPLOY / "Dockerfile") == ""


def test_targets_differ_in_their_environment_only() -> None:
    steps = dockerfile_steps()
    for target in ("cpu", "cuda"):
        own = [(instruction, rest) for stage, instruction, rest in steps if stage == target]
        assert own[0] == ("FROM", f"runtime AS {target}")
        assert ("COPY", f"--from={target}-environment /opt/dino-search /opt/dino-search") in own
        assert {instruction for instruction, _ in own} <= {"FROM", "ENV", "COPY"}
    assert steps[-1][0] == "cpu", "a build without a target makes the small image"


def test_image_serves_as_an_unprivileged_user() -> None:
    runtime = [(instruction, rest) for stage, instruction, rest in dockerfile_steps() if stage == "runtime"]
    assert ("USER", "10001:10001") in runtime
    assert ("VOLUME", "/data") in runtime
    assert ("ENTRYPOINT", '["dino-search"]') in runtime
    assert ("CMD", '["serve", "--host", "0.0.0.0"]') in runtime
    environment = " ".join(rest for instruction, rest in runtime if instruction == "ENV")
    assert "DINO_SEARCH_HOME=/data" in environment
    assert "DINO_SEARCH_KEYS=required" in environment, "the port is other machines' too"


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (None, False)])
def test_healthcheck_follows_livez(status: int | None, healthy: bool) -> None:
    (check,) = (rest for _, instruction, rest in dockerfile_steps() if instruction == "HEALTHCHECK")
    interpreter, *arguments = json.loads(check.partition(" CMD ")[2])
    assert interpreter == "python"
    with _service_answering(status) as port:
        # A proxy that the environment names is not asked about this machine's own service.
        environment = {**os.environ, "DINO_SEARCH_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, check=False, timeout=20
        )
    assert (done.returncode == 0) is healthy


def test_build_context_is_what_the_dockerfile_copies() -> None:
    lines = (CHECKOUT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*", "everything stays out that is not named"
    copied = {
        source
        for _, instruction, rest in dockerfile_steps()
        if instruction == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert {pattern[1:] for pattern in patterns if pattern.startswith("!")} == copied
    assert all((CHECKOUT / source).exists() for source in copied)
    assert "**/.env" in patterns


def test_server_requirements_agree_with_the_extras() -> None:
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    lines = (DEPLOY / "requirements-server.txt").read_text(encoding="utf-8").splitlines()
    listed = {Requirement(line) for line in lines if not line.startswith("#")}
    wanted = {Requirement(line) for line in (*extras["distributed"], *extras["tracing"])}
    assert listed == {requirement for requirement in wanted if requirement.name != "ray"}


def test_torch_is_asked_for_as_in_pyproject() -> None:
    asked = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    wanted = {Requirement(line.partition("#")[0]) for line in asked if line.startswith(("torch>", "torchvision>"))}
    installs = [rest for _, instruction, rest in dockerfile_steps() if instruction == "RUN" and '"torch>=' in rest]
    assert len(installs) == 2
    for install in installs:
        assert {Requirement(text) for text in re.findall(r'"(torch[^"$]*)"', install)} == wanted


@contextmanager
def _service_answering(status: int | None) -> Iterator[int]:
    """Port of a service whose /livez has this status, everything else 404; None: nobody listens."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if status and self.path == "/livez" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if status is None:
        server.server_close()
        yield server.server_port
        return
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

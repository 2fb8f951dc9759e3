"""The files of `deploy/`, as the programs that use them see them."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).parents[1]
DEPLOY = CHECKOUT / "deploy"
CHART = DEPLOY / "helm" / "dino-search"
DRAIN_S = 30
"""How long the service lets requests end, unless it is told otherwise."""


def read_yaml(*parts: str) -> Any:
    return yaml.safe_load(DEPLOY.joinpath(*parts).read_text(encoding="utf-8"))


def dockerfile_steps() -> list[tuple[str, str, str]]:
    """(stage, instruction, rest) of each step, with continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    steps: list[tuple[str, str, str]] = []
    stage = ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            stage = rest.rpartition(" AS ")[2]
        steps.append((stage, instruction, rest))
    return steps


def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "dino-search.json").read_text(encoding="utf-8"))


def panels() -> Iterator[Any]:
    yield from dashboard()["panels"]


def queries() -> list[str]:
    """Of the dashboard's panels, with values for Grafana's variables."""
    found = [target["expr"] for panel in panels() for target in panel.get("targets", [])]
    assert found
    return [query.replace("$__rate_interval", "1m").replace("$instance", ".*") for query in found]


def seconds(text: str) -> float:
    """Of `45s`, `2m` or `45`."""
    match = re.fullmatch(r"([0-9.]+)(ms|s|m|h)?", text)
    assert match, text
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, None: 1}[match[2]]


def program(name: str) -> str:
    """Path of a checking program. Skips the test where it is not installed: none of them comes with the project."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def output_of(*command: str | Path, cwd: Path | None = None) -> str:
    """Of a program that accepts what it is given; what it says otherwise fails the test."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def nginx_configuration(folder: Path, *, tls: str, services: Sequence[str] = ()) -> Path:
    """nginx's main file around the site of `deploy/`, with a certificate made for it; all it writes lies in the folder.

    tls: what it listens on. services: addresses that it deals requests out to, in place of the site's.
    """
    certificate = ("-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem")
    making = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=test")
    output_of(program("openssl"), *making, *certificate)
    site = (DEPLOY / "nginx" / "dino-search.conf").read_text(encoding="utf-8")
    site = site.replace("/etc/ssl/dino-search", str(folder))
    site = re.sub(r"listen \[::\].*\n", "\n", site)
    site = re.sub(r"listen 80", f"listen unix:{folder}/80", site)
    site = re.sub(r"listen 443 ssl", f"listen {tls} ssl", site)
    if services:
        site = re.sub(r"server 127.0.0.1:8000;", " ".join(f"server {service};" for service in services), site)
    (folder / "site.conf").write_text(site, encoding="utf-8")
    temporary = "".join(
        f"{kind}_temp_path {folder / kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # Whoever starts it may write to the folder; the user that nginx would change to may not.
    main = f"user {getpass.getuser()}; " if os.geteuid() == 0 else ""
    main += f"pid {folder}/pid; events {{}} http {{ access_log off; {temporary} include {folder}/site.conf; }}"
    (folder / "nginx.conf").write_text(main, encoding="utf-8")
    return folder / "nginx.conf"

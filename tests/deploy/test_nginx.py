from __future__ import annotations

import re
from pathlib import Path

from deploy_files import DEPLOY, nginx_configuration, output_of, program, seconds

SITE = DEPLOY / "nginx" / "dino-search.conf"


def test_nginx_accepts_the_site(tmp_path: Path) -> None:
    nginx = program("nginx")
    # nginx opens what it listens on to try it, and ports may be taken.
    configuration = nginx_configuration(tmp_path, tls=f"unix:{tmp_path}/443")
    said = output_of(nginx, "-t", "-p", tmp_path, "-c", configuration, "-e", "stderr")
    assert "test is successful" in said


def test_braces_and_statements_are_complete() -> None:
    text = re.sub(r"#.*", "", SITE.read_text(encoding="utf-8"))
    assert text.count("{") == text.count("}")
    for line in filter(None, map(str.strip, text.splitlines())):
        assert line.endswith((";", "{", "}")), line


def test_site_lets_the_service_answer_first() -> None:
    text = SITE.read_text(encoding="utf-8")
    request_timeout_s = 60
    assert seconds(_value(text, "proxy_read_timeout")) > request_timeout_s
    assert _value(text, "client_max_body_size") == "64m"
    assert _value(text, "proxy_next_upstream") == "error"


def test_metrics_and_probes_are_not_published() -> None:
    match = re.search(r"location ~ (\S+) \{\s*return 404;", SITE.read_text(encoding="utf-8"))
    assert match
    assert all(re.search(match[1], path) for path in ("/metrics", "/livez", "/readyz"))
    assert not any(re.search(match[1], path) for path in ("/", "/search", "/images/1/thumbnail"))


def _value(text: str, name: str) -> str:
    (found,) = re.findall(rf"^\s*{name} (.+);", text, flags=re.MULTILINE)
    return str(found)

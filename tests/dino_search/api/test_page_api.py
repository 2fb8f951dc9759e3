"""The files of the web page over HTTP."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from running_service import RunningService, is_problem

NAMES = sorted(file.name for file in files("dino_search").joinpath("web").iterdir() if file.is_file())
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@pytest.mark.parametrize("name", NAMES)
def test_each_file_comes_whole_with_its_type_and_the_policy(service: RunningService, name: str) -> None:
    answer = service.http.get(f"/web/{name}")
    assert answer.content == files("dino_search").joinpath("web", name).read_bytes()
    assert answer.headers["content-type"].split(";")[0] == TYPES[name.rpartition(".")[2]]
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy


def test_the_page_is_the_index(service: RunningService) -> None:
    assert service.http.get("/").content == service.http.get("/web/index.html").content
    head = service.http.head("/")
    assert (head.status_code, head.content) == (200, b"")


def test_a_file_that_the_browser_has_is_not_sent_again(service: RunningService) -> None:
    first = service.http.get("/web/page.js")
    etag = first.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}'):
        again = service.http.get("/web/page.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert service.http.get("/web/page.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert service.http.get("/").headers["etag"] != etag


@pytest.mark.parametrize("path", ["none.js", "%2e%2e%2fapi%2fapp.py", "..%5capi%5capp.py", "__init__.py", "a/b.js"])
def test_what_is_no_file_of_the_page_is_not_found(service: RunningService, path: str) -> None:
    assert is_problem(service.http.get(f"/web/{path}"), 404, "not-found")


def test_the_page_takes_nothing(service: RunningService) -> None:
    answer = service.http.post("/")
    assert is_problem(answer, 405, "method-not-allowed")
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize("name", NAMES)
def test_files_name_only_files_of_the_page(name: str) -> None:
    text = files("dino_search").joinpath("web", name).read_text(encoding="utf-8")
    for found in re.findall(r"""["'(](/web/[^"')]+)""", text):
        assert found.removeprefix("/web/") in NAMES
    hosts = {found for found in re.findall(r"https?://[^\s\"')]+", text) if found != "http://www.w3.org/2000/svg"}
    assert hosts == set()

"""The page of a copy report in a browser, opened from disk."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bad_files import encoded, picture
from browser import chromium
from commands_in_process import Command
from copy_pairs import a_failed_query, a_match, a_query, sha256_of
from dino_search.copy_report import CopyReport
from dino_search.copy_results import CopyQuery
from dino_search.verdict_files import COLUMNS
from dino_search.verdicts import Verdicts
from sample_collections import write_pictures

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a report of the given queries; whatever the page reports as an error, or asks the network for, fails."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, accept_downloads=True)
    context.set_default_timeout(10_000)
    trouble: list[str] = []

    def open_report(*queries: CopyQuery, path: Path | None = None, **options: Any) -> Page:
        folder = path or tmp_path / "report"
        if path is None:
            given = {"title": "A title", "collection": "default", "model": "m"} | options
            with CopyReport(folder, **given) as report:
                for query in queries:
                    report.add(query)
        page = context.new_page()
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("console", lambda message: trouble.append(f"console: {message.text}"))
        page.on("dialog", lambda dialog: trouble.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: trouble.append(request.url) if request.url.startswith("http") else None)
        page.goto((folder / "report.html").as_uri())
        return page

    yield open_report
    context.close()
    assert trouble == []


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return write_pictures(tmp_path / "photos", *(f"{name}.jpg" for name in "abcdef"))


def some_queries(paths: list[Path]) -> list[CopyQuery]:
    """Five pairs with the first picture: two copies, one uncertain, two different."""
    scores = (0.1, 2.0, 0.6, 1.5, 0.3)
    first, *others = paths
    pairs = zip(scores, others, strict=True)
    return [
        a_query(first, *(a_match(first, other, score, rank=number, precision=score / 2)
                         for number, (score, other) in enumerate(pairs, 1)))
    ]  # fmt: skip


def shown(page: Page) -> list[str]:
    """Names of the references in the order on the screen."""
    rows = page.locator(".pair").all()
    tops = sorted(rows, key=lambda row: (row.bounding_box() or {"y": 0})["y"])
    return [row.locator(".name").nth(1).inner_text().removesuffix(".jpg") for row in tops]


def current(page: Page) -> str:
    return page.locator(".pair.current .name").nth(1).inner_text().removesuffix(".jpg")


def marked(page: Page) -> dict[str, str]:
    found = {}
    for row in page.locator(".pair").all():
        if mark := row.get_attribute("data-mark"):
            found[row.locator(".name").nth(1).inner_text().removesuffix(".jpg")] = mark
    return found


def downloaded(page: Page, press: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.keyboard.press(press)
    target = folder / download.value.suggested_filename
    download.value.save_as(target)
    return target


# --- looking


def test_pairs_are_shown_side_by_side_with_their_areas(opened: Open, paths: list[Path]) -> None:
    area = ((0.25, 0.5), (0.75, 0.5), (0.75, 1.0), (0.25, 1.0))
    a, b, *_ = paths
    match = a_match(
        a, b, 1.25, cosine=0.75, precision=0.987, query_area=area, reference_area=area, similar=True, verified=True,
        variant="mirror", reason="burst",
    )  # fmt: skip
    page = opened(a_query(a, match), a_failed_query(paths[5]))
    row = page.locator(".pair")
    pictures = row.locator("img").all()
    sizes = [item.evaluate("image => [image.complete, image.naturalWidth, image.naturalHeight]") for item in pictures]
    assert sizes == [[True, 96, 64], [True, 96, 64]]
    boxes = [item.bounding_box() for item in pictures]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    for image, outline in zip(boxes, row.locator("polygon.outline").all(), strict=True):
        found = outline.bounding_box()
        assert found is not None
        assert image is not None
        assert found["x"] == pytest.approx(image["x"] + image["width"] / 4, abs=2)
        assert found["y"] == pytest.approx(image["y"] + image["height"] / 2, abs=2)
        assert found["width"] == pytest.approx(image["width"] / 2, abs=4)
    text = row.inner_text()
    for part in ("copy", "similar", "98.7 %", "1.250", "0.750", "a.jpg", "b.jpg", "frames of one burst", "mirrored"):
        assert part in text
    assert "1 query could not be used" in page.locator("footer").inner_text()


def test_sorting_and_filtering(opened: Open, paths: list[Path]) -> None:
    page = opened(*some_queries(paths))
    assert shown(page) == ["c", "e", "d", "f", "b"]  # copies first, then by score
    page.select_option("#sort", "query")
    assert shown(page) == ["b", "c", "d", "e", "f"]
    page.select_option("#sort", "score")
    page.click("#reverse")
    assert shown(page) == ["b", "f", "d", "e", "c"]
    page.click("#reverse")
    page.click("[data-decision=different]")
    assert shown(page) == ["c", "e", "d"]
    page.fill("#min-score", "1")
    assert shown(page) == ["c", "e"]
    page.fill("#text", "E.JPG")
    assert shown(page) == ["e"]
    assert page.locator("#shown").inner_text() == "1 of 5 pairs"
    page.fill("#text", "nothing like that")
    assert page.locator("#empty").inner_text().startswith("No pair passes the filters")
    page.click("#reset")
    assert shown(page) == ["c", "e", "d", "f", "b"]


@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
def test_names_of_files_never_run_as_script(opened: Open, tmp_path: Path) -> None:
    names = [
        "</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", '"><svg onload=alert(3)>',
        "' onmouseover='alert(4)", "javascript:alert(5)", "<!--<script>", "two\nlines", "{{constructor}}", "\u202e gpj",
    ]  # fmt: skip
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{name.replace('/', chr(0x2215))}.jpg" for name in names]
    for path in paths:
        path.write_bytes(encoded(picture(), "JPEG"))
    hostile = "</title></script><script>alert(6)</script><b>"
    page = opened(
        *(a_query(path, a_match(path, path)) for path in paths),
        *(a_failed_query(Path(f"/x/{hostile}"), hostile) for _ in range(2)),
        title=hostile, collection=hostile, model=hostile, facts={hostile: hostile},
    )  # fmt: skip
    assert page.title() == hostile
    assert page.locator("h1").inner_text() == hostile
    assert page.locator("b b, td b, script:has-text('alert')").count() == 0
    page.select_option("#sort", "query")
    found = page.evaluate("[...document.querySelectorAll('.name')].map(element => element.textContent)")
    assert set(found) <= {path.name for path in paths}
    assert len(found) >= 8
    for link in page.locator("a.frame").all():
        assert str(link.get_attribute("href")).startswith("file:///")
    page.evaluate("document.querySelectorAll('details').forEach(item => { item.open = true; })")
    assert page.locator(".failed td").first.inner_text() == f"/x/{hostile}"


def test_what_would_run_is_refused_by_the_page_itself(browser: Browser, tmp_path: Path, paths: list[Path]) -> None:
    with CopyReport(tmp_path / "report", title="t", collection="default", model="m") as report:
        report.add(some_queries(paths)[0])
    file = tmp_path / "report" / "report.html"
    file.write_text(
        file.read_text("utf-8").replace("</header>", "</header><script>document.title = 'run'</script>"), "utf-8"
    )
    page = browser.new_page()
    page.goto(file.as_uri())
    assert page.locator(".pair").count() == 5
    assert page.title() == "t"
    refused = page.evaluate("() => { try { document.body.innerHTML = '<b>x'; } catch (error) { return error.name; } }")
    assert refused == "TypeError"
    page.close()


def test_originals_open_from_their_pictures(opened: Open, tmp_path: Path) -> None:
    try:
        plain, odd = write_pictures(tmp_path / "with space", "50% #1?.jpg", "caf\udce9 \\xe9.jpg")
    except OSError:
        pytest.skip("this file system refuses the name")
    page = opened(a_query(plain, a_match(plain, odd)))
    for link, path in zip(page.locator("a.frame").all(), (plain, odd), strict=True):
        assert link.get_attribute("href") == path.as_uri()


def test_a_picture_that_is_gone_is_named(opened: Open, tmp_path: Path, paths: list[Path]) -> None:
    page = opened(a_query(paths[0], a_match(paths[0], tmp_path / "gone.jpg")))
    assert page.locator("img").count() == 1
    assert "the reference cannot be read any more" in page.locator(".pair").inner_text()


def test_a_report_without_pairs_says_so(opened: Open, tmp_path: Path) -> None:
    page = opened(a_failed_query(tmp_path / "x.jpg"))
    assert page.locator("#empty").inner_text() == "No candidate pairs were found."
    assert page.locator("details.failed").get_attribute("open") is not None
    for key in "jkcnusd":
        page.keyboard.press(key)
    assert page.locator("#csv").is_disabled()


# --- many


def test_ten_thousand_rows_are_quick_and_few_are_in_the_page(opened: Open, tmp_path: Path, paths: list[Path]) -> None:
    first, *others = paths
    matches = [a_match(first, others[number % 5], number / 10_000, rank=number + 1) for number in range(10_000)]
    page = opened(a_query(first, *matches))
    page.wait_for_selector(".pair img")
    loaded_ms = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    assert loaded_ms < 5000  # measured: 0.3 s
    assert page.locator("#shown").inner_text() == "10,000 of 10,000 pairs"
    assert page.locator(".pair").count() < 30
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('.pair.current').getAttribute('aria-posinset') === '10000'")
    assert "score 0.000" in page.locator(".pair.current").inner_text()
    assert page.locator(".pair").count() < 30
    page.keyboard.press("Home")
    assert "score 1.000" in page.locator(".pair.current").inner_text()
    assert page.locator(".pair.current").evaluate("element => element === document.activeElement")


# --- deciding


def test_keys_move_and_mark(opened: Open, paths: list[Path], tmp_path: Path) -> None:
    page = opened(*some_queries(paths))
    page.keyboard.press("j")  # to the first
    assert current(page) == "c"
    for key in "jjk":
        page.keyboard.press(key)
    assert current(page) == "e"
    page.keyboard.press("c")
    assert current(page) == "d"
    page.keyboard.press("n")
    page.keyboard.press("n")
    assert marked(page) == {"e": "copy", "d": "not_copy", "f": "not_copy"}
    page.keyboard.press("u")
    page.keyboard.press("u")
    assert (marked(page), current(page)) == ({"e": "copy"}, "d")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("u")  # the mark of the one that we moved to
    assert marked(page) == {}
    assert page.locator("#csv").is_disabled()
    page.keyboard.press("/")
    page.keyboard.type("cnu")
    assert page.locator("#text").input_value() == "cnu"
    assert marked(page) == {}
    page.keyboard.press("Control+c")
    assert marked(page) == {}


def test_buttons_mark_and_take_marks_back(opened: Open, paths: list[Path]) -> None:
    page = opened(*some_queries(paths))
    row = page.locator(".pair").first
    row.get_by_role("button", name="Not a copy").click()
    assert marked(page) == {"c": "not_copy"}
    assert row.get_by_role("button", name="Not a copy").get_attribute("aria-pressed") == "true"
    row.get_by_role("button", name="Copy", exact=True).click()
    assert marked(page) == {"c": "copy"}
    assert page.locator("#csv").inner_text() == "Download verdicts (1)"
    row.get_by_role("button", name="Copy", exact=True).click()
    assert marked(page) == {}


def test_marks_are_there_after_the_page_was_closed(opened: Open, paths: list[Path], tmp_path: Path) -> None:
    page = opened(*some_queries(paths))
    page.keyboard.press("c")
    page.keyboard.press("n")
    page.close()
    page = opened(path=tmp_path / "report")
    assert marked(page) == {"c": "copy", "e": "not_copy"}
    page.select_option("#marked", "no")
    assert shown(page) == ["d", "f", "b"]
    page.select_option("#marked", "yes")
    assert shown(page) == ["c", "e"]


def test_a_pair_in_both_directions_has_one_mark(opened: Open, paths: list[Path], tmp_path: Path) -> None:
    a, b, *_ = paths
    page = opened(a_query(a, a_match(a, b, 2)), a_query(b, a_match(b, a, 1.5)))
    page.keyboard.press("c")
    assert marked(page) == {"a": "copy", "b": "copy"}
    file = downloaded(page, "s", tmp_path)
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("key", ["s", "d"])
@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
def test_downloaded_marks_are_verdicts_that_import_takes(
    opened: Open, dino_search: Command, tmp_path: Path, key: str
) -> None:
    a, b, c = write_pictures(tmp_path / "photos", 'a "quoted", one.jpg', "two\nlines <b>.jpg", "c.jpg")
    page = opened(a_query(a, a_match(a, b, 2), a_match(a, c, 1)))
    page.keyboard.press("c")
    page.keyboard.press("n")
    file = downloaded(page, key, tmp_path)
    assert "dino-search verdicts import" in page.locator("#status").inner_text()
    if key == "s":
        with open(file, newline="", encoding="utf-8") as table:
            rows = list(csv.reader(table))
        assert rows[0] == list(COLUMNS)
        assert rows[1][:5] == [str(a), str(b), "copy", sha256_of(a), sha256_of(b)]
    assert dino_search("verdicts", "import", file).out == "2 added, 0 changed, 0 unchanged\n"
    found = {frozenset((row.query_sha256, row.reference_sha256)): row.decision for row in Verdicts().listed()}
    assert found == {
        frozenset((sha256_of(a), sha256_of(b))): "copy", frozenset((sha256_of(a), sha256_of(c))): "not_copy",
    }  # fmt: skip


def test_what_was_decided_before_is_shown(opened: Open, paths: list[Path]) -> None:
    a, b, c, *_ = paths
    page = opened(a_query(a, a_match(a, b, 2, verdict="not_copy", reason="verdict"), a_match(a, c)))
    assert "decided by a person: not a copy" in page.locator(".pair").first.inner_text()
    page.select_option("#marked", "decided")
    assert shown(page) == ["b"]


# --- for everybody


def test_screen_readers_hear_what_happens(opened: Open, paths: list[Path]) -> None:
    page = opened(*some_queries(paths))
    assert page.get_by_role("list").get_by_role("listitem").count() == 5
    row = page.get_by_role("listitem").first
    assert (row.get_attribute("aria-posinset"), row.get_attribute("aria-setsize")) == ("1", "5")
    page.keyboard.press("c")
    assert page.get_by_role("status").inner_text() == "marked copy: a.jpg and c.jpg. 1 marked"
    assert str(row.get_attribute("aria-label")).endswith("marked copy")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, button')].filter(item => !(item.labels?.length "
        "|| item.ariaLabel || item.textContent.trim())).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_cut_off_in_any_width_and_colours_follow_the_system(
    browser: Browser, tmp_path: Path, paths: list[Path], width: int, scheme: Any
) -> None:
    long = write_pictures(tmp_path / ("folder " * 20), f"{'long' * 40}.jpg")[0]
    with CopyReport(tmp_path / "report", title="t" * 80, collection="default", model="m") as report:
        report.add(a_query(long, a_match(long, paths[0], 0.7, similar=True, verdict="copy"), a_match(long, paths[1])))
    context = browser.new_context(viewport={"width": width, "height": 700}, color_scheme=scheme)
    page = context.new_page()
    page.goto((tmp_path / "report" / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for row in page.locator(".pair").all():
        fits = "row => row.scrollHeight <= row.clientHeight + 1 && row.scrollWidth <= row.clientWidth + 1"
        assert row.evaluate(fits)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(background) < 60) == (scheme == "dark")
    context.close()

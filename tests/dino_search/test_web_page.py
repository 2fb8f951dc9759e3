"""The web page in a browser, against a service on this machine that has a few photographs and edited copies of them."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import skimage
from PIL import Image

from browser import chromium
from dino_index.edits import apply_edits
from dino_index.images import load_image
from dino_search import Collection, IndexOptions
from dino_search.api.keys import ApiKeys
from running_service import RunningService, running_service

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.browser

Open = Callable[..., "Page"]

NAMES = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
DESKTOP = {"width": 1200, "height": 800}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos/NAME/`: a photograph, a part of it, and the very same file again; `queries/`: other edits."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for file in NAMES:
        name = file.partition(".")[0]
        photograph = Image.fromarray(load_image(Path(skimage.__file__).parent / "data" / file).pixels_HWC)
        photograph.thumbnail((320, 320))
        photos, queries = root / "photos" / name, root / "queries"
        photos.mkdir(parents=True)
        queries.mkdir(exist_ok=True)
        photograph.save(photos / f"{name}.jpg", quality=90)
        (photos / f"{name}-again.jpg").write_bytes((photos / f"{name}.jpg").read_bytes())
        apply_edits(photograph, ["crop"], rng).save(photos / f"{name}-crop.jpg", quality=90)
        apply_edits(photograph, ["colour", "caption"], rng).save(queries / f"{name}.jpg", quality=90)
    (root / "queries" / "notes.jpg").write_text("these are words")
    return root


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[RunningService]:
    home = tmp_path_factory.mktemp("service") / "home"
    with Collection.open("default", home=home) as collection:
        collection.index(folder / "photos", IndexOptions(labels="folders"))
    with Collection.open("few", home=home) as collection:
        collection.index(folder / "photos" / "rocket")
    with running_service(home, keys="off") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def opened(browser: Browser, service: RunningService) -> Iterator[Open]:
    """Opens the page; what it reports as an error, or asks of anybody but the service, fails the test."""
    trouble: list[str] = []
    contexts = []

    def open_page(place: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP} | options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("console", lambda message: trouble.append(f"console: {message.text}"))
        page.on("request", lambda asked: None if _is_ours(asked.url, service) else trouble.append(asked.url))
        page.goto(f"{service.url}/{place}")
        page.locator("#collection option").first.wait_for(state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # A refused request is for the tests that send one.
    assert [line for line in trouble if not line.startswith("console: Failed to load resource")] == []


def _is_ours(url: str, service: RunningService) -> bool:
    return url.startswith((f"{service.url}/", f"blob:{service.url}/"))


def choose(page: Page, path: Path) -> None:
    page.set_input_files("#file", path)


def set_mode(page: Page, label: str) -> None:
    page.get_by_label(label, exact=True).check()


def status(page: Page, pattern: str) -> None:
    """Waits until the live region says this."""
    page.locator("#status", has_text=re.compile(pattern)).wait_for()


def names(page: Page) -> list[str]:
    return [name.removesuffix(".jpg") for name in page.locator(".result .name").all_inner_texts()]


def box(locator: Locator) -> tuple[float, float, float, float]:
    found = locator.bounding_box()
    assert found is not None
    return found["x"], found["y"], found["width"], found["height"]


def is_shown(image: Locator) -> bool:
    image.scroll_into_view_if_needed()
    image.evaluate("image => image.complete || new Promise(done => image.addEventListener('load', done))")
    return bool(image.evaluate("image => image.naturalWidth > 0"))


# --- searching


def test_a_chosen_file_is_searched_by(opened: Open, folder: Path) -> None:
    page = opened()
    page.locator("#k").fill("5")
    choose(page, folder / "queries" / "chelsea.jpg")
    status(page, "5 images found")
    assert set(names(page)[:2]) <= {"chelsea", "chelsea-again", "chelsea-crop"}
    first = page.locator(".result").first
    assert 0.4 < float(first.locator(".score").inner_text().split()[-1]) <= 1
    assert first.locator(".label").inner_text() == "chelsea"
    assert is_shown(first.locator("img"))
    assert is_shown(page.locator("#preview-image"))
    assert page.title().startswith("Like chelsea.jpg")


def test_a_click_on_a_result_searches_by_it_and_back_returns(opened: Open, folder: Path) -> None:
    page = opened()
    choose(page, folder / "queries" / "coffee.jpg")
    status(page, "12 images found")
    found = names(page)
    page.locator(".result", has_text="rocket-crop.jpg").click()
    page.get_by_role("heading", name="Like rocket-crop.jpg").wait_for()
    assert names(page)[0] == "rocket-crop"
    assert page.locator(".result .score").first.inner_text().endswith("1.000")
    assert page.evaluate("document.activeElement.id") == "results"
    page.reload()
    page.get_by_role("heading", name="Like rocket-crop.jpg").wait_for()
    page.go_back()
    page.go_forward()
    page.get_by_role("heading", name="Like rocket-crop.jpg").wait_for()
    assert len(found) == 12


def test_back_returns_to_a_file_that_was_searched_by(opened: Open, folder: Path) -> None:
    page = opened()
    choose(page, folder / "queries" / "coffee.jpg")
    status(page, "12 images found")
    found = names(page)
    page.locator(".result", has_text="rocket-crop.jpg").click()
    page.get_by_role("heading", name="Like rocket-crop.jpg").wait_for()
    page.go_back()
    page.get_by_role("heading", name="Like coffee.jpg").wait_for()
    assert names(page) == found


def test_the_page_begins_with_images_to_ask_about(opened: Open) -> None:
    page = opened()
    page.get_by_role("heading", name="Or begin with one of the collection").wait_for()
    assert len(names(page)) == 12
    page.locator(".result", has_text="coffee-crop.jpg").press("Enter")
    page.get_by_role("heading", name="Like coffee-crop.jpg").wait_for()


@pytest.mark.parametrize("place", ["#mode=toString&image=1e3", "#mode=search&image=-1", "#%", "#results"])
def test_an_address_that_means_nothing_is_no_question(opened: Open, place: str) -> None:
    page = opened(place)
    page.get_by_role("heading", name="Or begin with one of the collection").wait_for()
    assert page.locator("#modes :checked").get_attribute("value") == "search"


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_can_be_dropped_or_pasted(opened: Open, folder: Path, event: str) -> None:
    page = opened()
    data = base64.b64encode((folder / "queries" / "rocket.jpg").read_bytes()).decode()
    page.evaluate(
        """([type, data]) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const held = new DataTransfer();
            held.items.add(new File([bytes], "from-elsewhere.jpg", { type: "image/jpeg" }));
            const options = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(type === "drop"
                ? new DragEvent("drop", { ...options, dataTransfer: held })
                : new ClipboardEvent("paste", { ...options, clipboardData: held }));
        }""",
        [event, data],
    )
    page.get_by_role("heading", name="Like from-elsewhere.jpg").wait_for()
    assert names(page)[0].startswith("rocket")


def test_filters_are_added_and_removed(opened: Open, folder: Path) -> None:
    page = opened()
    choose(page, folder / "queries" / "coffee.jpg")
    status(page, "12 images found")
    page.get_by_label("Field").fill("label")
    page.get_by_label("Comparison").select_option("!=")
    page.get_by_label("Value").fill("coffee")
    page.keyboard.press("Enter")
    status(page, "9 images found")
    assert not any(name.startswith("coffee") for name in names(page))
    page.get_by_role("button", name="Remove filter label != coffee").click()
    status(page, "12 images found")


def test_another_collection_can_be_chosen(opened: Open, folder: Path) -> None:
    page = opened()
    choose(page, folder / "queries" / "coffee.jpg")
    status(page, "12 images found")
    page.get_by_label("Collection").select_option("few")
    status(page, "3 images found")
    assert page.locator(".result .label").count() == 0


def test_a_picture_is_classified(opened: Open, folder: Path) -> None:
    page = opened()
    set_mode(page, "Classify")
    choose(page, folder / "queries" / "motorcycle_left.jpg")
    page.get_by_role("heading", name="motorcycle_left.jpg is motorcycle_left").wait_for()
    first = page.locator(".labels li").first
    share = float(first.locator(".share").inner_text().removesuffix("%"))
    assert share > 50
    assert box(first.locator(".bar"))[2] == pytest.approx(box(first.locator(".track"))[2] * share / 100, abs=2)
    assert len(names(page)) == 12


def test_attention_is_shown_over_the_picture_and_taken_away(opened: Open, folder: Path) -> None:
    page = opened()
    choose(page, folder / "queries" / "chelsea.jpg")
    status(page, "12 images found")
    before = page.locator("#preview-image").get_attribute("src")
    button = page.get_by_role("button", name="Show attention")
    button.click()
    status(page, "where the model looks")
    assert is_shown(page.locator("#preview-image"))
    assert page.locator("#preview-image").get_attribute("src") != before
    assert "Where the model looks" in str(page.locator("#preview-image").get_attribute("alt"))
    hide = page.get_by_role("button", name="Hide attention")
    assert hide.get_attribute("aria-pressed") == "true"
    hide.click()
    assert page.locator("#preview-image").get_attribute("src") == before


# --- copies and duplicates


def test_copies_are_shown_with_the_matched_areas_on_both_pictures(
    opened: Open, folder: Path, service: RunningService
) -> None:
    page = opened()
    set_mode(page, "Copies")
    query = folder / "queries" / "motorcycle_left.jpg"
    choose(page, query)
    status(page, r"candidates, [1-9]\d* cop(y|ies)")
    sent = {"image": (query.name, query.read_bytes())}
    expected = service.http.post("/copies", files=sent, data={"k": "20"}).json()["queries"][0]["matches"]
    drawn = next(match for match in expected if match["reference_area"])
    name = Path(drawn["reference"]).name
    pair = page.get_by_role("article").filter(has=page.get_by_role("button", name=f"Search by {name}")).first
    assert pair.locator(".decision").inner_text() == drawn["decision"]
    assert f"{drawn['score']:.3f}" in pair.inner_text()
    for number, area in enumerate((drawn["query_area"], drawn["reference_area"])):
        assert is_shown(pair.locator("img").nth(number))
        x, y, width, height = box(pair.locator("img").nth(number))
        xs, ys = zip(*area, strict=True)
        inside = page.evaluate(
            """(outline) => { const { x, y, width, height } = outline.getBBox(), m = outline.getScreenCTM();
                return [m.e + m.a * x, m.f + m.d * y, m.a * width, m.d * height]; }""",
            pair.locator("polygon.outline").nth(number).element_handle(),
        )
        expected_box = [x + width * min(xs), y + height * min(ys), width * (max(xs) - min(xs)),
                        height * (max(ys) - min(ys))]  # fmt: skip
        assert inside == pytest.approx(expected_box, abs=1.5)
    pair.get_by_role("button", name=f"Search by {name}").click()
    page.get_by_role("heading", name=f"Like {name}").wait_for()


def test_duplicates_are_judged_by_keyboard(opened: Open, service: RunningService) -> None:
    page = opened()
    set_mode(page, "Duplicates")
    page.get_by_role("button", name="Find duplicates").press("Enter")
    status(page, r"4 groups among 12 images")
    pairs = page.locator(".pair")
    focused = "[...document.querySelectorAll('.pair')].indexOf(document.activeElement)"
    assert page.evaluate(focused) == 0
    judged = [number for number in range(pairs.count()) if pairs.nth(number).locator("button[data-decision]").count()]
    first, second = judged[:2]
    for _ in range(first):
        page.keyboard.press("j")
    page.keyboard.press("c")
    page.keyboard.press("k")
    assert page.evaluate(focused) == first
    for key in ["ArrowDown"] * (second - first):
        page.keyboard.press(key)
    assert page.evaluate(focused) == second
    page.keyboard.press("n")
    status(page, "Recorded: .*: not a copy")
    for number, decision in ((first, "copy"), (second, "not_copy")):
        assert pairs.nth(number).get_attribute("data-verdict") == decision
        pressed = pairs.nth(number).locator("[aria-pressed=true]")
        assert pressed.get_attribute("data-decision") == decision
    recorded = {
        # Of two files with the same bytes, a verdict names either.
        frozenset(Path(each[side]).name.replace("-again", "") for side in ("query", "reference")): each["decision"]
        for each in service.http.get("/verdicts").json()["verdicts"]
    }
    for number, decision in ((first, "copy"), (second, "not_copy")):
        shown = frozenset(name.split()[-1] for name in pairs.nth(number).locator(".name").all_inner_texts())
        shown = frozenset(name.replace("-again", "") for name in shown)
        assert {pair for pair, found in recorded.items() if found == decision} >= {shown}
    page.get_by_role("button", name="Find duplicates").click()
    status(page, "4 groups among 12 images")
    assert page.locator(".pair[data-verdict=copy]").count() == 1
    assert page.locator(".pair[data-verdict=not_copy]").count() == 0


def test_duplicates_that_take_longer_than_a_request_are_waited_for(opened: Open) -> None:
    page = opened()
    problem = {"type": "/problems/request-timed-out", "title": "Request timed out", "status": 503, "detail": "again"}
    answers: list[Any] = [problem, problem]

    def answer(route: Any) -> None:
        if answers:
            route.fulfill(status=503, content_type="application/problem+json", body=json.dumps(answers.pop()))
        else:
            route.continue_()

    page.route("**/duplicates?**", answer)
    set_mode(page, "Duplicates")
    page.get_by_role("button", name="Find duplicates").click()
    status(page, "groups among 12 images")
    assert (answers, page.get_by_role("alert").inner_text()) == ([], "")


def test_more_groups_are_shown_when_asked_for_and_each_pair_once(opened: Open, service: RunningService) -> None:
    page = opened()
    page.route("**/duplicates?**", lambda route: route.continue_(url=route.request.url.replace("limit=50", "limit=2")))
    set_mode(page, "Duplicates")
    page.get_by_role("button", name="Find duplicates").click()
    more = page.get_by_role("button", name="Show more groups")
    more.wait_for()
    assert page.locator(".group").count() == 2
    more.click()
    status(page, "more pairs? shown")
    groups = service.http.get("/duplicates").json()["groups"]
    headings = page.locator(".group h3").all_inner_texts()
    assert [int(heading.split()[1]) for heading in headings] == [group["group"] for group in groups]
    assert page.locator(".pair").count() == sum(len(group["files"]) - 1 for group in groups)
    more.wait_for(state="hidden")


def test_a_verdict_that_is_refused_is_taken_back(opened: Open) -> None:
    page = opened()
    problem = {"type": "/problems/scope-missing", "title": "Scope missing", "status": 403, "detail": "needs write"}
    page.route(
        "**/verdicts",
        lambda route: (
            route.fulfill(status=403, content_type="application/problem+json", body=json.dumps(problem))
            if route.request.method == "PUT"
            else route.continue_()
        ),
    )
    set_mode(page, "Duplicates")
    page.get_by_role("button", name="Find duplicates").click()
    pair = page.locator(".pair", has=page.locator("button[data-decision=not_copy]")).last
    before = pair.get_attribute("data-verdict")
    pair.locator("button[data-decision=not_copy]").click()
    page.get_by_role("alert").get_by_text("needs write").wait_for()
    assert pair.get_attribute("data-verdict") == before


# --- errors and keys


def test_what_the_service_refuses_is_shown_as_its_detail(opened: Open, folder: Path, service: RunningService) -> None:
    page = opened()
    path = folder / "queries" / "notes.jpg"
    choose(page, path)
    expected = service.http.post("/search", files={"image": (path.name, path.read_bytes())})
    assert expected.status_code == 415
    page.get_by_role("alert").get_by_text(expected.json()["detail"]).wait_for()
    page.locator("#preview .missing").wait_for()
    choose(page, folder / "queries" / "coffee.jpg")
    status(page, "12 images found")
    assert page.get_by_role("alert").inner_text() == ""


def test_what_will_not_pass_by_itself_is_not_to_be_tried_again(opened: Open, folder: Path) -> None:
    page = opened()
    page.locator("#k").fill("0")
    choose(page, folder / "queries" / "coffee.jpg")
    page.get_by_role("alert").get_by_text("k: ").wait_for()
    assert page.get_by_role("button", name="Try again").count() == 0


def test_a_service_that_has_gone_is_said_and_can_be_tried_again(opened: Open, folder: Path) -> None:
    page = opened()
    page.route("**/search", lambda route: route.abort())
    choose(page, folder / "queries" / "coffee.jpg")
    page.get_by_role("alert").get_by_text("cannot be reached").wait_for()
    page.unroute("**/search")
    page.get_by_role("button", name="Try again").click()
    status(page, "12 images found")


def test_a_key_is_asked_for_sent_and_kept_for_the_tab(
    browser: Browser, service: RunningService, folder: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(service.app.state.settings.home, home)
    _, key = ApiKeys(home).add("page", scope="read")
    with running_service(home) as locked, browser.new_context() as context:
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.goto(locked.url)
        page.get_by_role("alert").get_by_text("asks for an API key").wait_for()
        page.locator("#key:focus").wait_for()
        page.keyboard.type("ds_" + "x" * 43)
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("found one that is unknown").wait_for()
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Or begin with").wait_for()
        choose(page, folder / "queries" / "coffee.jpg")
        status(page, "12 images found")
        page.locator(".result img[src]").first.wait_for()
        assert is_shown(page.locator(".result img").first)
        assert key not in page.content()
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        page.locator("#access summary").click()
        page.get_by_role("button", name="Forget").click()
        page.get_by_role("alert").get_by_text("asks for an API key").wait_for()
        assert page.evaluate("sessionStorage.length") == 0


# --- for everybody


def show_everything(page: Page, folder: Path) -> Iterator[str]:
    """The page in each of its states, by name."""
    page.get_by_role("heading", name="Or begin with").wait_for()
    yield "begin"
    page.get_by_label("Field").fill("label")
    page.get_by_label("Value").fill("coffee")
    page.keyboard.press("Enter")
    choose(page, folder / "queries" / "coffee.jpg")
    status(page, "3 images found")
    yield "search"
    set_mode(page, "Classify")
    page.locator(".labels").wait_for()
    yield "classify"
    set_mode(page, "Copies")
    page.locator(".pair").first.wait_for()
    page.locator("summary", has_text="nearest image").click()
    yield "copies"
    set_mode(page, "Duplicates")
    page.get_by_role("button", name="Find duplicates").click()
    page.locator(".group .pair").first.wait_for()
    yield "duplicates"
    set_mode(page, "Search")
    status(page, "3 images found")
    choose(page, folder / "queries" / "notes.jpg")
    page.locator("#problem p").wait_for()
    page.locator("#access summary").click()
    yield "problem"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_people_out(opened: Open, folder: Path, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]

    page = opened(color_scheme=scheme, reduced_motion="reduce")
    for name in show_everything(page, folder):
        found = Axe().run(page).response["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        bad = [f"{each['id']}: {each['nodes'][0]['html']}" for each in serious]
        assert (name, bad) == (name, [])


def test_dark_and_light_differ(opened: Open) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(map(int, re.findall(r"\d+", colour))) for colour in colours)
    assert light > 3 * 200
    assert dark < 3 * 60


def test_a_phone_shows_everything_without_scrolling_sideways(opened: Open, folder: Path) -> None:
    page = opened(viewport=PHONE, has_touch=True, is_mobile=True)
    for name in show_everything(page, folder):
        assert (name, page.evaluate("document.documentElement.scrollWidth")) == (name, PHONE["width"])


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
def test_long_names_and_labels_stay_in_their_places(opened: Open, folder: Path, viewport: Any) -> None:
    page = opened(viewport=viewport)
    choose(page, folder / "queries" / "motorcycle_left.jpg")
    status(page, "12 images found")
    wide = page.locator(".result").evaluate_all(
        """cells => cells.filter(cell => cell.scrollWidth > cell.clientWidth).map(cell => cell.title)"""
    )
    assert wide == []


def test_the_focus_goes_through_the_page_in_order_and_is_seen(opened: Open) -> None:
    page = opened()
    page.get_by_role("heading", name="Or begin with").wait_for()
    visited = []
    for _ in range(11):
        page.keyboard.press("Tab")
        visited.append(page.evaluate("(({ id, name, localName }) => id || name || localName)(document.activeElement)"))
        outline = page.evaluate(
            """(() => { const at = document.activeElement, next = at.nextElementSibling;
                return [at, next].some((each) => each && getComputedStyle(each).outlineStyle !== "none"); })()"""
        )
        assert outline or visited[-1] == "skip", visited[-1]
    assert visited == [
        "skip", "collection", "summary", "mode", "file", "k", "min_score", "run", "filter-field", "filter-operator",
        "filter-value",
    ]  # fmt: skip
    page.locator("#skip").press("Enter")
    assert page.evaluate("document.activeElement.id") == "results"

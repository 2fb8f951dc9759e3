from __future__ import annotations

import base64
import io
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from bad_files import encoded, exif_orientation, picture
from dino_index.catalog.portable_paths import encode_path
from dino_index.errors import OutputUnwritable
from dino_search.contact_sheet import write_contact_sheet
from dino_search.results import SearchResult, SearchResults
from sample_collections import write_pictures


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[Image.Image]:
        found: list[Image.Image] = []
        for tag, attributes in self.tags:
            if tag == "img":
                head, data = str(attributes["src"]).split(",")
                assert head == "data:image/jpeg;base64"
                found.append(Image.open(io.BytesIO(base64.b64decode(data))))
        return found


def search_of(query: Path, *found: Path) -> SearchResults:
    results = [
        SearchResult(rank=rank, image_id=rank, path=encode_path(str(path)), score=1 / rank, label=None)
        for rank, path in enumerate(found, 1)
    ]
    return SearchResults(query=encode_path(str(query)), collection="default", model="m", results=results)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, "query.jpg", "a.jpg", "b.jpg")
    write_contact_sheet(tmp_path / "page.html", "A title", [search_of(*paths), search_of(*paths)], "A note.")
    text = (tmp_path / "page.html").read_text("utf-8")
    page = Page(tmp_path / "page.html")
    assert "http" not in text
    assert "url(" not in text
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert all(str(value).startswith("data:") for _, attributes in page.tags
               for name, value in attributes.items() if name in ("src", "href", "srcset"))  # fmt: skip
    assert len(page.pictures()) == 6
    assert "A title" in page.text
    assert "A note." in page.text
    assert "0.500 b.jpg" in page.text


@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
@pytest.mark.parametrize(
    "name", ['"><script>alert(1)<x>.jpg', "' onerror='alert(1).jpg", "&lt;b&gt;.jpg", "{{ 7*7 }}.jpg"]
)
def test_names_are_text_and_never_markup(tmp_path: Path, name: str) -> None:
    (path,) = write_pictures(tmp_path, name)
    write_contact_sheet(tmp_path / "page.html", f"Search in {name}", [search_of(path, path)], name)
    page = Page(tmp_path / "page.html")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [set(attributes) for attributes in images] == [{"src", "alt"}] * 2
    assert [attributes["alt"] for attributes in images] == [name] * 2
    assert page.text.count(name) == 2 + 1 + 1 + 1  # title twice, note, two captions
    assert "script" not in {tag for tag, _ in page.tags}


def test_thumbnails_are_small_upright_and_without_metadata(tmp_path: Path) -> None:
    exif = exif_orientation(6)
    exif[0x010F] = "Secret Camera Maker"
    (tmp_path / "phone.jpg").write_bytes(encoded(picture(600, 400), "JPEG", exif=exif))
    write_contact_sheet(tmp_path / "page.html", "t", [search_of(tmp_path / "phone.jpg")])
    (thumbnail,) = Page(tmp_path / "page.html").pictures()
    assert thumbnail.size == (160, 240)
    assert not thumbnail.getexif()


def test_a_picture_that_is_gone_is_shown_by_name(tmp_path: Path) -> None:
    (query,) = write_pictures(tmp_path, "query.jpg")
    write_contact_sheet(tmp_path / "page.html", "t", [search_of(query, tmp_path / "gone.jpg"), search_of(query)])
    page = Page(tmp_path / "page.html")
    assert len(page.pictures()) == 2
    assert "cannot be read" in page.text
    assert "gone.jpg" in page.text
    assert "nothing found" in page.text


@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
def test_names_that_are_not_utf_8_find_their_picture(tmp_path: Path) -> None:
    try:
        (path,) = write_pictures(tmp_path, "caf\udce9.jpg")
    except OSError:
        pytest.skip("this file system refuses the name")
    write_contact_sheet(tmp_path / "page.html", "t", [search_of(path)])
    page = Page(tmp_path / "page.html")
    assert len(page.pictures()) == 1
    assert r"caf\xe9.jpg" in page.text


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (query,) = write_pictures(tmp_path, "query.jpg")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputUnwritable, match=r"page\.html cannot be written: "):
        write_contact_sheet(tmp_path / "page.html", "t", [search_of(query)])
    assert sorted(path.name for path in tmp_path.iterdir() if "page" in path.name) == ["page.html"]

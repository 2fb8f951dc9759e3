from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, ImageRow, SourceRow
from dino_index.catalog.portable_paths import encode_path
from dino_index.collections import CollectionInfo, create_collection
from dino_index.errors import FilterError
from dino_index.filters import COLUMNS, Filter, matching_ids, parse_filter
from dino_index.model_files import ModelSpec

ROWS: list[dict[str, Any]] = [
    {"path": "a.jpg", "label": "cat", "width": 100, "facts": {"year": 1987, "by": "Ann", "zip": "01234", "ok": True}},
    {"path": "b.jpg", "label": "Dog", "width": 200, "facts": {"year": "1999", "by": "Bob", "zip": "9", "tags": [1]}},
    {"path": "c/d.jpg", "label": None, "width": 300, "facts": {"year": None, "by": "ann", "zip": "10", "ok": False}},
    {"path": "e.jpg", "label": "zebra", "width": 1000, "facts": {"year": 2024.5, "by": "Ångström", "size": "big"}},
    {"path": "f.jpg", "label": "cat", "width": None, "facts": {}},
]
START = datetime(2024, 2, 29, 23, 0, tzinfo=UTC)


class _NoModel(ModelSpec):
    fingerprint = "0" * 64


@pytest.fixture
def filled(home: Path) -> Iterator[tuple[Session, CollectionInfo]]:
    """Five images of one collection, numbered 1 to 5 an hour apart, and one of another collection."""
    catalog = Catalog.open(home, create=True)
    assert catalog is not None
    spec = _NoModel(name="none", weights_path=Path("none"), architecture="none", input_size=8)
    with catalog.writing() as session:
        for name in ("default", "other"):
            collection = create_collection(session, name, spec, 8)
            source = SourceRow(collection_id=collection.id, path=encode_path("/data/ü \udce9"))
            session.add(source)
            session.flush()
            for number, row in enumerate(ROWS if name == "default" else ROWS[:1]):
                added_at = START + timedelta(hours=number)
                session.add(
                    ImageRow(
                        collection_id=collection.id, source_id=source.id, size=10 * number, mtime_ns=1, height=50,
                        status="ok" if row["width"] else "failed", generation=0, added_at=added_at,
                        sha256=bytes([number]) * 32, **row,
                    )
                )  # fmt: skip
                session.flush()
    with catalog.reading() as session:
        collection = create_collection(session, "default", spec, 8)
        yield session, collection
    catalog.close()


Matching = Callable[..., str]


@pytest.fixture
def matching(filled: tuple[Session, CollectionInfo]) -> Matching:
    """Names of the images that pass, without extension."""
    session, collection = filled
    names = dict(session.execute(select(ImageRow.id, ImageRow.path)).all())

    def run(*filters: str) -> str:
        ids = matching_ids(session, collection, [parse_filter(text) for text in filters])
        assert ids.tolist() == sorted(ids.tolist())
        return "".join(names[image_id][-5] for image_id in ids.tolist())

    return run


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("label = cat", Filter("label", "=", "cat")),
        ("label=cat", Filter("label", "=", "cat")),
        ("  year>=1990 ", Filter("year", ">=", "1990")),
        ("a key != 'x = y'", Filter("a key", "!=", "x = y")),
        ('label = "big cat"', Filter("label", "=", "big cat")),
        ("label = ''", Filter("label", "=", "")),
        ("label = it's", Filter("label", "=", "it's")),
        ("path = /a <b>/c.jpg", Filter("path", "=", "/a <b>/c.jpg")),
        ("metadata.width < 3", Filter("metadata.width", "<", "3")),
    ],
)
def test_filters_are_read_with_and_without_blanks_and_quotes(text: str, parsed: Filter) -> None:
    assert parse_filter(text) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label", "expected a filter FIELD OP VALUE"),
        ("= cat", "expected a filter FIELD OP VALUE"),
        ("", "expected a filter"),
        ("label =", "expected a value behind ="),
        ("label == cat", "write a single ="),
        ("label ~ cat", "FIELD OP VALUE"),
    ],
)
def test_what_is_no_filter_is_explained(text: str, message: str) -> None:
    with pytest.raises(FilterError, match=message):
        parse_filter(text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("label = cat", "af"), ("label != cat", "bde"), ("label < a", "b"), ("label >= cat", "aef"), ("label = ''", ""),
        ("width >= 200", "bde"), ("width != 200", "adef"), ("width < 1e3", "abd"), ("width = 200.0", "b"),
        ("size > 10", "def"), ("height = 50", "abdef"), ("status = failed", "f"), ("status = ok", "abde"),
        ("id > 0", "abdef"), ("id < 99999999999999999999", "abdef"), ("error_code != permission", "abdef"),
        (r"path = '/data/ü \xe9/c/d.jpg'", "d"), (r"path != '/data/ü \xe9/c/d.jpg'", "abef"), ("path = c/d.jpg", ""),
        (r"path < '/data/ü \xe9/b.jpg'", "a"), (r"path > '/data/ü \xe9/b'", "bdef"),
        (f"sha256 = {'01' * 32}", "b"), (f"sha256 != {'01' * 32}", "adef"),
        ("added_at = 2024-02-29", "a"), ("added_at != 2024-02-29", "bdef"), ("added_at > 2024-02-29", "bdef"),
        ("added_at <= 2024-02-29", "a"), ("added_at < 2024-03-01T01:00", "ab"), ("added_at <= 2024-03-01T01:00", "abd"),
        ("added_at = 2024-03-01T02:00:00+01:00", "d"), ("added_at >= 2024-03-02", ""),
    ],
)  # fmt: skip
def test_columns_are_compared(matching: Matching, text: str, names: str) -> None:
    assert matching(text) == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("year >= 1990", "be"), ("year < 2000", "ab"), ("year = 1987", "a"), ("year = 1987.0", "a"),
        ("year != 1987", "bdef"), ("year = 2024.5", "e"), ("year > 9", "abe"),
        ("by = ann", "d"), ("by >= a", "de"), ("by = Ångström", "e"), ("by < B", "a"), ("by != Bob", "adef"),
        ("zip = 01234", "a"), ("zip < 10", "b"), ("zip >= 10", "ad"),
        ("ok = true", "a"), ("ok != true", "bdef"), ("tags = [1]", ""), ("tags != x", "abdef"),
        ("metadata.size = big", "e"), ("metadata.year = 1987", "a"),
    ],
)  # fmt: skip
def test_metadata_is_compared_as_numbers_or_as_text(matching: Matching, text: str, names: str) -> None:
    assert matching(text) == names


def test_all_of_several_filters_must_hold(matching: Matching) -> None:
    assert matching("label = cat", "year = 1987") == "a"
    assert matching("label = cat", "year != 1987") == "f"
    assert matching("year > 1980", "by >= B", "width < 1000") == "b"
    assert matching("width > 1000", "year = 1987") == ""
    assert matching() == "abdef"


def test_unknown_fields_name_the_known_ones(matching: Matching) -> None:
    with pytest.raises(FilterError, match=r"found 'yaer'; it has the fields id, .*metadata keys by, ok, size, tags, y"):
        matching("yaer > 3")
    with pytest.raises(FilterError, match="found 'colour'"):
        matching("label = nothing", "colour = red")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width > wide", "width is a number, found 'wide'"),
        ("id = nan", "id is a number"),
        ("added_at > yesterday", "2024-12-31, or|2024-12-31 or .* found 'yesterday'"),
        ("sha256 > 00", "64 hexadecimal digits"),
    ],
)
def test_values_that_a_column_cannot_have_are_refused(matching: Matching, text: str, message: str) -> None:
    with pytest.raises(FilterError, match=message):
        matching(text)


def test_every_column_that_is_named_can_be_compared(matching: Matching) -> None:
    values = {"added_at": "2024-01-01", "sha256": "0" * 64}
    for column in COLUMNS:
        assert matching(f"{column} != {values.get(column, '-1')}") != ""

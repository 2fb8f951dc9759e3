from __future__ import annotations

import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dino_index.errors import ManifestError
from dino_index.manifests import is_manifest, read_manifest, to_json_value
from sample_collections import jpeg


def rows(path: Path) -> list[tuple[str, str | None, dict[str, Any] | None]]:
    return [(row.path, row.label, row.facts) for row in read_manifest(str(path))]


def test_text_manifest_has_a_path_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa b.jpg\r\n\n  \nsub/\xfc.jpg".encode() + b"\ncaf\xe9.jpg\n")
    assert rows(tmp_path / "a.txt") == [
        ("a b.jpg", None, None), ("sub/ü.jpg", None, None), ("caf\udce9.jpg", None, None),
    ]  # fmt: skip


def test_further_columns_are_facts_and_keep_their_text_in_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('year,path,label,note\n007,a.jpg,cat,"x, y"\n,"b,c.jpg",,\n')
    assert rows(tmp_path / "a.csv") == [
        ("a.jpg", "cat", {"year": "007", "note": "x, y"}),
        ("b,c.jpg", None, {"year": None, "note": None}),
    ]


def test_manifest_of_path_and_label_alone_says_nothing_about_facts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,label\na.jpg,cat\n")
    pq.write_table(pa.table({"path": ["a.jpg"], "label": ["cat"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"path": "a.jpg", "label": "cat"}\n')
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        assert rows(tmp_path / name) == [("a.jpg", "cat", None)]


def test_parquet_columns_of_every_kind_become_json(tmp_path: Path) -> None:
    noon = datetime(2024, 2, 29, 12, 0, 0, 5, UTC)
    table = pa.table(
        {
            "path": pa.array(["a.jpg", "b.jpg"]),
            "label": pa.array([3.0, float("nan")]),
            "whole": pa.array([2**60, None]),
            "real": pa.array([0.5, float("nan")]),
            "yes": pa.array([True, None]),
            "when": pa.array([noon, None], pa.timestamp("us", "UTC")),
            "exact": pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns")),
            "far": pa.array([2**62, None], pa.timestamp("us")),  # beyond the year 9999
            "day": pa.array([date(2024, 1, 2), None]),
            "clock": pa.array([time(1, 2, 3), None]),
            "length": pa.array([timedelta(seconds=90), None]),
            "price": pa.array([Decimal("1.50"), None]),
            "nested": pa.array(
                [{"boxes": [[1.0, float("inf")]], "at": noon.replace(tzinfo=None)}, None],
                pa.struct({"boxes": pa.list_(pa.list_(pa.float64())), "at": pa.timestamp("ns")}),
            ),
            "tags": pa.array([["x", None], None]),
            "pairs": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
            "small": pa.array([b"ab", None]),
            "large": pa.array([bytes(5000), None]),
            "category": pa.array(["red", None]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (_, label, facts), (_, no_label, nothing) = rows(tmp_path / "a.parquet")
    assert (label, no_label) == ("3", None)
    assert nothing is not None
    assert set(nothing.values()) == {None}
    far = facts.pop("far") if facts else None
    assert isinstance(far, str)
    assert facts == {
        "whole": 2**60, "real": 0.5, "yes": True, "when": "2024-02-29T12:00:00.000005+00:00",
        "exact": "2023-11-14T22:13:20.123456", "day": "2024-01-02", "clock": "01:02:03", "length": 90.0, "price": 1.5,
        "nested": {"boxes": [[1.0, None]], "at": "2024-02-29T12:00:00.000005"}, "tags": ["x", None],
        "pairs": [["k", 1]], "small": "YWI=", "large": "(5000 bytes)", "category": "red",
    }  # fmt: skip
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize(
    "value", [float("nan"), Decimal("NaN"), Decimal("-Infinity"), "\udce9\ud800", "a\0b", {1: {2.5}}, object]
)
def test_any_value_becomes_json_that_every_database_takes(value: Any) -> None:
    text = json.dumps(to_json_value(value), allow_nan=False, ensure_ascii=False)
    assert "\\u0000" not in text
    text.encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "file\na.jpg\n", "must have the column path in its first line, found file"),
        ("a.csv", "path,label\na,b.jpg,cat\n", "line 2: expected 2 columns .*found 3; .*comma in quotes"),
        ("a.parquet", "no parquet", "a.parquet cannot be read as Parquet"),
        ("a.jsonl", '{"path": null}', "line 1: expected a path, found None"),
        ("a.jsonl", '{"path": "a", "label": true}', "line 1: .* as label, found True"),
        ("a.csv", 'path,label\na.jpg,"\0"\n', "line 2: .*"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=message):
        rows(tmp_path / name)


def test_parquet_without_paths_names_what_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"file": ["a.jpg"]}), tmp_path / "a.parquet")
    with pytest.raises(ManifestError, match="must have the column path, found file"):
        rows(tmp_path / "a.parquet")
    pq.write_table(pa.table({"path": ["a.jpg", None]}), tmp_path / "a.parquet")
    with pytest.raises(ManifestError, match=r"a\.parquet, row 2: expected a path, found None"):
        rows(tmp_path / "a.parquet")


def test_a_picture_under_the_name_of_a_manifest_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(jpeg(0))
    (tmp_path / "b.TXT").write_text("a.jpg\n")
    assert not is_manifest(str(tmp_path / "a.txt"))
    assert is_manifest(str(tmp_path / "b.TXT"))
    assert not is_manifest(str(tmp_path / "missing.csv"))
    assert is_manifest("s3://bucket/list.parquet")
    assert not is_manifest("s3://bucket/photos")

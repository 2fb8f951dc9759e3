"""`verdicts`: what is exported comes back, bad rows are named, and two who import at once lose nothing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands_in_process import Command
from dino_index.errors import OutputExists, OutputUnwritable, VerdictFileError
from dino_search.verdict_files import COLUMNS
from dino_search.verdicts import Verdicts
from sample_collections import images_of, index_files, write_pictures

A, B, C = "0a" * 32, "0b" * 32, "f0" * 32


def write_csv(path: Path, *rows: dict[str, str], columns: tuple[str, ...] = COLUMNS) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def by_sha(one: str, other: str, decision: str = "copy", **more: str) -> dict[str, str]:
    return {"query_sha256": one, "reference_sha256": other, "decision": decision} | more


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_exported_verdicts_come_back_in_another_home(
    dino_search: Command, tiny_model: Path, home: Path, tmp_path: Path, suffix: str, database: str
) -> None:
    a, b = write_pictures(tmp_path / "photos", 'a "quoted", <b>\n\'é.jpg', "b.jpg")
    index_files(home, tiny_model, a, b)
    digests = {path: image["sha256"].hex() for path, image in images_of(home).items()}
    given = write_csv(
        tmp_path / "given.csv",
        by_sha(digests[str(b)], digests[str(a)], "not_copy", note='=LINK("x")\nsecond line', decided_at="2026-01-02"),
        by_sha(A, digests[str(b)], "copy", note="'quoted"),
    )
    assert dino_search("verdicts", "import", given).out == "2 added, 0 changed, 0 unchanged\n"
    exported = tmp_path / f"exported{suffix}"
    assert dino_search("verdicts", "export", exported).out == f"2 verdicts written to {exported}\n"
    listed = dino_search("verdicts", "list", "--json").json()["verdicts"]
    assert {row["note"] for row in listed} == {'=LINK("x")\nsecond line', "'quoted"}
    assert {frozenset((row["query"], row["reference"])) for row in listed} == {
        frozenset((str(a), str(b))), frozenset(("", str(b))),
    }  # fmt: skip
    again = dino_search("verdicts", "import", exported, "--json").json()
    assert (again["added"], again["changed"], again["unchanged"], again["unused_columns"]) == (0, 0, 2, [])
    if database == "sqlite":
        other = tmp_path / "other"
        assert dino_search("verdicts", "import", exported, "--home", other).code == 0
        elsewhere = dino_search("verdicts", "list", "--json", "--home", other).json()["verdicts"]
        assert elsewhere == [row | {"query": "", "reference": ""} for row in listed]


def test_no_cell_of_an_exported_table_is_a_formula(dino_search: Command, tmp_path: Path) -> None:
    notes = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "'=1", "''", "plain", "'plain"]
    rows = [by_sha(f"{number:064x}", C, note=note) for number, note in enumerate(notes)]
    given = tmp_path / "given.json"
    given.write_text(json.dumps(rows))
    assert dino_search("verdicts", "import", given).code == 0
    dino_search("verdicts", "export", tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r")] == []
    assert dino_search("verdicts", "import", tmp_path / "out.csv").out == "0 added, 0 changed, 10 unchanged\n"


def test_the_last_row_on_a_pair_counts_in_either_direction(dino_search: Command, tmp_path: Path) -> None:
    given = write_csv(tmp_path / "v.csv", by_sha(A, B), by_sha(B, A, "not_copy"), by_sha(A, C))
    ended = dino_search("verdicts", "import", given)
    assert ended.out == "2 added, 0 changed, 0 unchanged\n"
    assert "1 rows are about a pair" in ended.err
    assert {(row.query_sha256, row.decision) for row in Verdicts().listed() if row.reference_sha256 == B} == {
        (A, "not_copy")
    }
    assert dino_search("verdicts", "import", write_csv(given, by_sha(B, A), by_sha(A, C))).out == (
        "0 added, 1 changed, 1 unchanged\n"
    )


def test_without_sha256_the_paths_say_which_pictures(
    dino_search: Command, tiny_model: Path, home: Path, tmp_path: Path
) -> None:
    (known,) = write_pictures(tmp_path / "photos", "known.jpg")
    index_files(home, tiny_model, tmp_path / "photos")
    known_digest = images_of(home)[str(known)]["sha256"].hex()
    known.unlink()  # the catalog still knows it
    (outside,) = write_pictures(tmp_path / "lists", "outside.jpg", seed=9)
    columns = ("query", "reference", "decision", "score")
    given = write_csv(
        tmp_path / "lists" / "v.csv",
        {"query": "outside.jpg", "reference": str(known), "decision": "Copy ", "score": "0.5"},
        columns=columns,
    )
    ended = dino_search("verdicts", "import", given)
    assert ended.out == "1 added, 0 changed, 0 unchanged\n"
    assert "mean nothing here: score" in ended.err
    (row,) = Verdicts().listed()
    assert known_digest in (row.query_sha256, row.reference_sha256)
    assert str(known) in (row.query, row.reference)
    other = write_csv(
        tmp_path / "more.csv", {"query": "nowhere.jpg", "reference": str(outside), "decision": "copy"}, columns=columns
    )
    ended = dino_search("verdicts", "import", other)
    assert ended.code == 1
    assert (
        f"line 2: {tmp_path / 'nowhere.jpg'} is not in the catalog, and as a file: there is no such file" in ended.err
    )


def test_files_of_spreadsheets_with_semicolons_are_read(dino_search: Command, tmp_path: Path) -> None:
    given = tmp_path / "v.csv"
    given.write_text(f"\ufeffquery_sha256;reference_sha256;decision\r\n{A.upper()};{B};NOT_COPY\r\n", encoding="utf-8")
    assert dino_search("verdicts", "import", given).out.startswith("1 added")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (by_sha(A, B, "different"), "expected the decision copy or not_copy, found 'different'"),
        (by_sha(A, B, ""), "found 'none'"),
        (by_sha("0g" * 32, B), "query_sha256 must be 64 hexadecimal digits"),
        (by_sha(A, "0b" * 20), "reference_sha256 must be 64 hexadecimal digits"),
        (by_sha(A, ""), "expected a path or sha256 of the reference, found neither"),
        (by_sha(A, B, decided_at="yesterday"), "Invalid isoformat"),
    ],
)
def test_bad_rows_are_named_by_line_and_nothing_is_recorded(tmp_path: Path, bad: dict[str, str], reason: str) -> None:
    good = by_sha(A, C, note="on\ntwo lines")
    with pytest.raises(VerdictFileError) as caught:
        Verdicts().import_from(write_csv(tmp_path / "v.csv", good, bad, good, bad))
    assert "v.csv: 2 rows cannot be used, so nothing was recorded. line 4: " in str(caught.value)
    assert "; line 7: " in str(caught.value)
    assert reason in str(caught.value)
    (tmp_path / "v.json").write_text(json.dumps({"verdicts": [good, bad]}))
    with pytest.raises(VerdictFileError, match=r"1 rows cannot be used, so nothing was recorded\. entry 2: ") as caught:
        Verdicts().import_from(tmp_path / "v.json")
    assert reason in str(caught.value)
    assert Verdicts().listed() == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must have the columns query, reference, decision, .* found nothing"),
        (b"query,reference\na,b\n", "found query, reference"),
        (b"query,decision,query_sha256\n", "must have the columns"),
        (b"query,reference,decision\na,b,copy,d\n", "line 2: it has more values"),
        (b"\xff\xfe\x00", r"no text in UTF-8 \(byte 0\)"),
        (b"[1]", "entry 1: expected an object"),
        (b'{"verdicts": 1}', "must hold a list"),
        (b"[" * 100_000, "is no JSON"),
        (b'[{"query": 1, "reference": "b", "decision": "copy"}]', "query must be text, found 1"),
        (b'[{"query": "a", "reference": "b", "decision": "copy", "note": "\\ud800"}]', "surrogates not allowed"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_that_are_no_verdicts_are_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "v").write_bytes(content)
    with pytest.raises(VerdictFileError, match=reason):
        Verdicts().import_from(tmp_path / "v")
    assert Verdicts().listed() == []


def test_of_two_who_import_at_once_both_files_land(home: Path, tmp_path: Path) -> None:
    files = [
        write_csv(tmp_path / f"{who}.csv", *(by_sha(f"{2 * number + who:064x}", C) for number in range(300)))
        for who in range(2)
    ]
    script = "import sys; from dino_search.verdicts import Verdicts; print(Verdicts().import_from(sys.argv[1]).added)"
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True) for file in files
    ]
    assert [process.communicate(timeout=60)[0] for process in running] == ["300\n", "300\n"]
    assert len(Verdicts(home).listed()) == 600


def test_verdicts_of_one_collection_are_listed_and_exported_alone(
    dino_search: Command, tiny_model: Path, home: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(("one", "two")):
        write_pictures(tmp_path / name, "x.jpg", seed=number)
        index_files(home, tiny_model, tmp_path / name, collection=name)
    digests = [images_of(home, name)[str(tmp_path / name / "x.jpg")]["sha256"].hex() for name in ("one", "two")]
    dino_search(
        "verdicts", "import", write_csv(tmp_path / "v.csv", by_sha(digests[0], A), by_sha(digests[1], A, "not_copy"))
    )
    assert dino_search("verdicts", "list", "-c", "two").out.startswith("not_copy\t")
    assert dino_search("verdicts", "export", tmp_path / "one.csv", "-c", "one", "--json").json()["verdicts"] == 1
    assert dino_search("verdicts", "list", "-c", "three").code == 1
    line = dino_search("verdicts", "list", "-c", "one").out
    assert f"sha256:{A}" in line
    assert str(tmp_path / "one" / "x.jpg") in line


def test_an_export_overwrites_only_when_told_and_never_in_part(
    dino_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "v.csv"
    file.write_text("precious")
    assert dino_search("verdicts", "export", file).code == 1
    with pytest.raises(OutputExists, match="--force"):
        Verdicts().export(file)
    assert file.read_text() == "precious"
    assert Verdicts().export(file, force=True) == 0
    assert file.read_text().strip() == ",".join(COLUMNS)
    with pytest.raises(VerdictFileError, match=r"\.csv or \.json, found v.txt"):
        Verdicts().export(tmp_path / "v.txt")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputUnwritable, match="No space left"):
        Verdicts().export(tmp_path / "new.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.csv"]


def test_a_home_without_verdicts_says_what_to_do(dino_search: Command, home: Path) -> None:
    ended = dino_search("verdicts", "list")
    assert (ended.code, ended.out) == (0, "")
    assert "verdicts import FILE" in ended.err
    assert dino_search("verdicts", "list", "--json").json() == {"verdicts": []}
    assert not home.exists()


@pytest.mark.parametrize("command", ["list", "import", "export"])
def test_help_of_each_ends_with_a_line_to_paste(dino_search: Command, command: str) -> None:
    ended = dino_search("verdicts", command, "--help")
    assert ended.out.rstrip().splitlines()[-1].strip().startswith(f"dino-search verdicts {command}")

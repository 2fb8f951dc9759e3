"""What the commands promise to people and programs: answers, exit codes, streams."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from bad_files import encoded, make_bad_files, picture
from commands_in_process import Command, Ended
from dino_search import cli, demonstration
from sample_collections import ids_of, write_pictures


@pytest.fixture
def filled(dino_search: Command, photos: Path, tiny_model: Path) -> Path:
    """The folder of pictures, indexed with labels."""
    assert dino_search("index", photos, "--model", tiny_model, "--labels", "folders").code == 0
    return photos


# --- index


def test_index_prints_a_summary_for_people(dino_search: Command, photos: Path, tiny_model: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"bad")
    (photos / "notes.txt").write_text("notes")
    (photos / ".hidden").mkdir()
    ended = dino_search("index", photos, "--model", tiny_model)
    assert ended.code == 0
    assert ended.out.splitlines() == [
        "8 added, 0 updated, 0 unchanged, 0 removed, 1 failed, 1 ignored",
        f"8 images in collection 'default' ({tiny_model})",
    ]
    assert "1 files could not be read; list them: dino-search info --failures\n" in ended.err
    assert "ignored, as they are no images: 1 text" in ended.err
    assert "folders skipped: 1 hidden" in ended.err


def test_index_json_has_the_promised_keys(dino_search: Command, photos: Path, tiny_model: Path) -> None:
    make_bad_files(photos)
    first = dino_search("index", photos, "--model", tiny_model, "--json")
    values = first.json()
    assert first.code == 0
    assert list(values) == [
        "added", "updated", "skipped", "removed", "failed", "ignored", "images", "images_per_second",
    ]  # fmt: skip
    speed = values.pop("images_per_second")
    assert isinstance(speed, float)
    assert speed > 0
    failed = values["failed"]
    assert failed > 40
    assert values == {"added": 8, "updated": 0, "skipped": 0, "removed": 0, "failed": failed, "ignored": 0, "images": 8}
    again = dino_search("index", photos, "--json").json()
    assert (again["added"], again["skipped"], again["failed"], again["images"]) == (0, 8, failed, 8)


def test_index_exits_1_when_no_image_could_be_read(dino_search: Command, tmp_path: Path, tiny_model: Path) -> None:
    write_pictures(tmp_path, "ok/1.jpg")
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "bad.jpg").write_bytes(b"bad")
    assert dino_search("index", tmp_path / "ok", "--model", tiny_model, "-c", "mine").code == 0
    for _ in ("new", "unchanged"):
        ended = dino_search("index", folder, "-c", "mine", "--json")
        assert ended.code == 1
        assert ended.json()["failed"] == 1
        assert ended.err == (
            "error: no image under the given paths could be read; see: dino-search info --failures -c mine\n"
        )


def test_index_takes_the_options_that_decide_what_is_read(dino_search: Command, photos: Path, tiny_model: Path) -> None:
    (photos / "big.png").write_bytes(encoded(picture(200, 200), "PNG"))
    options = ("--exclude", "dog", "--exclude", "3.*", "--max-pixels", "10000", "--batch-size", "2", "--workers", "1")
    ended = dino_search("index", photos, "--model", tiny_model, "--json", *options)
    assert (ended.json()["added"], ended.json()["failed"]) == (3, 1)
    ledger = dino_search("info", "--failures")
    assert ledger.out.startswith(f"too_many_pixels\t{photos / 'big.png'}\t")


def test_index_prunes_and_refuses_to(dino_search: Command, filled: Path) -> None:
    shutil.rmtree(filled / "dog")
    refused = dino_search("index", filled, "--prune")
    assert refused.code == 1
    assert "refused to drop 4 of 8 images" in refused.err
    assert dino_search("index", filled, "--prune", "--yes", "--json").json()["removed"] == 4
    shutil.rmtree(filled / "cat")
    everything = dino_search("index", filled / "cat", "--prune", "--yes", "--json")
    assert (everything.code, everything.json()["removed"], everything.json()["images"]) == (0, 4, 0)


def test_index_builds_the_type_that_is_asked_for_and_info_says_why(
    dino_search: Command, photos: Path, tiny_model: Path
) -> None:
    write_pictures(photos, *(f"more/{number}.jpg" for number in range(40)), seed=500)
    assert dino_search("index", photos, "--model", tiny_model, "--index-type", "HNSW8").code == 0
    facts = dino_search("info", "--json").json()
    assert (facts["index_type"], facts["index_type_asked"]) == ("HNSW8", "HNSW8")
    assert "asked" in facts["index_reason"]
    found = dino_search("search", photos / "cat/0.jpg", "-k", "3", "--json").json()["results"]
    assert (len(found), found[0]["score"]) == (3, 1.0)


def test_an_unknown_index_type_is_refused_before_anything_is_indexed(
    dino_search: Command, photos: Path, tiny_model: Path
) -> None:
    ended = dino_search("index", photos, "--model", tiny_model, "--index-type", "nonsense")
    assert (ended.code, len(ended.err.splitlines())) == (1, 1)
    assert "nonsense" in ended.err
    assert dino_search("info").code == 1


def test_a_collection_of_an_earlier_bundled_model_names_the_way_to_the_present_one(
    dino_search: Command, filled: Path, home: Path, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(home / "catalog.sqlite3")) as catalog:
        catalog.execute("UPDATE model SET name = 'bundled_v1', config = json_set(config, '$.weights_path', '/gone')")
        catalog.commit()
    unknown = write_pictures(tmp_path, "unknown.jpg", seed=77)[0]
    ended = dino_search("search", unknown)
    assert (ended.code, len(ended.err.splitlines())) == (1, 1)
    assert "run: dino-search reindex -c default --model bundled" in ended.err
    assert dino_search("reindex", "--model", "bundled").code == 0
    assert dino_search("search", unknown).code == 0


def test_running_index_again_loads_no_torch(photos: Path, dino_search: Command) -> None:
    assert dino_search("index", photos / "cat").code == 0
    script = (
        "import sys; sys.argv[0] = 'dino-search'\n"
        "from dino_search.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, "index", str(photos / "cat"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ended.stdout)["skipped"] == 4
    assert not {"torch", "torchvision", "timm", "faiss", "alembic"} & set(ended.stderr.split())


# --- search and classify


def test_search_json_has_the_promised_keys(dino_search: Command, filled: Path, tiny_model: Path, home: Path) -> None:
    query = filled / "cat/2.jpg"
    ended = dino_search("search", query, "-k", "3", "--json")
    answer = ended.json()
    assert (ended.code, ended.err) == (0, "")
    assert list(answer) == ["query", "collection", "model", "results"]
    assert (answer["query"], answer["collection"], answer["model"]) == (str(query), "default", str(tiny_model))
    assert [list(result) for result in answer["results"]] == [["rank", "image_id", "path", "score", "label"]] * 3
    ids = ids_of(home)
    for rank, result in enumerate(answer["results"], 1):
        assert result["rank"] == rank
        assert result["image_id"] == ids[result["path"]]
        assert result["label"] == Path(result["path"]).parent.name
        assert -1 <= result["score"] <= 1
    assert (answer["results"][0]["path"], answer["results"][0]["score"]) == (str(query), 1.0)


def test_search_prints_one_line_a_result(dino_search: Command, filled: Path) -> None:
    ended = dino_search("search", filled / "cat/2.jpg", "-k", "5")
    rows = [line.split("\t") for line in ended.out.splitlines()]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[0] == ["1", "1.0000", "cat", str(filled / "cat/2.jpg")]


def test_search_on_a_terminal_prints_a_table(
    dino_search: Command, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = filled / "cat/[red]bold.jpg"
    shutil.copy(filled / "cat/2.jpg", query)
    dino_search("index", filled)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "400")
    ended = dino_search("search", query, "-k", "2")
    text = re.sub(r"\x1b\[[\d;]*m", "", ended.out)
    header, *rows = text.splitlines()
    assert header.split() == ["rank", "score", "label", "path"]
    assert len(rows) == 2
    assert str(query) in text


def test_a_lowest_score_that_nothing_reaches_is_told(dino_search: Command, filled: Path) -> None:
    ended = dino_search("search", filled / "cat/2.jpg", "--min-score", "1.1")
    assert (ended.code, ended.out, ended.err) == (0, "", "nothing reaches the asked score\n")


def test_classify_answers_for_each_picture(dino_search: Command, filled: Path) -> None:
    one = dino_search("classify", filled / "dog/1.jpg", "-k", "1")
    assert one.out.splitlines()[0] == f"dog\t1.000\t{filled / 'dog/1.jpg'}"
    assert len(one.out.splitlines()) == 2  # and the neighbour that voted
    several = dino_search("classify", filled / "cat/0.jpg", filled / "dog/1.jpg", "-k", "8")
    assert [line.split("\t")[0] for line in several.out.splitlines()] == ["cat", "dog"]
    answer = dino_search("classify", filled / "cat/0.jpg", "-k", "4", "--temperature", "0.5", "--json").json()
    assert list(answer) == ["collection", "model", "k", "temperature", "results"]
    assert list(answer["results"][0]) == ["query", "label", "probability", "probabilities", "neighbours"]
    assert (answer["k"], answer["temperature"], len(answer["results"][0]["neighbours"])) == (4, 0.5, 4)
    assert sum(answer["results"][0]["probabilities"].values()) == pytest.approx(1)


# --- contact sheets


def test_search_writes_a_page_and_keeps_an_existing_one(dino_search: Command, filled: Path, tmp_path: Path) -> None:
    page = tmp_path / "found.html"
    first = dino_search("search", filled / "cat/0.jpg", "--html", page, "-k", "3", "--json")
    assert (first.code, first.err) == (0, f"wrote {page}\n")
    assert first.json()["results"][0]["rank"] == 1
    assert page.read_text("utf-8").count("<img ") == 1 + 3
    page.write_text("my own notes")
    second = dino_search("search", filled / "cat/0.jpg", "--html", page)
    assert (second.code, second.out, page.read_text()) == (1, "", "my own notes")
    assert "--force" in second.err
    assert dino_search("search", filled / "cat/0.jpg", "--html", page, "--force").code == 0
    assert "<img " in page.read_text("utf-8")


# --- odd names


@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
def test_odd_names_stay_in_one_line_and_harm_nothing(dino_search: Command, tmp_path: Path, tiny_model: Path) -> None:
    names = [
        "two\nlines.jpg",
        "[red]bold.jpg",
        "escape\x1b[31m.jpg",
        "Grüße 写真 🌄.jpg",
        "cr\rlf.jpg",
        "a\u202eb.jpg",
    ]
    if sys.platform == "linux":
        names.append("caf\udce9.jpg")
    folder = tmp_path / "odd [bold]"
    paths = write_pictures(folder, *names)
    (folder / "bad\n[red].jpg").write_bytes(b"bad")
    assert dino_search("index", folder, "--model", tiny_model).code == 0
    listed = dino_search("search", paths[0], "-k", "50").out
    assert len(listed.splitlines()) == len(names)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", listed)
    for shown in (r"two\nlines.jpg", "[red]bold.jpg", r"escape\x1b[31m.jpg", "Grüße 写真 🌄.jpg", r"cr\rlf.jpg"):
        assert shown in listed
    (ledger,) = dino_search("info", "--failures").out.splitlines()
    assert r"bad\n[red].jpg" in ledger
    for path in paths:
        answer = dino_search("search", path, "--json").json()
        assert answer["results"][0]["path"] == answer["query"]
        assert answer["results"][0]["score"] == 1.0
    assert dino_search("info", "--json").code == 0
    page = tmp_path / "odd.html"
    assert dino_search("search", paths[-1], "--html", page, "-k", "50").code == 0
    assert page.read_text("utf-8").count("<img ") == 1 + len(names)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_home_and_a_label_that_are_not_utf_8_can_be_printed(
    dino_search: Command, tmp_path: Path, tiny_model: Path
) -> None:
    write_pictures(tmp_path / "photos", "caf\udce9/1.jpg", "bar/2.jpg")
    home = tmp_path / "h\udce9"
    ended = dino_search("index", tmp_path / "photos", "--model", tiny_model, "--labels", "folders", "--home", home)
    assert ended.code == 0
    assert dino_search("info", "--json", "--home", home).json()["home"] == str(tmp_path / r"h\xe9")
    found = dino_search("search", tmp_path / "photos/caf\udce9/1.jpg", "--home", home)
    assert found.out.splitlines()[0].split("\t")[2] == r"caf\xe9"
    assert dino_search("compact", "--home", home).code == 0


# --- housekeeping


def test_info_shows_facts_and_failures(dino_search: Command, filled: Path) -> None:
    (filled / "bad.jpg").write_bytes(b"bad")
    dino_search("index", filled)
    facts = dino_search("info", "--json").json()
    assert {"collection", "images", "failed", "model", "index_type"} <= facts.keys()
    assert (facts["collection"], facts["images"], facts["failed"], facts["labels"]) == ("default", 8, 1, 2)
    printed = dict(re.split(r":\s+", line, maxsplit=1) for line in dino_search("info").out.splitlines())
    assert printed.keys() == facts.keys()
    assert (printed["images"], printed["sources"]) == ("8", str(filled))
    with_ledger = dino_search("info", "--failures", "--json").json()
    assert [list(failure) for failure in with_ledger["failures"]] == [["path", "code", "message"]]


def test_verify_exits_1_while_something_is_wrong(dino_search: Command, filled: Path, home: Path) -> None:
    assert dino_search("compact").out == "8 images in the index file of 'default'\n"
    sound = dino_search("verify")
    assert (sound.code, sound.out) == (0, "8 images checked, 0 problems\n")
    (snapshot,) = (home / "snapshots").rglob("*.faiss")
    os.truncate(snapshot, 100)
    broken = dino_search("verify")
    assert broken.code == 1
    assert broken.out.startswith("problem\tsnapshot: ")
    assert "dino-search verify --repair" in broken.err
    repaired = dino_search("verify", "--repair", "--json")
    assert (repaired.code, repaired.json()["images"], repaired.json()["problems"]) == (0, 8, [])
    assert len(repaired.json()["repaired"]) == 1
    assert dino_search("verify").code == 0


def test_a_damaged_index_file_is_warned_of_on_stderr_only(home: Path, filled: Path, dino_search: Command) -> None:
    dino_search("compact")
    (snapshot,) = (home / "snapshots").rglob("*.faiss")
    snapshot.unlink()
    ended = subprocess.run(
        [sys.executable, "-m", "dino_search", "search", str(filled / "cat/0.jpg"), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(json.loads(ended.stdout)["results"]) == 8
    (warning,) = ended.stderr.splitlines()
    assert warning.startswith("WARNING: ")
    assert snapshot.name in warning


def test_remove_takes_ids_files_and_folders(dino_search: Command, filled: Path, home: Path) -> None:
    image_id = ids_of(home)[str(filled / "cat/0.jpg")]
    ended = dino_search("remove", str(image_id), filled / "cat/1.jpg", filled / "dog")
    assert (ended.code, ended.out) == (0, "6 images removed from 'default'\n")
    assert dino_search("info", "--json").json()["images"] == 2
    again = dino_search("remove", str(image_id))
    assert (again.code, again.out) == (1, "")
    assert "nothing was removed" in again.err


def test_collections_are_kept_apart(dino_search: Command, filled: Path, tmp_path: Path, tiny_model: Path) -> None:
    write_pictures(tmp_path / "more", "new.jpg", seed=70)
    assert dino_search("index", tmp_path / "more", "-c", "second", "--model", tiny_model).code == 0
    answer = dino_search("search", filled / "cat/0.jpg", "--collection", "second", "--json").json()
    assert [result["path"] for result in answer["results"]] == [str(tmp_path / "more/new.jpg")]
    assert len(dino_search("search", filled / "cat/0.jpg", "--json").json()["results"]) == 8


def test_the_home_is_that_of_the_option_then_of_the_environment(
    dino_search: Command, filled: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(home, elsewhere)
    assert dino_search("remove", filled / "dog", "--home", elsewhere).code == 0
    assert dino_search("info", "--json").json()["images"] == 8
    monkeypatch.setenv("DINO_SEARCH_HOME", str(elsewhere))
    assert dino_search("info", "--json").json()["images"] == 4
    assert dino_search("info", "--json", "--home", home).json()["images"] == 8


def test_the_demonstration_runs_twice(dino_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "PHOTOGRAPHS", ("chelsea", "coins"))
    monkeypatch.setattr(demonstration, "QUERY_EDITS", demonstration.QUERY_EDITS[:2])
    out = tmp_path / "demo"
    for _ in ("first", "again"):
        ended = dino_search("demo", "--out", out)
        assert ended.code == 0
        lines = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
        assert list(lines) == ["indexed", "searched", "classified", "copies", "open", "report", "try"]
        assert lines["indexed"].startswith("10 images with bundled_v5")
        assert lines["searched"].startswith("4 of 4")
        assert lines["copies"] == "4 of 4 are called copies, 0 of a wrong one"
        assert Path(lines["report"]).is_file()
        page = (out / "contact-sheet.html").read_text("utf-8")
        assert page.count("<section>") == 4
    command = lines["try"].split()
    found = dino_search(*command[1:], "--json").json()
    assert Path(found["results"][0]["path"]).parent.name == "chelsea"


# --- what goes wrong


def assert_one_line_of_complaint(ended: Ended, words: str) -> None:
    assert ended.code == 1, ended
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line), line


@pytest.mark.parametrize("command", ["search query.jpg", "classify query.jpg", "info", "verify", "compact", "remove 1"])
def test_before_any_index_each_command_names_the_next_one(dino_search: Command, command: str) -> None:
    assert_one_line_of_complaint(dino_search(*command.split()), "nothing has been indexed yet .* dino-search index")


NOTHING_FOUND = "expected images under .*, found none; run: dino-search index"
FAILURES = {
    "empty folder": (("index", "{tmp}/empty"), NOTHING_FOUND),
    "missing path": (("index", "{tmp}/missing"), "missing: no such file or folder"),
    "missing query": (("search", "{tmp}/missing.jpg"), "the query .*missing.jpg cannot be used"),
    "query that is no picture": (("search", "{tmp}/bad.jpg"), "the query .*bad.jpg cannot be used"),
    "query that is a folder": (("search", "{tmp}/empty"), "the query .*empty cannot be used"),
    "unknown collection": (("search", "{photo}", "-c", "other"), "no collection 'other': found default; .* -c other"),
    "unusable collection": (("index", "{photo}", "-c", "a\nb"), "printable characters"),
    "collection not in UTF-8": (("search", "{photo}", "-c", "\udcff"), "printable characters"),
    "missing labels": (("index", "{photo}", "--labels", "{tmp}/no.csv"), "the label file .* cannot be read"),
    "bad labels": (("index", "{photo}", "--labels", "{tmp}/bad.jpg"), "must have the columns path and label"),
    "missing model": (("index", "{photo}", "--model", "{tmp}/no.safetensors"), "expected 'bundled' or the path"),
    "bad model": (("index", "{photo}", "--model", "{tmp}/bad.jpg"), "no safetensors file"),
    "another model": (("index", "{photo}", "--model", "bundled"), "was built with .* not with bundled_v5"),
    "another pooling": (("index", "{photo}", "--pooling", "reference"), "was built with"),
    "unknown id": (("remove", "123456"), "no image for 123456"),
    "unknown folder": (("remove", "{tmp}/empty"), "no image for .*empty"),
    "page that exists": (("search", "{photo}", "--html", "{tmp}/bad.jpg"), "exists already"),
    "page in no folder": (("search", "{photo}", "--html", "{tmp}/no/page.html"), "page.html cannot be written"),
    "page that is a folder": (("search", "{photo}", "--html", "{tmp}/empty", "--force"), "empty cannot be written"),
    "home that is a file": (("index", "{photo}", "--home", "{tmp}/bad.jpg"), "must be a folder"),
    "home in a file": (("index", "{photo}", "--home", "{tmp}/bad.jpg/home"), "must be a folder"),
}


@pytest.mark.parametrize(("arguments", "words"), FAILURES.values(), ids=FAILURES)
def test_an_expected_failure_is_one_line_and_exit_1(
    dino_search: Command, filled: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_bytes(b"this is not a picture")
    filled_in = [word.format(tmp=tmp_path, photo=filled / "cat/0.jpg") for word in arguments]
    assert_one_line_of_complaint(dino_search(*filled_in), words)


def test_without_labels_classify_names_the_way_to_get_them(
    dino_search: Command, photos: Path, tiny_model: Path
) -> None:
    dino_search("index", photos, "--model", tiny_model)
    assert_one_line_of_complaint(dino_search("classify", photos / "cat/0.jpg"), "--labels folders")


@pytest.mark.parametrize(
    "arguments",
    [
        "search photo.jpg -k 0",
        "search photo.jpg -k many",
        "search",
        "classify photo.jpg --temperature 0",
        "index",
        "index photos --device tpu",
        "index photos --pooling most",
        "index photos --batch-size -1",
        "index photos --workers -1",
        "index photos --max-pixels 0",
        "index photos --max-bytes 99999999999999999",
        "index photos --no-such-option",
        "index photos --exclude=",
        "index photos --exclude /",
        "no-such-command",
        "remove",
    ],
)
def test_wrong_usage_is_exit_2_and_touches_nothing(dino_search: Command, home: Path, arguments: str) -> None:
    ended = dino_search(*arguments.split())
    assert (ended.code, ended.out) == (2, "")
    assert ended.err
    assert "Traceback" not in ended.err
    assert not home.exists()


def test_a_demonstration_that_cannot_be_written_says_so(dino_search: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = dino_search("demo", "--out", tmp_path / "file")
    assert (ended.code, ended.out) == (1, "")
    assert re.search("^error: .* cannot be written: .* --out$", ended.err.splitlines()[-1])
    assert "Traceback" not in ended.err


# --- manifests, filters, relocation


def test_index_reports_what_a_manifest_brings(
    dino_search: Command, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("path,label,year\nphotos/cat/0.jpg,cat,1987\nphotos/cat/0.jpg,,\nphotos/none.jpg,,\n")
    ended = dino_search("index", manifest, "--model", tiny_model)
    assert ended.out.startswith("1 added, 0 updated, 0 unchanged, 0 removed, 1 failed, 0 ignored\n")
    assert "1 rows of manifests name a file again; the first one counts\n" in ended.err
    ledger = dino_search("info", "--failures").out
    assert ledger.startswith(f"vanished\t{photos / 'none.jpg'}\t{manifest}, line 4: expected an image file")
    (photos / "s.tar").write_bytes(b"")
    (photos / "t.tar").write_bytes(b"tar?")
    assert "1 tar shard\n" not in dino_search("index", manifest).err
    assert "name them: dino-search index PATH/*.tar\n" in dino_search("index", photos).err


def test_search_and_classify_take_filters(dino_search: Command, filled: Path) -> None:
    query = filled / "cat" / "0.jpg"
    found = dino_search("search", query, "--filter", "label = dog", "--filter", "width > 1", "--json").json()
    assert [result["label"] for result in found["results"]] == ["dog"] * 4
    assert list(found) == ["query", "collection", "model", "results"]
    assert list(found["results"][0]) == ["rank", "image_id", "path", "score", "label"]
    assert dino_search("classify", query, "--filter", "label != cat").out.startswith("dog\t")
    nothing = dino_search("search", query, "--filter", "label = cow")
    assert (nothing.code, nothing.out, nothing.err) == (0, "", "no image passes the filters\n")
    for text in ("label", "colour = red", "width = wide"):
        ended = dino_search("search", query, "--filter", text)
        assert (ended.code, ended.out) == (1, "")
        assert re.fullmatch(r"error: [^\n]+\n", ended.err)


def test_relocate_rewrites_paths_and_says_what_it_looked_for(
    dino_search: Command, filled: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    refused = dino_search("relocate", filled, new)
    assert refused.code == 1
    assert "of 8 that were looked for, 8 are missing" in refused.err
    filled.rename(new)
    done = dino_search("relocate", filled, new)
    assert (done.code, done.out) == (0, f"8 images of default are at {new} now\n")
    assert done.err == "8 files looked for, 0 missing, 0 of another size\n"
    assert dino_search("index", new, "--json").json()["skipped"] == 8
    back = dino_search("relocate", new, filled, "--yes", "-c", "default", "--json").json()
    assert back == {"images": 8, "collections": ["default"], "checked": 8, "missing": 8, "changed": 0}


def test_ctrl_c_before_there_is_a_command_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def be_interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", be_interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted; what was recorded before stays\n"

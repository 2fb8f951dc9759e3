"""`dino-search evaluate`: every protocol end to end, its JSON, its files, its errors."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bad_files import picture
from commands_in_process import Command
from dino_index.edits import apply_edits
from dino_search import Collection, IndexOptions
from dino_search.cli import app
from dino_search.copies import CopiesOptions
from sample_collections import write_pictures


@pytest.fixture
def classes(tmp_path: Path) -> tuple[Path, Path]:
    write_pictures(tmp_path / "train", *(f"{name}/{n}.jpg" for name in ("cat", "dog") for n in range(6)))
    write_pictures(tmp_path / "val", *(f"{name}/{n}.jpg" for name in ("cat", "dog") for n in range(4)), seed=3)
    return tmp_path / "train", tmp_path / "val"


@pytest.fixture
def copied(tmp_path: Path) -> list[str | Path]:
    """Options of ten references and four queries, of which three are copies."""
    write_pictures(tmp_path / "references", *(f"r{number}.jpg" for number in range(10)))
    (tmp_path / "queries").mkdir()
    for number, edits in enumerate((["blur"], ["mirror"], ["crop"], ["grey"])):
        seed = number if number < 3 else 77
        edited = apply_edits(picture(seed=seed), edits, np.random.default_rng(0))
        edited.save(tmp_path / f"queries/q{number}.png")
    rows = ["query,reference", *(f"q{number}.png,r{number}.jpg" for number in range(3)), "q3.png,"]
    (tmp_path / "truth.csv").write_text("\n".join(rows))
    return [
        "--queries", tmp_path / "queries", "--references", tmp_path / "references", "--truth", tmp_path / "truth.csv"
    ]  # fmt: skip


def test_knn_prints_the_json_that_is_promised(
    dino_search: Command, classes: tuple[Path, Path], tiny_model: Path
) -> None:
    ended = dino_search("evaluate", "knn", "--train", classes[0], "--val", classes[1], "--model", tiny_model, "--json")
    assert ended.code == 0
    printed = ended.json()
    for top in ("top1", "top5"):
        assert list(printed[top]) == ["10", "20", "100", "200"]
        assert all(0 <= value <= 1 for value in printed[top].values())
        assert all(len(printed["confidence"][top][k]) == 2 for k in printed[top])
    assert printed["top5"]["200"] == 1.0  # of two classes, both of which vote
    assert printed["model"] == str(tiny_model)


def test_knn_takes_what_index_takes(dino_search: Command, classes: tuple[Path, Path], tiny_model: Path) -> None:
    options = [
        "--model", tiny_model, "--input-size", "48", "--device", "cpu", "--batch-size", "3", "--workers", "1",
        "-k", "1", "-k", "7", "--per-class", "2", "--seed", "5", "--temperature", ".1", "--no-cache",
    ]  # fmt: skip
    ended = dino_search("evaluate", "knn", "--train", classes[0], "--val", classes[1], *options, "--json")
    printed = ended.json()
    assert (ended.code, list(printed["top1"]), printed["input_size"]) == (0, ["1", "7"], 48)
    assert (printed["train"]["used"], printed["seed"], printed["temperature"]) == (4, 5, 0.1)


def test_tables_are_for_people_and_remarks_go_to_stderr(
    dino_search: Command, classes: tuple[Path, Path], tiny_model: Path
) -> None:
    write_pictures(classes[1], "newt/0.jpg", seed=90)
    (classes[0] / "cat/broken.jpg").write_bytes(b"nothing")
    ended = dino_search("evaluate", "knn", "--train", classes[0], "--val", classes[1], "--model", tiny_model)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("top1 10")
    assert all("%" in line for line in lines)
    assert "newt" in ended.err
    assert "1 training files cannot be read" in ended.err


def test_results_are_written_and_not_overwritten(
    dino_search: Command, classes: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    command = ["evaluate", "knn", "--train", classes[0], "--val", classes[1], "--model", tiny_model, "--json"]
    out = tmp_path / "a/b"
    printed = dino_search(*command, "--out", out).json()
    assert json.loads((out / "result.json").read_text()) == printed
    table = (out / "table.md").read_text()
    assert table.count("\n| top") == 8
    assert f"| top1 20 | {100 * printed['top1']['20']:.1f} % |" in table
    with Image.open(out / "plot.png") as plot:
        assert plot.width > 400
        assert len(plot.convert("RGB").getcolors(1 << 24) or ()) > 3
    refused = dino_search(*command, "--out", out)
    assert refused.code == 1
    assert "exists already" in refused.err
    assert dino_search(*command, "--out", out, "--force").code == 0


def test_vectors_are_kept_in_the_home_and_a_purge_drops_them(
    dino_search: Command, classes: tuple[Path, Path], tiny_model: Path, home: Path
) -> None:
    command = ["evaluate", "knn", "--train", classes[0], "--val", classes[1], "--model", tiny_model, "--json"]
    first = dino_search(*command).json()
    assert len(list((home / "evaluation").glob("*.sqlite3"))) == 1
    assert dino_search(*command).json() == first
    dino_search("index", classes[0], "--model", tiny_model)
    assert dino_search("remove", classes[0] / "cat/0.jpg", "--purge").code == 0
    assert not (home / "evaluation").exists()


def test_retrieval_prints_the_json_that_is_promised(
    dino_search: Command, copied: list[str | Path], tiny_model: Path
) -> None:
    ended = dino_search("evaluate", "retrieval", *copied, "--model", tiny_model, "--json")
    assert ended.code == 0
    printed = ended.json()
    assert {"micro_ap", "recall_at_p90", "map", "rank1"} <= printed.keys()
    assert all(0 < printed[name] <= 1 for name in ("micro_ap", "map"))
    assert (printed["num_queries"], printed["num_queries_with_match"]) == (4, 3)
    two_scales = dino_search("evaluate", "retrieval", *copied, "--model", tiny_model, "--scales", "1,.5", "--json")
    assert two_scales.json()["input_sizes"] == [32, 16]


def test_revisited_and_holidays_are_evaluated(dino_search: Command, tiny_model: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "jpg", "100000.jpg", "100001.jpg", "100100.jpg", "100101.jpg", "q.jpg")
    entry = {"bbx": [0.0, 0.0, 50.0, 50.0], "easy": [0], "hard": [2], "junk": [1]}
    gnd = {"imlist": ["100000", "100001", "100100", "100101"], "qimlist": ["q"], "gnd": [entry]}
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(gnd))
    common: list[str | Path] = ["--references", tmp_path / "jpg", "--model", tiny_model, "--json"]
    revisited = dino_search("evaluate", "retrieval", *common, "--gnd", tmp_path / "gnd.pkl").json()
    for difficulty in ("easy", "medium", "hard"):
        assert 0 < revisited[difficulty]["map"] <= 1
        assert list(revisited[difficulty]["mp"]) == ["1", "5", "10"]
    holidays = dino_search("evaluate", "retrieval", *common, "--layout", "holidays").json()
    assert holidays["num_queries"] == 2
    assert 0 < holidays["map"] <= 1


def test_a_pickle_that_would_run_code_is_refused_in_one_line(
    dino_search: Command, tiny_model: Path, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    write_pictures(tmp_path / "jpg", "a.jpg")
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps({"imlist": [], "qimlist": [], "gnd": Evil()}))
    ended = dino_search(
        "evaluate", "retrieval", "--references", tmp_path / "jpg", "--model", tiny_model, "--gnd", tmp_path / "gnd.pkl"
    )
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert "could run code" in ended.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "parts",
    [[], ["--no-verify"], ["--descriptor", "cls"], ["--variants", "none", "--regions", "none", "--no-normalisation"]],
)
def test_copies_prints_the_json_that_is_promised(
    dino_search: Command, copied: list[str | Path], tiny_model: Path, parts: list[str]
) -> None:
    ended = dino_search("evaluate", "copies", *copied, "--model", tiny_model, "--json", *parts)
    assert ended.code == 0
    printed = ended.json()
    assert all(0 <= printed[name] <= 1 for name in ("micro_ap", "recall_at_p90", "map", "rank1"))
    assert (printed["num_queries"], printed["num_queries_with_match"]) == (4, 3)
    assert printed.get("num_verified", 0) == (5 if "--no-verify" not in parts and "cls" not in parts else 0)


def test_copies_are_those_that_the_command_copies_finds(
    dino_search: Command, copied: list[str | Path], tiny_model: Path, tmp_path: Path, home: Path
) -> None:
    """The same candidates with the same scores as from a collection, so the same figures."""
    printed = dino_search("evaluate", "copies", *copied, "--model", tiny_model, "--json").json()
    with Collection.open("c", home=home, model=tiny_model) as collection:
        collection.index(tmp_path / "references", IndexOptions())
        pairs, first = [], []
        for query in collection.copies(tmp_path / "queries", CopiesOptions(copy_score=1.0)):
            number = Path(query.query).stem.removeprefix("q")
            correct = [Path(match.reference).stem == f"r{number}" and number != "3" for match in query.matches]
            pairs += list(zip((match.score for match in query.matches), correct, strict=True))
            first += [correct[0]] if number != "3" else []
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    found = np.cumsum([correct for _, correct in pairs])
    precisions = [found[place] / (place + 1) for place, (_, correct) in enumerate(pairs) if correct]
    assert printed["micro_ap"] == pytest.approx(sum(precisions) / 3)
    assert printed["rank1"] == pytest.approx(np.mean(first))


def test_copydays_and_isc_are_evaluated(dino_search: Command, tiny_model: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "days/original", "200000.jpg", "200100.jpg")
    write_pictures(tmp_path / "days/strong", "200001.jpg", "200101.jpg")
    write_pictures(tmp_path / "days/jpegqual/3", "200000.jpg", "200100.jpg")
    write_pictures(tmp_path / "others", "a.jpg", "b.jpg", "c.jpg", seed=40)
    common: list[str | Path] = ["--model", tiny_model, "--json", "--no-verify"]
    copydays = dino_search(
        "evaluate", "copies", "--layout", "copydays", "--queries", tmp_path / "days",
        "--references", tmp_path / "others", *common,
    )  # fmt: skip
    assert copydays.json()["map"] == {"strong": 1.0, "jpegqual/3": 1.0}
    assert copydays.json()["distractors"]["images"] == 3
    (tmp_path / "gt.csv").write_text("query_id,reference_id\n200001,200000\n")
    isc = dino_search(
        "evaluate", "copies", "--layout", "isc", "--queries", tmp_path / "days/strong",
        "--references", tmp_path / "days/original", "--truth", tmp_path / "gt.csv", *common,
    )  # fmt: skip
    assert (isc.json()["num_queries"], isc.json()["num_queries_with_match"]) == (2, 1)


@pytest.mark.parametrize("command", ["retrieval", "copies"])
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("", "must have the columns query, reference"),
        ("query,reference\n", "has no rows"),
        ("query,reference\nq0.png,\n", "expected a query with a match among 10 references"),
        ("query,reference\ngone.png,r0.jpg\nq0.png,lost.jpg\n", "1 queries (gone.png) and 1 references (lost.jpg)"),
    ],
)
def test_truth_of_no_use_is_an_error_in_one_line(
    dino_search: Command, copied: list[str | Path], tiny_model: Path, tmp_path: Path, command: str, rows: str, said: str
) -> None:
    (tmp_path / "truth.csv").write_text(rows)
    ended = dino_search("evaluate", command, *copied, "--model", tiny_model, "--json")
    assert (ended.code, ended.out) == (1, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_files_that_truth_names_and_are_missing_are_listed(
    dino_search: Command, copied: list[str | Path], tiny_model: Path, tmp_path: Path
) -> None:
    with (tmp_path / "truth.csv").open("a") as truth:
        truth.write("\ngone.png,r0.jpg\nq0.png,lost.jpg\n")
    ended = dino_search("evaluate", "retrieval", *copied, "--model", tiny_model, "--json")
    assert ended.json()["missing"] == {"queries": ["gone.png"], "references": ["lost.jpg"]}
    assert "gone.png" in ended.err
    assert "lost.jpg" in ended.err


def test_errors_of_folders_are_one_line(
    dino_search: Command, classes: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    write_pictures(tmp_path / "one", "cat/0.jpg")
    for train, said in (
        (tmp_path / "gone", "no such file or folder"),
        (tmp_path / "empty", "found none that can be read"),
        (tmp_path / "one", "found one (cat)"),
    ):
        ended = dino_search("evaluate", "knn", "--train", train, "--val", classes[1], "--model", tiny_model)
        assert ended.code == 1
        assert said in ended.err
        assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["retrieval", "--references", "r"],
        ["retrieval", "--references", "r", "--truth", "t", "--gnd", "g"],
        ["retrieval", "--references", "r", "--truth", "t", "--scales", "0"],
        ["retrieval", "--references", "r", "--truth", "t", "--scales", "x"],
        ["retrieval", "--references", "r", "--layout", "copydays"],
        ["copies", "--queries", "q", "--truth", "t"],
        ["copies", "--queries", "q", "--references", "r"],
        ["copies", "--queries", "q", "--layout", "copydays", "--truth", "t"],
        ["copies", "--queries", "q", "--references", "r", "--truth", "t", "--compat"],
        ["copies", "--queries", "q", "--references", "r", "--truth", "t", "--descriptor", "gem"],
        ["copies", "--queries", "q", "--references", "r", "--truth", "t", "--regions", "both"],
        ["knn", "--train", "t"],
        ["knn", "--train", "t", "--val", "v", "--device", "tpu"],
        ["knn", "--train", "t", "--val", "v", "--temperature", "0"],
    ],
)
def test_wrong_usage_ends_with_2(dino_search: Command, arguments: list[str]) -> None:
    assert dino_search("evaluate", *arguments).code == 2


@pytest.mark.parametrize("command", ["knn", "retrieval", "copies"])
def test_help_ends_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", command, "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0
    assert result.stdout.rstrip().splitlines()[-1].strip().startswith(f"dino-search evaluate {command} ")


def test_importing_the_protocols_loads_nothing_until_they_run() -> None:
    script = "import sys, dino_training.evaluation; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"faiss", "numpy", "sqlalchemy", "timm", "torch"} & set(loaded)

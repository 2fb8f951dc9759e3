"""`copies`, `compare` and `calibrate` as their users run them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image, ImageDraw, ImageFont

from commands_in_process import Command
from dino_index.edits import EDITS
from dino_index.images import load_image
from sample_collections import write_pictures

DATA = Path(skimage.__file__).parent / "data"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left")
ALL_EDITS = ("reencode", "caption", "mirror", "crop", "paste")


def photograph(name: str) -> Image.Image:
    path = next(path for path in DATA.glob(f"{name}.*") if path.suffix in {".png", ".jpg"})
    return Image.fromarray(load_image(path, max_short_side=300).pixels_HWC)


def edited(name: str, kind: str) -> Image.Image:
    return EDITS[kind](photograph(name), np.random.default_rng(7))


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the photographs under the bundled model; copied for each test."""
    from dino_search.collection import Collection

    folder = tmp_path_factory.mktemp("indexed")
    photos = folder / "photos"
    photos.mkdir()
    for name in PHOTOGRAPHS:
        photograph(name).save(photos / f"{name}.png")
    with Collection.open(home=folder / "home") as collection:
        collection.index(photos)
    return folder


@pytest.fixture
def photos(indexed: Path, home: Path) -> Path:
    """The folder of photographs, indexed in the test's own home."""
    shutil.copytree(indexed / "home", home)
    return indexed / "photos"


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_edited_copies_are_found_with_the_area_that_matches(photos: Path, dino_search: Command, tmp_path: Path) -> None:
    queries = tmp_path / "queries"
    queries.mkdir()
    for name, kind in zip(PHOTOGRAPHS, ALL_EDITS, strict=True):
        edited(name, kind).save(queries / f"{name}-{kind}.png")
    ended = dino_search("copies", queries, "--json")
    assert ended.code == 0
    found = {Path(query["query"]).stem: query["matches"] for query in ended.json()["queries"]}
    best = {name: matches[0] for name, matches in found.items()}
    assert {name: Path(match["reference"]).stem for name, match in best.items()} == {
        f"{name}-{kind}": name for name, kind in zip(PHOTOGRAPHS, ALL_EDITS, strict=True)
    }
    assert [match["decision"] for match in best.values()].count("copy") >= 4
    assert [match["verified"] for match in best.values()].count(True) >= 4
    pasted = best["motorcycle_left-paste"]
    width, height = (max(p[i] for p in pasted["query_area"]) - min(p[i] for p in pasted["query_area"]) for i in (0, 1))
    assert 0.3 < width < 0.8
    assert 0.3 < height < 0.8
    others = [match for matches in found.values() for match in matches[1:]]
    assert {match["decision"] for match in others} == {"different"}


def test_a_report_lists_every_query_and_bad_ones_stop_nothing(
    photos: Path, dino_search: Command, tmp_path: Path
) -> None:
    queries, report = tmp_path / "queries", tmp_path / "report"
    queries.mkdir()
    edited("coffee", "reencode").save(queries / "coffee.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)).save(queries / "noise.png")
    (queries / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    ended = dino_search("copies", queries, tmp_path / "missing.jpg", "--report", report, "-k", "3")
    assert ended.code == 0
    rows = {Path(row["query"]).name: row for row in table(report / "queries.csv")}
    assert {name: row["status"] for name, row in rows.items()} == {
        "coffee.png": "ok", "noise.png": "ok", "broken.jpg": "failed", "missing.jpg": "failed",
    }  # fmt: skip
    assert all(rows[name]["reason"] for name in ("broken.jpg", "missing.jpg"))
    matches = table(report / "matches.csv")
    assert list(matches[0]) == ["query", "reference", "score", "cosine", "rank", "decision", "precision"]
    assert [(Path(row["query"]).name, row["rank"]) for row in matches] == [
        (name, rank) for name in ("coffee.png", "noise.png") for rank in "123"
    ]
    assert (matches[0]["decision"], Path(matches[0]["reference"]).stem) == ("copy", "coffee")
    assert {row["decision"] for row in matches[3:]} <= {"uncertain", "different"}
    assert sorted(path.name for path in report.iterdir()) == [
        "matches.csv", "matches.json", "matches.parquet", "queries.csv", "report.html",
    ]  # fmt: skip
    assert "1 of 4 queries are copies" in ended.err
    again = dino_search("copies", queries, "--report", report)
    assert again.code == 1
    assert "--force" in again.err


def test_the_very_file_is_a_copy_of_itself(photos: Path, dino_search: Command) -> None:
    (query,) = dino_search("copies", photos / "coffee.png", "--json").json()["queries"]
    first = query["matches"][0]
    assert (first["decision"], first["reason"], first["cosine"]) == ("copy", "identical", pytest.approx(1, abs=1e-4))


def test_all_queries_bad_is_reported_and_fails(photos: Path, dino_search: Command, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")
    ended = dino_search("copies", bad, "--report", tmp_path / "report")
    assert ended.code == 1
    assert "none of the queries could be read" in ended.err
    assert [row["status"] for row in table(tmp_path / "report" / "queries.csv")] == ["failed"]
    assert table(tmp_path / "report" / "matches.csv") == []


def test_an_empty_folder_fails_and_says_so(photos: Path, dino_search: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = dino_search("copies", tmp_path / "empty", "--report", tmp_path / "report")
    assert ended.code == 1
    assert "no image was found under the given paths" in ended.err
    assert table(tmp_path / "report" / "queries.csv") == []


def test_min_score_filters_the_list_and_nothing_else(photos: Path, dino_search: Command) -> None:
    everything, some = (
        dino_search("copies", photos / "coffee.png", "--json", *more).json()["queries"][0]["matches"]
        for more in ([], ["--min-score", "0.5"])
    )
    assert some == [match for match in everything if match["score"] >= 0.5]
    assert 0 < len(some) < len(everything)


def test_a_copy_score_decides_in_place_of_the_precision(photos: Path, dino_search: Command, tmp_path: Path) -> None:
    query = tmp_path / "q.png"
    edited("coffee", "caption").save(query)
    score = dino_search("copies", query, "--json").json()["queries"][0]["matches"][0]["score"]
    for copy_score, decision in ((score - 0.01, "copy"), (score + 0.01, "uncertain")):
        match = dino_search("copies", query, "--json", "--copy-score", str(copy_score)).json()["queries"][0]["matches"][
            0
        ]
        assert match["decision"] == decision


def test_a_verdict_wins_over_the_score_in_both_directions(photos: Path, dino_search: Command, tmp_path: Path) -> None:
    query, other = tmp_path / "q.png", photos / "coffee.png"
    edited("coffee", "reencode").save(query)
    verdicts = tmp_path / "verdicts.csv"

    def decide(*rows: tuple[Path, Path, str]) -> None:
        lines = ["query,reference,decision", *(",".join(map(str, row)) for row in rows)]
        verdicts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert dino_search("verdicts", "import", verdicts).code == 0

    decide((other, query, "not_copy"), (query, photos / "rocket.png", "copy"))
    matches = dino_search("copies", query, "--json").json()["queries"][0]["matches"]
    decisions = {Path(match["reference"]).stem: (match["decision"], match["reason"]) for match in matches}
    assert decisions["coffee"] == ("different", "verdict")
    assert decisions["rocket"] == ("copy", "verdict")
    assert dino_search("compare", query, other).code == 1
    assert dino_search("compare", photos / "rocket.png", query).code == 0


@pytest.mark.parametrize("regions", ["none", "query", "both"])
def test_regions_can_be_switched(photos: Path, dino_search: Command, tmp_path: Path, regions: str) -> None:
    query = tmp_path / "q.png"
    photograph("astronaut").crop((120, 20, 220, 130)).save(query)
    ended = dino_search("copies", query, "--json", "--regions", regions, "--copy-score", "1")
    assert ended.code == 0
    assert Path(ended.json()["queries"][0]["matches"][0]["reference"]).stem == "astronaut" or regions != "both"
    assert ("forward passes, once" in ended.err) == (regions == "both")
    if regions == "both":
        assert "forward passes, once" not in dino_search("copies", query, "--regions", "both", "--copy-score", "1").err
        assert dino_search("verify").code == 0


def test_whitening_normalisation_and_verification_can_be_switched_off(photos: Path, dino_search: Command) -> None:
    def match(*options: str) -> dict[str, Any]:
        ended = dino_search("copies", photos / "coffee.png", "--json", "--copy-score", "0.5", *options)
        matches: list[dict[str, Any]] = ended.json()["queries"][0]["matches"]
        return matches[1]

    usual, raw = match(), match("--no-whitening")
    assert raw["cosine"] != usual["cosine"]
    assert match("--no-normalisation", "--verify", "0")["score"] == pytest.approx(usual["cosine"], abs=1e-5)
    assert match("--verify", "0")["verified"] is None


def page(text: str) -> Image.Image:
    """A page of text in one layout."""
    sheet = Image.new("RGB", (420, 560), "white")
    draw = ImageDraw.Draw(sheet)
    rng = np.random.default_rng(len(text))
    words = text.split()
    for line in range(26):
        chosen = " ".join(rng.choice(words, 8))
        draw.text((30, 30 + 19 * line), chosen, fill="black", font=ImageFont.load_default(13))
    return sheet


def test_blank_and_text_pages_are_no_copies_by_likeness_alone(home: Path, dino_search: Command, tmp_path: Path) -> None:
    archive, queries = tmp_path / "archive", tmp_path / "queries"
    archive.mkdir()
    queries.mkdir()
    first = page("invoice number total amount due payment terms thirty days net")
    other = page("minutes of the meeting held on monday with all members present and no votes")
    first.save(archive / "first.png")
    Image.new("RGB", (420, 560), "white").save(archive / "blank.png")
    Image.new("RGB", (400, 580), (250, 250, 250)).save(queries / "blank.png")
    other.save(queries / "other.png")
    first.save(queries / "same.jpg", quality=40)
    dino_search("index", archive)
    found = dino_search("copies", queries, "--json", "--copy-score", "-1").json()["queries"]
    decisions = {
        (Path(query["query"]).stem, Path(match["reference"]).stem): (match["decision"], match["reason"])
        for query in found
        for match in query["matches"]
    }
    assert decisions["same", "first"] == ("copy", "score")
    assert decisions["other", "first"] == ("uncertain", "plain")
    assert decisions["blank", "blank"] == ("uncertain", "plain")


def test_frames_of_a_burst_are_similar_and_no_copies(home: Path, dino_search: Command, tmp_path: Path) -> None:
    def shot(path: Path, second: int, box: tuple[int, int, int, int]) -> None:
        exif = Image.Exif()
        exif[0x010F], exif[0x0110] = "Maker", "Camera 1"
        exif.get_ifd(0x8769)[0x9003] = f"2024:05:31 18:04:{second:02d}"
        photograph("coffee").crop(box).save(path, exif=exif, quality=95)

    (tmp_path / "archive").mkdir()
    shot(tmp_path / "archive" / "frame-1.jpg", 10, (0, 0, 400, 280))
    shot(tmp_path / "frame-2.jpg", 11, (6, 4, 406, 284))
    shot(tmp_path / "copy.jpg", 10, (6, 4, 406, 284))
    dino_search("index", tmp_path / "archive")
    ended = dino_search("copies", tmp_path / "frame-2.jpg", tmp_path / "copy.jpg", "--json")
    (frame,), (copy,) = (query["matches"] for query in ended.json()["queries"])
    assert (frame["decision"], frame["similar"], frame["reason"]) == ("different", True, "burst")
    assert (copy["decision"], copy["similar"]) == ("copy", False)


def test_a_collection_of_one_image_works(home: Path, dino_search: Command, tmp_path: Path) -> None:
    photograph("coffee").save(tmp_path / "one.png")
    assert dino_search("index", tmp_path / "one.png").code == 0
    edited("coffee", "caption").save(tmp_path / "q.png")
    (query,) = dino_search("copies", tmp_path / "q.png", "--json").json()["queries"]
    assert [match["decision"] for match in query["matches"]] == ["copy"]


def test_hostile_names_stay_themselves(photos: Path, dino_search: Command, tmp_path: Path) -> None:
    name = '=cmd|"x",\n<script>alert(1)</script>.png'.replace("/", "-")
    edited("coffee", "reencode").save(tmp_path / "q.png")
    (tmp_path / "q.png").rename(tmp_path / name)
    assert dino_search("copies", tmp_path / name, "--report", tmp_path / "report").code == 0
    rows = table(tmp_path / "report" / "matches.csv")
    assert {row["query"] for row in rows} == {str(tmp_path / name)}
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page


def test_an_interrupted_report_leaves_nothing(
    photos: Path, dino_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dino_search.copy_report import CopyReport

    def interrupt(self: CopyReport, query: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CopyReport, "add", interrupt)
    report = tmp_path / "here" / "report"
    assert dino_search("copies", photos, "--report", report, "--copy-score", "1", "--verify", "0").code == 130
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (["--regions", "all"], "--regions"),
        (["--variants", "some"], "--variants"),
        (["--target-precision", "99"], "target_precision must be between 0 and 1"),
        (["--match-share", "0"], "match_share must be above 0"),
    ],
)
def test_wrong_options_are_wrong_usage(photos: Path, dino_search: Command, wrong: list[str], expected: str) -> None:
    ended = dino_search("copies", photos, *wrong)
    assert ended.code == 2
    assert expected in ended.err


def test_nothing_indexed_yet_says_what_to_run(dino_search: Command, tmp_path: Path) -> None:
    ended = dino_search("copies", tmp_path)
    assert ended.code == 1
    assert "dino-search index" in ended.err


# compare


def test_compare_says_copy_different_and_error_by_its_exit_status(
    dino_search: Command, tmp_path: Path, home: Path
) -> None:
    for name in ("coffee", "chelsea"):
        photograph(name).save(tmp_path / f"{name}.png")
    edited("coffee", "crop").save(tmp_path / "crop.png")
    same = dino_search("compare", tmp_path / "coffee.png", tmp_path / "crop.png", "--json")
    assert same.code == 0
    assert same.json()["transform"] is not None
    assert dino_search("compare", tmp_path / "crop.png", tmp_path / "coffee.png").code == 0
    assert dino_search("compare", tmp_path / "coffee.png", tmp_path / "chelsea.png").code == 1
    missing = dino_search("compare", tmp_path / "coffee.png", tmp_path / "missing.png")
    assert missing.code == 2
    assert "missing.png cannot be used" in missing.err
    assert not home.exists(), "comparing needs no home"


def test_compare_is_uncertain_between_the_two(photos: Path, dino_search: Command, tmp_path: Path) -> None:
    edited("coffee", "caption").save(tmp_path / "q.png")
    ended = dino_search("compare", photos / "coffee.png", tmp_path / "q.png", "--copy-score", "99")
    assert ended.code == 3
    assert ended.out.startswith("uncertain")


# calibrate


@pytest.fixture
def tiny_collection(dino_search: Command, tiny_model: Path, tmp_path: Path) -> Path:
    """Sixty pictures under a model that nothing ships with."""
    folder = tmp_path / "pictures"
    write_pictures(folder, *(f"{number}.jpg" for number in range(60)))
    assert dino_search("index", folder, "--model", tiny_model).code == 0
    return folder


def test_the_first_copies_calibrates_another_model_once_and_says_so(
    tiny_collection: Path, dino_search: Command
) -> None:
    first = dino_search("copies", tiny_collection / "0.jpg", "--json", "--verify", "0", "--regions", "none")
    assert first.code == 0
    assert "no calibration for" in first.err
    assert first.json()["queries"][0]["matches"][0]["precision"] is not None
    second = dino_search("copies", tiny_collection / "0.jpg", "--json", "--verify", "0", "--regions", "none")
    assert "no calibration for" not in second.err
    assert second.json()["queries"] == first.json()["queries"]


def test_calibrate_says_what_its_estimates_rest_on(tiny_collection: Path, dino_search: Command) -> None:
    ended = dino_search("calibrate", "--json", "--verify", "0", "--regions", "none", "--queries", "60")
    assert ended.code == 0
    value = ended.json()
    assert value["mode"] == "none/all/descriptor"
    assert (value["queries"], value["references"], value["checked_on_other_images"]) == (90, 60, False)
    assert [row["target_precision"] for row in value["table"]] == [0.9, 0.95, 0.99, 0.999]
    assert "not checked on other images" in dino_search(
        "calibrate", "--verify", "0", "--regions", "none", "--queries", "60"
    ).err  # fmt: skip


def test_calibrate_takes_labelled_pairs(tiny_collection: Path, dino_search: Command, tmp_path: Path) -> None:
    rows = ["query,reference", *(f"pictures/{n}.jpg,pictures/{n}.jpg" for n in range(50)), "pictures/55.jpg,"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    ended = dino_search(
        "calibrate", "--pairs", tmp_path / "pairs.csv", "--verify", "0", "--regions", "none", "--variants", "none",
        "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert (ended.json()["queries"], ended.json()["origin"]) == (51, "51 labelled queries of pairs.csv")
    (tmp_path / "pairs.csv").write_text("query,reference\npictures/0.jpg,elsewhere.jpg\n", encoding="utf-8")
    refused = dino_search("calibrate", "--pairs", tmp_path / "pairs.csv")
    assert refused.code == 1
    assert "elsewhere.jpg" in refused.err


def test_too_few_images_cannot_be_calibrated_on(dino_search: Command, tiny_model: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "few", "a.jpg", "b.jpg")
    dino_search("index", tmp_path / "few", "--model", tiny_model)
    ended = dino_search("copies", tmp_path / "few", "--verify", "0", "--regions", "none")
    assert ended.code == 1
    assert "--copy-score" in ended.err
    assert dino_search("copies", tmp_path / "few", "--verify", "0", "--copy-score", "0.9").code == 0


def test_whitening_and_calibration_outlast_a_backup(
    tiny_collection: Path, dino_search: Command, tmp_path: Path
) -> None:
    before = dino_search("copies", tiny_collection, "--json", "--verify", "0", "--regions", "none")
    assert dino_search("catalog", "backup", tmp_path / "b").code == 0
    shutil.rmtree(Path(json.loads(dino_search("info", "--json").out)["home"]))
    assert dino_search("catalog", "restore", tmp_path / "b").code == 0
    after = dino_search("copies", tiny_collection, "--json", "--verify", "0", "--regions", "none")
    assert "no calibration for" not in after.err
    assert after.json()["queries"] == before.json()["queries"]

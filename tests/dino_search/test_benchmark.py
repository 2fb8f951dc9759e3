"""`bench` runs the product's own code, and its figures hang together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bad_files import make_bad_files
from dino_index.errors import NoImagesFound
from dino_search import benchmark
from dino_search.benchmark import Benchmark, run_benchmark
from dino_search.cli import main
from sample_collections import index_files, write_pictures


def measure(home: Path, images: Path | None = None) -> Benchmark:
    return run_benchmark(home, "default", images, seconds_a_stage=0.2, num_random_vectors=300)


def test_bench_takes_model_and_vectors_of_the_collection(home: Path, photos: Path, tiny_model: Path) -> None:
    index_files(home, tiny_model, photos)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.suffix in (".sqlite3", ".faiss")}
    measured = measure(home, photos)
    assert (measured.model, measured.dim) == (str(tiny_model), 64)
    assert (measured.search.vectors, measured.search.num_vectors) == ("the collection's", 8)
    assert measured.index.num_images == 8
    assert before == {
        path: path.stat().st_mtime_ns for path in home.rglob("*") if path.suffix in (".sqlite3", ".faiss")
    }


def test_bench_needs_no_home(home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "BUNDLED", str(tiny_model))
    measured = measure(home)
    assert (measured.search.vectors, measured.search.num_vectors) == ("random", 300)
    assert measured.pictures == "scikit-image's photographs"
    assert measured.index.num_images >= 32
    assert not home.exists()


def test_speeds_and_estimates_hang_together(home: Path, photos: Path, tiny_model: Path) -> None:
    index_files(home, tiny_model, photos)
    measured = measure(home, photos)
    for speed in (measured.decode, measured.forward, measured.index):
        assert speed.images_per_second == pytest.approx(speed.num_images / speed.seconds, rel=0.1)
    assert 0 < measured.search.median_ms <= measured.search.slowest_of_20_ms
    assert [estimate.images for estimate in measured.estimates] == [10_000, 100_000, 1_000_000]
    for estimate in measured.estimates:
        assert estimate.index_s == pytest.approx(estimate.images / measured.index.images_per_second, abs=0.1)
    first, _, last = measured.estimates
    assert last.disk_bytes == 100 * first.disk_bytes
    assert last.memory_bytes - first.memory_bytes == pytest.approx(990_000 * (64 * 4 + 8), rel=0.01)


def test_estimated_disk_is_what_a_catalog_takes(home: Path, tiny_model: Path, tmp_path: Path) -> None:
    from dino_index.model_files import resolve_model

    num_images = 5000
    catalog = benchmark._random_collection(tmp_path / "random", resolve_model(tiny_model), 64, num_images)
    catalog.reclaim_space()
    catalog.close()
    taken = sum(path.stat().st_size for path in (tmp_path / "random").rglob("*") if path.is_file())
    speed = benchmark._speed(1, 1)
    search = benchmark.SearchSpeed(vectors="", num_vectors=0, open_s=0, median_ms=1, slowest_of_20_ms=1)
    estimated = benchmark._estimate(num_images, 64, speed, search).disk_bytes
    # The random images have no GeM vectors, short paths and no labels.
    assert 0.5 * estimated < taken < estimated


def test_files_that_cannot_be_read_are_left_out(home: Path, tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "mixed"
    write_pictures(folder, *(f"{number}.jpg" for number in range(4)))
    index_files(home, tiny_model, folder)
    make_bad_files(folder)
    assert measure(home, folder).megapixels < 0.1


def test_bench_says_when_there_is_nothing_to_read(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoImagesFound, match="--images"):
        measure(home, tmp_path / "empty")
    (tmp_path / "empty" / "bad.jpg").write_bytes(b"bad")
    with pytest.raises(NoImagesFound, match="could be read"):
        measure(home, tmp_path / "empty")


def test_command_prints_a_table_and_json(
    home: Path, photos: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index_files(home, tiny_model, photos)
    monkeypatch.setattr(benchmark.run_benchmark, "__kwdefaults__", {
        **(benchmark.run_benchmark.__kwdefaults__ or {}), "seconds_a_stage": 0.1,
    })  # fmt: skip

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["dino-search", "bench", "--images", str(photos), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0

    run("--json")
    values = json.loads(capsys.readouterr().out)
    assert {"model", "dtype", "decode", "forward", "index", "search", "estimates"} <= values.keys()
    run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        "model", "pictures", "decode", "forward", "index", "open", "search",
        "10,000 images", "100,000 images", "1,000,000 images",
    ]  # fmt: skip

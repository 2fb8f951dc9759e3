"""Indexing into PostgreSQL against indexing into SQLite, the same pictures in turn.

With a model of one small block, where the database matters most, and with the bundled one. The server is given by
DINO_SEARCH_TEST_DATABASE, else one of our own that confirms a commit when it is on the disk, as servers do.
`--images N --bundled-images N --rounds R`
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from material import report, report_ratio, write_photographs, write_random_model

from dino_search import Collection

sys.path.insert(0, str(Path(__file__).parents[1]))

from postgres_server import URL_VARIABLE, Catalogs, Server, find_server_binaries


def indexing_rate(photos: Path, first: Path, home: Path, model: str | Path, url: str | None) -> float:
    """Images/s of one `index` into a collection that exists: making it and loading the model belong to neither rate."""
    num_images = sum(1 for _ in photos.iterdir())
    with Collection.open(home=home, model=model, database=url) as collection:
        collection.index(first)
        start = time.perf_counter()
        summary = collection.index(photos)
        assert summary.added == num_images
        return num_images / (time.perf_counter() - start)


def compare(name: str, photos: Path, folder: Path, model: str | Path, catalogs: Catalogs, rounds: int) -> None:
    rates: dict[str, list[float]] = {"sqlite": [], "postgresql": []}
    first = write_photographs(folder / name / "first", 1, (48, 64))[0].parent
    for number in range(rounds + 1):
        # Each goes first in turn.
        for database in ("sqlite", "postgresql") if number % 2 else ("postgresql", "sqlite"):
            home = folder / name / f"{database}-{number}"
            url = catalogs.url_of(home) if database == "postgresql" else None
            rate = indexing_rate(photos, first, home, model, url)
            if number:  # the first round is for what is compiled and cached at first use
                rates[database].append(rate)
    for database, measured in rates.items():
        report(f"index into {database}, {name}", measured, "images/s")
    report_ratio(f"  postgresql / sqlite, {name}", rates["postgresql"], rates["sqlite"], ">= 0.8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--bundled-images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    server = None if os.environ.get(URL_VARIABLE) else Server(find_server_binaries(), settings=())
    catalogs = Catalogs(server.url if server else os.environ[URL_VARIABLE])
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_photographs(folder / "small", arguments.images, (64, 48))
            write_photographs(folder / "photos", arguments.bundled_images, (500, 375))
            small = {"img_size": 32, "depth": 1, "embed_dim": 192, "num_heads": 3}
            quick = write_random_model(folder / "quick.safetensors", "vit_tiny_patch16_224", **small)
            compare("a quick model", folder / "small", folder, quick, catalogs, arguments.rounds)
            compare("the bundled model", folder / "photos", folder, "bundled", catalogs, arguments.rounds)
    finally:
        if server:
            server.delete()
        else:
            catalogs.drop()


if __name__ == "__main__":
    main()

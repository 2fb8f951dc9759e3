"""A copy report of 10,000 pairs: writing it, how large its page is, and how soon a browser shows it from disk."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from material import report, seconds, write_photographs

from dino_search.copy_report import CopyReport
from dino_search.copy_results import CopyMatch, CopyQuery, Point

sys.path.insert(0, str(Path(__file__).parents[1]))

_AREA: tuple[Point, ...] = ((0.1, 0.12), (0.86, 0.08), (0.9, 0.8), (0.14, 0.88))
_PAIRS_A_QUERY = 10


def write_report(folder: Path, photographs: list[Path], num_pairs: int, *, distinct: bool) -> None:
    """distinct: every reference is another picture to the page, which is the most that it can hold."""
    rng = np.random.default_rng(0)
    shutil.rmtree(folder, ignore_errors=True)
    with CopyReport(folder, title="Benchmark", collection="default", model="none") as written:
        for first in range(0, num_pairs, _PAIRS_A_QUERY):
            query = photographs[(first // _PAIRS_A_QUERY) % len(photographs)]
            matches = []
            for rank in range(1, _PAIRS_A_QUERY + 1):
                number, score = int(rng.integers(len(photographs))), float(rng.normal(0.2, 0.6))
                reference = photographs[number]
                named = f"{first + rank}" if distinct else str(reference)
                matches.append(
                    CopyMatch(
                        query=str(query), reference=str(reference), image_id=number, score=score, cosine=0.4, rank=rank,
                        decision="copy" if score > 1 else "different", precision=min(max(score, 0.0), 1.0),
                        reason="score", query_area=_AREA, reference_area=_AREA,
                        query_sha256=hashlib.sha256(str(query).encode()).hexdigest(),
                        reference_sha256=hashlib.sha256(named.encode()).hexdigest(),
                    )
                )  # fmt: skip
            written.add(CopyQuery(query=str(query), matches=matches))


def measure_in_browser(page_file: Path, rounds: int) -> None:
    """Seconds until the first pictures are there, and for sorting all rows."""
    from browser import chromium

    shown: list[float] = []
    sorted_in: list[float] = []
    with chromium() as browser:
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1280, "height": 860})

            def show() -> None:
                page.goto(page_file.as_uri())  # noqa: B023 (called at once)
                page.wait_for_selector(".pair img")  # noqa: B023

            shown.append(seconds(show))
            sorted_in.append(seconds(lambda: page.select_option("#sort", "query")))  # noqa: B023
            page.close()
    report("first pictures shown", shown, "s")
    report("sorted by another column", sorted_in, "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--photographs", type=int, default=1000, help="500x375 JPEG files that the pairs are made of")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        photographs = write_photographs(Path(name) / "photographs", arguments.photographs, (500, 375))
        folder = Path(name) / "report"
        for distinct in (False, True):
            num_pictures = arguments.pairs + arguments.photographs if distinct else arguments.photographs
            print(f"{arguments.pairs:,} pairs of about {num_pictures:,} pictures")
            times = [
                seconds(lambda: write_report(folder, photographs, arguments.pairs, distinct=distinct))  # noqa: B023
                for _ in range(arguments.rounds)
            ]
            report("written", times, "s")
            report("report.html", [(folder / "report.html").stat().st_size / 1e6], "MB")
            try:
                measure_in_browser(folder / "report.html", arguments.rounds)
            except pytest.skip.Exception as reason:
                print(f"no browser: {reason}")


if __name__ == "__main__":
    main()

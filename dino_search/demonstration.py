"""The demonstration: real photographs, edited copies of them, and what the product makes of both."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

from dino_index.edits import apply_edits
from dino_index.errors import OutputUnwritable
from dino_index.images import load_image
from dino_index.indexing import IndexOptions, IndexSummary
from dino_search.collection import Collection
from dino_search.contact_sheet import KIND, write_contact_sheet
from dino_search.copy_report import CopyReport
from dino_search.copy_results import CopyQuery

# Photographs that come with scikit-image, by file name without ending.
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "ihc", "moon", "motorcycle_left", "page", "retina", "rocket", "text",
)  # fmt: skip
# Each photograph is indexed with copies edited in these ways ...
INDEXED_EDITS = ("crop", "grey", "blur", "rotate_small")
# ... and searched for with copies edited in other ways.
QUERY_EDITS = (("reencode", "resize"), ("colour", "caption"), ("crop", "noise"), ("overlay",))

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """What the demonstration did and how well it went."""

    summary: IndexSummary
    num_queries: int
    num_found: int
    """Queries whose nearest image comes from the same photograph."""
    num_classified: int
    """Queries that got the right photograph as their label."""
    num_copies: int
    """Queries that are called copies of the right photograph or of its edited copies, and of no other."""
    num_wrong: int
    """Queries that are called copies of something else."""
    example_query: Path
    contact_sheet: Path
    copy_report: Path


def run_demonstration(folder: Path, collection: Collection) -> Demonstration:
    """Writes photographs and queries below `folder`, indexes, searches, classifies, and reports copies.

    Raises OutputUnwritable, and as `Collection.index`, `search`, `classify` and `copies` do.
    """
    rng = np.random.default_rng(_SEED)
    photos, queries = folder / "photos", folder / "queries"
    query_paths: list[Path] = []
    for name in PHOTOGRAPHS:
        photograph = _photograph(name)
        _write(photos / name / f"{name}.jpg", photograph)
        for kind in INDEXED_EDITS:
            _write(photos / name / f"{name}-{kind}.jpg", apply_edits(photograph, [kind], rng))
        for edits in QUERY_EDITS:
            query_paths.append(queries / f"{name}-{'-'.join(edits)}.jpg")
            _write(query_paths[-1], apply_edits(photograph, edits, rng))
    summary = collection.index(photos, IndexOptions(labels="folders"))
    searches = [collection.search(path, k=5) for path in query_paths]
    classified = collection.classify([str(path) for path in query_paths], k=5)
    truth = [_name_of(str(path)) for path in query_paths]
    num_found = sum(found.results[0].label == name for found, name in zip(searches, truth, strict=True))
    sheet = folder / "contact-sheet.html"
    write_contact_sheet(
        sheet,
        "dino-search demonstration",
        searches,
        f"Each row: an edited copy, and the images nearest to it. The nearest is of the same photograph for "
        f"{num_found} of {len(searches)} queries.",
    )
    collection.record_report(sheet, KIND)
    report = folder / "copies"
    called = [
        (_name_of(query.query), {_name_of(match.reference) for match in query.matches if match.decision == "copy"})
        for query in _report_copies(collection, queries, report)
    ]
    return Demonstration(
        summary=summary,
        num_queries=len(searches),
        num_found=num_found,
        num_classified=sum(result.label == name for result, name in zip(classified.results, truth, strict=True)),
        num_copies=sum(originals == {name} for name, originals in called),
        num_wrong=sum(bool(originals - {name}) for name, originals in called),
        example_query=query_paths[0],
        contact_sheet=sheet,
        copy_report=report / "report.html",
    )


def _report_copies(collection: Collection, queries: Path, folder: Path) -> list[CopyQuery]:
    run = collection.copies(queries)
    report = CopyReport(
        folder, title="Copies in the dino-search demonstration", collection=collection.name,
        model=collection.model_name(), force=True, facts=run.facts,
    )  # fmt: skip
    found = []
    with report as written:
        for query in run:
            written.add(query)
            found.append(query)
    report.record_in(collection)
    return found


def _name_of(path: str) -> str:
    """Of the photograph that an edited copy was made from."""
    return Path(path).stem.split("-")[0]


def _photograph(name: str) -> Image.Image:
    folder = Path(skimage.__file__).parent / "data"
    path = next(path for ending in (".png", ".jpg") if (path := folder / f"{name}{ending}").is_file())
    return Image.fromarray(load_image(path).pixels_HWC)


def _write(path: Path, image: Image.Image) -> None:
    """Writes a JPEG unless this very file is there: a second run then finds everything unchanged."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, "JPEG", quality=90)
        if path.is_file() and path.read_bytes() == partial.read_bytes():
            partial.unlink()
        else:
            os.replace(partial, path)
    except OSError as error:
        raise OutputUnwritable(
            f"{path} cannot be written: {error.strerror}; choose another place with --out"
        ) from error

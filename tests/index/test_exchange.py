"""Exports that other programs open, and imports that bring everything back."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import select, update

from databases import created_catalog, open_catalog
from dino_index import exports, imports
from dino_index.catalog import Catalog, EmbeddingRow, ImageRow, SettingRow, SourceRow, WhiteningRow
from dino_index.catalog.portable_paths import encode_path
from dino_index.collections import find_collection
from dino_index.copy_decisions import Verdict
from dino_index.copy_exchange import read_copy_tables
from dino_index.copy_settings import add_calibration, add_whitening, latest_calibration
from dino_index.errors import (
    CatalogUnavailable,
    CollectionNotFound,
    DinoSearchError,
    ExportDamaged,
    ExportIncomplete,
    ExportTooNew,
    FingerprintMismatch,
    NotAnExport,
    OutputExists,
    OutputUnwritable,
)
from dino_index.exchange import part_number
from dino_index.exports import ExportFormat, ExportSummary, FlatIndexFile, export_collection
from dino_index.imports import ImportSummary, import_collection
from dino_index.model_files import resolve_model
from dino_index.verdicts import RecordedVerdict, ordered_pair, record_verdicts, recorded_verdicts
from sample_collections import (
    count_rows,
    findable,
    ids_of,
    images_of,
    index_files,
    save_tiny_model,
    write_pictures,
)
from small_disks import fill, mounted


def export(home: Path, out: Path, collection: str = "default", **options: Any) -> ExportSummary:
    with closing(open_catalog(home)) as catalog:
        return export_collection(catalog, collection, out, **options)


def bring_in(home: Path, folder: Path, collection: str = "default", model: Path | None = None) -> ImportSummary:
    catalog = Catalog.open(home, create=True)
    assert catalog is not None
    with closing(catalog):
        return import_collection(catalog, collection, folder, resolve_model(model) if model else None)


def everything(home: Path, collection: str = "default") -> dict[str, dict[str, Any]]:
    """All columns of each image and its vectors, by path; its own id and the catalog's bookkeeping left out."""
    images = images_of(home, collection)
    with closing(open_catalog(home)) as catalog, catalog.reading() as session:
        for row, source in session.execute(
            select(ImageRow, SourceRow.path).join(SourceRow, SourceRow.id == ImageRow.source_id)
        ):
            path = os.path.join(source, row.path)
            if path in images:
                names = "mtime_ns facts error_message added_at".split()
                images[path] |= {name: getattr(row, name) for name in names} | {"source": source, "name": row.path}
    return images


def index_sample(home: Path, model: Path, folder: Path) -> None:
    """Seven readable pictures with labels and facts, two of the same bytes, and a failed file."""
    write_pictures(folder, "cat/a.jpg", "cat/b'&.jpg", "dog/ä c.jpg", "dog/d.jpg", "dog/e.jpg", "dog/f.jpg")
    (folder / "dog" / "same.jpg").write_bytes((folder / "cat" / "a.jpg").read_bytes())
    (folder / "broken.jpg").write_bytes(b"no picture")
    index_files(home, model, folder, labels="folders")
    with closing(open_catalog(home)) as catalog, catalog.writing() as session:
        facts = {"photographer": "Ä", "year": 1987, "nested": {"deep": [1, None]}}
        session.execute(update(ImageRow).where(ImageRow.path == "cat/a.jpg").values(facts=facts))


@pytest.fixture
def photos(tmp_path: Path, home: Path, tiny_model: Path) -> Path:
    """The sample's folder, indexed."""
    index_sample(home, tiny_model, tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def exported(tmp_path: Path, home: Path, photos: Path) -> Path:
    """The same collection as a folder of three parts."""
    export(home, tmp_path / "exported", rows_a_part=3)
    return tmp_path / "exported"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("original")
    index_sample(folder / "home", tiny_model, folder / "photos")
    export(folder / "home", folder / "exported", rows_a_part=3)
    return folder / "exported"


@pytest.fixture
def arrived(tmp_path: Path, original: Path) -> Path:
    """An export as on another machine: to be damaged."""
    return shutil.copytree(original, tmp_path / "arrived")


# --- what other programs find


def test_vectors_and_metadata_are_aligned_as_clip_retrieval_reads_them(exported: Path, home: Path) -> None:
    parts = sorted((exported / "img_emb").glob("*.npy"))
    assert [part.name for part in parts] == ["img_emb_0.npy", "img_emb_1.npy", "img_emb_2.npy"]
    tables = [pq.read_table(path) for path in sorted((exported / "metadata").glob("*.parquet"))]
    assert [np.load(part).shape[0] for part in parts] == [table.num_rows for table in tables] == [3, 3, 1]
    vectors_ND = np.concatenate([np.load(part) for part in parts])
    assert vectors_ND.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(vectors_ND.astype(np.float32), axis=1), 1, atol=2e-3)
    rows = pa.concat_tables(tables).to_pylist()
    images = images_of(home)
    for row, vector_D in zip(rows, vectors_ND, strict=True):
        raw_D = np.frombuffer(images[row["image_path"]]["cls"], np.float16).astype(np.float32)
        np.testing.assert_allclose(vector_D, raw_D / np.linalg.norm(raw_D), atol=1e-3)
        assert row["label"] == images[row["image_path"]]["label"]
        assert row["image_id"] == ids_of(home)[row["image_path"]]


def test_metadata_holds_nothing_that_json_has_no_word_for(exported: Path) -> None:
    (path, *_) = (exported / "metadata").glob("*.parquet")
    rows = pq.read_table(path).to_pylist()
    assert json.loads(json.dumps(rows)) == rows


def test_faiss_opens_the_index_and_finds_each_row_by_its_vector(exported: Path) -> None:
    index = faiss.read_index(str(exported / "image.index"))
    assert (index.ntotal, index.metric_type) == (7, faiss.METRIC_INNER_PRODUCT)
    tables = [pq.read_table(path) for path in sorted((exported / "metadata").glob("*.parquet"))]
    paths = pa.concat_tables(tables)["image_path"].to_pylist()
    queries_QD = np.concatenate([np.load(path) for path in sorted((exported / "img_emb").glob("*.npy"))])
    scores, rows, found = index.search_and_reconstruct(queries_QD.astype(np.float32), 1)
    np.testing.assert_allclose(scores, 1, atol=2e-3)
    np.testing.assert_allclose(found[:, 0], queries_QD, atol=1e-3)
    for number, row in enumerate(rows[:, 0]):
        assert row == number or Path(paths[row]).read_bytes() == Path(paths[number]).read_bytes()


def test_index_file_is_byte_for_byte_what_faiss_writes(tmp_path: Path) -> None:
    vectors_ND = np.random.default_rng(0).normal(size=(10, 7)).astype(np.float32)
    with FlatIndexFile(tmp_path / "ours", 7) as file:
        file.add(vectors_ND[:6])
        file.add(vectors_ND[6:])
    index = faiss.IndexFlatIP(7)
    index.add(vectors_ND)
    faiss.write_index(index, str(tmp_path / "theirs"))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_part_names_sort_as_their_numbers_do() -> None:
    for num_parts in (1, 2, 10, 11, 101):
        names = [part_number(part, num_parts) for part in range(num_parts)]
        assert sorted(names) == names
        assert len(set(names)) == num_parts


# --- what comes back


@pytest.mark.parametrize("rows_a_part", [3, 1000])
@pytest.mark.parametrize("rows_a_page", [1, 2, 1000])
def test_import_restores_everything(
    tmp_path: Path, home: Path, photos: Path, tiny_model: Path, rows_a_part: int, rows_a_page: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(exports, "_ROWS_PER_FETCH", rows_a_page)
    monkeypatch.setattr(imports, "_FAILED_ROWS_A_TRANSACTION", rows_a_page)
    (photos / "broken two.jpg").write_bytes(b"no picture either")
    index_files(home, tiny_model, photos)
    (photos / "cat" / "a.jpg").unlink()  # what is imported need not exist
    export(home, tmp_path / "exported", rows_a_part=rows_a_part)
    other = tmp_path / "other"
    done = bring_in(other, tmp_path / "exported")
    assert done == ImportSummary(collection="default", added=9, failed=2, images=7, ids="kept")
    assert everything(other) == everything(home)
    assert ids_of(other) == ids_of(home)
    assert findable(other) == findable(home)
    assert count_rows(other, SettingRow) == 0


def test_ids_are_new_in_a_home_that_has_images(tmp_path: Path, exported: Path, tiny_model: Path) -> None:
    other = tmp_path / "other"
    write_pictures(tmp_path / "more", "z.jpg", seed=50)
    index_files(other, tiny_model, tmp_path / "more", collection="first")
    assert bring_in(other, exported, "second").ids == "new"
    assert min(ids_of(other, "second").values()) > max(ids_of(other, "first").values())


def test_new_images_after_an_import_get_ids_of_their_own(
    tmp_path: Path, home: Path, exported: Path, tiny_model: Path
) -> None:
    other = tmp_path / "other"
    bring_in(other, exported)
    write_pictures(tmp_path / "more", "z.jpg", seed=50)
    index_files(other, tiny_model, tmp_path / "more")
    assert ids_of(other)[str(tmp_path / "more" / "z.jpg")] > max(ids_of(home).values())


def test_index_finds_imported_files_unchanged(tmp_path: Path, exported: Path, photos: Path, tiny_model: Path) -> None:
    other = tmp_path / "other"
    bring_in(other, exported)
    summary = index_files(other, tiny_model, photos)
    assert (summary.added, summary.updated, summary.skipped, summary.failed) == (0, 0, 7, 1)


def test_import_into_a_collection_updates_what_differs(
    tmp_path: Path, home: Path, exported: Path, photos: Path, tiny_model: Path
) -> None:
    write_pictures(photos, "dog/d.jpg", seed=90)
    write_pictures(photos, "broken.jpg", seed=91)
    (photos / "dog" / "e.jpg").write_bytes(b"now broken")
    index_files(home, tiny_model, photos)
    with closing(open_catalog(home)) as catalog, catalog.writing() as session:
        session.execute(update(ImageRow).where(ImageRow.path == "dog/f.jpg").values(label="wolf"))
    before = ids_of(home)
    done = bring_in(home, exported)
    # The file that was broken when exported has become readable, and stays so.
    assert (done.added, done.updated, done.skipped) == (0, 3, 5)
    assert ids_of(home) == before
    found = everything(home)
    assert found[str(photos / "dog/e.jpg")]["status"] == found[str(photos / "broken.jpg")]["status"] == "ok"
    assert found[str(photos / "dog/f.jpg")]["label"] == "dog"
    assert findable(home) == set(found)
    assert bring_in(home, exported).updated == 0


def test_import_below_a_known_folder_meets_the_same_images(
    tmp_path: Path, home: Path, photos: Path, tiny_model: Path
) -> None:
    other = tmp_path / "other"
    index_files(other, tiny_model, photos / "dog")
    export(other, tmp_path / "narrow")
    done = bring_in(home, tmp_path / "narrow")
    assert (done.added, done.skipped, done.images) == (0, 5, 7) or (done.added, done.updated) == (0, 5)
    with closing(open_catalog(home)) as catalog, catalog.reading() as session:
        assert [encode_path(str(photos))] == session.scalars(select(SourceRow.path)).all()


def test_names_that_are_no_utf8_come_back(tmp_path: Path, home: Path, tiny_model: Path) -> None:
    folder = os.fsencode(tmp_path / "odd")
    os.mkdir(folder)
    (picture,) = write_pictures(tmp_path, "x.jpg")
    try:
        os.rename(picture, folder + b"/\xe9\\xe9.jpg")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    index_files(home, tiny_model, os.fsdecode(folder))
    export(home, tmp_path / "exported")
    bring_in(tmp_path / "other", tmp_path / "exported")
    assert ids_of(tmp_path / "other") == ids_of(home)
    (row,) = pq.read_table(tmp_path / "exported" / "metadata" / "metadata_0.parquet").to_pylist()
    assert row["path"] == row["image_path"].split("/")[-1] == "\\xe9\\x5cxe9.jpg"


def test_stopped_import_goes_on_with_the_same_ids(
    tmp_path: Path, home: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    read_part = imports._Import._read_part

    def fail_at_the_last(self: Any, part: int) -> Any:
        if part == 2:
            raise KeyboardInterrupt
        return read_part(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(imports._Import, "_read_part", fail_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            bring_in(other, exported)
    assert len(ids_of(other)) == 6
    done = bring_in(other, exported)
    assert (done.added, done.skipped, done.ids) == (2, 6, "kept")
    assert everything(other) == everything(home)
    assert ids_of(other) == ids_of(home)


def test_a_collection_without_readable_images_comes_back(tmp_path: Path, home: Path, photos: Path) -> None:
    with closing(open_catalog(home)) as catalog, catalog.writing() as session:
        for row in session.scalars(select(ImageRow).where(ImageRow.status == "ok")):
            session.delete(row)
    assert export(home, tmp_path / "exported").parts == 0
    assert faiss.read_index(str(tmp_path / "exported" / "image.index")).ntotal == 0
    assert bring_in(tmp_path / "other", tmp_path / "exported").added == 1


# --- verdicts, whitening, calibration


def decisions(home: Path, collection: str = "default") -> tuple[Any, ...]:
    """Verdicts by pair with note and time, and all versions of the collection's settings."""
    with closing(open_catalog(home)) as catalog, catalog.reading() as session:
        info = find_collection(session, collection)
        verdicts = {item.pair: (item.decision, item.note, item.decided_at) for item in recorded_verdicts(session)}
        whitenings = [(row.version, row.data, row.facts, row.created_at) for row in session.scalars(
            select(WhiteningRow).where(WhiteningRow.collection_id == info.id).order_by(WhiteningRow.version)
        )]  # fmt: skip
        return verdicts, whitenings, latest_calibration(session, info)


def decide(home: Path, name: str, decision: Verdict, note: str = "") -> None:
    """A verdict on the image of this name and one that was never indexed."""
    digest = next(image["sha256"] for path, image in images_of(home).items() if path.endswith(name))
    with closing(open_catalog(home)) as catalog, catalog.writing() as session:
        pair = ordered_pair(digest, b"\x80" * 32)
        decided = RecordedVerdict(pair=pair, decision=decision, note=note, decided_at=datetime(2026, 1, 2, tzinfo=UTC))
        record_verdicts(session, [decided])


def test_verdicts_and_settings_travel_with_the_collection(tmp_path: Path, home: Path, photos: Path) -> None:
    decide(home, "cat/a.jpg", "not_copy", 'a "note"\n')
    with closing(open_catalog(home)) as catalog, catalog.writing() as session:
        elsewhere = RecordedVerdict(pair=(bytes(32), b"\xff" * 32), decision="copy", decided_at=datetime.now(UTC))
        record_verdicts(session, [elsewhere])  # has no picture of the collection
        info = find_collection(session, "default")
        for version in range(2):
            add_whitening(session, info, bytes(range(256)), {"images": 7, "of": "Ä"}, after=version)
            add_calibration(session, info, {"knots": [1, None]}, after=version)
    export(home, tmp_path / "exported")
    other = tmp_path / "other"
    bring_in(other, tmp_path / "exported")
    verdicts, *settings = decisions(home)
    del verdicts[elsewhere.pair]
    assert len(verdicts) == 1
    assert decisions(other) == (verdicts, *settings)
    assert bring_in(other, tmp_path / "exported").updated == 0
    assert decisions(other) == (verdicts, *settings)


def test_what_was_decided_here_stays_on_import(tmp_path: Path, home: Path, photos: Path) -> None:
    decide(home, "cat/a.jpg", "copy")
    decide(home, "dog/e.jpg", "copy")
    with closing(open_catalog(home)) as catalog, catalog.writing() as session:
        add_calibration(session, find_collection(session, "default"), {"of": "the export"}, after=0)
    export(home, tmp_path / "exported")
    other = tmp_path / "other"
    with closing(created_catalog(other)):
        pass
    bring_in(other, tmp_path / "exported")
    decide(other, "cat/a.jpg", "not_copy")
    with closing(open_catalog(other)) as catalog, catalog.writing() as session:
        add_calibration(session, find_collection(session, "default"), {"of": "this home"}, after=1)
    before = decisions(other)
    bring_in(other, tmp_path / "exported")
    assert decisions(other) == before
    assert sorted(decision for decision, *_ in before[0].values()) == ["copy", "not_copy"]


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("verdicts.parquet", {"first_sha256": "00" * 31, "second_sha256": "ff" * 32, "decision": "copy"}),
        ("verdicts.parquet", {"first_sha256": "00" * 32, "second_sha256": "ff" * 32, "decision": "different"}),
        ("whitening.parquet", {"version": 0, "data": b"x", "facts": "{}"}),
        ("calibration.parquet", {"version": 1, "value": "[]"}),
        ("calibration.parquet", None),
    ],
)
def test_verdicts_and_settings_that_make_no_sense_are_refused(
    tmp_path: Path, arrived: Path, file: str, row: dict[str, Any] | None
) -> None:
    schema = pq.read_schema(arrived / file)
    if row is None:
        (arrived / file).write_bytes(b"no table")
    else:
        at = {name: "2026-01-02T00:00:00+00:00" for name in ("decided_at", "created_at") if name in schema.names}
        pq.write_table(pa.Table.from_pylist([row | at], schema=schema), arrived / file)
    with pytest.raises(ExportDamaged, match=file):
        read_copy_tables(arrived, {file: None})


def test_exports_of_earlier_versions_are_without_them(tmp_path: Path, arrived: Path) -> None:
    description = json.loads((arrived / "export.json").read_text())
    for name in ("verdicts.parquet", "whitening.parquet", "calibration.parquet"):
        del description["files"][name]
        (arrived / name).unlink()
    (arrived / "export.json").write_text(json.dumps(description))
    assert bring_in(tmp_path / "other", arrived).images == 7


# --- models


def test_import_refuses_vectors_of_another_model(tmp_path: Path, exported: Path, photos: Path) -> None:
    other = tmp_path / "other"
    index_files(other, save_tiny_model(tmp_path / "two.safetensors", seed=1), photos / "cat")
    before = everything(other)
    with pytest.raises(FingerprintMismatch, match="-c NAME"):
        bring_in(other, exported)
    assert everything(other) == before


def test_import_learns_where_the_weights_are_and_checks_them(tmp_path: Path, exported: Path, tiny_model: Path) -> None:
    moved = Path(shutil.copy(tiny_model, tmp_path / "moved.safetensors"))
    another = save_tiny_model(tmp_path / "two.safetensors", seed=1)
    with pytest.raises(FingerprintMismatch, match="leave out --model"):
        bring_in(tmp_path / "other", exported, model=another)
    bring_in(tmp_path / "other", exported, model=moved)
    with closing(open_catalog(tmp_path / "other")) as catalog, catalog.reading() as session:
        from dino_index.collections import find_collection, model_of

        assert model_of(find_collection(session, "default")).weights_path == moved


# --- what is refused


def damage(folder: Path, name: str, change: Any) -> None:
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if (changed := change(data)) is not None:
        path.write_bytes(changed)


def flipped(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


DAMAGES: dict[str, tuple[str, Any, type[DinoSearchError]]] = {
    "vectors cut short": ("cls_emb/cls_emb_1.npy", lambda data: data[:-7], ExportDamaged),
    "a flipped bit in vectors": ("gem_emb/gem_emb_2.npy", flipped, ExportDamaged),
    "a flipped bit in metadata": ("metadata/metadata_2.parquet", flipped, ExportDamaged),
    "a missing part": ("cls_emb/cls_emb_2.npy", lambda data: None, ExportDamaged),
    "a missing ledger": ("failed.parquet", lambda data: None, ExportDamaged),
    "no description": ("export.json", lambda data: None, NotAnExport),
    "a cut description": ("export.json", lambda data: data[:-30], ExportDamaged),
    "a description that is no object": ("export.json", lambda data: b"[1]", NotAnExport),
    "a newer version": ("export.json", lambda data: data.replace(b'"version": 1', b'"version": 2'), ExportTooNew),
    "counts that disagree": ("export.json", lambda data: data.replace(b'"images": 7', b'"images": 8'), ExportDamaged),
    "unknown keys": ("export.json", lambda data: data.replace(b'"images"', b'"pictures"'), ExportDamaged),
    "a file outside": ("export.json", lambda data: data.replace(b'"image.index"', b'"../image.index"'), ExportDamaged),
    "no fingerprint": ("export.json", lambda data: data.replace(b'"fingerprint": "', b'"fingerprint": "-'),
                       ExportDamaged),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_export_is_refused_whole(tmp_path: Path, arrived: Path, name: str) -> None:
    file, change, error = DAMAGES[name]
    damage(arrived, file, change)
    with pytest.raises(error) as raised:
        bring_in(tmp_path / "other", arrived)
    assert "\n" not in str(raised.value)
    assert count_rows(tmp_path / "other", ImageRow) == 0


def redescribe(folder: Path, name: str) -> None:
    """Enters a changed file into the description, as somebody who forges an export would."""
    import hashlib

    values = json.loads((folder / "export.json").read_text())
    data = (folder / name).read_bytes()
    values["files"][name] = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "export.json").write_text(json.dumps(values))


FORGED_ARRAYS: dict[str, Any] = {
    "too few rows": np.ones((2, 64), np.float16),
    "another length": np.ones((3, 32), np.float16),
    "another type": np.ones((3, 64), np.float32),
    "not a number": np.full((3, 64), np.nan, np.float16),
    "zeros": np.zeros((3, 64), np.float16),
    "objects": np.array([[{}] * 64] * 3),
}


@pytest.mark.parametrize("name", FORGED_ARRAYS)
def test_forged_vectors_are_refused(tmp_path: Path, arrived: Path, name: str) -> None:
    np.save(arrived / "cls_emb" / "cls_emb_0.npy", FORGED_ARRAYS[name], allow_pickle=True)
    redescribe(arrived, "cls_emb/cls_emb_0.npy")
    with pytest.raises(ExportDamaged):
        bring_in(tmp_path / "other", arrived)
    assert count_rows(tmp_path / "other", ImageRow) == 0


@pytest.mark.parametrize(
    ("column", "value"),
    [("path", "../../etc/passwd"), ("sha256", "12"), ("sha256", None), ("metadata", "{"), ("metadata", "[]"),
     ("image_id", None), ("image_id", -1), ("added_at", "yesterday"), ("source", ""), ("size", None)],
)  # fmt: skip
def test_forged_metadata_is_refused(tmp_path: Path, arrived: Path, column: str, value: Any) -> None:
    path = arrived / "metadata" / "metadata_0.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    redescribe(arrived, "metadata/metadata_0.parquet")
    with pytest.raises(ExportDamaged, match="row 1"):
        bring_in(tmp_path / "other", arrived)
    assert count_rows(tmp_path / "other", ImageRow) == 0


def test_embeddings_of_another_program_are_refused_with_the_reason(tmp_path: Path, arrived: Path) -> None:
    (arrived / "export.json").unlink()
    with pytest.raises(NotAnExport, match="fingerprint of the model"):
        bring_in(tmp_path / "other", arrived)
    with pytest.raises(NotAnExport, match="no folder"):
        bring_in(tmp_path / "other", tmp_path / "nothing")


@pytest.mark.parametrize(("form", "folders"), [("embeddings", 4), ("faiss", 1)])
def test_format_decides_what_is_written(
    tmp_path: Path, home: Path, photos: Path, form: ExportFormat, folders: int
) -> None:
    export(home, tmp_path / "exported", form=form)
    assert sum(path.is_dir() for path in (tmp_path / "exported").iterdir()) == folders
    assert (tmp_path / "exported" / "image.index").exists() == (form == "faiss")
    if form == "faiss":
        with pytest.raises(ExportIncomplete, match="--format all"):
            bring_in(tmp_path / "other", tmp_path / "exported")
    else:
        assert bring_in(tmp_path / "other", tmp_path / "exported").images == 7


# --- what export leaves alone


def test_only_an_earlier_export_is_replaced_and_only_with_force(
    tmp_path: Path, home: Path, exported: Path, photos: Path
) -> None:
    with pytest.raises(OutputExists, match="--force"):
        export(home, exported)
    assert export(home, exported, force=True).parts == 1
    assert not (exported / "img_emb" / "img_emb_2.npy").exists()
    for force in (False, True):
        with pytest.raises(OutputExists, match="not touched"):
            export(home, photos, force=force)
    (tmp_path / "empty").mkdir()
    export(home, tmp_path / "empty")
    assert (tmp_path / "empty" / "export.json").is_file()


def test_failing_export_leaves_nothing(
    tmp_path: Path, home: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CollectionNotFound):
        export(home, tmp_path / "new", "other")
    with closing(sqlite3.connect(home / "catalog.sqlite3")) as connection:
        connection.execute("UPDATE embedding SET kind = 'gone' WHERE kind = 'gem'")
        connection.commit()
    for out, force in ((tmp_path / "new", False), (exported, True)):
        with pytest.raises(CatalogUnavailable, match="verify --repair"):
            export(home, out, force=force)
    with closing(sqlite3.connect(home / "catalog.sqlite3")) as connection:
        connection.execute("UPDATE embedding SET kind = 'gem' WHERE kind = 'gone'")
        connection.commit()
    with monkeypatch.context() as patch:
        patch.setattr("dino_index.exports.pq.write_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(home, tmp_path / "new", form="faiss")
    assert [path for path in sorted(tmp_path.rglob("*")) if "catalog" not in path.name] == [
        path for path in before if "catalog" not in path.name
    ]


@pytest.mark.mounts
def test_full_disk_leaves_nothing(tmp_path: Path, home: Path, photos: Path) -> None:
    with mounted(tmp_path / "disk", "400k") as disk:
        for leave_kb in (0, 4, 8, 12, 16):
            filler = fill(disk, leave_kb=leave_kb)
            with pytest.raises(OutputUnwritable, match="nothing was left"):
                export(home, disk / "exported")
            assert list(disk.iterdir()) == [filler]
            filler.unlink()
        assert export(home, disk / "exported").images == 7


def test_export_takes_one_state_however_long_it_takes(
    tmp_path: Path, home: Path, photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_part = exports._load_part

    def load_and_index_more(*arguments: Any) -> Any:
        write_pictures(photos, "new.jpg", seed=70)
        (photos / "dog" / "f.jpg").unlink(missing_ok=True)
        index_files(home, tiny_model, photos, prune=True, prune_any=True)
        return load_part(*arguments)

    monkeypatch.setattr(exports, "_load_part", load_and_index_more)
    assert export(home, tmp_path / "exported", rows_a_part=2).images == 7
    assert str(photos / "dog" / "f.jpg") in ids_of_export(tmp_path / "exported")
    assert count_rows(home, EmbeddingRow) > 0


def ids_of_export(folder: Path) -> dict[str, int]:
    tables = [pq.read_table(path) for path in sorted((folder / "metadata").glob("*.parquet"))]
    return {row["image_path"]: row["image_id"] for row in pa.concat_tables(tables).to_pylist()}

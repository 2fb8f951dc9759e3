from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import timm
from numpy.typing import NDArray
from safetensors.torch import save_file
from sqlalchemy import func, select

from databases import open_catalog
from dino_index.backbones import Backbone
from dino_index.catalog import EmbeddingRow, RemovalRow, SnapshotRow
from dino_index.collections import find_collection
from dino_index.embedding import EmbeddingSettings
from dino_index.errors import FingerprintMismatch, ReindexRefused, WeightsMismatch
from dino_index.index_types import build_index
from dino_index.indexing import Progress
from dino_index.integrity import compact_collection, verify_collection
from dino_index.model_files import Pooling, resolve_model
from dino_index.recording import remove_images
from dino_index.reindexing import ReindexOptions, ReindexSummary, _Reindexing, reindex_collection
from dino_index.snapshots import normalise
from dino_index.vector_index import VectorIndex
from sample_collections import (
    count_rows,
    findable,
    ids_of,
    images_of,
    index_files,
    jpeg,
    save_tiny_model,
    write_pictures,
)


@pytest.fixture(autouse=True)
def _small_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six pictures take three transactions, between which other commands have their turn."""
    monkeypatch.setattr("dino_index.recording._IMAGES_A_TRANSACTION", 2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures in two folders."""
    folder = tmp_path / "photos"
    write_pictures(folder, "a/1.jpg", "a/2.jpg", "a/3.jpg", "b/4.jpg", "b/5.jpg", "b/6.jpg")
    return folder


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    """Weights that give other vectors than the tiny model's."""
    return save_tiny_model(tmp_path / "other.safetensors", seed=1)


@pytest.fixture
def filled(home: Path, tiny_model: Path, photos: Path) -> Path:
    """The home with the photos, labelled, under the tiny model."""
    index_files(home, tiny_model, photos, labels="folders")
    return home


def reindex(
    home: Path,
    model: Path,
    collection: str = "default",
    *,
    pooling: Pooling = "normalised",
    batch_size: int = 2,
    allow_missing: bool = False,
    **hooks: Any,
) -> ReindexSummary:
    """One run of `reindex_collection`."""
    catalog = open_catalog(home)
    options = ReindexOptions(allow_missing=allow_missing, embedding=EmbeddingSettings(batch_size=batch_size))
    try:
        with catalog.reading() as session:
            info = find_collection(session, collection)
        return reindex_collection(catalog, info, resolve_model(model, pooling=pooling), options, **hooks)
    finally:
        catalog.close()


def on_first(action: Callable[[], object]) -> Callable[[Progress], None]:
    """A progress callback that does something once, when the first batch has been recorded."""
    waiting = [action]

    def act(progress: Progress) -> None:
        if progress.done and waiting:
            waiting.pop()()

    return act


def ranking(home: Path, query_D: NDArray[np.float32], collection: str = "default") -> list[tuple[str, float]]:
    """All images by path and score, as a search ranks them."""
    catalog = open_catalog(home)
    with catalog.reading() as session:
        index = VectorIndex.load(catalog, session, find_collection(session, collection))
    catalog.close()
    paths = {image_id: path for path, image_id in ids_of(home, collection).items()}
    ((ids, scores),) = index.search(query_D[None], 1000)
    return [(paths[image_id], score) for image_id, score in zip(ids.tolist(), scores.tolist(), strict=True)]


def queries() -> NDArray[np.float32]:
    queries_QD = np.random.default_rng(5).normal(size=(4, 64)).astype(np.float32)
    return normalise(queries_QD)


def same_as_fresh(home: Path, model: Path, photos: Path, fresh: Path) -> None:
    """Asserts that a collection holds and finds what one made with the model from the start does."""
    index_files(fresh, model, photos, labels="folders")
    assert images_of(home) == images_of(fresh)
    assert count_rows(home, EmbeddingRow) == count_rows(fresh, EmbeddingRow)
    for query_D in queries():
        assert ranking(home, query_D) == ranking(fresh, query_D)


def problems_of(home: Path) -> list[str]:
    catalog = open_catalog(home)
    with catalog.reading() as session:
        info = find_collection(session, "default")
    report = verify_collection(catalog, info)
    catalog.close()
    return report.problems


def model_of(home: Path, collection: str = "default") -> str:
    catalog = open_catalog(home)
    with catalog.reading() as session:
        name = find_collection(session, collection).model_name
    catalog.close()
    return name


def compact(home: Path, collection: str = "default") -> None:
    catalog = open_catalog(home)
    with catalog.reading() as session:
        info = find_collection(session, collection)
    compact_collection(catalog, info)
    catalog.close()


# --- the whole of it


def test_a_reindexed_collection_equals_one_made_with_the_new_model(
    filled: Path, photos: Path, other_model: Path, tmp_path: Path
) -> None:
    ids = ids_of(filled)
    before = [ranking(filled, query_D) for query_D in queries()]
    summary = reindex(filled, other_model)
    assert (summary.switched, summary.embedded, summary.images) == (True, 6, 6)
    assert (summary.reused, summary.updated, summary.failed, summary.interrupted) == (0, 0, 0, False)
    assert summary.model == model_of(filled) == str(other_model)
    assert ids_of(filled) == ids
    assert [ranking(filled, query_D) for query_D in queries()] != before
    same_as_fresh(filled, other_model, photos, tmp_path / "fresh")
    assert problems_of(filled) == []
    assert count_rows(filled, SnapshotRow) == 1


def test_a_model_of_another_length_takes_over(filled: Path, photos: Path, tmp_path: Path) -> None:
    compact(filled)  # a snapshot of vectors of the old length
    path = tmp_path / "wide.safetensors"
    wide: dict[str, Any] = {"depth": 1, "embed_dim": 192, "num_heads": 3, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **wide)
    description = {"architecture": "vit_tiny_patch16_224", "architecture_args": wide, "input_size": 32}
    save_file(model.state_dict(), path, metadata={"dino_search": json.dumps(description)})
    assert reindex(filled, path).switched
    assert len(findable(filled)) == 6
    assert problems_of(filled) == []


def test_indexing_goes_on_with_the_new_model(filled: Path, photos: Path, other_model: Path, tiny_model: Path) -> None:
    reindex(filled, other_model)
    write_pictures(photos, "b/7.jpg", seed=70)
    with pytest.raises(FingerprintMismatch):
        index_files(filled, tiny_model, photos)
    summary = index_files(filled, other_model, photos)
    assert (summary.added, summary.skipped) == (1, 6)
    assert len(findable(filled)) == 7


def test_another_pooling_is_another_model(filled: Path, tiny_model: Path) -> None:
    before = images_of(filled)
    assert reindex(filled, tiny_model, pooling="reference").embedded == 6
    after = images_of(filled)
    assert all(after[path]["cls"] == facts["cls"] for path, facts in before.items())
    assert all(after[path]["gem"] != facts["gem"] for path, facts in before.items())


def test_the_same_model_again_is_nothing_to_do(filled: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = images_of(filled)
    monkeypatch.setattr(Backbone, "__init__", None)  # not even loaded
    summary = reindex(filled, tiny_model)
    assert (summary.switched, summary.embedded, summary.images) == (False, 0, 6)
    assert images_of(filled) == before


def test_a_model_that_cannot_be_used_changes_nothing(filled: Path, tmp_path: Path) -> None:
    deeper = {"depth": 2, "embed_dim": 64, "num_heads": 1, "img_size": 32}
    unusable = save_tiny_model(tmp_path / "unusable.safetensors", architecture_args=deeper)
    before = images_of(filled)
    with pytest.raises(WeightsMismatch):
        reindex(filled, unusable)
    assert images_of(filled) == before


def test_the_same_bytes_are_embedded_once(filled: Path, photos: Path, tiny_model: Path, other_model: Path) -> None:
    shutil.copy(photos / "a/1.jpg", photos / "b/copy.jpg")
    index_files(filled, tiny_model, photos)
    assert reindex(filled, other_model).embedded == 6
    assert len(findable(filled)) == 7


def test_removed_and_failed_images_stay_what_they_are(
    filled: Path, photos: Path, tiny_model: Path, other_model: Path
) -> None:
    (photos / "a/bad.jpg").write_bytes(b"bad")
    index_files(filled, tiny_model, photos)
    compact(filled)
    catalog = open_catalog(filled)
    removed = ids_of(filled)[str(photos / "a/1.jpg")]
    with catalog.writing() as session:
        remove_images(session, find_collection(session, "default"), [removed])
    catalog.close()
    reindex(filled, other_model)
    assert images_of(filled)[str(photos / "a/bad.jpg")]["status"] == "failed"
    assert len(findable(filled)) == 5
    assert count_rows(filled, RemovalRow) == 0


# --- embeddings that others need, and those that nobody does


def test_embeddings_of_the_old_model_stay_where_another_collection_needs_them(
    filled: Path, photos: Path, tiny_model: Path, other_model: Path
) -> None:
    index_files(filled, tiny_model, photos / "a", collection="second")
    before = images_of(filled, "second")
    reindex(filled, other_model)
    assert images_of(filled, "second") == before
    assert count_rows(filled, EmbeddingRow) == 2 * (6 + 3)
    compact(filled)
    assert images_of(filled, "second") == before
    assert reindex(filled, other_model, "second").reused == 3
    assert count_rows(filled, EmbeddingRow) == 2 * 6


def test_compacting_drops_what_a_kill_before_dropping_left(
    filled: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino_index.reindexing.drop_unneeded_embeddings", lambda *_: None)
    reindex(filled, other_model)
    assert count_rows(filled, EmbeddingRow) == 2 * 2 * 6
    compact(filled)
    assert count_rows(filled, EmbeddingRow) == 2 * 6
    assert problems_of(filled) == []


def test_compacting_spares_a_change_that_waits_to_go_on(filled: Path, tiny_model: Path, other_model: Path) -> None:
    assert reindex(filled, other_model, should_stop=lambda: True).interrupted
    compact(filled)
    summary = reindex(filled, other_model)
    assert (summary.reused, summary.embedded) == (2, 4)


def test_a_change_that_was_given_up_is_dropped_by_compacting(filled: Path, tiny_model: Path, other_model: Path) -> None:
    reindex(filled, other_model, should_stop=lambda: True)
    assert count_rows(filled, EmbeddingRow) == 2 * (6 + 2)
    assert not reindex(filled, tiny_model).switched
    compact(filled)
    assert count_rows(filled, EmbeddingRow) == 2 * 6


# --- interruption


def test_an_interrupted_run_leaves_the_old_model_and_goes_on(
    filled: Path, photos: Path, other_model: Path, tmp_path: Path
) -> None:
    before = [ranking(filled, query_D) for query_D in queries()]
    asked = iter(range(1, 100))
    first = reindex(filled, other_model, should_stop=lambda: next(asked) == 2)
    assert (first.interrupted, first.switched, first.embedded, first.remaining) == (True, False, 4, 2)
    assert model_of(filled) != str(other_model)
    assert [ranking(filled, query_D) for query_D in queries()] == before
    second = reindex(filled, other_model)
    assert (second.switched, second.reused, second.embedded) == (True, 4, 2)
    same_as_fresh(filled, other_model, photos, tmp_path / "fresh")


def test_searching_the_old_model_works_throughout(filled: Path, other_model: Path) -> None:
    expected = ranking(filled, queries()[0])
    seen = []
    reindex(filled, other_model, on_progress=lambda progress: seen.append(ranking(filled, queries()[0])))
    assert len(seen) >= 3
    assert all(found == expected for found in seen)


# --- company


def test_images_that_another_run_adds_meanwhile_are_not_lost(
    filled: Path, photos: Path, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    write_pictures(photos, "b/7.jpg", "b/8.jpg", seed=70)
    add = on_first(lambda: index_files(filled, tiny_model, photos, labels="folders"))
    summary = reindex(filled, other_model, on_progress=add)
    assert (summary.embedded, summary.images) == (8, 8)
    same_as_fresh(filled, other_model, photos, tmp_path / "fresh")


def test_images_that_come_just_before_the_switch_are_not_lost(
    filled: Path, photos: Path, tiny_model: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(photos, "b/7.jpg", seed=70)
    switch = _Reindexing._switch
    answers: list[bool] = []

    def add_then_switch(self: _Reindexing) -> bool:
        if not answers:
            index_files(filled, tiny_model, photos)
        answers.append(switch(self))
        return answers[-1]

    monkeypatch.setattr(_Reindexing, "_switch", add_then_switch)
    assert reindex(filled, other_model).embedded == 7
    assert answers == [False, True]
    assert str(photos / "b/7.jpg") in findable(filled)


def test_images_that_another_run_removes_meanwhile_stay_removed(filled: Path, photos: Path, other_model: Path) -> None:
    def remove() -> None:
        catalog = open_catalog(filled)
        with catalog.writing() as session:
            remove_images(session, find_collection(session, "default"), [ids_of(filled)[str(photos / "b/6.jpg")]])
        catalog.close()

    assert reindex(filled, other_model, on_progress=on_first(remove)).images == 5
    assert str(photos / "b/6.jpg") not in findable(filled)


def test_an_indexing_run_that_meets_the_switch_records_nothing_under_the_old_model(
    filled: Path, photos: Path, tiny_model: Path, other_model: Path
) -> None:
    write_pictures(photos, *(f"c/{number}.jpg" for number in range(6)), seed=70)
    switch = on_first(lambda: reindex(filled, other_model))
    with pytest.raises(FingerprintMismatch, match="run the same command again"):
        index_files(filled, tiny_model, photos, on_progress=switch, embedding=EmbeddingSettings(batch_size=1))
    assert problems_of(filled) == []
    summary = index_files(filled, other_model, photos)
    assert summary.images == len(findable(filled)) == 12
    assert problems_of(filled) == []


def test_a_snapshot_that_is_written_during_the_switch_does_not_count(
    filled: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = build_index

    def build_slowly(*arguments: Any) -> Any:
        monkeypatch.setattr("dino_index.snapshots.build_index", build)
        # The other command's lock on the folder would make the switch's own snapshot wait for ever in one process.
        monkeypatch.setattr("dino_index.reindexing.vector_store_of", lambda _: Mock())
        reindex(filled, other_model)
        return build(*arguments)

    monkeypatch.setattr("dino_index.snapshots.build_index", build_slowly)
    with pytest.raises(FingerprintMismatch):
        compact(filled)
    assert count_rows(filled, SnapshotRow) == 0
    assert len(findable(filled)) == 6
    compact(filled)
    assert problems_of(filled) == []
    assert len(list((filled / "snapshots").rglob("*.faiss"))) == 1


def test_two_runs_at_once_end_with_one_switch(filled: Path, photos: Path, other_model: Path, tmp_path: Path) -> None:
    inner: list[ReindexSummary] = []
    outer = reindex(filled, other_model, on_progress=on_first(lambda: inner.append(reindex(filled, other_model))))
    assert (inner[0].switched, outer.switched) == (True, False)
    assert outer.images == 6
    same_as_fresh(filled, other_model, photos, tmp_path / "fresh")


def test_of_two_changes_to_different_models_the_last_one_stays(
    filled: Path, photos: Path, other_model: Path, tmp_path: Path
) -> None:
    third = save_tiny_model(tmp_path / "third.safetensors", seed=2)
    reindex(filled, other_model, on_progress=on_first(lambda: reindex(filled, third)))
    assert model_of(filled) == str(other_model)
    same_as_fresh(filled, other_model, photos, tmp_path / "fresh")


# --- files that are not what they were


def test_files_that_are_gone_refuse_the_switch_and_are_counted(
    filled: Path, photos: Path, tiny_model: Path, other_model: Path
) -> None:
    (photos / "a/1.jpg").unlink()
    (photos / "b/6.jpg").write_bytes(b"no picture any more")
    before = images_of(filled)
    with pytest.raises(ReindexRefused) as caught:
        reindex(filled, other_model)
    message = str(caught.value)
    assert "2 of its 6 images" in message
    assert "1 not_an_image, 1 vanished" in message
    assert str(photos / "a/1.jpg") in message
    assert "--allow-missing" in message
    assert images_of(filled) == before
    assert len(findable(filled)) == 6

    # What the message says to do; what was embedded before is not embedded again.
    index_files(filled, tiny_model, photos, prune=True, prune_any=True)
    summary = reindex(filled, other_model)
    assert (summary.embedded, summary.reused, summary.images) == (0, 4, 4)


def test_files_that_are_gone_become_failed_ones_where_that_is_allowed(
    filled: Path, photos: Path, other_model: Path
) -> None:
    picture = (photos / "a/1.jpg").read_bytes()
    (photos / "a/1.jpg").unlink()
    ids = ids_of(filled)
    summary = reindex(filled, other_model, allow_missing=True)
    assert (summary.switched, summary.failed, summary.images) == (True, 1, 5)
    entry = images_of(filled)[str(photos / "a/1.jpg")]
    assert (entry["status"], entry["error_code"], entry["sha256"]) == ("failed", "vanished", None)
    assert problems_of(filled) == []

    # It comes back under its own id and label.
    (photos / "a/1.jpg").write_bytes(picture)
    assert index_files(filled, other_model, photos).updated == 1
    assert ids_of(filled) == ids
    assert images_of(filled)[str(photos / "a/1.jpg")]["label"] == "a"


def test_a_collection_is_never_emptied(filled: Path, photos: Path, other_model: Path) -> None:
    photos.rename(photos.with_name("elsewhere"))
    with pytest.raises(ReindexRefused, match="6 of its 6 images"):
        reindex(filled, other_model, allow_missing=True)
    assert len(findable(filled)) == 6


def test_a_file_that_is_gone_is_not_missed_where_a_copy_has_its_bytes(
    filled: Path, photos: Path, tiny_model: Path, other_model: Path
) -> None:
    shutil.copy(photos / "a/1.jpg", photos / "b/copy.jpg")
    index_files(filled, tiny_model, photos)
    (photos / "a/1.jpg").unlink()
    summary = reindex(filled, other_model)
    assert (summary.switched, summary.failed, summary.images) == (True, 0, 7)


def test_a_changed_file_is_taken_with_its_new_content_at_the_switch(
    filled: Path, photos: Path, other_model: Path, tmp_path: Path
) -> None:
    changed = photos / "a/1.jpg"
    ids, before = ids_of(filled), images_of(filled)[str(changed)]
    changed.write_bytes(jpeg(99))
    os.utime(changed, ns=(0, 10**18))
    stopped = reindex(filled, other_model, batch_size=1, should_stop=lambda: True)
    assert stopped.interrupted
    assert images_of(filled)[str(changed)] == before
    summary = reindex(filled, other_model)
    assert (summary.updated, summary.failed, summary.images) == (1, 0, 6)
    assert ids_of(filled) == ids
    assert index_files(filled, other_model, photos).skipped == 6
    same_as_fresh(filled, other_model, photos, tmp_path / "fresh")


def test_a_changed_file_whose_new_embedding_was_dropped_is_read_again(
    filled: Path, photos: Path, other_model: Path, tmp_path: Path
) -> None:
    (photos / "a/1.jpg").write_bytes(jpeg(99))
    summary = reindex(filled, other_model, on_progress=on_first(lambda: compact(filled)))
    assert (summary.switched, summary.updated) == (True, 1)
    assert problems_of(filled) == []
    same_as_fresh(filled, other_model, photos, tmp_path / "fresh")


def test_weights_that_moved_since_are_remembered_where_they_are(
    filled: Path, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    reindex(filled, other_model)
    moved = tmp_path / "moved.safetensors"
    other_model.rename(moved)
    reindex(filled, tiny_model)
    reindex(filled, moved)
    assert model_of(filled) == str(moved)


def test_progress_counts_up_to_all_pictures(filled: Path, other_model: Path) -> None:
    seen: list[Progress] = []
    reindex(filled, other_model, on_progress=seen.append)
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert (seen[0].done, seen[0].total, seen[-1].done, seen[-1].total) == (0, 6, 6, 6)


def test_an_empty_collection_changes_its_model_too(
    home: Path, tiny_model: Path, photos: Path, other_model: Path
) -> None:
    index_files(home, tiny_model, photos)
    for path in sorted(photos.rglob("*.jpg")):
        path.unlink()
    index_files(home, tiny_model, photos, prune=True, prune_any=True)
    summary = reindex(home, other_model)
    assert (summary.switched, summary.images) == (True, 0)
    catalog = open_catalog(home)
    with catalog.reading() as session:
        assert session.scalars(select(func.count()).select_from(EmbeddingRow)).one() == 0
    catalog.close()

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image
from sqlalchemy import select, update

import dino_search
from bad_files import encoded, exif_orientation, make_good_files, picture
from databases import open_catalog
from dino_index.catalog import EmbeddingRow, ImageRow
from dino_index.catalog.portable_paths import decode_path
from dino_index.collections import find_collection
from dino_index.edits import apply_edits
from dino_index.errors import (
    CollectionEmpty,
    CollectionNotFound,
    FilterError,
    FingerprintMismatch,
    ImageError,
    NoLabels,
    SourceNotFound,
)
from dino_index.images import load_image
from dino_search import Collection, EmbeddingSettings, IndexOptions
from dino_search.contact_sheet import write_contact_sheet
from dino_search.demonstration import PHOTOGRAPHS
from sample_collections import save_tiny_model, write_pictures, write_shard


@pytest.fixture
def opened(home: Path, tiny_model: Path, photos: Path) -> Iterator[Collection]:
    """Eight pictures of two labels under the tiny model."""
    with Collection.open(home=home, model=tiny_model) as collection:
        collection.index(photos, IndexOptions(labels="folders"))
        yield collection


def test_the_package_offers_what_its_readers_import() -> None:
    assert all(hasattr(dino_search, name) for name in dino_search.__all__)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = dino_search.no_such_thing


# --- searching


def test_an_indexed_picture_finds_itself_with_a_score_of_one(opened: Collection, photos: Path) -> None:
    for path in sorted(photos.rglob("*.jpg")):
        found = opened.search(path, k=3)
        assert (found.results[0].path, found.results[0].score) == (str(path), 1.0)
        assert [result.rank for result in found.results] == [1, 2, 3]
        scores = [result.score for result in found.results]
        assert scores == sorted(scores, reverse=True)
        assert (found.query, found.collection) == (str(path), "default")


def test_path_bytes_and_picture_are_the_same_query(opened: Collection, tmp_path: Path) -> None:
    path = tmp_path / "query.png"
    path.write_bytes(encoded(picture(seed=77), "PNG"))
    answers = [opened.search(query, k=8).results for query in (path, str(path), path.read_bytes(), Image.open(path))]
    assert answers[1:] == answers[:-1]


def test_a_query_is_read_as_an_indexed_file_is(home: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unusual"
    folder.mkdir()
    make_good_files(folder)
    with Collection.open(home=home, model=tiny_model) as collection:
        num_images = collection.index(folder).images
        by_score: dict[str, float] = {}
        for path in folder.iterdir():
            # As bytes that are not in the catalog: a new forward pass instead of the stored vector.
            for result in collection.search(path.read_bytes() + b"\0", k=num_images).results:
                if os.path.basename(decode_path(result.path)) == path.name:
                    by_score[path.name] = result.score
    assert min(by_score.values()) > 0.999


def test_edited_copies_find_their_original_first(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    originals = []
    for number, name in enumerate(PHOTOGRAPHS):
        path = next((Path(skimage.__file__).parent / "data").glob(f"{name}.[jp][pn]g"))
        originals.append(Image.fromarray(load_image(path, max_short_side=240).pixels_HWC))
        originals[-1].save(folder / f"{number}.jpg", quality=90)
    rng = np.random.default_rng(0)
    kinds = ("reencode", "blur", "colour", "noise", "resize", "caption")
    with Collection.open(home=home) as collection:
        assert collection.index(folder).images == len(PHOTOGRAPHS)
        for number, kind in enumerate(kinds):
            found = collection.search(apply_edits(originals[number], [kind], rng), k=1)
            assert found.results[0].path == str(folder / f"{number}.jpg"), kind
        assert collection.model_name() == "bundled_v5"


def test_the_collection_notices_what_others_add_and_remove(
    opened: Collection, home: Path, tiny_model: Path, photos: Path
) -> None:
    query = photos / "cat/0.jpg"
    assert len(opened.search(query, k=20).results) == 8
    shutil.copy(query, photos / "copy.jpg")
    with Collection.open(home=home, model=tiny_model) as other:
        other.index(photos)
        assert len(opened.search(query, k=20).results) == 9
        other.remove([photos / "dog"])
    assert {result.path for result in opened.search(query, k=20).results} == {
        str(photos / name) for name in ("cat/0.jpg", "cat/1.jpg", "cat/2.jpg", "cat/3.jpg", "copy.jpg")
    }


def test_a_lowest_score_filters_the_list_and_nothing_else(opened: Collection, photos: Path) -> None:
    everything = opened.search(photos / "cat/0.jpg", k=8).results
    least = everything[3].score
    assert opened.search(photos / "cat/0.jpg", k=8, min_score=least).results == [
        result for result in everything if result.score >= least
    ]
    assert opened.search(photos / "cat/0.jpg", min_score=1.5).results == []


@pytest.mark.parametrize("k", [0, -1])
def test_k_must_be_at_least_one(opened: Collection, photos: Path, k: int) -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        opened.search(photos / "cat/0.jpg", k=k)


def test_a_query_that_cannot_be_used_is_named(opened: Collection, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"the query .*missing\.jpg cannot be used") as caught:
        opened.search(tmp_path / "missing.jpg")
    assert caught.value.reason == "vanished"
    with pytest.raises(ImageError, match="the query picture cannot be used") as caught:
        opened.search(b"not a picture")
    assert caught.value.reason == "not_an_image"


# --- classifying


def test_labels_are_voted_for_by_the_nearest(opened: Collection, photos: Path) -> None:
    (result,) = opened.classify(photos / "cat/0.jpg", k=1).results
    assert (result.label, result.probability, result.probabilities) == ("cat", 1.0, {"cat": 1.0})
    answer = opened.classify([photos / "cat/0.jpg", photos / "dog/0.jpg"], k=8)
    assert [result.label for result in answer.results] == ["cat", "dog"]
    for result in answer.results:
        assert sum(result.probabilities.values()) == pytest.approx(1)
        weights = np.exp(np.array([neighbour.score for neighbour in result.neighbours]) / 0.07)
        mine = [neighbour.label == result.label for neighbour in result.neighbours]
        assert result.probability == pytest.approx(weights[mine].sum() / weights.sum())


def test_only_labelled_images_vote(opened: Collection, photos: Path) -> None:
    write_pictures(photos, *(f"{number}.jpg" for number in range(5)), seed=0)  # loose copies, without a label
    opened.index(photos)
    (result,) = opened.classify(photos / "cat/0.jpg", k=20).results
    assert len(result.neighbours) == 8
    assert None not in [neighbour.label for neighbour in result.neighbours]


def test_classifying_nothing_answers_nothing(opened: Collection) -> None:
    assert opened.classify([]).results == []


def test_without_labels_there_is_no_classifying(home: Path, tiny_model: Path, photos: Path) -> None:
    with Collection.open(home=home, model=tiny_model) as collection:
        collection.index(photos)
        with pytest.raises(NoLabels, match="--labels folders"):
            collection.classify(photos / "cat/0.jpg")


# --- what there is


def test_before_any_index_the_next_command_is_named(home: Path, tmp_path: Path) -> None:
    collection = Collection.open(home=home)
    for call in (lambda: collection.search(tmp_path / "a.jpg"), collection.info, collection.verify, collection.compact):
        with pytest.raises(CollectionNotFound, match="run: dino-search index"):
            call()
    assert not home.exists()


def test_an_unknown_collection_names_those_that_exist(opened: Collection, home: Path, photos: Path) -> None:
    with pytest.raises(CollectionNotFound, match=r"no collection 'other': found default; .* -c other"):
        Collection.open("other", home=home).search(photos / "cat/0.jpg")


def test_a_collection_without_a_readable_image_says_so(home: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    (query,) = write_pictures(tmp_path, "query/1.jpg")
    with Collection.open(home=home, model=tiny_model) as collection:
        assert collection.index(tmp_path / "bad.jpg").failed == 1
        with pytest.raises(CollectionEmpty, match="no readable image"):
            collection.search(query)


def test_info_counts_what_there_is(opened: Collection, photos: Path, home: Path, tiny_model: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"bad")
    opened.index(photos)
    facts = opened.info()
    assert (facts["collection"], facts["images"], facts["failed"], facts["labels"]) == ("default", 8, 1, 2)
    assert (facts["model"], facts["dim"], facts["index_type"]) == (str(tiny_model), 64, "flat")
    assert (facts["home"], facts["sources"]) == (str(home), [str(photos)])
    assert facts["images_in_snapshot"] == 0
    opened.compact()
    assert opened.info()["images_in_snapshot"] == 8
    (failure,) = opened.failures()
    assert (failure["path"], failure["code"]) == (str(photos / "bad.jpg"), "not_an_image")
    assert failure["message"]


# --- removing


def test_images_are_removed_by_id_file_and_folder(opened: Collection, photos: Path) -> None:
    image_id = opened.search(photos / "cat/0.jpg", k=1).results[0].image_id
    assert opened.remove([image_id, photos / "cat/1.jpg", str(photos / "dog"), photos / "dog/1.jpg"]) == 6
    left = {result.path for result in opened.search(photos / "cat/0.jpg", k=20).results}
    assert left == {str(photos / "cat/2.jpg"), str(photos / "cat/3.jpg")}
    assert (photos / "cat/0.jpg").exists()


@pytest.mark.parametrize("target", [999, "nowhere", "photos/ca"])
def test_an_unknown_target_removes_nothing_at_all(
    opened: Collection, photos: Path, target: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    with pytest.raises(SourceNotFound, match="nothing was removed"):
        opened.remove([photos / "cat", target])
    assert opened.info()["images"] == 8


# --- models and options


def test_the_pooling_asked_for_is_the_one_used(home: Path, photos: Path) -> None:
    with Collection.open(home=home, pooling="reference") as collection:
        collection.index(photos / "cat/0.jpg")
        assert collection.info()["pooling"] == "reference"
    with Collection.open(home=home) as collection:  # the collection's own
        assert collection.index(photos / "cat/1.jpg").added == 1
    with Collection.open(home=home, pooling="normalised") as collection, pytest.raises(FingerprintMismatch):
        collection.index(photos / "cat/2.jpg")


def test_a_query_is_embedded_by_the_collections_own_model(
    opened: Collection, home: Path, photos: Path, tmp_path: Path
) -> None:
    query = encoded(picture(seed=50), "PNG")
    with Collection.open(home=home) as reopened:
        assert reopened.search(query).results == opened.search(query).results
    other = save_tiny_model(tmp_path / "other.safetensors", seed=5)
    with Collection.open(home=home, model=other) as mismatched, pytest.raises(FingerprintMismatch):
        mismatched.index(photos)


def test_a_collection_can_be_used_again_after_closing(opened: Collection, photos: Path) -> None:
    before = opened.search(photos / "cat/0.jpg")
    opened.close()
    assert opened.search(photos / "cat/0.jpg") == before


def test_the_home_comes_from_the_environment(home: Path, tiny_model: Path, photos: Path) -> None:
    with Collection.open(model=tiny_model) as collection:
        collection.index(photos)
    assert (home / "catalog.sqlite3").is_file()


def test_a_home_may_start_with_a_tilde(
    tmp_path: Path, tiny_model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with Collection.open(home="~/mine", model=tiny_model) as collection:
        collection.index(photos)
    assert (tmp_path / "mine/catalog.sqlite3").is_file()


@pytest.mark.parametrize("values", [{"batch_size": -1}, {"workers": -1}])
def test_embedding_settings_are_checked(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))} must be 0 or more, found -1"):
        EmbeddingSettings(**values)  # type: ignore[arg-type]


def test_a_picture_is_turned_upright_by_its_exif(opened: Collection) -> None:
    upright = picture(seed=60)
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    data = encoded(sideways, "PNG", exif=exif_orientation(6))
    with Image.open(io.BytesIO(data)) as image:
        turned = [opened.search(query).results for query in (image, data)]
    assert turned[0] == turned[1]
    for one, other in zip(turned[0], opened.search(upright).results, strict=True):
        assert one.image_id == other.image_id
        assert one.score == pytest.approx(other.score, abs=1e-3)


def test_relative_paths_mean_the_same_file(opened: Collection, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos / "cat")
    assert (
        opened.search("0.jpg") == opened.search(photos / "cat/0.jpg") == opened.search(os.path.join("..", "cat/0.jpg"))
    )


def test_filters_leave_k_results_where_k_images_pass(opened: Collection, photos: Path, tmp_path: Path) -> None:
    files = sorted(str(path) for path in photos.rglob("*.jpg"))
    lines = [f"{path},{number}" for number, path in enumerate(files)]
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(["path,number", *lines]) + "\n")
    opened.index(manifest)
    everything = opened.search(files[0], k=8).results
    found = opened.search(files[0], k=3, filters=["number >= 2", "number != 5"]).results
    passing = [result for result in everything if files.index(result.path) in (2, 3, 4, 6, 7)]
    assert [(result.path, result.score) for result in found] == [(one.path, one.score) for one in passing[:3]]
    assert [result.rank for result in found] == [1, 2, 3]
    assert len(opened.search(files[0], k=8, filters=["number < 3"]).results) == 3
    assert opened.search(files[0], filters=["number > 99"]).results == []
    with pytest.raises(FilterError, match="metadata keys number"):
        opened.search(files[0], filters=["nubmer > 9"])


def test_only_voters_that_pass_the_filter_vote(opened: Collection, photos: Path) -> None:
    opened.index(photos, IndexOptions(labels="folders"))
    query = next(photos.rglob("*.jpg"))
    voted = opened.classify(query, filters=["label != dog"]).results[0]
    assert {result.label for result in voted.neighbours} == {"cat"}
    with pytest.raises(NoLabels, match="passes the filter"):
        opened.classify(query, filters=["label = cow"])


@pytest.fixture
def in_shards(home: Path, tiny_model: Path) -> Iterator[Collection]:
    with Collection.open("shards", home=home, model=tiny_model) as collection:
        yield collection


def test_members_of_shards_are_found_searched_by_and_repaired(
    in_shards: Collection, photos: Path, tmp_path: Path
) -> None:
    opened = in_shards
    files = sorted(photos.rglob("*.jpg"))
    shard = write_shard(tmp_path / "s.tar", {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files})
    opened.index(shard)
    member = f"{shard}/{files[2].parent.name}/{files[2].name}"
    assert opened.search(member, k=1).results[0].path == member
    assert opened.search(files[2], k=1).results[0].path == member
    catalog = open_catalog(opened.home)
    with catalog.writing() as session:
        row = session.scalars(
            select(ImageRow).where(ImageRow.path == Path(member).relative_to(tmp_path).as_posix())
        ).one()
        session.execute(update(EmbeddingRow).where(EmbeddingRow.sha256 == row.sha256).values(vector=b"?"))
    catalog.close()
    report = opened.verify(repair=True)
    assert (len(report.repaired), report.problems) == (1, [])
    assert opened.search(member, k=1).results[0].path == member
    sheet = tmp_path / "sheet.html"
    write_contact_sheet(sheet, "Search", [opened.search(member, k=2)])
    assert sheet.read_text().count("data:image/jpeg;base64") == 3
    assert opened.remove([f"{shard}/cat"]) == 4


def test_a_search_that_a_switch_of_models_repeats_keeps_its_filter(
    photos: Path, tiny_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def switched_after_the_first_call(*arguments: Any) -> Any:
        calls.append(1)
        found = find_collection(*arguments)
        return replace(found, model_id=-1) if len(calls) == 1 else found

    with Collection.open(model=tiny_model) as collection:
        collection.index(photos, IndexOptions(labels="folders"))
        monkeypatch.setattr("dino_search.collection.find_collection", switched_after_the_first_call)
        found = collection.search(photos / "dog/0.jpg", k=8, filters=["label = cat"]).results
    assert len(calls) > 2
    assert [result.label for result in found] == ["cat"] * 4

from __future__ import annotations

import json
import os
import re
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bad_files import encoded, make_bad_files, make_good_files, picture, png_16_bit
from dino_index.errors import ImageError, LabelFileError, ManifestError, NoImagesFound, SourceNotFound
from dino_index.images import decode
from dino_training.image_source import ImageSource
from sample_collections import jpeg, write_pictures, write_shard

NO_IMAGE = b"This is not a picture.\n" * 20
posix_only = pytest.mark.skipif(os.name != "posix", reason="links need a POSIX system")


def names_below(source: ImageSource, root: Path) -> list[str]:
    return [os.path.relpath(name, root).replace(os.sep, "/") for name in source.names]


def load_all(source: ImageSource) -> list[NDArray[np.uint8]]:
    return [source.load(position) for position in range(len(source))]


def assert_same_pixels(one: list[NDArray[np.uint8]], other: list[NDArray[np.uint8]]) -> None:
    assert len(one) == len(other)
    assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


# --- what is listed


def test_folders_and_files_are_listed_in_a_fixed_order_each_file_once(tmp_path: Path) -> None:
    write_pictures(tmp_path, "b/2.jpg", "b/deep/er/3.jpg", "b/1.jpg", "a/1.jpg", "alone.jpg")
    paths = [tmp_path / "b", tmp_path / "a", tmp_path / "alone.jpg", tmp_path / "b/2.jpg", tmp_path / "b", tmp_path]
    source = ImageSource.open(paths)
    assert names_below(source, tmp_path) == ["alone.jpg", "b/2.jpg", "b/1.jpg", "b/deep/er/3.jpg", "a/1.jpg"]
    assert len(source) == 5
    assert source.labels is None
    assert ImageSource.open(paths).names == source.names


def test_what_is_no_image_is_counted_by_type(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg", ".hidden.jpg", "@eaDir/thumbnail.jpg")
    (tmp_path / "notes.txt").write_bytes(NO_IMAGE)
    (tmp_path / "film.mp4").write_bytes(NO_IMAGE)
    source = ImageSource.open([tmp_path])
    assert names_below(source, tmp_path) == ["a.jpg"]
    assert source.ignored == {"text": 1, "video": 1}
    assert source.skipped == {"hidden": 1, "thumbnails": 1}


def test_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    for name in ("nothing", "nothing.jpg", "nothing.txt", "nothing.csv", "nothing.tar", "nothing.tar.gz"):
        with pytest.raises(SourceNotFound, match=f"{name}: no such file or folder"):
            ImageSource.open([tmp_path / "a.jpg", tmp_path / name])


@posix_only
def test_paths_without_an_image_are_an_error_that_counts_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(NO_IMAGE)
    os.symlink("nowhere", tmp_path / "a.jpg")
    write_shard(tmp_path / "labels.tar", {"1.cls": b"3"})
    with pytest.raises(NoImagesFound, match=r"found 1 broken_link, 1 shard member, 1 text;"):
        ImageSource.open([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoImagesFound, match="found nothing"):
        ImageSource.open([tmp_path / "empty"])


# --- manifests


def test_text_manifest_names_images_relative_to_itself(tmp_path: Path) -> None:
    first, second, third = write_pictures(tmp_path, "photos/a b.jpg", "photos/ü.jpg", "lists/3.jpg")
    manifest = tmp_path / "lists/train.txt"
    manifest.write_text(f"../photos/ü.jpg\r\n\n  \n3.jpg\n{first}\n./3.jpg", encoding="utf-8")
    source = ImageSource.open([manifest])
    assert source.names == [str(second), str(third), str(first)]
    assert source.skipped == {"named again": 1}
    assert len(ImageSource.open([manifest, tmp_path])) == 3


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "LIST.CSV"])
def test_manifest_with_labels(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path, "cats/1.jpg", "dogs/2.jpg", "dogs/3.jpg")
    (tmp_path / name).write_text(
        '"path","label","width"\n"cats/1.jpg","a ""cat""",96\n\n"dogs/2.jpg",7,96\n"dogs/3.jpg",,96\n'
        if name.lower().endswith("csv")
        else '{"path": "cats/1.jpg", "label": "a \\"cat\\""}\n\n{"label": 7, "path": "dogs/2.jpg"}\n'
        '{"path": "dogs/3.jpg"}\n'
    )
    names = ["cats/1.jpg", "dogs/2.jpg", "dogs/3.jpg"]
    source = ImageSource.open([tmp_path / name])
    assert (names_below(source, tmp_path), source.labels) == (names, None)
    assert ImageSource.open([tmp_path / name], labels="folders").labels == ['a "cat"', "7", "dogs"]


def test_manifest_may_do_without_labels(tmp_path: Path) -> None:
    write_pictures(tmp_path, "cats/1.jpg")
    (tmp_path / "a.csv").write_text("path\ncats/1.jpg\n")
    (tmp_path / "labels.csv").write_text("path,label\ncats/1.jpg,lion\n")
    assert ImageSource.open([tmp_path / "a.csv"]).labels is None
    assert ImageSource.open([tmp_path / "a.csv"], labels=str(tmp_path / "labels.csv")).labels == ["lion"]


def test_manifest_may_name_shards_and_label_them(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    write_shard(tmp_path / "s.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    (tmp_path / "list.csv").write_text("path,label\ns.tar,lion\na.jpg,\n")
    source = ImageSource.open([tmp_path / "list.csv"], labels="folders")
    assert names_below(source, tmp_path) == ["a.jpg", "s.tar/1.jpg", "s.tar/2.jpg"]
    assert source.labels == [tmp_path.name, "lion", "lion"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "file,label\na.jpg,cat\n", "list.csv must have the column path .*file, label"),
        ("list.csv", "", "found nothing"),
        ("list.csv", "path,label\na.jpg,cat\n,cat\n", "list.csv, line 3: expected a path"),
        ("list.csv", "label,path\ncat\n", "list.csv, line 2: expected a path, found None"),
        ("list.jsonl", '{"path": "a.jpg"}\n{"path"\n', "list.jsonl, line 2: expected JSON"),
        ("list.jsonl", '["a.jpg"]\n', "list.jsonl, line 1: expected an object with the key path"),
        ("list.jsonl", '{"path": 3}\n', "list.jsonl, line 1: expected a path, found 3"),
        ("list.jsonl", '{"path": "a.jpg", "label": [1]}\n', r"line 1: .* as label, found \[1\]"),
    ],
)
def test_mistakes_in_a_manifest_are_named_with_their_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    write_pictures(tmp_path, "a.jpg", "folder/b.jpg", "a.tar.gz")
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=message):
        ImageSource.open([tmp_path / name])


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ("no such.jpg", "vanished", "list.txt, line 2: .* found none at .*no such.jpg"),
        ("no such.tar", "vanished", "list.txt, line 2: .* found none at .*no such.tar"),
        ("folder", "not_a_file", "list.txt, line 2: .*is a folder"),
        ("a\0.jpg", "unreadable", "list.txt, line 2: .*null"),
        ("a.tar.gz", "unsupported", "list.txt, line 2: .*compressed"),
    ],
)
def test_what_a_manifest_names_and_is_not_there_is_a_failure(
    tmp_path: Path, line: str, reason: str, message: str
) -> None:
    write_pictures(tmp_path, "a.jpg", "b.jpg", "folder/c.jpg", "a.tar.gz")
    (tmp_path / "list.txt").write_text(f"a.jpg\n{line}\nb.jpg\n")
    source = ImageSource.open([tmp_path / "list.txt"])
    assert names_below(source, tmp_path) == ["a.jpg", "b.jpg"]
    ((failed, error),) = source.failures.items()
    assert failed == str(tmp_path / line.replace("\0", r"\x00"))
    assert error.reason == reason
    assert re.search(message, str(error))


# --- shards


def test_images_in_shards_are_read_like_files(tmp_path: Path) -> None:
    make_good_files(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.*g")}
    shard = write_shard(tmp_path / "good.tar", files)
    source = ImageSource.open([shard])
    assert source.names == [f"{shard}/{name}" for name in files]
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(source.load, range(len(source))))
    assert_same_pixels(loaded, [decode(data).pixels_HWC for data in files.values()])


def test_shards_directly_in_a_folder_are_read_after_its_files(tmp_path: Path) -> None:
    write_pictures(tmp_path, "z.jpg", "sub/y.jpg")
    for name in ("2.tar", "1.tar", "sub/3.tar", ".hidden.tar"):
        write_shard(tmp_path / name, {"a.jpg": jpeg(1)})
    (tmp_path / "none.tar").touch()
    source = ImageSource.open([tmp_path, tmp_path / "2.tar"])
    assert names_below(source, tmp_path) == ["z.jpg", "sub/y.jpg", "2.tar/a.jpg", "1.tar/a.jpg"]
    assert source.ignored == {"tar shard": 1, "empty": 1}
    source = ImageSource.open([tmp_path, tmp_path / "sub"])
    assert len(source) == 5
    assert source.ignored == {"empty": 1}


def test_members_that_are_no_image_are_counted(tmp_path: Path) -> None:
    members = {"1.jpg": jpeg(1), "1.cls": b"3", "1.json": b"{}", "._1.jpg": b"?", ".git/a.png": b"?", "jpg": b"?"}
    shard = write_shard(tmp_path / "a.tar", members | {"./2.PNG": encoded(picture(), "PNG"), ".jpg": b"?"})
    with tarfile.open(shard, "a") as tar:
        folder, link = tarfile.TarInfo("folder.jpg"), tarfile.TarInfo("link.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.LNKTYPE, "1.jpg"
        tar.addfile(folder)
        tar.addfile(link)
    source = ImageSource.open([shard])
    assert source.names == [f"{shard}/1.jpg", f"{shard}/2.PNG"]
    assert source.ignored == {"shard member": 7}
    assert source.failures == {}


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "behind a picture", "header overwritten"])
def test_images_before_the_cut_of_a_truncated_shard_are_used(tmp_path: Path, cut: str) -> None:
    whole = write_shard(tmp_path / "a.tar", {f"{number}.jpg": jpeg(number) for number in range(4)})
    with tarfile.open(whole) as tar:
        third = tar.getmembers()[2]
    data = whole.read_bytes()
    whole.write_bytes(
        {
            "in a picture": data[: third.offset_data + 100],
            "in a header": data[: third.offset + 100],
            "behind a picture": data[: third.offset],
            "header overwritten": data[: third.offset] + b"\xff" * 512 + data[third.offset + 512 :],
        }[cut]
    )
    source = ImageSource.open([whole])
    assert names_below(source, tmp_path) == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert_same_pixels(load_all(source), [decode(jpeg(0)).pixels_HWC, decode(jpeg(1)).pixels_HWC])
    assert source.failures[str(whole)].reason == "truncated"
    assert "the 2 images before" in str(source.failures[str(whole)])
    assert source.num_unreadable == 1


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar.gz"
    with tarfile.open(shard, "w:gz"):
        pass
    with pytest.raises(SourceNotFound, match=r"a\.tar\.gz: .* compressed archive; unpack it, or pack it as \.tar"):
        ImageSource.open([shard])
    shard = shard.rename(tmp_path / "a.tar")
    write_pictures(tmp_path, "b.jpg")
    source = ImageSource.open([tmp_path])
    assert source.failures[str(shard)].reason == "corrupt"
    assert "expected an uncompressed tar archive" in str(source.failures[str(shard)])


def test_bad_members_fail_for_the_reason_of_bad_files(tmp_path: Path) -> None:
    reasons = make_bad_files(tmp_path)
    bad = {name: (tmp_path / name).read_bytes() for name in reasons if (tmp_path / name).is_file()}
    (tmp_path / "shards").mkdir()
    shard = write_shard(tmp_path / "shards/bad.tar", bad)
    source = ImageSource.open([shard])
    for position in range(len(source)):
        with pytest.raises(ImageError):
            source.load(position)
    found = {os.path.basename(name): error.reason for name, error in source.failures.items()}
    assert found == {name: reasons[name] for name in bad}


@pytest.mark.parametrize(("accident", "reason"), [("gone", "vanished"), ("shorter", "truncated")])
def test_shard_that_changes_after_listing_gives_image_errors(tmp_path: Path, accident: str, reason: str) -> None:
    shard = write_shard(tmp_path / "a.tar", {"a.jpg": jpeg(0)})
    source = ImageSource.open([shard])
    if accident == "gone":
        shard.unlink()
    else:
        os.truncate(shard, 1000)
    with pytest.raises(ImageError) as caught:
        source.load(0)
    assert caught.value.reason == reason


# --- labels


def test_labels_from_folders_are_those_of_indexing_and_of_folders_in_shards(tmp_path: Path) -> None:
    write_pictures(tmp_path, "set/cats/1.jpg", "set/cats/deep/2.jpg", "set/dogs/3.jpg", "set/loose.jpg", "birds/4.jpg")
    shard = write_shard(tmp_path / "s.tar", {"cows/5.jpg": jpeg(5), "./cows/x/6.jpg": jpeg(6), "7.jpg": jpeg(7)})
    source = ImageSource.open([tmp_path / "set", tmp_path / "birds", shard], labels="folders")
    assert source.labels is not None
    assert dict(zip(names_below(source, tmp_path), source.labels, strict=True)) == {
        "set/cats/1.jpg": "cats", "set/cats/deep/2.jpg": "cats", "set/dogs/3.jpg": "dogs", "set/loose.jpg": None,
        "birds/4.jpg": "birds", "s.tar/cows/5.jpg": "cows", "s.tar/cows/x/6.jpg": "cows", "s.tar/7.jpg": None,
    }  # fmt: skip


def test_labels_from_a_csv_file_and_a_manifest_before_it(tmp_path: Path) -> None:
    write_pictures(tmp_path, "set/1.jpg", "set/2.jpg", "set/3.jpg")
    write_shard(tmp_path / "set/s.tar", {"4.jpg": jpeg(4)})
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\n1.jpg,one\n2.jpg,two\ns.tar/4.jpg,four\nnot there.jpg,five\n")
    assert ImageSource.open([tmp_path / "set"], labels=str(labels)).labels == ["one", "two", None, "four"]
    (tmp_path / "list.csv").write_text("path,label\nset/1.jpg,uno\n")
    source = ImageSource.open([tmp_path / "set", tmp_path / "list.csv"], labels=str(labels))
    assert source.labels == ["uno", "two", None, "four"]


def test_labels_inside_shards_count_where_nothing_else_does(tmp_path: Path) -> None:
    members = {"1.jpg": jpeg(1), "1.cls": b"3", "cows/2.jpg": jpeg(2), "cows/2.cls": b"4"}
    shard = write_shard(tmp_path / "s.tar", members)
    assert ImageSource.open([shard]).labels is None
    assert ImageSource.open([shard], labels="folders").labels == ["3", "cows"]


def test_label_file_without_its_columns_is_an_error(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    (tmp_path / "labels.csv").write_text("file,class\n")
    with pytest.raises(LabelFileError, match="columns path and label"):
        ImageSource.open([tmp_path], labels=str(tmp_path / "labels.csv"))


# --- digest


def test_digest_changes_when_the_list_does_and_only_then(tmp_path: Path) -> None:
    first, second = write_pictures(tmp_path, "a.jpg", "b.jpg")
    shard = write_shard(tmp_path / "s.tar", {"c.jpg": jpeg(3)})
    digests = [ImageSource.open([tmp_path]).digest]
    os.utime(first)
    assert ImageSource.open([tmp_path]).digest == digests[0]
    second.write_bytes(jpeg(1) + b"?")
    digests.append(ImageSource.open([tmp_path]).digest)
    second.rename(tmp_path / "c.jpg")
    digests.append(ImageSource.open([tmp_path]).digest)
    write_shard(shard, {"d.jpg": jpeg(3)})
    digests.append(ImageSource.open([tmp_path]).digest)
    shard.unlink()
    digests.append(ImageSource.open([tmp_path]).digest)
    assert len(set(digests)) == len(digests) == 5
    assert all(len(digest) == 64 for digest in digests)


# --- unreadable images


def test_unreadable_images_are_counted_and_the_next_readable_one_stands_in(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, *"0.jpg 1.jpg 2.jpg 3.jpg 4.jpg".split())
    for number in (1, 2, 4):
        paths[number].write_bytes(NO_IMAGE)
    source = ImageSource.open([tmp_path])
    assert (len(source), source.num_unreadable) == (5, 0)
    loaded = [source.load_readable(position) for position in range(5)]
    expected = [decode(paths[number].read_bytes()).pixels_HWC for number in (0, 3, 3, 3, 0)]
    assert_same_pixels(loaded, expected)
    assert {name: error.reason for name, error in source.failures.items()} == {
        str(paths[number]): "not_an_image" for number in (1, 2, 4)
    }
    assert (len(source), source.num_readable, source.num_unreadable) == (5, 2, 3)


def test_image_found_unreadable_stays_so_for_the_whole_run(tmp_path: Path) -> None:
    path, _ = write_pictures(tmp_path, "a.jpg", "b.jpg")
    good = path.read_bytes()
    path.write_bytes(NO_IMAGE)
    source = ImageSource.open([tmp_path])
    messages = []
    for content in (NO_IMAGE, good):
        path.write_bytes(content)
        with pytest.raises(ImageError) as caught:
            source.load(0)
        messages.append((caught.value.reason, str(caught.value)))
    assert messages[0] == messages[1]
    assert np.array_equal(source.load_readable(0), source.load(1))


def test_failures_do_not_keep_the_files_they_are_about_in_memory(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(0)[:300] + bytes(2 << 20))
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    source = ImageSource.open([tmp_path])
    tracemalloc.start()
    source.load_readable(0)
    assert source.num_unreadable == 5
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2 << 20


def test_set_without_a_readable_image_is_an_error_with_counts(tmp_path: Path) -> None:
    make_bad_files(tmp_path)
    source = ImageSource.open([tmp_path])
    assert source.prepare(decode_size=8, cache_bytes=1 << 20)
    for position in (0, len(source) - 1):
        with pytest.raises(NoImagesFound, match=r"none of the \d+ listed can be read: .*\d+ truncated"):
            source.load_readable(position)
    assert source.num_unreadable >= len(source)


@posix_only
def test_failures_of_listing_are_counted_too(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    os.symlink("nowhere", tmp_path / "broken.jpg")
    source = ImageSource.open([tmp_path])
    assert (len(source), source.num_readable, source.num_unreadable) == (1, 1, 1)
    assert source.failures[str(tmp_path / "broken.jpg")].reason == "broken_link"


# --- pixels and the cache


def test_grey_16_bit_and_cmyk_files_load_as_rgb(tmp_path: Path) -> None:
    image = picture()
    grey = np.asarray(image.convert("L"))
    (tmp_path / "1 grey.png").write_bytes(encoded(image.convert("L"), "PNG"))
    (tmp_path / "2 deep.png").write_bytes(png_16_bit(grey.astype(np.uint16) * 257))
    (tmp_path / "3 inks.tif").write_bytes(encoded(image.convert("CMYK"), "TIFF"))
    one, two, three = load_all(ImageSource.open([tmp_path]))
    for pixels_HWC in (one, two, three):
        assert pixels_HWC.shape == (64, 96, 3)
        assert pixels_HWC.dtype == np.uint8
    assert np.array_equal(one, np.repeat(grey[:, :, None], 3, axis=2))
    assert np.abs(one.astype(int) - two).max() <= 1
    assert np.abs(three.astype(int) - np.asarray(image)).max() <= 2


def test_images_are_decoded_to_the_short_side_asked_for(tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(encoded(picture(400, 300), "JPEG"))
    (tmp_path / "small.jpg").write_bytes(encoded(picture(20, 30), "JPEG"))
    source = ImageSource.open([tmp_path])
    assert [pixels.shape for pixels in load_all(source)] == [(300, 400, 3), (30, 20, 3)]
    source.prepare(decode_size=60, cache_bytes=0)
    assert [pixels.shape for pixels in load_all(source)] == [(60, 80, 3), (30, 20, 3)]


def test_cached_images_are_the_same_as_those_decoded_when_asked_for(tmp_path: Path) -> None:
    make_good_files(tmp_path)
    make_bad_files(tmp_path)
    write_shard(tmp_path / "s.tar", {"1.jpg": jpeg(1), "2.jpg": NO_IMAGE, "3.jpg": jpeg(3)})
    plain, cached = ImageSource.open([tmp_path]), ImageSource.open([tmp_path])
    progress: list[tuple[int, int]] = []
    assert not plain.prepare(decode_size=32, cache_bytes=0)
    assert cached.prepare(
        decode_size=32, cache_bytes=100 << 20, workers=3, on_progress=lambda *now: progress.append(now)
    )
    assert progress == sorted(progress)
    assert progress[-1] == (len(cached), len(cached))
    assert_same_pixels(*([source.load_readable(at) for at in range(len(source))] for source in (plain, cached)))
    assert {name: str(error) for name, error in plain.failures.items()} == {
        name: str(error) for name, error in cached.failures.items()
    }
    position = cached.names.index(str(tmp_path / "s.tar/3.jpg"))
    assert cached.load(position) is cached.load(position)
    assert plain.load(position) is not plain.load(position)


def test_nothing_is_kept_where_not_all_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, *(f"{number:03}.jpg" for number in range(100)))
    source = ImageSource.open([tmp_path])
    decoded: list[int] = []
    load = ImageSource.load

    def note_load(self: ImageSource, position: int) -> NDArray[np.uint8]:
        decoded.append(position)
        return load(self, position)

    monkeypatch.setattr(ImageSource, "load", note_load)
    assert not source.prepare(decode_size=64, cache_bytes=99 * 64 * 96 * 3)
    assert len(decoded) == 64  # a sample tells
    assert min(decoded) < 5
    assert max(decoded) > 95
    assert source.load(5) is not source.load(5)
    assert source.prepare(decode_size=64, cache_bytes=101 * 64 * 96 * 3)
    assert source.load(5) is source.load(5)
    assert not source.prepare(decode_size=32, cache_bytes=1000)
    assert source.load(5).shape == (32, 48, 3)


def test_cache_is_dropped_when_the_sample_promised_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, *(f"{number:03}.jpg" for number in range(100)))
    source = ImageSource.open([tmp_path])
    monkeypatch.setattr(ImageSource, "_estimate_bytes", lambda *_: 0)
    progress: list[int] = []
    fits = source.prepare(
        decode_size=64, cache_bytes=50 * 64 * 96 * 3, on_progress=lambda done, total: progress.append(done)
    )
    assert not fits
    assert progress == [32]
    assert source.load(5) is not source.load(5)


def test_list_that_is_read_back_as_json_survives_odd_names(tmp_path: Path) -> None:
    names = make_good_files(tmp_path)
    manifest = tmp_path / "all.jsonl"
    manifest.write_text("".join(json.dumps({"path": name}) + "\n" for name in names))
    source = ImageSource.open([manifest])
    assert {os.path.basename(name) for name in source.names} == set(names)
    assert len(source.digest) == 64

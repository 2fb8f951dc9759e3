from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bad_files import encoded, make_bad_files, make_good_files, picture
from dino_index.errors import ImageError, SourceNotFound
from dino_index.image_files import Listing, list_images

JPEG = encoded(picture(), "JPEG")
posix_only = pytest.mark.skipif(os.name != "posix", reason="links and pipes need a POSIX system")


def make_tree(root: Path, *names: str, content: bytes = JPEG) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def names_below(listing: Listing, root: Path) -> list[str]:
    return [os.path.relpath(file.path, root).replace(os.sep, "/") for file in listing.files]


def test_folder_after_folder_names_sorted_by_their_bytes(tmp_path: Path) -> None:
    make_tree(tmp_path, "b.jpg", "B.jpg", "ä.jpg", "z/1.jpg", "a/2.jpg", "a/b/3.jpg", "a.jpg")
    listing = list_images([tmp_path])
    assert names_below(listing, tmp_path) == [
        "B.jpg", "a.jpg", "b.jpg", "ä.jpg", "a/2.jpg", "a/b/3.jpg", "z/1.jpg",
    ]  # fmt: skip
    assert listing == list_images([tmp_path])


def test_size_and_time_are_those_of_the_file(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.jpg")
    os.utime(tmp_path / "a.jpg", ns=(10**18, 10**18 + 700))
    (file,) = list_images([tmp_path]).files
    status = os.stat(tmp_path / "a.jpg")
    assert (file.size, file.mtime_ns) == (len(JPEG), status.st_mtime_ns)


def test_paths_are_absolute_for_relative_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path, "photos/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert [file.path for file in list_images(["photos/../photos/"]).files] == [
        os.path.abspath(os.path.join("photos", "a.jpg"))
    ]


def test_every_good_file_is_listed_whatever_its_name(tmp_path: Path) -> None:
    sizes = make_good_files(tmp_path)
    listing = list_images([tmp_path])
    assert {os.path.basename(file.path) for file in listing.files} == set(sizes)
    assert not listing.ignored
    assert not listing.failures


def test_bad_files_are_listed_or_failures_and_never_lost(tmp_path: Path) -> None:
    reasons = make_bad_files(tmp_path)
    listing = list_images([tmp_path])
    failed = {os.path.basename(failure.path): failure.reason for failure in listing.failures}
    assert {os.path.basename(file.path) for file in listing.files} | set(failed) == set(reasons)
    assert failed.items() <= reasons.items()
    if os.name == "posix":
        assert set(failed) == {"pipe.jpg", "broken link.jpg", "link to itself.jpg"}
    assert all(failure.reason in ImageError.REASONS and failure.message for failure in listing.failures)


def test_other_files_are_counted_by_type(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.mp4", "b.MOV", "c.cr2", "d.nef", "e.pdf", "f.zip", "g.mp3", "h.txt", content=b"?" * 50)
    make_tree(tmp_path, "i.svg", "j.unheard-of", "k", "l.xmp", content=b"?" * 50)
    make_tree(tmp_path, "empty.txt", "empty", content=b"")
    listing = list_images([tmp_path])
    assert not listing.files
    assert listing.ignored == {
        "video": 2, "raw photo": 2, "document": 1, "archive": 1, "audio": 1, "text": 1, "vector graphic": 1,
        "other": 2, "edit record": 1, "empty": 2,
    }  # fmt: skip


def test_raw_photographs_are_ignored_unless_they_are_plain_pictures(tmp_path: Path) -> None:
    make_tree(tmp_path, "real.nef", "real.DNG", content=encoded(picture(), "TIFF"))
    make_tree(tmp_path, "really a jpeg.nef")
    listing = list_images([tmp_path])
    assert names_below(listing, tmp_path) == ["really a jpeg.nef"]
    assert listing.ignored == {"raw photo": 2}


def test_empty_file_with_the_name_of_an_image_is_listed(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.jpg", content=b"")
    assert names_below(list_images([tmp_path]), tmp_path) == ["a.jpg"]


def test_hidden_thumbnail_and_system_entries_are_skipped_and_counted(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.jpg", "._a.jpg", ".b.jpg", ".trash/c.jpg", "@eaDir/d.jpg", ".thumbnails/e.jpg")
    make_tree(tmp_path, "__MACOSX/f.jpg", "$RECYCLE.BIN/g.jpg", "Previews.lrdata/h.jpg")
    make_tree(tmp_path, "P.photoslibrary/resources/i.jpg", "P.photoslibrary/originals/j.jpg", "resources/k.jpg")
    listing = list_images([tmp_path])
    assert names_below(listing, tmp_path) == ["a.jpg", "P.photoslibrary/originals/j.jpg", "resources/k.jpg"]
    assert listing.skipped_files == {"hidden": 2}
    assert listing.skipped_folders == {"hidden": 1, "thumbnails": 4, "system": 2}


def test_hidden_paths_are_listed_when_given(tmp_path: Path) -> None:
    make_tree(tmp_path, ".album/a.jpg", ".b.jpg")
    listing = list_images([tmp_path / ".album", tmp_path / ".b.jpg"])
    assert names_below(listing, tmp_path) == [".b.jpg", ".album/a.jpg"]
    # Neither lost nor counted as skipped when its folder is given too.
    listing = list_images([tmp_path, tmp_path / ".b.jpg"])
    assert names_below(listing, tmp_path) == [".b.jpg"]
    assert not listing.skipped_files


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("*.png", ["a.jpg", "raw/c.jpg", "raw/x/d.jpg", "trip/e.jpg", "trip/raw/f.jpg"]),
        ("raw", ["a.jpg", "b.png", "trip/e.jpg"]),
        ("raw/", ["a.jpg", "b.png", "trip/e.jpg"]),
        ("a.jpg/", ["a.jpg", "b.png", "raw/c.jpg", "raw/x/d.jpg", "trip/e.jpg", "trip/raw/f.jpg"]),
        ("raw/*", ["a.jpg", "b.png", "trip/e.jpg", "trip/raw/f.jpg"]),
        ("raw/*.jpg", ["a.jpg", "b.png", "raw/x/d.jpg", "trip/e.jpg", "trip/raw/f.jpg"]),
        ("raw/**", ["a.jpg", "b.png", "trip/e.jpg", "trip/raw/f.jpg"]),
        ("**/raw/*.jpg", ["a.jpg", "b.png", "raw/x/d.jpg", "trip/e.jpg"]),
        ("./trip/e.jpg", ["a.jpg", "b.png", "raw/c.jpg", "raw/x/d.jpg", "trip/raw/f.jpg"]),
        ("[!a]*", ["a.jpg"]),
        ("?.jpg", ["b.png"]),
        ("**", []),
    ],
)
def test_exclude_patterns(tmp_path: Path, pattern: str, left: list[str]) -> None:
    make_tree(tmp_path, "a.jpg", "raw/c.jpg", "raw/x/d.jpg", "trip/e.jpg", "trip/raw/f.jpg")
    make_tree(tmp_path, "b.png")
    listing = list_images([tmp_path], exclude=[pattern])
    assert names_below(listing, tmp_path) == left
    skipped = listing.skipped_files["excluded"] + listing.skipped_folders["excluded"]
    assert (skipped > 0) == (len(left) < 6)


@given(
    st.lists(st.sampled_from("ab"), min_size=1, max_size=6),
    st.lists(st.sampled_from(["a", "b", "*", "**"]), min_size=2, max_size=5),
)
def test_path_patterns_agree_with_a_regular_expression(names: list[str], parts: list[str]) -> None:
    import re

    from dino_index.image_files import _compile

    # `**/` is any number of folders, `/**` at the end at least one name.
    text = "".join(
        (".+" if index == len(parts) - 1 else "(?:[^/]+/)*")
        if part == "**"
        else ("[^/]+" if part == "*" else part) + ("" if index == len(parts) - 1 else "/")
        for index, part in enumerate(parts)
    )
    path = "/".join(names)
    matched = _compile("/".join(parts)).matches(names[-1], path, False)
    assert matched == (re.fullmatch(text, path) is not None)


def test_excluded_given_file_is_skipped_and_given_folder_is_not(tmp_path: Path) -> None:
    make_tree(tmp_path, "album/a.jpg", "album_thumb.jpg")
    listing = list_images([tmp_path / "album", tmp_path / "album_thumb.jpg"], exclude=["album*"])
    assert names_below(listing, tmp_path) == ["album/a.jpg"]
    assert listing.skipped_files == {"excluded": 1}


def test_empty_exclude_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must name something"):
        list_images([tmp_path], exclude=["/"])


def test_overlapping_sources_list_each_file_once(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.jpg", "sub/b.jpg")
    listing = list_images([tmp_path / "a.jpg", tmp_path, tmp_path / "sub", tmp_path / "a.jpg", tmp_path])
    assert sorted(names_below(listing, tmp_path)) == ["a.jpg", "sub/b.jpg"]


def test_missing_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="no such file or folder"):
        list_images([tmp_path / "nothing"])
    make_tree(tmp_path, "a.jpg")
    with pytest.raises(SourceNotFound):
        list_images([tmp_path / "a.jpg" / "below a file"])


def test_empty_folder_gives_an_empty_listing(tmp_path: Path) -> None:
    (tmp_path / "nothing in it").mkdir()
    assert list_images([tmp_path / "nothing in it"]) == Listing()


@posix_only
def test_linked_folders_are_listed_once_under_the_real_path(tmp_path: Path) -> None:
    make_tree(tmp_path / "photos", "z/real/a.jpg")
    make_tree(tmp_path / "elsewhere", "b.jpg")
    os.symlink(tmp_path / "photos/z/real", tmp_path / "photos/a link that sorts first")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos/outside")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos/outside again")
    listing = list_images([tmp_path / "photos"])
    assert names_below(listing, tmp_path / "photos") == ["z/real/a.jpg", "outside/b.jpg"]
    assert listing.skipped_folders == {"listed already": 2}


@posix_only
def test_link_loops_end_and_are_counted(tmp_path: Path) -> None:
    make_tree(tmp_path, "a/b/c.jpg")
    os.symlink(tmp_path, tmp_path / "a/b/up")
    os.symlink(".", tmp_path / "a/here")
    listing = list_images([tmp_path])
    assert names_below(listing, tmp_path) == ["a/b/c.jpg"]
    assert listing.skipped_folders == {"link loop": 2}


@posix_only
def test_linked_file_is_listed_with_the_size_of_its_target(tmp_path: Path) -> None:
    make_tree(tmp_path / "other", "target.jpg")
    (tmp_path / "photos").mkdir()
    os.symlink(tmp_path / "other/target.jpg", tmp_path / "photos/link.jpg")
    (file,) = list_images([tmp_path / "photos"]).files
    assert (os.path.basename(file.path), file.size) == ("link.jpg", len(JPEG))


@posix_only
def test_links_and_pipes_without_the_name_of_an_image_are_ignored(tmp_path: Path) -> None:
    os.symlink("nowhere", tmp_path / "broken")
    os.symlink("circle", tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    listing = list_images([tmp_path])
    assert not listing.failures
    assert listing.ignored == {"broken link": 2, "not a file": 1}


@posix_only
def test_given_pipe_is_a_failure_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (failure,) = list_images([tmp_path / "pipe"]).failures
    assert failure.reason == "not_a_file"


@posix_only
def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9\nnoir.jpg"
    try:
        Path(os.fsdecode(raw)).write_bytes(JPEG)
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    (file,) = list_images([tmp_path], exclude=["*.png"]).files
    assert os.fsencode(file.path) == raw


def test_file_that_vanishes_while_listing_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path, "a.jpg", "b.jpg")
    scandir = os.scandir

    class VanishingEntry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.path = entry.name, entry.path
            self.is_dir, self.is_file, self.is_symlink = entry.is_dir, entry.is_file, entry.is_symlink
            self._entry = entry

        def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
            if self.name == "a.jpg":
                raise FileNotFoundError(2, "gone", self.path)
            return self._entry.stat(follow_symlinks=follow_symlinks)

    class VanishingScan:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self._entries = [VanishingEntry(entry) for entry in entries]

        def __enter__(self) -> list[VanishingEntry]:
            return self._entries

        def __exit__(self, *_: object) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(os, "scandir", VanishingScan)
    listing = list_images([tmp_path])
    assert names_below(listing, tmp_path) == ["b.jpg"]
    assert [(os.path.basename(f.path), f.reason) for f in listing.failures] == [("a.jpg", "vanished")]


def test_folder_that_cannot_be_listed_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path, "a.jpg", "locked/b.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:
        # Permission bits would not stop the superuser, who runs tests in containers.
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_images([tmp_path])
    assert names_below(listing, tmp_path) == ["a.jpg"]
    (failure,) = listing.failures
    assert (os.path.basename(failure.path), failure.reason) == ("locked", "permission")
    assert "cannot be listed" in failure.message
    with pytest.raises(SourceNotFound, match="cannot be listed"):
        list_images([tmp_path / "locked"])


def test_deep_folders_need_no_recursion(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(300):
        deep = deep / "d"
    make_tree(deep, "a.jpg")
    assert len(list_images([tmp_path]).files) == 1


def test_ten_thousand_files_take_a_moment(tmp_path: Path) -> None:
    for folder in range(10):
        (tmp_path / str(folder)).mkdir()
        for number in range(1000):
            (tmp_path / str(folder) / f"{number}.jpg").touch()
    list_images([tmp_path])
    started = time.process_time()
    assert len(list_images([tmp_path]).files) == 10_000
    assert time.process_time() - started < 1.0  # about .1 s; room for a busy machine


def test_listing_imports_neither_pillow_nor_numpy() -> None:
    code = "import sys, dino_index.image_files; print({'PIL', 'numpy', 'torch'} & set(sys.modules))"
    path = os.pathsep.join(sys.path)
    output = subprocess.check_output([sys.executable, "-c", code], text=True, env={**os.environ, "PYTHONPATH": path})
    assert output.strip() == "set()"

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from dino_index.errors import FolderRefused, OutputUnwritable, SourceNotFound, UploadRefused
from dino_search.api.job_folders import allowed_folder, refuse_links_out, safe_name, save_uploads, uploads_folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """`photos` is allowed; `private` and `photos2` beside it are not."""
    for name in ("photos/2026/deep", "photos2", "private/inner"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "photos/file.txt").write_text("")
    (tmp_path / "photos/out").symlink_to(tmp_path / "private")
    (tmp_path / "photos/inside").symlink_to(tmp_path / "photos/2026")
    (tmp_path / "photos/chain").symlink_to(tmp_path / "photos/out/inner")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "real"),
    [("photos", "photos"), ("photos/", "photos"), ("photos/2026/deep", "photos/2026/deep"), ("photos/2026/..",
     "photos"),
     ("photos/inside/deep", "photos/2026/deep"), ("photos/./2026//", "photos/2026"), ("private/../photos", "photos")],
)  # fmt: skip
def test_folders_below_an_allowed_one_are_given_by_their_real_path(tree: Path, given: str, real: str) -> None:
    assert allowed_folder(f"{tree}/{given}", [tree / "photos"]) == os.path.realpath(tree / real)


@pytest.mark.parametrize(
    "given",
    ["{tree}/private", "{tree}", "/", "{tree}/photos2", "{tree}/photos/..", "{tree}/photos/../private",
     "{tree}/photos/out",
     "{tree}/photos/out/inner", "{tree}/photos/chain", "{tree}/photos/inside/../../private", "{tree}/missing",
     "{tree}/photos/2026/../../../../../../../etc", "photos", "./photos", "../photos", "~/photos", "",
     "{tree}/photos\0/../private",
     "file://{tree}/photos", "s3://bucket/a", "https://a.test/", "/proc/self/cwd", "/etc", "{tree}/PHOTOS",
     "//{tree}/private"],
)  # fmt: skip
def test_all_other_folders_are_refused_in_the_same_words(
    tree: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    path = given.format(tree=tree)
    with pytest.raises(FolderRefused) as refused:
        allowed_folder(path, [tree / "photos"])
    assert str(refused.value) == f"expected the absolute path of a folder in {tree / 'photos'}, found {path!r}"


def test_without_allowed_folders_there_are_none(tree: Path) -> None:
    with pytest.raises(FolderRefused, match="send the pictures along"):
        allowed_folder(str(tree), [])


@pytest.mark.parametrize("name", ["missing", "file.txt"])
def test_what_is_no_folder_below_an_allowed_one_is_said_to_be_none(tree: Path, name: str) -> None:
    with pytest.raises(SourceNotFound, match="expected a folder"):
        allowed_folder(f"{tree}/photos/{name}", [tree / "photos"])


def test_an_allowed_folder_may_itself_be_a_link(tree: Path) -> None:
    (tree / "link").symlink_to(tree / "photos")
    assert allowed_folder(f"{tree}/link/2026", [tree / "link"]) == os.path.realpath(tree / "photos/2026")
    assert allowed_folder(f"{tree}/photos/2026", [tree / "link"]) == os.path.realpath(tree / "photos/2026")


def test_links_inside_that_lead_out_are_found_wherever_they_are(tree: Path) -> None:
    photos = os.path.realpath(tree / "photos")
    with pytest.raises(FolderRefused, match=r"photos/(out|chain) is a link that leads out"):
        refuse_links_out(photos, [photos])
    (tree / "photos/out").unlink()
    (tree / "photos/chain").unlink()
    refuse_links_out(photos, [photos])
    (tree / "photos/2026/loop").symlink_to(tree / "photos")
    (tree / "photos/2026/broken").symlink_to(tree / "nothing")
    refuse_links_out(photos, [photos])
    (tree / "private/a.jpg").write_bytes(b"")
    (tree / "photos/2026/deep/a.jpg").symlink_to(tree / "private/a.jpg")
    with pytest.raises(FolderRefused, match=r"deep/a\.jpg is a link that leads out"):
        refuse_links_out(photos, [photos])
    refuse_links_out(photos, [photos, tree / "private"])


@pytest.mark.parametrize(
    ("name", "safe"),
    [("a.jpg", "a.jpg"), ("../../etc/passwd", "passwd"), ("C:\\x\\a b.JPG", "a_b.JPG"), ("..", "picture"), ("",
     "picture"),
     (".bashrc", "picture.bashrc"), ("a\0b.png", "a_b.png"), ("写真.jpg", "picture.jpg"), ("x" * 300 + ".jpeg",
     "x" * 100 + ".jpeg"),
     ("a.jpg/", "picture"), ("-rf.jpg", "-rf.jpg"), ("a.", "a"), ("con\r\n.jpg", "con.jpg")],
)  # fmt: skip
def test_names_of_clients_lead_nowhere(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_uploads_lie_in_a_folder_of_their_own_in_their_order(home: Path) -> None:
    uploads = [(name, io.BytesIO(name.encode())) for name in ["a.jpg", "../a.jpg", *["b.jpg"] * 8]]
    token = save_uploads(home, uploads, 10)
    written = sorted(uploads_folder(home, token).iterdir())
    assert [written[number].name for number in (0, 1, -1)] == ["01-a.jpg", "02-a.jpg", "10-b.jpg"]
    assert written[1].read_bytes() == b"../a.jpg"
    for number in (0, 11):
        with pytest.raises(UploadRefused, match=f"1 to 10 pictures, found {number}"):
            save_uploads(home, [("a.jpg", io.BytesIO())] * number, 10)


def test_uploads_that_cannot_be_written_leave_nothing(home: Path) -> None:
    home.mkdir()
    (home / "uploads").write_text("a file")
    with pytest.raises(OutputUnwritable, match="cannot be stored"):
        save_uploads(home, [("a.jpg", io.BytesIO(b"a"))], 10)

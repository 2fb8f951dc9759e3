"""Frames of videos, with a small stand-in for OpenCV where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_index.errors import BackendMissing, ImageError
from dino_index.image_bytes import ReadLimits
from dino_index.video_frames import is_video, read_frames, require_opencv
from opencv_stand_in import FRAME_SIZE, install_opencv, remove_opencv, write_video


@pytest.fixture
def video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install_opencv(monkeypatch)
    return write_video(tmp_path / "clip.mp4", num_frames=5)


def test_frames_come_in_order_in_red_green_blue(video: Path) -> None:
    frames = list(read_frames(str(video)))
    assert [number for number, _ in frames] == [0, 1, 2, 3, 4]
    assert all(frame.shape == (FRAME_SIZE[1], FRAME_SIZE[0], 3) for _, frame in frames)
    assert [frame[0, 0].tolist() for _, frame in frames] == [[200, 100, number] for number in range(5)]


@pytest.mark.parametrize(("every", "expected"), [(2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_each_so_manieth_frame_can_be_asked_for(video: Path, every: int, expected: list[int]) -> None:
    assert [number for number, _ in read_frames(str(video), every=every)] == expected


def test_a_video_that_ends_early_is_remarked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_opencv(monkeypatch)
    path = write_video(tmp_path / "cut.mp4", num_frames=3, claimed=10)
    remarks: list[str] = []
    assert len(list(read_frames(str(path), on_remark=remarks.append))) == 3
    assert remarks == [f"{path}: 3 of the 10 frames that it claims to have could be read"]


@pytest.mark.parametrize(
    ("num_frames", "limits", "reason"),
    [(None, ReadLimits(), "unsupported"), (0, ReadLimits(), "unsupported"), (2, ReadLimits(max_pixels=9), "too_many")],
    ids=["no video", "no frame", "too large"],
)
def test_what_cannot_be_read_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_frames: int | None, limits: ReadLimits, reason: str
) -> None:
    install_opencv(monkeypatch)
    path = tmp_path / "bad.mp4"
    if num_frames is None:
        path.write_bytes(b"no video")
    else:
        write_video(path, num_frames=num_frames)
    with pytest.raises(ImageError) as raised:
        list(read_frames(str(path), limits=limits))
    assert raised.value.reason.startswith(reason)


def test_without_opencv_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    remove_opencv(monkeypatch)
    with pytest.raises(BackendMissing, match=r"a\.mp4 is a video.*pip install opencv-python-headless"):
        require_opencv("a.mp4")


def test_videos_are_known_by_their_names() -> None:
    assert is_video("/a/b.MP4")
    assert is_video("b.webm")
    assert not is_video("b.gif")
    assert not is_video("mp4")

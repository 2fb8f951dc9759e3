"""A stand-in for the few calls of OpenCV that read videos: a "video" is a file that says how many frames it has.

OpenCV is no dependency, and is not needed to test what is done with its frames.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

FRAME_SIZE = (48, 32)
_FRAME_COUNT = 7


class VideoCapture:
    """As cv2.VideoCapture; frames are even, in blue, green, red: their number, 100, 200."""

    def __init__(self, path: str) -> None:
        try:
            values: dict[str, int] | None = json.loads(Path(path).read_text("utf-8"))
        except ValueError:
            values = None
        self._values = values
        self._position = -1

    def isOpened(self) -> bool:  # noqa: N802 (its name)
        return self._values is not None

    def get(self, what: int) -> float:
        assert what == _FRAME_COUNT
        assert self._values is not None
        return float(self._values["claimed"])

    def grab(self) -> bool:
        assert self._values is not None
        self._position += 1
        return self._position < self._values["frames"]

    def retrieve(self) -> tuple[bool, NDArray[np.uint8]]:
        frame_HWC = np.empty((FRAME_SIZE[1], FRAME_SIZE[0], 3), np.uint8)
        frame_HWC[:] = (self._position, 100, 200)
        return True, frame_HWC

    def release(self) -> None:
        self._values = None


def write_video(path: Path, *, num_frames: int, claimed: int | None = None) -> Path:
    """What the stand-in reads as a video."""
    path.write_text(json.dumps({"frames": num_frames, "claimed": num_frames if claimed is None else claimed}), "utf-8")
    return path


def install_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("cv2")
    module.__spec__ = ModuleSpec("cv2", None)
    module.VideoCapture, module.CAP_PROP_FRAME_COUNT = VideoCapture, _FRAME_COUNT
    monkeypatch.setitem(sys.modules, "cv2", module)


def remove_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without it, whether it is there or not."""
    monkeypatch.setattr("dino_index.video_frames.importlib.util.find_spec", lambda name: None)

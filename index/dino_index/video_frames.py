"""Frames of a video file, read through OpenCV where that is installed. A video is no image for any other part.

Shapes: H x W pixels, C = 3 colours.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_index.errors import BackendMissing, ImageError
from dino_index.image_bytes import DEFAULT_LIMITS, ReadLimits
from dino_index.image_files import type_by_name


def is_video(path: str) -> bool:
    """Whether a name ends as those of videos do."""
    return type_by_name(os.path.basename(path)) == "video"


def require_opencv(path: str) -> None:
    """Raises BackendMissing where the frames of a video are asked for and cannot be read here."""
    if importlib.util.find_spec("cv2") is None:
        raise BackendMissing(
            f"{path} is a video, whose frames need OpenCV, found none; pip install opencv-python-headless, or name "
            "pictures"
        )


def read_frames(
    path: str,
    *,
    every: int = 1,
    limits: ReadLimits = DEFAULT_LIMITS,
    on_remark: Callable[[str], None] = lambda remark: None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(number from 0, pixels_HWC in RGB, upright) of each `every`th frame; one in memory at a time.

    on_remark: told where fewer frames can be read than the file claims to have.
    Raises BackendMissing; ImageError: vanished, unsupported, too_many_pixels.
    """
    require_opencv(path)
    cv2: Any = importlib.import_module("cv2")
    if not os.path.isfile(path):
        raise ImageError("vanished", "there is no such file (any more)")
    video = cv2.VideoCapture(path)
    try:
        if not video.isOpened():
            raise ImageError("unsupported", "OpenCV cannot open it as a video")
        number, claimed = 0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        while video.grab():
            if number % every == 0:
                found, frame_HWC = video.retrieve()
                if not found:
                    break
                height, width = frame_HWC.shape[:2]
                if height * width > limits.max_pixels:
                    raise ImageError(
                        "too_many_pixels",
                        f"frames of {width} x {height} pixels, more than the limit of {limits.max_pixels:,}"
                        " (max_pixels)",
                    )
                # OpenCV's order is blue, green, red.
                yield number, np.ascontiguousarray(frame_HWC[:, :, ::-1])
            number += 1
        if not number:
            raise ImageError("unsupported", "OpenCV finds no frame in it")
        if number < claimed:
            on_remark(f"{path}: {number} of the {claimed} frames that it claims to have could be read")
    finally:
        video.release()

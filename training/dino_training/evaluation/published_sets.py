"""Published sets that come with files of labels: Oxford Flowers 102, Stanford Cars, iNaturalist.

Laid out as torchvision has them, so that a set that was fetched for it can be used as it is. MATLAB files are read by
SciPy, which runs nothing that is in them; other formats of labels (pickles among them) are not looked for.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dino_index.errors import ImageError, NoImagesFound, TruthUnusable
from dino_training.image_listing import ListedImages

Part = Literal["train", "val"]

_FLOWERS_LABELS, _FLOWERS_PARTS = "imagelabels.mat", "setid.mat"
# The transfer protocol trains on both of the parts that are not the test (2,040 images) and judges the test (6,149).
_FLOWERS_IDS = {"train": ("trnid", "valid"), "val": ("tstid",)}
_CARS_FILES = {
    "train": (("devkit/cars_train_annos.mat",), "cars_train"),
    "val": (("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat"), "cars_test"),
}
_CARS_UNLABELLED = "devkit/cars_test_annos.mat"


def list_published_set(path: str | os.PathLike[str], part: Part) -> ListedImages | None:
    """The images of a part of a published set, with their classes; None where the path is none.

    Flowers 102: the folder with imagelabels.mat, setid.mat and jpg. Cars: the folder with devkit, cars_train and
    cars_test. iNaturalist: the JSON file of a part (train2018.json), whose `file_name`s are below its folder. Of the
    first two one folder holds both parts, and is given for both.
    Raises TruthUnusable for files of labels that contradict themselves, NoImagesFound for a part without one image.
    """
    root = Path(os.path.abspath(os.fsdecode(path)))
    if root.suffix.lower() == ".json" and root.is_file():
        listed = _listed(_inaturalist(root))
    elif (root / _FLOWERS_LABELS).is_file():
        listed = _listed(_flowers(root, part))
    elif (root / "devkit").is_dir() and (root / "cars_train").is_dir():
        listed = _listed(_cars(root, part))
    else:
        return None
    if not listed.names:
        missing = next(iter(listed.failures), "")
        raise NoImagesFound(
            f"expected the images that the labels in {root} name, found none of {len(listed.failures)}"
            + (f", such as {missing}; unpack the images beside the labels" if missing else "")
        )
    return listed


def _flowers(root: Path, part: Part) -> list[tuple[str, str]]:
    labels_N = _numbers(_matlab(root / _FLOWERS_LABELS), "labels", root / _FLOWERS_LABELS)
    parts = _matlab(root / _FLOWERS_PARTS)
    rows = []
    for key in _FLOWERS_IDS[part]:
        for image_id in _numbers(parts, key, root / _FLOWERS_PARTS):
            if not 1 <= image_id <= len(labels_N):
                raise TruthUnusable(
                    f"{root / _FLOWERS_PARTS}: {key} names image {image_id}, expected 1..{len(labels_N)}, as "
                    f"{_FLOWERS_LABELS} has labels"
                )
            rows.append((str(root / f"jpg/image_{image_id:05d}.jpg"), f"{labels_N[image_id - 1]:03d}"))
    return rows


def _cars(root: Path, part: Part) -> list[tuple[str, str]]:
    candidates, folder = _CARS_FILES[part]
    file = next((root / name for name in candidates if (root / name).is_file()), None)
    if file is None:
        unlabelled = f"; {_CARS_UNLABELLED} has no labels" if (root / _CARS_UNLABELLED).is_file() else ""
        raise TruthUnusable(f"expected {root / candidates[0]}, found no such file{unlabelled}")
    annotations = np.atleast_1d(_matlab(file).get("annotations", ()))
    if not annotations.size or not {"fname", "class"} <= set(annotations.dtype.names or ()):
        raise TruthUnusable(f"{file}: expected `annotations` with fname and class for each image, found none")
    try:
        return [(_below(root / folder, str(row["fname"]), file), f"{int(row['class']):03d}") for row in annotations]
    except (TypeError, ValueError) as error:
        raise TruthUnusable(f"{file}: expected a class number for each image: {error}") from error


def _inaturalist(file: Path) -> list[tuple[str, str]]:
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TruthUnusable(f"the file of labels {file} cannot be read: {error}") from error
    try:
        names = {image["id"]: str(image["file_name"]) for image in described["images"]}
        classes = {row["image_id"]: row["category_id"] for row in described["annotations"]}
    except (KeyError, TypeError) as error:
        raise TruthUnusable(
            f"{file}: expected `images` with id and file_name and `annotations` with image_id and category_id, as "
            f"iNaturalist has them; missing: {error}"
        ) from error
    if unlabelled := names.keys() - classes.keys():
        raise TruthUnusable(f"{file}: {len(unlabelled)} of {len(names)} images have no annotation, expected none")
    return [(_below(file.parent, name, file), str(classes[number])) for number, name in names.items()]


def _matlab(file: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        values: dict[str, Any] = loadmat(file, squeeze_me=True)
    except Exception as error:  # a damaged file can make the reader raise anything
        raise TruthUnusable(f"the file of labels {file} cannot be read: {error}") from error
    return values


def _numbers(values: dict[str, Any], key: str, file: Path) -> list[int]:
    found = np.atleast_1d(values.get(key, ()))
    if not found.size or found.ndim != 1 or found.dtype.kind not in "iu":
        raise TruthUnusable(f"{file}: expected `{key}` with a whole number for each image, found {found.dtype}")
    return [int(value) for value in found]


def _below(folder: Path, name: str, file: Path) -> str:
    """The path of a named file. Raises TruthUnusable for a name that leads out of the folder."""
    path = os.path.normpath(folder / name)
    if not path.startswith(f"{folder}{os.sep}"):
        raise TruthUnusable(f"{file}: expected names of files below {folder}, found {name!r}")
    return path


def _listed(rows: Iterable[tuple[str, str]]) -> ListedImages:
    """Images that are there, with their classes; the others are failures."""
    found = ListedImages()
    labels: list[str | None] = []
    sizes: list[int] = []
    for path, label in rows:
        try:
            size = os.stat(path).st_size
        except OSError as error:
            found.failures[path] = ImageError("vanished", f"the labels name it, and it is not there: {error.strerror}")
            continue
        found.names.append(path)
        labels.append(label)
        sizes.append(size)
    found.sizes = array("q", sizes)
    found.labels = labels
    return found

"""Labels of images: from the folder that holds them, or from a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from dino_index.catalog.portable_paths import encode_path
from dino_index.errors import LabelFileError

FROM_FOLDERS = "folders"


def labels_from_folders(paths: Sequence[str], files: Iterable[str]) -> dict[str, str]:
    """Label of each file: the first folder below the given path that it was found under.

    A given path without sub-folders is itself one class, named as its folder; files that lie loose beside
    sub-folders have no label. All paths absolute.
    """
    roots = sorted((os.path.abspath(path) for path in paths), key=len, reverse=True)
    loose: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    with_folders: set[str] = set()
    for file in files:
        root = next((root for root in roots if _is_below(file, root)), os.path.dirname(file))
        first, *deeper = os.path.relpath(file, root).split(os.sep)
        if deeper:
            labels[file] = encode_path(first)
            with_folders.add(root)
        else:
            loose.setdefault(root, []).append(file)
    for root in loose.keys() - with_folders:
        folder = root if os.path.isdir(root) else os.path.dirname(root)
        labels |= dict.fromkeys(loose[root], encode_path(os.path.basename(folder)))
    return labels


def labels_from_csv(label_file: str | Path, paths: Sequence[str]) -> dict[str, str]:
    """Label by absolute path, from a CSV file with the columns `path` and `label`.

    A relative path is looked for below each of `paths`, then beside the CSV file.
    Raises LabelFileError.
    """
    label_file = Path(label_file)
    folders = [path if os.path.isdir(path) else os.path.dirname(path) for path in map(os.path.abspath, paths)]
    folders.append(str(label_file.absolute().parent))
    labels: dict[str, str] = {}
    try:
        with open(label_file, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.DictReader(file)
            missing = {"path", "label"} - set(rows.fieldnames or ())
            if missing:
                raise LabelFileError(
                    f"{label_file} must have the columns path and label in its first line, "
                    f"found {', '.join(rows.fieldnames or ()) or 'nothing'}"
                )
            for row in rows:
                if not row["path"] or row["label"] is None:
                    raise LabelFileError(
                        f"{label_file}, line {rows.line_num}: expected a path and a label, found {row}"
                    )
                if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in row["label"]):
                    raise LabelFileError(
                        f"{label_file}, line {rows.line_num}: expected a label in UTF-8 without NUL, found {row}"
                    )
                candidates = [os.path.normpath(os.path.join(folder, row["path"])) for folder in folders]
                path = next(filter(os.path.lexists, candidates), candidates[0])
                labels[path] = row["label"]
    except (OSError, csv.Error) as error:
        raise LabelFileError(f"the label file {label_file} cannot be read: {error}") from error
    return labels


def _is_below(file: str, root: str) -> bool:
    return file == root or file.startswith(root.rstrip(os.sep) + os.sep)

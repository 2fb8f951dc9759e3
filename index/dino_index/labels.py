"""Labels of images: from the folder that holds them, or from a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from dino_index.catalog.portable_paths import encode_path
from dino_index.errors import LabelFileError
from dino_index.image_paths import absolute_path, ancestors, is_url, parent_of, separator_of, split_member

FROM_FOLDERS = "folders"


def labels_from_folders(paths: Sequence[str], files: Iterable[str]) -> dict[str, str]:
    """Label of each file: the first folder below the given path that it was found under.

    A given folder without sub-folders is itself one class, named as the folder; files that lie loose beside
    sub-folders have no label. Folders inside a tar shard count as those of a folder do, but a shard without folders is
    no class. All paths absolute.
    """
    roots = {absolute_path(path) for path in paths}
    loose: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    with_folders: set[str] = set()
    for file in files:
        root = next((folder for folder in ancestors(file) if folder in roots), None)
        if root == file:  # a given file is of the class of its folder
            loose[file] = [file]
            continue
        root = root or parent_of(file)
        first, *deeper = file[len(root.rstrip(separator_of(root))) + 1 :].split(separator_of(root))
        if deeper:
            labels[file] = encode_path(first)
            with_folders.add(root)
        else:
            loose.setdefault(root, []).append(file)
    for root in loose.keys() - with_folders:
        folder = parent_of(loose[root][0])
        member = split_member(loose[root][0])
        if member is None or member[0] != folder:
            labels |= dict.fromkeys(loose[root], encode_path(folder.rpartition(separator_of(folder))[2]))
    return labels


def labels_from_csv(label_file: str | Path, paths: Sequence[str], listed: Container[str] = ()) -> dict[str, str]:
    """Label by absolute path, from a CSV file with the columns `path` and `label`.

    A relative path is looked for below each of `paths`, which may be folders, shards and URLs, then beside the CSV
    file: first among the images `listed`, then among files.
    Raises LabelFileError.
    """
    label_file = Path(label_file)
    folders: list[str] = []
    for path in map(absolute_path, paths):
        folders += [path] if is_url(path) or os.path.isdir(path) else [path, os.path.dirname(path)]
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
                candidates = [_join(folder, row["path"]) for folder in folders]
                known = [path for path in candidates if path in listed] or filter(os.path.lexists, candidates)
                labels[next(iter(known), candidates[0])] = row["label"]
    except (OSError, csv.Error) as error:
        raise LabelFileError(f"the label file {label_file} cannot be read: {error}") from error
    return labels


def _join(folder: str, path: str) -> str:
    if is_url(path):
        return absolute_path(path)
    if is_url(folder) and not os.path.isabs(path):
        return f"{folder}/{path.removeprefix('./')}"
    return os.path.normpath(os.path.join(folder, path))

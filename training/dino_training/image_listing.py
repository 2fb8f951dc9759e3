"""Which images lie under the paths of a run, laid out for reading by position.

They are those of `dino_index.source_listing`, and the pictures in the files of published sets.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dino_index.errors import ImageError
from dino_index.image_files import Listing, type_by_name
from dino_index.image_paths import absolute_path
from dino_index.labels import FROM_FOLDERS, labels_from_csv, labels_from_folders
from dino_index.source_listing import by_image, list_sources, sidecar_values
from dino_training.set_files import Purpose, SetPictures, is_set_file, open_sets


@dataclass(kw_only=True)
class ListedImages:
    """Images in a fixed order: single files, those in folders and behind URLs, members of shards, of set files.

    names: absolute path, `SHARD.tar/MEMBER`, `SET-FILE/NUMBER` or URL. sizes: bytes. labels: None if none were asked
    for. shards: paths. shard_numbers, offsets: of the members of shards: in which of the shards they lie, and where in
    it their bytes begin. sets: the last of `names`.
    ignored: files and members that are no image, by type. skipped: files and folders not looked at, by reason.
    failures: what should be an image, a folder or a shard and cannot be read to its end, by name.
    """

    names: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    labels: list[str | None] | None = None
    shards: list[str] = field(default_factory=list)
    shard_numbers: array[int] = field(default_factory=lambda: array("l"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sets: SetPictures = field(default_factory=SetPictures)
    ignored: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    failures: dict[str, ImageError] = field(default_factory=dict)

    @property
    def num_files(self) -> int:
        """Images that are files of their own: the first of `names`."""
        return len(self.names) - len(self.offsets) - len(self.sets)


def list_images_of_run(
    paths: Sequence[str | os.PathLike[str]], *, labels: str = "none", purpose: Purpose = "pretraining"
) -> ListedImages:
    """The images under the given paths, each once however often it is given, as `list_sources` finds them.

    Tar shards and set files that lie directly in a given folder are read, too; of these, files for another purpose
    count as skipped unless they are given themselves (see `set_files`). A row of a manifest that names a file again
    counts as skipped.

    labels: `none`; `folders`, the first folder below a given one or inside a shard; or a CSV file with the columns path
    and label. What a manifest says goes before either; its label for a shard is that of every image in it. What a
    shard says by `.cls` members counts where nothing else does, and so does what a set says.

    Raises SourceNotFound, ManifestError and BackendMissing as `list_sources` does; SetFileUnusable; LabelFileError for
    a CSV file that lacks what it should have.
    """
    sets = open_sets(paths, purpose)
    listing = list_sources([path for path in paths if not is_set_file(absolute_path(path))], shards_in_folders=True)
    found = ListedImages(ignored=listing.ignored, skipped=listing.skipped_folders + listing.skipped_files)
    if listing.num_repeated:
        found.skipped["named again"] += listing.num_repeated
    found.failures = {failure.path: ImageError(failure.reason, failure.message) for failure in listing.failures}
    found.names = [file.path for file in listing.files]
    found.sizes = array("q", [file.size for file in listing.files])
    for number, shard in enumerate(listing.shards):
        found.shards.append(shard.path)
        found.names += map(shard.path_of, range(len(shard.names)))
        found.sizes += shard.sizes
        found.shard_numbers.extend([number] * len(shard.names))
        found.offsets += shard.offsets
    _add_sets(found, sets, [absolute_path(path) for path in paths])
    if labels != "none":
        found.labels = _labels(found, listing, [absolute_path(path) for path in paths], labels)
    return found


def _add_sets(found: ListedImages, sets: SetPictures, given: Sequence[str]) -> None:
    found.sets = sets
    found.names += sets.names
    found.sizes += sets.sizes
    if sets.num_left_out:
        found.skipped["file for another purpose"] += sets.num_left_out
    # They were counted as what is no image.
    counted = {path for file in sets.files for path in file.files if file.path not in given}
    found.ignored = +(found.ignored - Counter(type_by_name(os.path.basename(path)) for path in counted))


def _labels(found: ListedImages, listing: Listing, given: Sequence[str], labels: str) -> list[str | None]:
    places = [*given, *found.shards]
    by_set = {
        name: label for name, label in zip(found.sets.names, found.sets.labels(), strict=True) if label is not None
    }
    if labels == FROM_FOLDERS:
        by_name = labels_from_folders(places, found.names[: len(found.names) - len(found.sets)])
    else:
        by_name = labels_from_csv(labels, places, set(found.names))
    by_name = by_set | sidecar_values(listing)[0] | by_name | by_image(listing.labels, listing)
    return [sys.intern(label) if (label := by_name.get(name)) is not None else None for name in found.names]

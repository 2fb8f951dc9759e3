"""Which images the given paths hold: folders, single files, manifests, tar shards and URLs of all of these.

Nothing is left out silently: what is no image is counted, what should be one and cannot be read is a failure.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dino_index.errors import ImageError, SourceNotFound
from dino_index.image_files import (
    Exclusions,
    ListedFile,
    Listing,
    ListingFailure,
    has_image_name,
    list_images,
    reserved_name,
    type_by_name,
)
from dino_index.image_paths import absolute_path, is_shard_name, is_url, parent_of, split_member
from dino_index.manifests import is_manifest, read_manifest, to_json_value
from dino_index.shards import (
    COMPRESSED_SUFFIXES,
    Shard,
    find_member,
    member_path,
    read_shard,
    read_sidecars,
    sample_key,
)

if TYPE_CHECKING:
    from dino_index.remote_files import RemoteFile


def list_sources(
    paths: Sequence[str | os.PathLike[str]], *, exclude: Sequence[str] = (), shards_in_folders: bool = False
) -> Listing:
    """The images under the given paths, each once however often it is given.

    Folders and single files are taken as by `list_images`, except for these:
    - a given .txt, .csv, .jsonl or .parquet file: a manifest of images and shards, by paths relative to it or URLs;
      see `manifests`. What it names and is not there becomes a failure, `vanished`.
    - .tar: a shard. Its members are images if their extension is one of an image and no part of their name is hidden;
      what `.cls` and `.json` members say about them, `sidecar_values` has.
    - `SHARD.tar/MEMBER`: one image in a shard.
    - a URL: of a folder, which is listed with all that is below it by the names alone, or of any of the above.

    exclude: as `list_images` takes them; inside a shard, and below a URL, paths count from there.
    shards_in_folders: read those that lie directly in a given folder, too; otherwise they are counted as `tar shard`.

    Raises SourceNotFound for a given path that does not exist, cannot be listed, or is a compressed archive;
    ManifestError, BackendMissing; ValueError for an empty pattern.
    """
    collected = _sort_by_kind(paths)
    listing = list_images([*collected.folders, *collected.files], exclude=exclude)
    listing.failures = collected.failures + listing.failures
    listing.looked_through = list(dict.fromkeys(collected.folders))
    listing.labels, listing.facts = collected.labels, collected.facts
    listing.num_repeated = collected.num_repeated
    exclusions = Exclusions(exclude)
    _add_members(listing, collected.members)
    shards = {_identity(shard): shard for shard in collected.shards}
    if shards_in_folders:
        found = {_identity(shard): shard for folder in collected.folders for shard in _shards_directly_in(folder)}
        listing.ignored["tar shard"] -= len(found)  # as which they were counted
        listing.ignored += type(listing.ignored)()
        shards |= found
    for path in shards.values():
        _add_shard(listing, path, exclusions)
    _add_urls(listing, collected, exclusions)
    return listing


def shard_files(shard: Shard) -> Iterator[ListedFile]:
    """The images of a shard as files."""
    for name, size in zip(shard.names, shard.sizes, strict=True):
        yield ListedFile(member_path(shard.path, name), size, shard.mtime_ns)


@dataclass
class _Collected:
    """Paths by what they are, each once. given_urls: not out of a manifest."""

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    members: list[tuple[str, str]] = field(default_factory=list)
    given_urls: list[str] = field(default_factory=list)
    named_urls: dict[str, str] = field(default_factory=dict)
    """Where each stands."""
    failures: list[ListingFailure] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_repeated: int = 0


def _sort_by_kind(paths: Sequence[str | os.PathLike[str]]) -> _Collected:
    collected = _Collected()
    named: set[str] = set()
    for path in map(absolute_path, paths):
        if is_manifest(path):
            _take_manifest(collected, path, named)
            continue
        if path.lower().endswith(COMPRESSED_SUFFIXES) and (is_url(path) or os.path.isfile(path)):
            raise SourceNotFound(f"{path}: {_COMPRESSED}")
        if member := split_member(path):
            collected.members.append(member)
        elif is_shard_name(path) and (is_url(path) or os.path.isfile(path)):
            collected.shards.append(path)
        elif is_url(path):
            collected.given_urls.append(path)
        else:
            (collected.folders if os.path.isdir(path) else collected.files).append(path)
    collected.given_urls = list(dict.fromkeys(collected.given_urls))
    return collected


_COMPRESSED = "images are not read out of a compressed archive; unpack it, or pack it as .tar"


def _take_manifest(collected: _Collected, manifest: str, named: set[str]) -> None:
    """Sorts what a manifest names; what is not there becomes a failure."""
    for row in read_manifest(manifest):
        path = _resolve(row.path, manifest)
        if path in named:
            collected.num_repeated += 1
            continue
        named.add(path)
        if row.label is not None:
            collected.labels[path] = row.label
        if row.facts is not None:
            collected.facts[path] = row.facts
        if path.lower().endswith(COMPRESSED_SUFFIXES):
            collected.failures.append(ListingFailure(path, "unsupported", f"{row.where}: {_COMPRESSED}"))
        elif is_url(path) and not is_shard_name(path) and split_member(path) is None:
            collected.named_urls[path] = row.where
        else:
            _take_named(collected, path, row.where)


def _take_named(collected: _Collected, path: str, where: str) -> None:
    if member := split_member(path):
        collected.members.append(member)
        return
    if is_url(path):
        collected.shards.append(path)
        return
    try:
        status = os.stat(path)
    except ValueError as error:
        # The path itself cannot be stored, so the place of the row stands for it.
        printable = path.replace("\0", r"\x00")
        collected.failures.append(
            ListingFailure(printable, "unreadable", f"{where}: no file can have this name: {error}")
        )
        return
    except OSError as error:
        reason = "permission" if isinstance(error, PermissionError) else "vanished"
        message = f"{where}: expected an image file or a shard, found none at {path}: {error.strerror or error}"
        collected.failures.append(ListingFailure(path, reason, message))
        return
    if stat.S_ISDIR(status.st_mode):
        message = f"{where}: expected an image file or a shard, and {path} is a folder"
        collected.failures.append(ListingFailure(path, "not_a_file", message))
    else:
        (collected.shards if is_shard_name(path) else collected.files).append(path)


def _resolve(named: str, manifest: str) -> str:
    if is_url(named) or named.lower().startswith("file://"):
        return absolute_path(named)
    if is_url(manifest) and not os.path.isabs(named):
        return f"{parent_of(manifest)}/{named.removeprefix('./')}"
    return os.path.normpath(os.path.join(os.path.dirname(manifest), named))


def _identity(path: str) -> str:
    return path if is_url(path) else os.path.realpath(path)


def _shards_directly_in(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder), key=os.fsencode)
    except OSError:  # `list_images` says what is wrong
        return []
    shards = [os.path.join(folder, name) for name in names if is_shard_name(name) and not name.startswith(".")]
    return [shard for shard in shards if os.path.isfile(shard) and os.path.getsize(shard)]


def _add_members(listing: Listing, members: Sequence[tuple[str, str]]) -> None:
    for path, name in dict.fromkeys(members):
        member = member_path(path, name)
        try:
            shard, number = find_member(path, name)
        except ImageError as error:
            listing.failures.append(ListingFailure(member, error.reason, str(error)))
        else:
            listing.files.append(ListedFile(member, shard.sizes[number], shard.mtime_ns))


def _add_shard(listing: Listing, path: str, exclusions: Exclusions) -> None:
    try:
        shard = read_shard(path)
    except ImageError as error:
        listing.failures.append(ListingFailure(path, error.reason, str(error)))
        return
    listing.ignored += shard.ignored
    if shard.damage is not None:
        listing.failures.append(ListingFailure(path, shard.damage.reason, str(shard.damage)))
    else:
        listing.looked_through.append(path)
    single = {file.path for file in listing.files if file.path.startswith(path)}
    excluded = {number for number, name in enumerate(shard.names) if exclusions.match_any_part(name)}
    if excluded:
        listing.skipped_files["excluded"] += len(excluded)
    if excluded or single:
        kept = [number for number in range(len(shard.names)) if number not in excluded]
        shard = shard.only([number for number in kept if shard.path_of(number) not in single])
    listing.shards.append(shard)


def _add_urls(listing: Listing, collected: _Collected, exclusions: Exclusions) -> None:
    if not (collected.given_urls or collected.named_urls):
        return
    from dino_index.remote_files import describe, describe_all, require_backend

    seen: set[str] = set()
    for url in collected.given_urls:
        require_backend(url)
        try:
            file = describe(url)
            if file.is_folder:
                _add_url_folder(listing, url, exclusions, seen)
        except ImageError as error:
            raise SourceNotFound(f"{url}: {error}; check the URL and the network") from error
        if not file.is_folder and url not in seen:
            seen.add(url)
            listing.files.append(_listed(file))
    named = [url for url in collected.named_urls if url not in seen]
    for url, outcome in zip(named, describe_all(named), strict=True):
        where = collected.named_urls[url]
        if isinstance(outcome, ImageError):
            listing.failures.append(ListingFailure(url, outcome.reason, f"{where}: {outcome}"))
        elif outcome.is_folder:
            message = f"{where}: expected an image or a shard, found a folder or a page behind the URL"
            listing.failures.append(ListingFailure(url, "not_a_file", message))
        else:
            listing.files.append(_listed(outcome))


def _add_url_folder(listing: Listing, url: str, exclusions: Exclusions, seen: set[str]) -> None:
    from dino_index.remote_files import list_folder

    files, failures = list_folder(url)
    skipped_folders: dict[str, str] = {}
    for file in files:
        below = file.url[len(url.rstrip("/")) + 1 :]
        skip = _reason_to_skip(below, exclusions)
        if skip is not None:
            reason, folder = skip
            if folder is None:
                listing.skipped_files[reason] += 1
            else:
                skipped_folders[folder] = reason
        elif not has_image_name(below.rpartition("/")[2]):
            listing.ignored[type_by_name(below.rpartition("/")[2])] += 1
        elif file.url not in seen:
            seen.add(file.url)
            listing.files.append(_listed(file))
    listing.skipped_folders.update(skipped_folders.values())
    listing.failures += [ListingFailure(place, error.reason, str(error)) for place, error in failures.items()]
    listing.looked_through.append(url)


def _reason_to_skip(below: str, exclusions: Exclusions) -> tuple[str, str | None] | None:
    """(reason, skipped folder or None for the file alone) by the names on the way; None to take the file."""
    parts = below.split("/")
    for at, name in enumerate(parts):
        is_folder, path_below = at + 1 < len(parts), "/".join(parts[: at + 1])
        reason = reserved_name(name, parts[at - 1] if at else "", is_folder=is_folder)
        if reason is None and exclusions.match(name, path_below, is_folder=is_folder):
            reason = "excluded"
        if reason is not None:
            return reason, path_below if is_folder else None
    return None


def _listed(file: RemoteFile) -> ListedFile:
    return ListedFile(file.url, -1 if file.size is None else file.size, file.version)


def by_image(values: Mapping[str, Any], listing: Listing) -> dict[str, Any]:
    """What a manifest says, by the path of each image: what it says about a shard holds for every image in it."""
    if not values:
        return {}
    found = {file.path: values[file.path] for file in listing.files if file.path in values}
    for shard in listing.shards:
        for number in range(len(shard.names)):
            path = shard.path_of(number)
            if (value := values.get(path, values.get(shard.path))) is not None:
                found[path] = value
    return found


def sidecar_values(listing: Listing) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """(labels, facts) that shards themselves say about their images, by path: `1.cls` and `1.json` about `1.jpg`.

    What cannot be read of them is counted as skipped in the listing.
    """
    labels: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}
    for shard in listing.shards:
        label_by_key: dict[str, str] = {}
        facts_by_key: dict[str, dict[str, Any]] = {}
        try:
            for key, suffix, data in read_sidecars(shard):
                value = None if data is None else _parse_sidecar(suffix, data)
                if isinstance(value, str):
                    label_by_key[key] = value
                elif value is not None:
                    facts_by_key[key] = value
                else:
                    listing.skipped_files["unreadable .cls or .json in a shard"] += 1
        except ImageError as error:
            listing.failures.append(ListingFailure(shard.path, error.reason, str(error)))
        if label_by_key or facts_by_key:
            for number, name in enumerate(shard.names):
                key, path = sample_key(name), shard.path_of(number)
                if key in label_by_key:
                    labels[path] = label_by_key[key]
                if key in facts_by_key:
                    facts[path] = facts_by_key[key]
    return labels, facts


def _parse_sidecar(suffix: str, data: bytes) -> str | dict[str, Any] | None:
    """A label, or facts as JSON values; None for what is neither."""
    try:
        if suffix == ".cls":
            return data.decode("utf-8").replace("\0", "").strip() or None
        value = to_json_value(json.loads(data))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

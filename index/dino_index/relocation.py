"""Following a folder that was moved: the catalog's paths are rewritten, ids and embeddings stay.

OLD need not exist on this machine, nor be a path of its system: `D:\\photos` of a catalog that came from Windows counts
as well as a URL.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, CollectionRow, ImageRow, SourceRow, bound_parts
from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.collections import CollectionInfo, find_collection, join_path, source_paths
from dino_index.errors import ImageError, RelocationRefused, SourceNotFound
from dino_index.image_paths import absolute_path, is_shard_name, is_url, split_member
from dino_index.recording import Sources

_MAX_CHECKED = 1000
_WINDOWS = re.compile(r"[A-Za-z]:([\\/]|$)|\\\\")


@dataclass(frozen=True, kw_only=True)
class Relocation:
    """What a relocation did.

    images: of all collections together, failed entries included. collections: names of those that had any.
    checked, missing, changed: of a sample of readable images, how many were looked for at the new place, were not
    there, and were there with another size.
    """

    images: int
    collections: Sequence[str]
    checked: int
    missing: int
    changed: int


def relocate(
    catalog: Catalog, old: str, new: str | os.PathLike[str], *, collection: str | None = None, unchecked: bool = False
) -> Relocation:
    """Rewrites the paths of all images at or below `old` to the same places at or below `new`.

    old, new: folders, files, shards or URLs. collection: the only one to change; None for all of the home.
    unchecked: also when files are not at the new place.
    Raises SourceNotFound where no image lies below `old`; RelocationRefused where files are missing at the new place
    or have another size there, or where a collection knows images at both places; CollectionNotFound, CatalogErrors.
    Nothing is changed then.
    """
    old, new = _normalised(old), absolute_path(new)
    # Looked for outside of the transaction that writes, as servers may take their time.
    with catalog.reading() as session:
        moves = _moves(session, old, new, collection)
        found = _check(session, moves)
    if (found["missing"] or found["changed"]) and not unchecked:
        raise RelocationRefused(_refusal(found, new))
    with catalog.writing() as session:
        moves = _moves(session, old, new, collection)
        for move in moves:
            move.apply(session)
    return Relocation(
        images=sum(len(move.new_paths) for move in moves),
        collections=[move.collection.name for move in moves],
        checked=found["checked"], missing=found["missing"], changed=found["changed"],
    )  # fmt: skip


def _moves(session: Session, old: str, new: str, collection: str | None) -> list[_Move]:
    """What moves in each collection that is concerned."""
    names = [collection] if collection is not None else list(session.scalars(select(CollectionRow.name)))
    moves = [_Move(session, find_collection(session, name), old, new) for name in sorted(names)]
    moves = [move for move in moves if move.new_paths]
    if not moves:
        where = f"collection {collection!r}" if collection is not None else "any collection of this home"
        raise SourceNotFound(
            f"expected images of {where} at or below {encode_path(old)}, found none; "
            "the folders that are known are listed by: dino-search info"
        )
    for move in moves:
        move.refuse_collisions()
    return moves


class _Move:
    """One collection's part of a relocation. new_paths: absolute path at the new place, by image id."""

    def __init__(self, session: Session, collection: CollectionInfo, old: str, new: str) -> None:
        self.collection = collection
        self._new = new
        self._sources = source_paths(session, collection)
        self._moved_sources = {
            source_id: _join(new, rest)
            for source_id, path in self._sources.items()
            if (rest := _rest(path, old)) is not None
        }
        self.new_paths: dict[int, str] = {}
        self._other_paths: dict[int, str] = {}
        within = {source_id: rest for source_id, path in self._sources.items() if (rest := _rest(old, path))}
        rows = session.execute(
            select(ImageRow.id, ImageRow.source_id, ImageRow.path).where(ImageRow.collection_id == collection.id)
        )
        for image_id, source_id, name in rows:
            if source_id in self._moved_sources:
                self.new_paths[image_id] = join_path(self._moved_sources[source_id], name)
                continue
            parts, rest = decode_path(name).split("/"), within.get(source_id)
            if rest is not None and _begins_with(parts, rest, _is_windows(self._sources[source_id])):
                self.new_paths[image_id] = _join(new, parts[len(rest) :])
            else:
                self._other_paths[image_id] = join_path(self._sources[source_id], name)

    def refuse_collisions(self) -> None:
        known = set(self._other_paths.values()).intersection(self.new_paths.values())
        if known:
            raise RelocationRefused(
                f"collection {self.collection.name!r} knows {len(known)} of the images at the new place already, such "
                f"as {encode_path(min(known))}; drop those first: dino-search remove {encode_path(self._new)} "
                f"-c {self.collection.name}"
            )

    def apply(self, session: Session) -> None:
        """Moves sources and images, so that each image belongs to the nearest source that holds it."""
        by_path = {path: source_id for source_id, path in self._sources.items() if source_id not in self._moved_sources}
        moved = {path: source_id for source_id, path in self._moved_sources.items() if path not in by_path}
        # In two steps, as a source may move to where another one still is.
        for path_of in (lambda path: f"moving to {path}", lambda path: path):
            for path, source_id in moved.items():
                values = {"path": encode_path(path_of(path))}
                session.execute(update(SourceRow).where(SourceRow.id == source_id).values(**values))
        sources = Sources({source_id: path for path, source_id in (by_path | moved).items()})
        homeless = [path for path in self.new_paths.values() if sources.find(path) is None]
        if homeless:
            row = SourceRow(collection_id=self.collection.id, path=encode_path(_source_for(homeless, self._new)))
            session.add(row)
            session.flush()
            sources = Sources({**sources.paths_by_id, row.id: decode_path(row.path)})
        self._rehome(session, sources)
        for source_id in self._moved_sources.keys() - sources.paths_by_id.keys():
            session.execute(delete(SourceRow).where(SourceRow.id == source_id))

    def _rehome(self, session: Session, sources: Sources) -> None:
        """Writes the place of each image that is not where it was, relative to its source."""
        now = session.execute(
            select(ImageRow.id, ImageRow.source_id, ImageRow.path).where(ImageRow.collection_id == self.collection.id)
        )
        places = {image_id: (source_id, name) for image_id, source_id, name in now}
        changed: list[dict[str, Any]] = []
        for image_id, path in (self.new_paths | self._other_paths).items():
            place = sources.locate(path)
            if place != places[image_id]:
                changed.append({"id": image_id, "source_id": place[0], "path": place[1]})
        if not changed:
            return
        taken = set(places.values())
        if any((values["source_id"], values["path"]) in taken for values in changed):
            # As above.
            session.execute(update(ImageRow), [{"id": each["id"], "path": f"\n{each['id']}"} for each in changed])
        session.execute(update(ImageRow), changed)


def _check(session: Session, moves: Sequence[_Move]) -> dict[str, Any]:
    """Looks for a seeded sample of the readable images at the new place."""
    candidates = [(image_id, path) for move in moves for image_id, path in move.new_paths.items()]
    sizes: dict[int, int] = {}
    for part in bound_parts([image_id for image_id, _ in candidates]):
        rows = session.execute(select(ImageRow.id, ImageRow.size).where(ImageRow.id.in_(part), ImageRow.status == "ok"))
        sizes |= dict(rows.all())
    readable = [(image_id, path) for image_id, path in candidates if image_id in sizes]
    sample = readable if len(readable) <= _MAX_CHECKED else random.Random(0).sample(readable, _MAX_CHECKED)
    missing: list[str] = []
    changed: list[str] = []
    for image_id, path in sample:
        size = _size_at(path)
        if size is None:
            missing.append(path)
        elif size != sizes[image_id]:
            changed.append(path)
    example = encode_path((missing or changed or [""])[0])
    return {"checked": len(sample), "missing": len(missing), "changed": len(changed), "example": example}


def _size_at(path: str) -> int | None:
    """Size of the image at a path, None where it is not or cannot be asked for."""
    try:
        if member := split_member(path):
            from dino_index.shards import find_member

            shard, number = find_member(*member)
            return shard.sizes[number]
        if is_url(path):
            from dino_index.remote_files import describe

            return describe(path).size
        return os.stat(path).st_size
    except (ImageError, OSError, ValueError):
        return None


def _refusal(found: Mapping[str, Any], new: str) -> str:
    what = [f"{found['missing']} are missing"] if found["missing"] else []
    what += [f"{found['changed']} have another size"] if found["changed"] else []
    return (
        f"expected the files below {encode_path(new)}; of {found['checked']} that were looked for, "
        f"{' and '.join(what)}, such as {found['example']}; check the path, or repeat with --yes"
    )


def _source_for(paths: Sequence[str], new: str) -> str:
    """The source for images at or below `new`: itself, or its folder where it is the one file or shard that moved."""
    is_file = list(paths) == [new] or (is_shard_name(new) and os.path.isfile(new))
    return os.path.dirname(new) if is_file and not is_url(new) else new


def _normalised(path: str) -> str:
    if _is_windows(path):
        return path.rstrip("\\/") if len(path) > 3 else path[:2]
    return absolute_path(path)


def _is_windows(path: str) -> bool:
    return _WINDOWS.match(path) is not None


def _parts(path: str) -> list[str]:
    if _is_windows(path):
        return [part for part in re.split(r"[\\/]", path) if part]
    scheme, found, rest = path.partition("://") if is_url(path) else ("", "", path)
    return [scheme + found, *(part for part in rest.split("/") if part)]


def _rest(path: str, folder: str) -> list[str] | None:
    """The parts of a path below a folder, none where it is the folder; None where it does not lie there."""
    parts, above = _parts(path), _parts(folder)
    if _is_windows(path) != _is_windows(folder) or not _begins_with(parts, above, _is_windows(path)):
        return None
    return parts[len(above) :]


def _begins_with(parts: Sequence[str], beginning: Sequence[str], is_windows: bool) -> bool:
    first = list(parts[: len(beginning)])
    if is_windows:
        return [part.lower() for part in first] == [part.lower() for part in beginning]
    return first == list(beginning)


def _join(folder: str, parts: Sequence[str]) -> str:
    if not parts:
        return folder
    return "/".join([folder.rstrip("/"), *parts]) if is_url(folder) else os.path.join(folder, *parts)

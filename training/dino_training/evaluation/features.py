"""Embeddings of folders of pictures, by the same pipeline that `index` uses, and of single squares.

Only a fixed number of pictures is ever in memory; vectors are kept in float16.

Shapes: N pictures, D channels, S x S pixels, C = 3 colours.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dino_index.backbones import Backbone, Device, choose_device
from dino_index.catalog.portable_paths import encode_path
from dino_index.embedding import EmbeddedFile, EmbeddingSettings, FailedFile, embed_files
from dino_index.errors import NoImagesFound
from dino_index.image_bytes import FileContent, ReadLimits, read_file
from dino_index.image_files import ListedFile, Listing, list_images, type_by_name
from dino_index.image_paths import absolute_path
from dino_index.indexing import Progress
from dino_index.model_files import ModelSpec
from dino_training.evaluation.feature_cache import FeatureCache, RawVectors
from dino_training.set_files import Purpose, SetPictures, is_set_file, open_sets

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """The readable pictures below a folder, and what became of the other files. cls_ND, gem_ND: raw, float16."""

    folder: str
    paths: list[str]
    sha256: list[bytes]
    cls_ND: NDArray[np.float16]
    gem_ND: NDArray[np.float16]
    unreadable: dict[str, str]
    """Path of each file that should be a picture and cannot be used: the reason."""
    ignored: Counter[str]
    """Files that are none, by type."""
    labels: dict[str, str] = field(default_factory=dict)
    """What the files of a published set say of their pictures."""

    def __len__(self) -> int:
        return len(self.paths)

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": encode_path(self.folder),
            "images": len(self),
            "unreadable": [{"path": encode_path(path), "reason": why} for path, why in sorted(self.unreadable.items())],
            "ignored": dict(sorted(self.ignored.items())),
        }


class FeatureStore:
    """One model, and the vectors that it gave before. For one thread at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        device: Device = "auto",
        settings: EmbeddingSettings | None = None,
        cache: Path | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_remark: Callable[[str], None] = lambda remark: None,
    ) -> None:
        """cache: a folder; None for none. on_progress: of each folder from 0 on."""
        self.spec = spec
        self.settings = settings or EmbeddingSettings()
        self.on_progress = on_progress
        self.on_remark = on_remark
        self._device: Device = device
        self.cache_folder = cache
        self._cache = FeatureCache(cache, spec.fingerprint, on_remark) if cache is not None else None

    @cached_property
    def backbone(self) -> Backbone:
        """Loaded when it is first needed. Raises ModelError."""
        return Backbone(self.spec, device=self._device)

    @property
    def device(self) -> torch.device:
        """Where the model runs. Raises ModelError."""
        return choose_device(self._device)

    def to_json(self) -> dict[str, Any]:
        """What the vectors depend on."""
        return {
            "model": self.spec.name,
            "fingerprint": self.spec.fingerprint,
            "input_size": self.spec.input_size,
        }

    def at_size(self, input_size: int) -> FeatureStore:
        """The same model for squares of another side in pixels. Raises ModelError."""
        return FeatureStore(
            replace(self.spec, input_size=input_size),
            device=self._device,
            settings=self.settings,
            cache=self.cache_folder,
            on_progress=self.on_progress,
            on_remark=self.on_remark,
        )

    def embed_folder(
        self, folder: StrPath, *, only: Callable[[str], bool] = lambda path: True, set_purpose: Purpose | None = None
    ) -> Pictures:
        """All pictures below a folder, squashed to the model's input size.

        only: which paths are looked at; the others are left out without a word. set_purpose: those in the files of
        a published set, too, with their labels, that are for this; the folder may then be such a file itself.
        Raises SourceNotFound; NoImagesFound where not one can be read; SetFileUnusable; ModelError.
        """
        sets = SetPictures() if set_purpose is None else _open_sets(folder, set_purpose)
        listing = Listing() if sets.files and is_set_file(absolute_path(folder)) else list_images([folder])
        counted = {path for file in sets.files for path in file.files}
        listing.ignored = +(listing.ignored - Counter(type_by_name(os.path.basename(path)) for path in counted))
        unreadable = {failure.path: failure.message for failure in listing.failures if only(failure.path)}
        embedded = self._embed([file for file in listing.files if only(file.path)], unreadable)
        listed = [ListedFile(name, size, 0) for name, size in zip(sets.names, sets.sizes, strict=True)]
        embedded += self._embed(listed, unreadable, sets.read)
        labels = {name: label for name, label in zip(sets.names, sets.labels(), strict=True) if label is not None}
        if not embedded:
            examples = "".join(f", such as {path} ({why})" for path, why in list(unreadable.items())[:1])
            raise NoImagesFound(
                f"expected pictures below {os.fsdecode(folder)}, found none that can be read: {len(unreadable)} "
                f"unreadable{examples}, {listing.ignored.total()} other files; name a folder with JPEG, PNG or other "
                "pictures"
            )
        return Pictures(
            folder=os.path.abspath(os.fsdecode(folder)),
            paths=[path for path, _, _ in embedded],
            sha256=[sha256 for _, sha256, _ in embedded],
            cls_ND=np.stack([cls_D for _, _, (cls_D, _) in embedded]),
            gem_ND=np.stack([gem_D for _, _, (_, gem_D) in embedded]),
            unreadable=unreadable,
            ignored=listing.ignored,
            labels=labels,
        )

    def embed_squares(
        self, squares_SSC: Sequence[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """(cls_ND, gem_ND), raw, of pictures in the model's input size; not cached."""
        size = self.settings.batch_size or self.backbone.batch_size
        batches = [self.backbone.stack(squares_SSC[begin : begin + size]) for begin in range(0, len(squares_SSC), size)]
        with self.backbone.forward_threads() as forward:
            parts = list(forward.map(self.backbone.embed, batches))
        return np.concatenate([cls_BD for cls_BD, _ in parts]), np.concatenate([gem_BD for _, gem_BD in parts])

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _embed(
        self,
        files: Sequence[ListedFile],
        unreadable: dict[str, str],
        read: Callable[[str, ReadLimits], FileContent] = read_file,
    ) -> list[tuple[str, bytes, RawVectors]]:
        """(path, sha256, vectors) of each file that can be read; the others are added to `unreadable`."""
        found: list[tuple[str, bytes, RawVectors]] = []
        again: list[ListedFile] = []
        outcomes = embed_files(files, lambda: self.backbone, self.spec.input_size, self._size_of, self.settings, read)
        num_done = 0
        for batch in outcomes:
            new: list[tuple[bytes, tuple[int, int], RawVectors]] = []
            for outcome in batch:
                if isinstance(outcome, FailedFile):
                    unreadable[outcome.file.path] = f"{outcome.error.reason}: {outcome.error}"
                elif (vectors := self._vectors_of(outcome)) is None:
                    again.append(outcome.file)
                else:
                    facts = outcome.facts
                    found.append((outcome.file.path, facts.sha256, vectors))
                    if outcome.cls_D is not None:
                        new.append((facts.sha256, (facts.width, facts.height), vectors))
            if self._cache is not None:
                self._cache.add(new)
            num_done += len(batch)
            self.on_progress(Progress(done=num_done, total=len(files), failed=len(unreadable)))
        if again:  # the cache broke between the look and the taking
            self._cache = None
            found += self._embed(again, unreadable, read)
            place_of = {file.path: place for place, file in enumerate(files)}
            found.sort(key=lambda entry: place_of[entry[0]])
        return found

    def _size_of(self, sha256: bytes) -> tuple[int, int] | None:
        return None if self._cache is None else self._cache.size_of(sha256)

    def _vectors_of(self, outcome: EmbeddedFile) -> RawVectors | None:
        if outcome.cls_D is not None and outcome.gem_D is not None:
            return outcome.cls_D, outcome.gem_D
        return None if self._cache is None else self._cache.get(outcome.facts.sha256)


def _open_sets(folder: StrPath, purpose: Purpose) -> SetPictures:
    """Files of a published set. Raises SetFileUnusable; NoImagesFound where all are for another purpose."""
    sets = open_sets([folder], purpose)
    if sets.num_left_out and not sets.files:
        raise NoImagesFound(
            f"expected files for {purpose} in {os.fsdecode(folder)}, found {sets.num_left_out} for another purpose; "
            "name the file of pictures that is meant"
        )
    return sets

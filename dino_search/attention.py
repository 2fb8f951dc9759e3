"""Where a model looks, as files: for each picture an overlay, a map and a mask for each head of the last block.

Shapes: H heads, h x w patches, Y x X pixels of the picture, C = 3 colours, S the side that the model sees.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_index.attention_masks import enlarge, keep_mass
from dino_index.backbones import Backbone
from dino_index.catalog.portable_paths import encode_path
from dino_index.embedding import num_processors
from dino_index.errors import AttentionUnavailable, ImageError, ModelError, OutputExists, OutputUnwritable
from dino_index.heat import draw_heat, with_heat
from dino_index.image_bytes import DEFAULT_LIMITS, ReadLimits, read_file
from dino_index.image_paths import absolute_path, is_below, separator_of
from dino_index.images import decode, load_image
from dino_index.indexing import Progress
from dino_index.source_listing import list_sources, shard_files
from dino_index.video_frames import is_video, read_frames, require_opencv
from dino_search.attention_sheet import MAX_ROWS, Row, draw_sheet, sheet_row
from dino_training.evaluation.object_masks import MaskFolder, MaskScores, mask_result, read_mask
from dino_training.evaluation.results import EvaluationResult, refuse_existing_results

GRID_FILE = "grid.png"
_OVERLAY_FILE = "overlay.png"
_OURS = re.compile(r"overlay\.png|(head|mask)-\d+\.png")
_PNG_LEVEL = 3  # a third of the usual time, files a tenth larger
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What is drawn and measured."""

    mass: float = 0.6
    """Share of a head's attention that its mask keeps."""
    grid: bool = False
    """One more picture of all pictures."""
    masks: Path | None = None
    """Folder of masks of the objects."""
    every: int = 1
    """Of a video, each so-manieth frame."""
    force: bool = False
    limits: ReadLimits = DEFAULT_LIMITS
    seed: int = 0
    """Of the confidence intervals."""

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass must be above 0 and at most 1, found {self.mass}")
        if self.every < 1:
            raise ValueError(f"every must be 1 or more, found {self.every}")


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnPicture:
    """What was written of one picture. frame: its number in a video. scores: None without a mask."""

    path: str
    folder: Path
    frame: int | None
    size: tuple[int, int]
    grid: tuple[int, int]
    num_heads: int
    to_patches_H: NDArray[np.float64]
    scores: MaskScores | None

    def to_json(self) -> dict[str, Any]:
        def files(what: str) -> list[str]:
            return [encode_path(str(self.folder / _numbered(what, head))) for head in range(self.num_heads)]

        frame = {} if self.frame is None else {"frame": self.frame}
        return {
            "path": encode_path(self.path), **frame,
            "folder": encode_path(str(self.folder)),
            "width": self.size[0], "height": self.size[1],
            "patches": list(self.grid),
            "overlay": encode_path(str(self.folder / _OVERLAY_FILE)),
            "heads": files("head"), "masks": files("mask"),
            "attention_to_patches": self.to_patches_H.tolist(),
            **(self.scores.to_json() if self.scores is not None else {}),
        }  # fmt: skip


@dataclass(kw_only=True)
class DrawnAttention:
    """What one call did. failed: reason and message by path. result: of the masks, None without."""

    out: Path
    model: str
    fingerprint: str
    input_size: int
    mass: float
    pictures: list[DrawnPicture] = field(default_factory=list)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    grid: Path | None = None
    result: EvaluationResult | None = None

    def to_json(self) -> dict[str, Any]:
        """With masks, the figures of the protocol as well."""
        return (self.result.to_json() if self.result is not None else {}) | {
            "out": encode_path(str(self.out)),
            "model": self.model,
            "fingerprint": self.fingerprint,
            "input_size": self.input_size,
            "mass": self.mass,
            "pictures": [picture.to_json() for picture in self.pictures],
            "failed": [
                {"path": encode_path(path), "reason": reason, "message": message}
                for path, (reason, message) in self.failed.items()
            ],
            "ignored": dict(sorted(self.ignored.items())),
            "skipped": dict(sorted(self.skipped.items())),
            "grid": None if self.grid is None else encode_path(str(self.grid)),
        }


def draw_attention(
    sources: Sequence[str | os.PathLike[str]],
    out: Path,
    load_backbone: Callable[[], Backbone],
    options: AttentionOptions | None = None,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_remark: Callable[[str], None] = lambda remark: None,
) -> DrawnAttention:
    """Draws the attention of all pictures under `sources` into a folder for each, below `out`.

    sources: what `list_sources` takes, and video files. load_backbone: called once the sources are known to be there.
    A picture that cannot be read is in `failed`, and the others go on.
    Raises SourceError, ModelError (AttentionUnavailable for a model without [CLS] attention), OutputExists,
    OutputUnwritable; EvaluationImpossible where masks were asked for and no picture has one.
    """
    options = options or AttentionOptions()
    plan = _Plan.of(sources, on_remark)
    _refuse_existing(plan, out, options)
    masks = _open_masks(plan, options)
    backbone = load_backbone()
    if not backbone.has_attention:
        raise AttentionUnavailable(
            f"attention maps need a vision transformer of timm with a [CLS] token, found {backbone.spec.architecture} "
            f"({backbone.spec.name}); take another --model, such as bundled"
        )
    drawn = DrawnAttention(
        out=out, model=backbone.spec.name, fingerprint=backbone.spec.fingerprint,
        input_size=backbone.spec.input_size, mass=options.mass,
        failed=dict(plan.failed), ignored=plan.ignored, skipped=plan.skipped,
    )  # fmt: skip
    rows: list[Row] = []
    drawing = _Drawing(plan, out, masks, options, on_remark)
    for done, outcome in enumerate(drawing.of(backbone), 1):
        if isinstance(outcome, _Failure):
            drawn.failed[outcome.path] = outcome.reason, outcome.message
        else:
            picture, row = outcome
            drawn.pictures.append(picture)
            if row is not None and len(rows) < MAX_ROWS:
                rows.append(row)
        on_progress(Progress(done=done, total=max(done, len(plan.files)), failed=len(drawn.failed)))
    if rows:
        drawn.grid = out / GRID_FILE
        _save(draw_sheet(rows), drawn.grid)
        if len(drawn.pictures) > len(rows):
            on_remark(f"{GRID_FILE} shows the first {len(rows)} of {len(drawn.pictures)} pictures")
    if masks is not None and drawn.pictures:
        drawn.result = _judge(drawn, options, on_remark)
    return drawn


def _open_masks(plan: _Plan, options: AttentionOptions) -> MaskFolder | None:
    """Raises SourceNotFound, EvaluationImpossible: before hours of drawing."""
    if options.masks is None:
        return None
    names = [file.mask_name for file in plan.files]
    masks = MaskFolder(options.masks, names)
    if plan.files and not any(file.is_video for file in plan.files):  # whose frames are not counted yet
        masks.require_any(names)
    return masks


def _judge(drawn: DrawnAttention, options: AttentionOptions, on_remark: Callable[[str], None]) -> EvaluationResult:
    scores = [picture.scores for picture in drawn.pictures if picture.scores is not None]
    if len(scores) < len(drawn.pictures):
        num_left_out = len(drawn.pictures) - len(scores)
        on_remark(f"{num_left_out} pictures have no mask of their own with an object, and were not compared")
    protocol = f"attention of {drawn.model} against masks, {options.mass:.0%} of the mass"
    return mask_result(scores, protocol=protocol, mass=options.mass, seed=options.seed)


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """name: of the folder below `out`, with `/`. mask_name: what its mask is called, the same but for a number."""

    path: str
    name: str
    mask_name: str
    is_video: bool


@dataclass(kw_only=True)
class _Plan:
    """Which pictures and videos there are."""

    files: list[_Planned]
    failed: dict[str, tuple[str, str]]
    ignored: Counter[str]
    skipped: Counter[str]

    @classmethod
    def of(cls, sources: Sequence[str | os.PathLike[str]], on_remark: Callable[[str], None]) -> _Plan:
        """Raises SourceError."""
        given = list(dict.fromkeys(map(absolute_path, sources)))
        videos = [path for path in given if is_video(path) and os.path.isfile(path)]
        for path in videos:
            require_opencv(path)
        others = [path for path in given if path not in set(videos)]
        listing = list_sources(others)
        if listing.num_repeated:
            on_remark(f"{listing.num_repeated} rows of manifests name a file again; it is drawn once")
        files = [*listing.files, *(file for shard in listing.shards for file in shard_files(shard))]
        names = _Names(on_remark)
        return cls(
            files=[
                *(names.take(file.path, others, is_video=False) for file in files),
                *(names.take(path, others, is_video=True) for path in videos),
            ],
            failed={failure.path: (failure.reason, failure.message) for failure in listing.failures},
            ignored=listing.ignored,
            skipped=listing.skipped_folders + listing.skipped_files,
        )


class _Names:
    """A name for each picture, none twice: that of its place below the given folder."""

    def __init__(self, on_remark: Callable[[str], None]) -> None:
        self._on_remark = on_remark
        self._taken: set[str] = set()

    def take(self, path: str, given: Sequence[str], *, is_video: bool) -> _Planned:
        folder = next((folder for folder in given if path != folder and is_below(path, folder)), None)
        separator = separator_of(path)
        below = path.rpartition(separator)[2] if folder is None else path[len(folder) :].lstrip(separator)
        # A shard's member or a URL may hold parts that would lead out of the folder.
        parts = [part for part in below.replace(separator, "/").split("/") if part not in ("", ".", "..")]
        name = wanted = os.path.splitext("/".join(parts))[0] or "picture"
        number = 1
        # Some file systems take `A` and `a` for the same.
        while name.casefold() in self._taken:
            number += 1
            name = f"{wanted}-{number}"
        self._taken.add(name.casefold())
        if name != wanted:
            self._on_remark(f"{path}: {wanted} is another picture's; this one is in {name}")
        return _Planned(path=path, name=name, mask_name=wanted, is_video=is_video)


@dataclass(frozen=True, kw_only=True)
class _Failure:
    path: str
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """path, name, mask_name: as in the plan. pixels_YXC: in the picture's own size. square_SSC: what the model sees."""

    path: str
    name: str
    mask_name: str
    frame: int | None
    pixels_YXC: NDArray[np.uint8]
    square_SSC: NDArray[np.uint8]


class _Drawing:
    """Reading and writing in threads, the forward passes in between in one: they share hooks on the model."""

    def __init__(
        self,
        plan: _Plan,
        out: Path,
        masks: MaskFolder | None,
        options: AttentionOptions,
        on_remark: Callable[[str], None],
    ) -> None:
        self._plan, self._out, self._masks, self._options, self._on_remark = plan, out, masks, options, on_remark

    def of(self, backbone: Backbone) -> Iterator[_Failure | tuple[DrawnPicture, Row | None]]:
        """What became of each picture, in order; few are in memory at a time."""
        size, num_ahead = backbone.spec.input_size, num_processors()
        with ThreadPoolExecutor(num_ahead, "pictures") as pool:
            writing: deque[Future[tuple[DrawnPicture, Row | None]]] = deque()
            for loaded in self._loaded(pool, size, num_ahead):
                if isinstance(loaded, _Failure):
                    yield from _results(writing, 0)
                    yield loaded
                    continue
                (maps_Hhw,) = backbone.attention(loaded.square_SSC[None])
                if not np.isfinite(maps_Hhw).all():
                    raise ModelError(
                        f"the attention of {backbone.spec.name} to {loaded.path} is not finite: its weights are of no "
                        "use; take another --model"
                    )
                writing.append(pool.submit(self._write, loaded, maps_Hhw))
                yield from _results(writing, num_ahead)
            yield from _results(writing, 0)

    def _loaded(self, pool: ThreadPoolExecutor, size: int, num_ahead: int) -> Iterator[_Loaded | _Failure]:
        reading: deque[Future[_Loaded | _Failure]] = deque()
        for file in self._plan.files:
            if file.is_video:
                yield from _results(reading, 0)
                yield from self._frames(file, size)
                continue
            reading.append(pool.submit(self._load, file, size))
            yield from _results(reading, num_ahead)
        yield from _results(reading, 0)

    def _load(self, file: _Planned, size: int) -> _Loaded | _Failure:
        limits = self._options.limits
        try:
            data = read_file(file.path, limits).data
            return _Loaded(
                path=file.path, name=file.name, mask_name=file.mask_name, frame=None,
                pixels_YXC=decode(data, limits=limits).pixels_HWC,
                square_SSC=decode(data, size=(size, size), limits=limits).pixels_HWC,
            )  # fmt: skip
        except ImageError as error:
            return _Failure(path=file.path, reason=error.reason, message=str(error))

    def _frames(self, file: _Planned, size: int) -> Iterator[_Loaded | _Failure]:
        limits = self._options.limits
        frames = read_frames(file.path, every=self._options.every, limits=limits, on_remark=self._on_remark)
        try:
            for number, pixels_YXC in frames:
                square = load_image(Image.fromarray(pixels_YXC), size=(size, size), limits=limits)
                frame_name = f"frame-{number:06d}"
                yield _Loaded(
                    path=file.path, name=f"{file.name}/{frame_name}", mask_name=f"{file.mask_name}/{frame_name}",
                    frame=number,
                    pixels_YXC=pixels_YXC, square_SSC=square.pixels_HWC,
                )  # fmt: skip
        except ImageError as error:
            yield _Failure(path=file.path, reason=error.reason, message=str(error))

    def _write(self, loaded: _Loaded, maps_Hhw: NDArray[np.float32]) -> tuple[DrawnPicture, Row | None]:
        folder = self._out / loaded.name
        size = loaded.pixels_YXC.shape[1], loaded.pixels_YXC.shape[0]
        _make_folder(folder)
        _save(Image.fromarray(with_heat(loaded.pixels_YXC, maps_Hhw.mean(axis=0))), folder / _OVERLAY_FILE)
        for head, (map_hw, mask_hw) in enumerate(zip(maps_Hhw, keep_mass(maps_Hhw, self._options.mass), strict=True)):
            _save(draw_heat(map_hw, size), folder / _numbered("head", head))
            _save(Image.fromarray(enlarge(mask_hw, size)), folder / _numbered("mask", head))
        picture = DrawnPicture(
            path=loaded.path, folder=folder, frame=loaded.frame, size=size,
            grid=(maps_Hhw.shape[1], maps_Hhw.shape[2]), num_heads=len(maps_Hhw),
            to_patches_H=maps_Hhw.sum(axis=(1, 2), dtype=np.float64),
            scores=self._scores_of(loaded, maps_Hhw, size),
        )  # fmt: skip
        return picture, sheet_row(loaded.pixels_YXC, maps_Hhw) if self._options.grid else None

    def _scores_of(
        self, loaded: _Loaded, maps_Hhw: NDArray[np.float32], size: tuple[int, int]
    ) -> MaskScores | None:  # fmt: skip
        path = self._masks.find(loaded.mask_name) if self._masks is not None else None
        if path is None:
            return None
        try:
            truth = read_mask(path, self._options.limits)
        except ImageError as error:
            self._on_remark(f"the mask {path} cannot be read and was left out: {error}")
            return None
        if truth.size != size:
            self._on_remark(
                f"the mask {path} has {truth.size[0]} x {truth.size[1]} pixels, the picture {size[0]} x {size[1]}; "
                "it was resized"
            )
            truth = truth.resized(size)
        if not truth.object_YX.any():
            self._on_remark(f"the mask {path} has no object and was left out")
            return None
        return MaskScores.of(maps_Hhw, truth, self._options.mass)


def _results(waiting: deque[Future[_Result]], num_left: int) -> Iterator[_Result]:
    """Those of the oldest, until so many are left."""
    while len(waiting) > num_left:
        yield waiting.popleft().result()


def _refuse_existing(plan: _Plan, out: Path, options: AttentionOptions) -> None:
    """Raises OutputExists for the first file that would be overwritten without --force."""
    if options.masks is not None:
        refuse_existing_results(out, options.force)
    places = [out / file.name / ("" if file.is_video else _OVERLAY_FILE) for file in plan.files]
    places += [out / GRID_FILE] if options.grid else []
    for place in places:
        if os.path.lexists(place) and not options.force:
            raise OutputExists(f"{place} exists already; choose another --out or add --force to overwrite it")


def _make_folder(folder: Path) -> None:
    """Makes it, and drops what an earlier model with more heads has left in it. Raises OutputUnwritable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(folder):
            if _OURS.fullmatch(name):
                with suppress(IsADirectoryError):
                    os.unlink(folder / name)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _save(image: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, "PNG", compress_level=_PNG_LEVEL)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputUnwritable:
    return OutputUnwritable(f"{path} cannot be written: {error.strerror or error}; name another folder with --out")


def _numbered(what: str, head: int) -> str:
    return f"{what}-{head:02d}.png"

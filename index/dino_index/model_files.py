"""What a backbone's files say about it: architecture, input, fingerprint. Reads no tensor into torch.

Indexing an unchanged folder only has to know that the model is still the same one, so nothing here
imports torch or timm (the one exception is stated at `_description_by_file_name`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from dino_index.architectures import describe_tensors, strange_tensors
from dino_index.errors import ArchitectureUnknown, ModelError, ModelNotFound

Pooling = Literal["normalised", "reference"]

BUNDLED = "bundled"
BUNDLED_VERSION = "bundled_v5"
# A timm name: what to fetch where the bundled model is not good enough.
RECOMMENDED = "vit_small_patch16_224.dino"
METADATA_KEY = "dino_search"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Changes whenever the same weights and picture would give another stored vector.
_DESCRIPTOR_VERSION = 1
_MAX_STRANGE_LISTED = 4

# Files of PyTorch: read safely and converted once, see `checkpoints.py`.
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")

# What a channel of a model can see of a picture, and what it sees if its description does not say.
CHANNEL_NAMES = ("red", "green", "blue", "grey", "opacity", "nothing")
_USUAL_CHANNELS = {1: ("grey",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "opacity")}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A backbone before it is loaded: which file, which architecture, how pictures go in."""

    name: str
    """`bundled_v5`, a fetched model's name, or the file's path: what `info` shows and the collection stores."""
    weights_path: Path
    architecture: str
    """A timm architecture name, without a pretrained tag."""
    architecture_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for `timm.create_model` that differ from the architecture's own."""
    input_size: int
    """Side in pixels of the square that every picture is resized to."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each channel, 0..1: three values, or as many as the architecture's `in_chans` says."""
    std: tuple[float, ...] = IMAGENET_STD
    channels: tuple[str, ...] = ()
    """What each channel sees of a picture, of `CHANNEL_NAMES`; empty: the usual of one, three or four channels."""
    pooling: Pooling = "normalised"
    origin: str = "its description"
    """Where the architecture was read, in words."""

    def __post_init__(self) -> None:
        if not 8 <= self.input_size <= 4096:
            raise ModelError(f"input_size must be between 8 and 4096 px, found {self.input_size}")
        if self.pooling not in get_args(Pooling):
            raise ModelError(f"pooling must be one of {', '.join(get_args(Pooling))}, found {self.pooling!r}")
        number = self.architecture_args.get("in_chans", 3)
        if not self.channels and number not in _USUAL_CHANNELS:
            raise ModelError(
                f"in_chans is {number!r}, and a picture has three channels: the model's description must say under "
                f"'channels' what each one sees, of {', '.join(CHANNEL_NAMES)}"
            )
        if unknown := set(self.channels) - set(CHANNEL_NAMES):
            raise ModelError(f"channels may be {', '.join(CHANNEL_NAMES)}, found {', '.join(sorted(unknown))}")
        if self.channels and len(self.channels) != number:
            raise ModelError(f"channels must name what each of {number} channels sees, found {self.channels}")
        if len(self.mean) != number or len(self.std) != number:
            kind = "colour " if number == 3 else ""
            values = "1 value, as in_chans is 1" if number == 1 else f"{number} values, one a {kind}channel"
            raise ModelError(f"mean and std must have {values}, found {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ModelError(f"std must be above 0, found {self.std}")

    @property
    def seen_channels(self) -> tuple[str, ...]:
        """What each channel of the model sees of a picture, of `CHANNEL_NAMES`."""
        return self.channels or _USUAL_CHANNELS[len(self.mean)]

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of everything that decides a stored vector: weights, architecture, preprocessing, pooling.

        Independent of the file's name and of metadata inside it.
        """
        settings = {
            "weights": weights_digest(self.weights_path),
            "architecture": self.architecture,
            "architecture_args": self.architecture_args,
            "input_size": self.input_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "pooling": self.pooling,
            "descriptor_version": _DESCRIPTOR_VERSION,
        }
        if self.seen_channels != _USUAL_CHANNELS.get(len(self.mean)):
            settings["channels"] = list(self.seen_channels)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def config(self) -> dict[str, Any]:
        """The resolved settings as JSON values, as stored with a collection."""
        return {
            "weights_path": str(self.weights_path),
            "architecture": self.architecture,
            "architecture_args": self.architecture_args,
            "input_size": self.input_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "pooling": self.pooling,
        } | ({"channels": list(self.channels)} if self.channels else {})

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> ModelSpec:
        """The spec that `config` was taken from."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
        }
        values["weights_path"] = Path(config["weights_path"])
        return cls(name=name, origin="the collection", **values)


def resolve_model(
    model: str | Path = BUNDLED,
    *,
    pooling: Pooling = "normalised",
    input_size: int | None = None,
    models: Path | None = None,
    on_remark: Callable[[str], None] = lambda remark: None,
) -> ModelSpec:
    """The spec of `bundled` (or a bundled version's full name), of a model in the folder `models`, or of a local file.

    A name is a timm name whose weights have been fetched into `models`, or another file's there without `.safetensors`.
    A file is safetensors, or a PyTorch checkpoint, which is converted into `models` when it is first seen; on_remark
    is told then what was left out of it. A file's architecture is looked for, in this order, in the file's own
    metadata, in `NAME.json` beside it, in timm's `config.json` beside it, in the shapes of its tensors, and in its
    name (`vit_small_patch16_224.dino.safetensors`).
    input_size: side in pixels of the square that pictures are resized to; None for the model's own.
    Raises ModelNotFound (which names what there is), ArchitectureUnknown, CheckpointRefused, ModelError (a file that
    is neither), OutputUnwritable (no place for what is converted).
    """
    spec = _resolve(model, pooling, models, on_remark)
    return spec if input_size is None else replace(spec, input_size=input_size)


def _resolve(model: str | Path, pooling: Pooling, models: Path | None, on_remark: Callable[[str], None]) -> ModelSpec:
    if str(model) in (BUNDLED, BUNDLED_VERSION):
        path = Path(__file__).parent / "weights" / f"{BUNDLED_VERSION}.safetensors"
        return _spec(BUNDLED_VERSION, path, _read_json(path.with_suffix(".json")), pooling, "its description")
    path = Path(os.path.expanduser(model))
    if os.path.isfile(path):
        path = path.resolve()
        if path.suffix in CHECKPOINT_SUFFIXES:
            return _resolve_checkpoint(path, pooling, models, on_remark)
        description, origin = describe_file(path, shapes_in(path), metadata=True)
        return _spec(str(path), path, description, pooling, origin)
    if models is not None and (stored := stored_path(str(model), models)) is not None:
        description, origin = describe_file(stored, shapes_in(stored), metadata=True)
        return _spec(stored.name.removesuffix(".safetensors"), stored, description, pooling, origin)
    # Imports timm, which alone knows whether this is a name of its own.
    from dino_index.model_store import explain_missing

    raise ModelNotFound(explain_missing(str(model), models))


def _resolve_checkpoint(
    path: Path, pooling: Pooling, models: Path | None, on_remark: Callable[[str], None]
) -> ModelSpec:
    from dino_index.model_store import converted_checkpoint

    if models is None:
        raise ModelError(f"{path}: expected a .safetensors file where nothing can be converted")
    converted = converted_checkpoint(path, models, on_remark)
    beside = _description_beside(path)
    description, origin = beside or describe_file(converted, shapes_in(converted), metadata=True)
    return _spec(str(path), converted, description, pooling, origin)


def stored_path(name: str, models: Path) -> Path | None:
    """The weights of that name in the folder `models`, with or without timm's tag; None if there are none."""
    if not name or name.startswith(".") or os.path.basename(name) != name or "\\" in name:
        return None
    if (path := models / f"{name}.safetensors").is_file():
        return path.resolve()
    tagged = [path for path in models.glob("[!.]*.safetensors") if path.name.startswith(f"{name}.")]
    return tagged[0].resolve() if len(tagged) == 1 else None


def describe_file(path: Path, shapes: Mapping[str, list[int]], *, metadata: bool = False) -> tuple[dict[str, Any], str]:
    """The description of a weights file's architecture, and where it was read in words.

    metadata: whether the file is safetensors, whose own metadata come first. Raises ArchitectureUnknown, ModelError.
    """
    if metadata and METADATA_KEY in (found := _read_header(path)[0].get("__metadata__", {})):
        return _parse_json(found[METADATA_KEY], path), "the file's metadata"
    if beside := _description_beside(path):
        return beside
    if description := describe_tensors(shapes):
        return description, "the names and shapes of its tensors"
    return _description_by_file_name(path, shapes), "the file's name"


def shapes_in(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a safetensors file. Raises ModelError."""
    return {name: entry["shape"] for name, entry in _read_header(path)[0].items() if name != "__metadata__"}


def _description_beside(path: Path) -> tuple[dict[str, Any], str] | None:
    if (beside := path.with_suffix(".json")).is_file():
        return _read_json(beside), beside.name
    if (beside := path.with_name("config.json")).is_file():
        return _from_timm_config(_read_json(beside), beside), beside.name
    return None


def weights_digest(path: Path) -> str:
    """Hex sha256 over the tensors (name, dtype, shape, bytes; by name) of a safetensors file."""
    header, data_start = _read_header(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for name in sorted(header.keys() - {"__metadata__"}):
            tensor = header[name]
            begin, end = tensor["data_offsets"]
            digest.update(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
            file.seek(data_start + begin)
            remaining = end - begin
            while remaining and (chunk := file.read(min(remaining, 1 << 22))):
                digest.update(chunk)
                remaining -= len(chunk)
            if remaining:
                raise ModelError(f"{path} ends inside tensor {name!r}: the file is cut short, copy it again")
    return digest.hexdigest()


def _spec(name: str, path: Path, description: Mapping[str, Any], pooling: Pooling, origin: str) -> ModelSpec:
    known = {"architecture", "architecture_args", "input_size", "mean", "std", "channels", "card"}
    missing = {"architecture", "input_size"} - description.keys()
    unknown = description.keys() - known
    if missing or unknown:
        problem = f"lacks {sorted(missing)}" if missing else f"has unknown keys {sorted(unknown)}"
        raise ArchitectureUnknown(f"the description of {path} {problem}; it may hold {sorted(known)}")
    try:
        return ModelSpec(
            name=name,
            weights_path=path,
            architecture=str(description["architecture"]),
            architecture_args=dict(description.get("architecture_args", {})),
            input_size=int(description["input_size"]),
            mean=tuple(float(value) for value in description.get("mean", IMAGENET_MEAN)),
            std=tuple(float(value) for value in description.get("std", IMAGENET_STD)),
            channels=tuple(str(value) for value in description.get("channels", ())),
            pooling=pooling,
            origin=origin,
        )
    except (TypeError, ValueError) as error:
        raise ArchitectureUnknown(f"the description of {path} has a value of the wrong kind: {error}") from error


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its data starts (the format's published layout)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ModelError(f"{path} is no safetensors file: expected a header length, found {length}")
        header = _parse_json(file.read(length).decode("utf-8", "replace"), path)
    if not all(_is_header_entry(name, value) for name, value in header.items()):
        raise ModelError(f"{path} is no safetensors file: its header does not describe tensors")
    return header, 8 + length


def _is_header_entry(name: str, value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if name == "__metadata__":
        return all(isinstance(text, str) for text in value.values())
    offsets = value.get("data_offsets")
    return isinstance(value.get("shape"), list) and isinstance(offsets, list) and len(offsets) == 2 and "dtype" in value


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: expected JSON that describes the model, found {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object that describes the model, found {type(value).__name__}")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    return _parse_json(path.read_text(encoding="utf-8", errors="replace"), path)


def _from_timm_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Our description from the `config.json` that timm saves beside a model's weights."""
    if "architecture" not in config:
        raise ArchitectureUnknown(f"{path} names no 'architecture'; it is not timm's description of a model")
    preprocessing = config.get("pretrained_cfg") or {}
    arguments = config.get("model_args") or {}
    mean, std = preprocessing.get("mean", IMAGENET_MEAN), preprocessing.get("std", IMAGENET_STD)
    if arguments.get("in_chans") == 1 and len(mean) == len(std) == 3:
        # timm keeps the colours' values for a model of grey pictures.
        mean, std = ([sum(values) / 3] for values in (mean, std))
    return {
        "architecture": config["architecture"],
        "architecture_args": arguments,
        "input_size": (preprocessing.get("input_size") or [3, 224, 224])[-1],
        "mean": mean,
        "std": std,
    }


def _description_by_file_name(path: Path, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """The timm architecture that the file is named after. Imports timm: only its registry knows the names."""
    import timm

    architecture = path.stem.split(".")[0]
    if not timm.is_model(architecture):
        strange = strange_tensors(shapes)
        but_for = f" (a known one but for {', '.join(strange[:_MAX_STRANGE_LISTED])})" if strange else ""
        raise ArchitectureUnknown(
            f"{path} does not say which architecture it is for{but_for}; name it after a timm architecture "
            f"(vit_small_patch16_224.safetensors) or put {path.stem}.json beside it with "
            '{"architecture": NAME, "input_size": PIXELS}'
        )
    try:
        preset = timm.get_pretrained_cfg(path.stem)
    except RuntimeError:  # no tag of timm's
        preset = timm.get_pretrained_cfg(architecture)
    return {
        "architecture": architecture,
        "input_size": preset.input_size[-1] if preset else 224,
        "mean": preset.mean if preset else IMAGENET_MEAN,
        "std": preset.std if preset else IMAGENET_STD,
    }

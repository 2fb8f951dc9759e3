"""What a backbone's files say about it: architecture, input, fingerprint. Reads no tensor into torch.

Indexing an unchanged folder only has to know that the model is still the same one, so nothing here
imports torch or timm (the one exception is stated at `_description_by_file_name`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from dino_index.errors import ArchitectureUnknown, ModelError, ModelNotFound

Pooling = Literal["normalised", "reference"]

BUNDLED = "bundled"
BUNDLED_VERSION = "bundled_v2"
METADATA_KEY = "dino_search"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Changes whenever the same weights and picture would give another stored vector.
_DESCRIPTOR_VERSION = 1

_PLAIN_VIT_NAMES = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large"}
_PLAIN_VIT_KEY = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|head\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A backbone before it is loaded: which file, which architecture, how pictures go in."""

    name: str
    """`bundled_v2`, or the file's path: what `info` shows and the collection stores."""
    weights_path: Path
    architecture: str
    """A timm architecture name, without a pretrained tag."""
    architecture_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for `timm.create_model` that differ from the architecture's own."""
    input_size: int
    """Side in pixels of the square that every picture is resized to."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each channel, 0..1: three values, or one for a model of grey pictures (`in_chans` 1)."""
    std: tuple[float, ...] = IMAGENET_STD
    pooling: Pooling = "normalised"
    origin: str = "its description"
    """Where the architecture was read, in words."""

    def __post_init__(self) -> None:
        if not 8 <= self.input_size <= 4096:
            raise ModelError(f"input_size must be between 8 and 4096 px, found {self.input_size}")
        if self.pooling not in get_args(Pooling):
            raise ModelError(f"pooling must be one of {', '.join(get_args(Pooling))}, found {self.pooling!r}")
        channels = self.architecture_args.get("in_chans", 3)
        if channels not in (1, 3):
            raise ModelError(f"in_chans must be 3 (colour) or 1 (grey), found {channels!r}")
        if len(self.mean) != channels or len(self.std) != channels:
            values = "3 values, one a colour channel" if channels == 3 else "1 value, as in_chans is 1"
            raise ModelError(f"mean and std must have {values}, found {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ModelError(f"std must be above 0, found {self.std}")

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
        }

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> ModelSpec:
        """The spec that `config` was taken from."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
        }
        values["weights_path"] = Path(config["weights_path"])
        return cls(name=name, origin="the collection", **values)


def resolve_model(model: str | Path = BUNDLED, *, pooling: Pooling = "normalised") -> ModelSpec:
    """The spec of `bundled` (or a bundled version's full name) or of a local safetensors file.

    A file's architecture is looked for, in this order, in the file's own metadata, in `NAME.json` beside it,
    in timm's `config.json` beside it, in the shapes of a plain ViT, and in the file's name
    (`vit_small_patch16_224.dino.safetensors`).
    Raises ModelNotFound, ArchitectureUnknown, ModelError (a file that is not safetensors).
    """
    if str(model) in (BUNDLED, BUNDLED_VERSION):
        path = Path(__file__).parent / "weights" / f"{BUNDLED_VERSION}.safetensors"
        return _spec(BUNDLED_VERSION, path, _read_json(path.with_suffix(".json")), pooling, "its description")
    path = Path(os.path.expanduser(model))
    if not os.path.isfile(path):
        raise ModelNotFound(
            f"no model {str(model)!r}: expected '{BUNDLED}' or the path of a .safetensors file, found no such file"
        )
    path = path.resolve()
    header, _ = _read_header(path)
    metadata = header.get("__metadata__", {})
    if METADATA_KEY in metadata:
        return _spec(str(path), path, _parse_json(metadata[METADATA_KEY], path), pooling, "the file's metadata")
    if (beside := path.with_suffix(".json")).is_file():
        return _spec(str(path), path, _read_json(beside), pooling, beside.name)
    if (beside := path.with_name("config.json")).is_file():
        return _spec(str(path), path, _from_timm_config(_read_json(beside), beside), pooling, beside.name)
    if description := _description_by_shapes(header):
        return _spec(str(path), path, description, pooling, "the shapes of its tensors, 64 channels a head")
    return _spec(str(path), path, _description_by_file_name(path), pooling, "the file's name")


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
    known = {"architecture", "architecture_args", "input_size", "mean", "std", "card"}
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
    return {
        "architecture": config["architecture"],
        "architecture_args": config.get("model_args") or {},
        "input_size": (preprocessing.get("input_size") or [3, 224, 224])[-1],
        "mean": preprocessing.get("mean", IMAGENET_MEAN),
        "std": preprocessing.get("std", IMAGENET_STD),
    }


def _description_by_shapes(header: Mapping[str, Any]) -> dict[str, Any] | None:
    """A plain ViT (as DINO's own) recognised by its tensors; None for anything else.

    The number of heads leaves no trace in the shapes: 64 channels a head, as every published DINO ViT has.
    """
    names = header.keys() - {"__metadata__"}
    if "cls_token" not in names or not all(_PLAIN_VIT_KEY.fullmatch(name) for name in names):
        return None
    width = header["cls_token"]["shape"][-1]
    if width not in _PLAIN_VIT_NAMES or "pos_embed" not in names or "patch_embed.proj.weight" not in names:
        return None
    patch_size = header["patch_embed.proj.weight"]["shape"][-1]
    grid = round((header["pos_embed"]["shape"][1] - 1) ** 0.5)
    depth = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))
    return {
        "architecture": f"{_PLAIN_VIT_NAMES[width]}_patch16_224",
        "architecture_args": {"patch_size": patch_size, "img_size": grid * patch_size, "depth": depth},
        "input_size": grid * patch_size,
    }


def _description_by_file_name(path: Path) -> dict[str, Any]:
    """The timm architecture that the file is named after. Imports timm: only its registry knows the names."""
    import timm

    architecture = path.stem.split(".")[0]
    if not timm.is_model(architecture):
        raise ArchitectureUnknown(
            f"{path} does not say which architecture it is for; name it after a timm architecture "
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

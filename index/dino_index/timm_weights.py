"""The weights that timm knows by name: which there are, where other programs have put them, reading them in."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dino_index.architectures import describe_tensors
from dino_index.checkpoints import read_checkpoint
from dino_index.errors import ModelError, ModelNotFound, WeightsMismatch

# What the hub keeps weights under, the safe form first.
_HUB_FILE_NAMES = ("model.safetensors", "pytorch_model.bin")
_MAX_MISMATCH_LENGTH = 600
_MAX_SIMILAR = 4
_MIN_WORD_LENGTH = 4
# As their owners write them, where timm's registry has another spelling.
_LICENCES = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "dinov3-license": "DINOv3 License",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
}


@dataclass(frozen=True, kw_only=True)
class TimmWeights:
    """Pretrained weights as timm's registry describes them."""

    name: str
    """Architecture and tag: `vit_small_patch16_224.dino`."""
    repository: str | None
    """On the hub; None for weights that timm has elsewhere."""
    file_names: tuple[str, ...]
    """In the repository, in the order to try them."""
    address: str | None
    """Of the file that the weights' authors publish, where timm knows it."""
    licence: str | None
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def architecture(self) -> str:
        return self.name.split(".")[0]


def is_timm_name(name: str) -> bool:
    """Whether timm has an architecture of this name, whatever its tag."""
    return timm.is_model(name.split(".")[0])


def find_weights(name: str) -> TimmWeights:
    """What timm knows about the weights of a name; without a tag, of timm's default one.

    Raises ModelNotFound, which names those with the most similar names.
    """
    try:
        preset: Any = timm.get_pretrained_cfg(name) if is_timm_name(name) else None
    except RuntimeError:  # no tag of that architecture
        preset = None
    if preset is None or not preset.has_weights:
        raise ModelNotFound(
            f"timm {timm.__version__} has no weights {name!r}{similar_to(name)}; for all names: "
            "python -c \"import timm; print(*timm.list_models(pretrained=True), sep='\\n')\""
        )
    tag = preset.tag or ""
    return TimmWeights(
        name=f"{preset.architecture}.{tag}" if tag else preset.architecture,
        repository=preset.hf_hub_id or None,
        file_names=(preset.hf_hub_filename,) if preset.hf_hub_filename else _HUB_FILE_NAMES,
        address=preset.url or None,
        licence=_LICENCES.get(preset.license or "", preset.license or None),
        input_size=preset.input_size[-1],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def similar_to(name: str) -> str:
    """`; did you mean …?` with timm's names of weights that are most like this one, or nothing."""
    known = timm.list_models(pretrained=True)
    same = [other for other in known if other.split(".")[0] == name.split(".")[0]]
    matches = difflib.get_close_matches(name, same or known, n=_MAX_SIMILAR, cutoff=0.0 if same else 0.7)
    if not matches:  # such as dinov2_vits14: the shortest of those with a word of it
        words = [word for word in re.split(r"\W|_", name) if len(word) >= _MIN_WORD_LENGTH]
        matches = sorted((other for other in known if any(word in other for word in words)), key=len)[:_MAX_SIMILAR]
    return f"; did you mean {', '.join(matches)}?" if matches else ""


def cached_file(weights: TimmWeights) -> Path | None:
    """Where the hub's client or PyTorch has put these weights before, if they are on this machine."""
    if weights.repository:
        for file_name in weights.file_names:
            found = try_to_load_from_cache(weights.repository, file_name)
            if isinstance(found, str):
                return Path(found)
    elif weights.address:
        path = Path(torch.hub.get_dir()) / "checkpoints" / weights.address.rsplit("/", 1)[-1]
        return path if path.is_file() else None
    return None


def read_weights(weights: TimmWeights, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, description) of a file of these weights, as timm loads it: strictly, after its own conversions.

    Raises WeightsMismatch, CheckpointRefused, ModelError.
    """
    try:
        found = load_file(path) if path.suffix == ".safetensors" else read_checkpoint(path).tensors
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the weights of {weights.name!r} in {path} are no readable safetensors file: {error}"
        ) from error
    try:
        model: Any = timm.create_model(weights.name, pretrained=True, pretrained_cfg_overlay={"state_dict": found})
    except RuntimeError as error:
        listed = re.sub(r"\s+", " ", str(error))[:_MAX_MISMATCH_LENGTH]
        raise WeightsMismatch(f"{path} does not fit {weights.name}: {listed}") from error
    except Exception as error:
        problem = re.sub(r"\s+", " ", str(error)) or type(error).__name__
        raise ModelError(f"the weights of {weights.name!r} in {path} cannot be loaded: {problem}") from error
    tensors: dict[str, Tensor] = model.state_dict()
    return tensors, _describe(weights, tensors)


def _describe(weights: TimmWeights, tensors: dict[str, Tensor]) -> dict[str, Any]:
    description: dict[str, Any] = {
        "architecture": weights.architecture,
        "architecture_args": {},
        "input_size": weights.input_size,
    }
    # DINO's published files are known by their shapes: fetched here or converted from one of those, it is one model.
    if weights.name.endswith(".dino"):
        description |= describe_tensors({name: list(tensor.shape) for name, tensor in tensors.items()}) or {}
    return description | {"mean": list(weights.mean), "std": list(weights.std)}

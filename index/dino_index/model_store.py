"""The models of a home: weights that were fetched, checkpoints that were converted, and which one is the default.

`HOME/models/NAME.safetensors` holds the tensors and, in its metadata, which architecture they are for;
`NAME.json` beside it the same and a card: source, licence, length of descriptors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from dino_index.catalog import SettingRow
from dino_index.errors import HubUnavailable, ModelError, ModelNotFound, OutputUnwritable
from dino_index.model_files import (
    BUNDLED,
    BUNDLED_VERSION,
    METADATA_KEY,
    ModelSpec,
    Pooling,
    describe_file,
    resolve_model,
    shapes_in,
    stored_path,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session
    from torch import Tensor

    from dino_index.timm_weights import TimmWeights

Source = Literal["bundled", "hub", "file"]

_DEFAULT_KEY = "default_model"
_FETCHING = ".fetching"
_PARTIAL = ".partial-"
_STALE_AFTER_S = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model that `--model NAME` takes."""

    name: str
    megabytes: float
    dim: int | None
    """Length of a descriptor's [CLS] part; None where nothing says it."""
    source: Source
    licence: str | None
    is_default: bool
    path: str

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return values | {"default": values.pop("is_default")}


def models_folder(home: Path) -> Path:
    """Where a home keeps its models."""
    return home / "models"


def list_models(home: Path, default: str = BUNDLED_VERSION) -> list[StoredModel]:
    """The bundled model, then the home's by name."""
    bundled = resolve_model(BUNDLED)
    paths = [bundled.weights_path, *sorted(models_folder(home).glob("[!.]*.safetensors"))]
    return [_stored(path, "bundled" if path == bundled.weights_path else "file", default) for path in paths]


def default_model(session: Session) -> str:
    """Name of the model that new collections of the home get: `bundled` unless another was set."""
    row = session.get(SettingRow, _DEFAULT_KEY)
    return str(row.value["name"]) if row is not None else BUNDLED


def set_default_model(session: Session, name: str) -> None:
    """Makes a model the default of the home, for collections that do not exist yet."""
    if name == BUNDLED_VERSION:  # the bundled one of whichever version of this program
        name = BUNDLED
    session.merge(SettingRow(key=_DEFAULT_KEY, value={"name": name}))


def resolve_default(
    name: str, home: Path, *, pooling: Pooling = "normalised", input_size: int | None = None
) -> ModelSpec:
    """The spec of the home's default model. Raises ModelNotFound where its file has gone."""
    if name != BUNDLED and stored_path(name, models_folder(home)) is None:
        raise ModelNotFound(
            f"the default model of this home is {name!r}, and {models_folder(home) / name}.safetensors is gone; "
            f"fetch it again: dino-search models get {name}, or set another one: dino-search models get {BUNDLED} "
            "--default"
        )
    return resolve_model(name, pooling=pooling, input_size=input_size, models=models_folder(home))


def fetch_model(
    name: str,
    home: Path,
    *,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
    on_remark: Callable[[str], None] = lambda remark: None,
) -> ModelSpec:
    """The spec of a timm name's weights, fetched from the hub unless they are in the home or in the hub's cache here.

    The file takes its place only when it is whole and loads strictly. on_progress: told bytes that have arrived, and
    all of them.
    Raises ModelNotFound, HubUnavailable, ModelError (weights that do not fit), OutputUnwritable.
    """
    models = models_folder(home)
    if name in (BUNDLED, BUNDLED_VERSION) or stored_path(name, models) is not None:
        return resolve_model(name, models=models)
    from dino_index.timm_weights import cached_file, find_weights

    weights = find_weights(name)
    if stored_path(weights.name, models) is None:
        with _writing_to(models), _fetching(models) as folder:
            path, origin = cached_file(weights), "the hub's cache on this machine"
            if path is None:
                path, origin = _download(weights, folder, models, on_progress)
            else:
                on_remark(f"{weights.name} was in {origin} already")
            _put(weights, path, origin, folder, models)
    return resolve_model(weights.name, models=models)


def converted_checkpoint(path: Path, models: Path, on_remark: Callable[[str], None]) -> Path:
    """The safetensors form of a PyTorch checkpoint in the folder `models`, made when these bytes are first seen.

    Raises CheckpointRefused, ArchitectureUnknown, ModelError, OutputUnwritable.
    """
    target = models / f"{path.stem}-{_file_digest(path)[:12]}.safetensors"
    if not target.is_file():
        convert_checkpoint(path, target, on_remark)
    return target.resolve()


def convert_checkpoint(path: Path, target: Path, on_remark: Callable[[str], None] = lambda remark: None) -> None:
    """Writes a PyTorch checkpoint's backbone as safetensors, with what is known of its architecture.

    Raises CheckpointRefused, ArchitectureUnknown, ModelError, OutputUnwritable.
    """
    from dino_index.checkpoints import read_checkpoint

    checkpoint = read_checkpoint(path)
    description, _ = describe_file(path, {name: list(value.shape) for name, value in checkpoint.tensors.items()})
    description.pop("card", None)
    for remark in checkpoint.remarks:
        on_remark(f"{path.name}: {remark}")
    save_weights(checkpoint.tensors, target, description)


def save_weights(tensors: Mapping[str, Tensor], path: Path, description: Mapping[str, Any] | None) -> None:
    """Writes a safetensors file whose metadata say which architecture it is for; it appears whole or not at all.

    Raises OutputUnwritable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {METADATA_KEY: json.dumps(description)} if description else None
    partial = path.with_name(f"{_PARTIAL}{uuid.uuid4().hex}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        # Copies: views and tensors that share memory cannot be saved.
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # the latter for a full disk
        raise OutputUnwritable(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def explain_missing(name: str, models: Path | None) -> str:
    """Why a model is not there, and what is: for an error message. Imports timm."""
    from dino_index.timm_weights import is_timm_name, similar_to

    here = ", ".join([BUNDLED, *(sorted(path.stem for path in models.glob("[!.]*.safetensors")) if models else [])])
    if is_timm_name(name):
        return (
            f"{name} has not been fetched, and nothing is downloaded unasked; fetch it: dino-search models get {name}; "
            f"here now: {here}"
        )
    expected = f"'{BUNDLED}' or the path of a .safetensors or .pth file, or the name of a fetched model"
    similar = similar_to(name) if name and os.path.basename(name) == name else ""
    return f"no model {name!r}: expected {expected}, found no such file; here now: {here}{similar}"


def _download(
    weights: TimmWeights, folder: Path, models: Path, on_progress: Callable[[int, int | None], None]
) -> tuple[Path, str]:
    from dino_index.hub import fetch_file, hub_timeout_s

    if weights.repository is None:
        raise ModelNotFound(
            f"timm has {weights.name} in no repository of the hub; download {weights.address} yourself and give its "
            "path: --model FILE"
        )
    try:
        found = fetch_file(
            weights.repository, weights.file_names, folder, timeout_s=hub_timeout_s(), on_progress=on_progress
        )
    except HubUnavailable as error:
        here = ", ".join([BUNDLED, *sorted(path.stem for path in models.glob("[!.]*.safetensors"))])
        raise HubUnavailable(
            f"{error}; without it, --model takes what is here ({here}) and weights files (.safetensors, .pth)"
        ) from error
    return found.path, f"{weights.repository}@{found.commit or 'main'}"


def _put(weights: TimmWeights, path: Path, origin: str, folder: Path, models: Path) -> None:
    """Stores weights under their name once they are known to load."""
    from dino_index.backbones import Backbone
    from dino_index.timm_weights import read_weights

    tensors, description = read_weights(weights, path)
    partial = folder / f"{weights.name}.safetensors"
    save_weights(tensors, partial, description)
    dim = Backbone(resolve_model(partial), device="cpu").dim
    card = {"source": "hub", "origin": origin, "licence": weights.licence, "dim": dim}
    partial.with_suffix(".json").write_text(json.dumps(description | {"card": card}, indent=2), encoding="utf-8")
    # The weights last: without them there is no model of this name.
    for file in (partial.with_suffix(".json"), partial):
        os.replace(file, models / file.name)


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Translates what the file system refuses under a folder."""
    try:
        yield
    except OSError as error:
        raise OutputUnwritable(f"{folder} cannot be written: {error}; choose another --home") from error


@contextmanager
def _fetching(models: Path) -> Iterator[Path]:
    """An empty folder for what is on its way, of one process at a time. Nothing of it stays."""
    folder = models / _FETCHING
    models.mkdir(parents=True, exist_ok=True)
    lock = FileLock(models / f"{_FETCHING}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ModelError(
            f"another process fetches a model into {models}; wait for it to end, then run again"
        ) from error
    try:
        # A killed process may have left its own.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _stored(path: Path, source: Source, default: str) -> StoredModel:
    name = path.name.removesuffix(".safetensors")
    card: dict[str, Any] = {}
    with suppress(OSError, ValueError, AttributeError):  # none, or not ours
        card = dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")).get("card", {}))
    return StoredModel(
        name=name,
        megabytes=round(path.stat().st_size / 1e6, 1),
        dim=card.get("dim") or _width(path),
        source=card.get("source", source),
        licence=card.get("licence"),
        is_default=name == (BUNDLED_VERSION if default == BUNDLED else default),
        path=str(path),
    )


def _width(path: Path) -> int | None:
    """Length of a transformer's [CLS] token, from its weights; None for others and for damaged files."""
    with suppress(ModelError, OSError, IndexError):
        return int(shapes_in(path)["cls_token"][-1]) if "cls_token" in shapes_in(path) else None
    return None


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_stale(folder: Path) -> None:
    """Removes what processes that were killed while they saved have left, long enough ago that none still writes."""
    for path in folder.glob(f"{_PARTIAL}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_AFTER_S:
                path.unlink()

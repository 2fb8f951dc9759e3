"""Backbones: a timm architecture with local weights, loaded strictly, ready to embed pictures.

Shapes: B pictures, H x W pixels, C channels of a picture (red, green, blue, or grey alone), D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dino_index.descriptors import descriptors
from dino_index.errors import ArchitectureUnknown, ModelError, WeightsMismatch
from dino_index.matrix_products import bfloat16_is_faster
from dino_index.model_files import ModelSpec

Device = Literal["auto", "cpu", "cuda"]

# Shares of red, green and blue in the grey that a model of one channel sees (ITU-R BT.601).
GREY = (0.299, 0.587, 0.114)

_MAX_KEYS_LISTED = 8
# By device and whether it computes in bfloat16. On processors the activations should stay in the cache.
_BATCH_SIZES = {("cpu", False): 16, ("cpu", True): 32, ("cuda", False): 128, ("cuda", True): 256}


class Backbone:
    """One loaded model: `embed` turns squares of pixels into (CLS, GeM) vectors, in any thread."""

    def __init__(self, spec: ModelSpec, *, device: Device = "auto", dtype: torch.dtype | None = None) -> None:
        """Builds the architecture and loads the weights.

        dtype: None chooses bfloat16 where the processor computes in it, else float32.
        Raises ArchitectureUnknown, WeightsMismatch, ModelError.
        """
        self.spec = spec
        self.device = choose_device(device)
        self.dtype = dtype or fastest_dtype(self.device)
        self._model = load_model(spec).to(self.device, self.dtype)
        self.batch_size = _BATCH_SIZES[self.device.type, self.dtype == torch.bfloat16]
        """Pictures in one forward pass that suit the device."""
        # Pixels are 0..255: scaling by 255 is folded into the normalisation.
        self._shift = self._per_channel(spec.mean)
        self._scale = 1 / self._per_channel(spec.std)
        self._grey_shares = torch.tensor(GREY, device=self.device).view(1, 3, 1, 1)
        self.dim = int(self.embed_tensor(torch.zeros(1, spec.input_size, spec.input_size, 3))[0].shape[1])

    @property
    def num_passes(self) -> int:
        """How many forward passes run at a time where there are many to do: one a processor, one on a GPU."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    @contextmanager
    def forward_threads(self) -> Iterator[ThreadPoolExecutor]:
        """`num_passes` threads to call `embed` in, each of which computes on one processor alone.

        Threads that share one pass wait for each other at every layer, and the longer the more other work there is
        (decoding). Two passes side by side do 1.2 to 1.3 times as many pictures as one over two processors.
        """
        num_threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.num_passes, "forward", initializer=self._compute_alone)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)

    def embed(self, pixels_BHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """(cls_BD, gem_BD) of RGB squares of the model's input size, raw and in float16 as they are stored."""
        cls_BD, gem_BD = self.embed_tensor(torch.from_numpy(pixels_BHWC))
        return _to_float16(cls_BD), _to_float16(gem_BD)

    @torch.inference_mode()
    def embed_tensor(self, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """The same as float32 tensors on the model's device. pixels_BHWC: RGB, uint8 or float, 0..255."""
        pictures_BCHW = pixels_BHWC.to(self.device).permute(0, 3, 1, 2).to(torch.float32, copy=True)
        if len(self.spec.mean) == 1:
            pictures_BCHW = (pictures_BCHW * self._grey_shares).sum(dim=1, keepdim=True)
        pictures_BCHW = pictures_BCHW.sub_(self._shift).mul_(self._scale)
        return descriptors(self._model, pictures_BCHW.to(self.dtype).contiguous(), self.spec.pooling)

    def _compute_alone(self) -> None:
        if self.device.type == "cpu":
            torch.set_num_threads(1)

    def _per_channel(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=self.device).mul(255).view(1, -1, 1, 1)


def choose_device(device: Device) -> torch.device:
    """The device by name; `auto` is the GPU where there is one. Raises ModelError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device 'cuda' was asked for, found no usable GPU; use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster (GPUs since Ampere; processors by trial), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if bfloat16_is_faster() else torch.float32


def _to_float16(vectors_BD: Tensor) -> NDArray[np.float16]:
    values: NDArray[np.float16] = vectors_BD.clamp(-65504, 65504).half().cpu().numpy()
    return values


def load_model(spec: ModelSpec) -> nn.Module:
    """The architecture with its weights, for pictures of the spec's input size; in evaluation mode, without gradients.

    Raises ArchitectureUnknown, WeightsMismatch, ModelError.
    """
    try:
        weights = load_file(spec.weights_path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{spec.weights_path} is no readable safetensors file: {error}") from error
    if not timm.is_model(spec.architecture):
        raise ArchitectureUnknown(
            f"timm {timm.__version__} has no architecture {spec.architecture!r}, which {spec.weights_path} is for"
        )
    arguments: dict[str, Any] = {"num_classes": 0, **spec.architecture_args}
    preset = timm.get_pretrained_cfg(spec.architecture)
    classifier_name: Any = preset.classifier if preset else "head"
    if isinstance(classifier_name, tuple):  # a distilled DeiT has two
        classifier_name = classifier_name[0]
    if (classifier := weights.get(f"{classifier_name}.weight")) is not None:
        # Weights with a classifier load whole, strictly; its output is never used.
        arguments["num_classes"] = classifier.shape[0]
    try:
        model: nn.Module = timm.create_model(spec.architecture, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ArchitectureUnknown(f"timm refuses {spec.architecture} with {arguments}: {error}") from error
    _load_strictly(model, weights, spec)
    _set_input_size(model, spec)
    return model.eval().requires_grad_(False)


def _load_strictly(model: nn.Module, weights: dict[str, Tensor], spec: ModelSpec) -> None:
    expected = model.state_dict()
    problems = [f"missing {key}" for key in sorted(expected.keys() - weights.keys())]
    problems += [f"unexpected {key}" for key in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{key} is {list(weights[key].shape)}, expected {list(expected[key].shape)}"
        for key in sorted(expected.keys() & weights.keys())
        if weights[key].shape != expected[key].shape
    ]
    if problems:
        listed = "; ".join(problems[:_MAX_KEYS_LISTED])
        more = f"; and {len(problems) - _MAX_KEYS_LISTED} more" if len(problems) > _MAX_KEYS_LISTED else ""
        raise WeightsMismatch(
            f"{spec.weights_path} does not fit {spec.architecture} (architecture from {spec.origin}): {listed}{more}"
        )
    model.load_state_dict(weights, strict=True)


def _set_input_size(model: nn.Module, spec: ModelSpec) -> None:
    """Fits position embeddings to the input size once, instead of interpolating in every forward pass."""
    patch_embed = getattr(model, "patch_embed", None)
    built_for = getattr(patch_embed, "img_size", None)
    if built_for is None or tuple(built_for) == (spec.input_size, spec.input_size):
        return
    patch_size = patch_embed.patch_size[0]  # type: ignore[union-attr]
    if spec.input_size % patch_size:
        raise ModelError(f"input_size must be a multiple of the patch size {patch_size}, found {spec.input_size}")
    if not hasattr(model, "set_input_size"):
        raise ModelError(f"{spec.architecture} takes pictures of {tuple(built_for)} px only, not {spec.input_size}")
    model.set_input_size(img_size=(spec.input_size, spec.input_size))  # type: ignore[operator]

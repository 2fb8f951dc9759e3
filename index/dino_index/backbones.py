"""Backbones: a timm architecture with local weights, loaded strictly, ready to embed pictures.

Shapes: B pictures, H x W pixels, C channels that the model sees of a picture, D channels of a vector;
h x w patches, P channels of a patch.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dino_index.attention import attention_maps, has_attention
from dino_index.descriptors import descriptors, descriptors_and_patches, patches
from dino_index.errors import ArchitectureUnknown, ModelError, OutOfMemory, WeightsMismatch
from dino_index.matrix_products import bfloat16_is_faster
from dino_index.model_files import ModelSpec

logger = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]

# Shares of red, green and blue in the grey that a model of one channel sees (ITU-R BT.601).
GREY = (0.299, 0.587, 0.114)
# What each kind of channel is made of: shares of red, green and blue, and the value for full opacity (0..255). Pictures
# are laid over white when they are read, so they are opaque everywhere.
_CHANNELS = {
    "red": (1, 0, 0, 0),
    "green": (0, 1, 0, 0),
    "blue": (0, 0, 1, 0),
    "grey": (*GREY, 0),
    "opacity": (0, 0, 0, 255),
}
_COLOURS = ("red", "green", "blue")

_MAX_KEYS_LISTED = 8
# By device and whether it computes in bfloat16. On processors the activations should stay in the cache: a ViT-Ti/8 does
# 67 images/s on one in batches of 4 to 16, 40 in batches of 32.
_BATCH_SIZES = {("cpu", False): 16, ("cpu", True): 8, ("cuda", False): 128, ("cuda", True): 256}
# Attention weights of one layer and batch up to which plain products beat torch's fused attention on processors in
# bfloat16: 1.7 to 2.1 times as fast below, the same beyond the cache. In float32 the fused one is always faster.
_MAX_ATTENTION_BYTES = 8 * 2**20


class Backbone:
    """One loaded model: `embed` turns squares of pixels into (CLS, GeM) vectors, in any thread."""

    def __init__(self, spec: ModelSpec, *, device: Device = "auto", dtype: torch.dtype | None = None) -> None:
        """Builds the architecture and loads the weights.

        dtype: None chooses bfloat16 where the processor computes in it, else float32.
        Raises ArchitectureUnknown, WeightsMismatch, OutOfMemory, ModelError.
        """
        self.spec = spec
        self._devices = usable_devices(device)
        self.device = self._devices[0]
        self.dtype = dtype or fastest_dtype(self.device)
        self.batch_size = _BATCH_SIZES[self.device.type, self.dtype == torch.bfloat16]
        """Pictures in one forward pass that suit the device."""
        self._replicas = [_Replica(spec, self.device, self.dtype)]
        self._thread = threading.local()
        self.dim = int(self.embed_tensor(torch.zeros(1, spec.input_size, spec.input_size, 3))[0].shape[1])

    @property
    def num_passes(self) -> int:
        """How many forward passes run at a time where there are many to do: one a processor, or one a GPU."""
        return torch.get_num_threads() if self._is_shared else len(self._devices)

    @property
    def num_devices(self) -> int:
        """GPUs that work side by side; the processors count as one."""
        return len(self._devices)

    @property
    def patch_size(self) -> int:
        """Side in pixels of the patches that fill a picture; 1 for an architecture that takes any size."""
        patch_embed = getattr(self._replicas[0].model, "patch_embed", None)
        return int(getattr(patch_embed, "patch_size", (1,))[0])

    @property
    def has_attention(self) -> bool:
        """Whether `attention` can be asked for."""
        return has_attention(self._replicas[0].model)

    @property
    def max_waiting(self) -> int:
        """Batches to hand over before waiting for the oldest: a GPU is not to wait for its next pixels."""
        return self.num_passes if self._is_shared else 2 * self.num_passes

    @property
    def _is_shared(self) -> bool:
        """Whether all threads compute with the same replica. A GPU belongs to one thread."""
        return self._devices == [torch.device("cpu")]

    @contextmanager
    def forward_threads(self) -> Iterator[ThreadPoolExecutor]:
        """`num_passes` threads to call `embed` in, each of which computes on one processor or one GPU alone.

        Threads that share one pass wait for each other at every layer, and the longer the more other work there is
        (decoding). Two passes side by side do 1.2 to 1.3 times as many pictures as one over two processors.
        With several GPUs each has a replica of the model, and the next batch goes to whichever is free.
        """
        num_threads = torch.get_num_threads()
        free: SimpleQueue[_Replica] = SimpleQueue()
        for replica in self._replicas_of_all_devices():
            free.put(replica)
        pool = ThreadPoolExecutor(self.num_passes, "forward", initializer=self._compute_alone, initargs=(free,))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)

    def stack(self, squares_HWC: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Pictures as one array for `embed`, which a GPU can fetch by itself while the processor does other things."""
        if self.device.type == "cuda":
            try:
                pinned = torch.empty((len(squares_HWC), *squares_HWC[0].shape), dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # a container may lock few pages only
                pass
            else:
                return np.stack(squares_HWC, out=pinned.numpy())
        return np.stack(squares_HWC)

    def embed(self, pixels_BHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """(cls_BD, gem_BD) of RGB squares of the model's input size, raw and in float16 as they are stored.

        A batch that does not fit into memory is done in halves, and so are later ones.
        Raises OutOfMemory where a single picture does not fit.
        """
        cls_BD, gem_BD = self._embed_in_parts(pixels_BHWC, _Replica.forward)
        return cls_BD, gem_BD

    def embed_with_patches(
        self, pixels_BHWC: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.float16]]:
        """(cls_BD, gem_BD, patches_BhwP): what `embed` gives, and of the same pass a unit vector for each patch.

        See `descriptors_and_patches`. Memory is treated as `embed` does. Raises OutOfMemory.
        """
        cls_BD, gem_BD, patches_BhwP = self._embed_in_parts(pixels_BHWC, _Replica.forward_with_patches)
        return cls_BD, gem_BD, patches_BhwP

    def patches(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.float16]:
        """patches_BhwP of `embed_with_patches` alone, for two thirds of the time. Raises OutOfMemory."""
        (patches_BhwP,) = self._embed_in_parts(pixels_BHWC, _Replica.patches)
        return patches_BhwP

    def attention(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """maps_BHhw: where the last block looks, for each head; see `attention_maps`.

        Raises AttentionUnavailable; OutOfMemory where a single picture does not fit.
        """
        replica: _Replica = getattr(self._thread, "replica", self._replicas[0])
        try:
            return replica.attention(torch.from_numpy(pixels_BHWC)).cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        # After the block: the error would keep the tensors of the pass in memory.
        replica.halve(len(pixels_BHWC))
        return np.concatenate([self.attention(part_BHWC) for part_BHWC in np.array_split(pixels_BHWC, 2)])

    def describe(
        self, pixels_BHWC: NDArray[np.uint8], describe: Callable[[nn.Module, Tensor], Tensor]
    ) -> NDArray[np.float16]:
        """What `describe` gives of the model and normalised pictures: other vectors than `embed`'s, a row a picture.

        Memory is treated as `embed` does. Raises OutOfMemory.
        """
        (vectors_BF,) = self._embed_in_parts(pixels_BHWC, lambda replica, pixels: replica.describe(pixels, describe))
        return vectors_BF

    @property
    def model(self) -> nn.Module:
        """The network on the first device, to be looked at and not changed."""
        return self._replicas[0].model

    def embed_tensor(self, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """The same as float32 tensors on the model's device. pixels_BHWC: RGB, uint8 or float, 0..255."""
        return self._replicas[0].forward(pixels_BHWC)

    def _embed_in_parts(
        self, pixels_BHWC: NDArray[np.uint8], forward: Callable[[_Replica, Tensor], tuple[Tensor, ...]]
    ) -> tuple[NDArray[np.float16], ...]:
        """What `forward` gives of this thread's replica, of as many pictures at a time as fit into memory."""
        replica: _Replica = getattr(self._thread, "replica", self._replicas[0])
        parts: list[tuple[NDArray[np.float16], ...]] = []
        begin = 0
        while begin < len(pixels_BHWC) or not parts:
            size = min(len(pixels_BHWC) - begin, replica.max_pictures)
            if (vectors := _try_to_embed(replica, pixels_BHWC[begin : begin + size], forward)) is not None:
                parts.append(vectors)
                begin += size
            else:
                replica.halve(size)
        return parts[0] if len(parts) == 1 else tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def _replicas_of_all_devices(self) -> list[_Replica]:
        """A replica on each device; a GPU that has no room for one is left out, with a remark."""
        for device in self._devices[len(self._replicas) :]:
            try:
                self._replicas.append(_Replica(self.spec, device, self.dtype))
            except OutOfMemory as error:
                logger.warning("%s; going on without it", error)
                self._devices.remove(device)
        return self._replicas

    def _compute_alone(self, free: SimpleQueue[_Replica]) -> None:
        if self.device.type == "cpu":
            use_threads(1)
        if not self._is_shared:
            self._thread.replica = free.get()


class _Replica:
    """The model on one device."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        """Raises OutOfMemory, and as `load_model` does."""
        self.device = device
        self._spec = spec
        self._dtype = dtype
        self.max_pictures = sys.maxsize
        """At a time; fewer once more were found not to fit into memory."""
        model = load_model(spec)
        if device.type == "cpu" and dtype == torch.bfloat16:
            _choose_attention(model, _BATCH_SIZES["cpu", True])
        try:
            # Convolutions are up to 1.8 times as fast in this layout, in which the pixels come; nothing else minds.
            self.model = model.to(device, dtype).to(memory_format=torch.channels_last)
            self._normalise = Normaliser(spec, device)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"{spec.name} does not fit into the memory of {device}: end what else uses it, "
                "use --device cpu, or a smaller model"
            ) from error

    @torch.inference_mode()
    def forward(self, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """`Backbone.embed_tensor` on this device."""
        return descriptors(self.model, self._normalised(pixels_BHWC), self._spec.pooling)

    @torch.inference_mode()
    def forward_with_patches(self, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return descriptors_and_patches(self.model, self._normalised(pixels_BHWC), self._spec.pooling)

    @torch.inference_mode()
    def patches(self, pixels_BHWC: Tensor) -> tuple[Tensor]:
        return (patches(self.model, self._normalised(pixels_BHWC)),)

    @torch.inference_mode()
    def attention(self, pixels_BHWC: Tensor) -> Tensor:
        return attention_maps(self.model, self._normalised(pixels_BHWC))

    @torch.inference_mode()
    def describe(self, pixels_BHWC: Tensor, describe: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor]:
        return (describe(self.model, self._normalised(pixels_BHWC)),)

    def _normalised(self, pixels_BHWC: Tensor) -> Tensor:
        return self._normalise(pixels_BHWC).to(self._dtype, memory_format=torch.channels_last)

    def halve(self, num_pictures: int) -> None:
        """Takes note that so many pictures do not fit into memory. Raises OutOfMemory where that is one."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if num_pictures <= 1:
            size = self._spec.input_size
            raise OutOfMemory(
                f"one picture of {size}x{size} px does not fit into the memory of {self.device} under "
                f"{self._spec.name}: end what else uses it, use --device cpu, or a smaller model"
            )
        self.max_pictures = min(self.max_pictures, num_pictures // 2)
        logger.warning(
            "%d pictures do not fit into the memory of %s; going on with %d at a time",
            num_pictures, self.device, self.max_pictures,
        )  # fmt: skip


class Normaliser:
    """Pixels as a model takes them: its channels, from red, green and blue, with its mean and deviation."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._device = device
        # Pixels are 0..255: scaling by 255 is folded into the normalisation.
        self._shift = self._per_channel(spec.mean)
        self._scale = 1 / self._per_channel(spec.std)
        self._mixing = _channel_mixing(spec, device)

    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """pictures_BCHW: float32, on the device. pixels_BHWC: RGB, uint8 or float, 0..255."""
        # Returns at once for pixels in page-locked memory: the GPU fetches them.
        pixels_BHWC = pixels_BHWC.to(self._device, non_blocking=True)
        pictures_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32, copy=True)
        if self._mixing is not None:
            shares_C3, constant_C = self._mixing
            pictures_BCHW = torch.einsum("cr,brhw->bchw", shares_C3, pictures_BCHW) + constant_C.view(1, -1, 1, 1)
        return pictures_BCHW.sub_(self._shift).mul_(self._scale)

    def _per_channel(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=self._device).mul(255).view(1, -1, 1, 1)


def use_threads(num_threads: int) -> None:
    """Has torch compute with so many threads on processors, in the calling thread and in those that begin to later."""
    # A thread that was never asked for its number takes over, at its first computation, what was set last in any.
    torch.get_num_threads()
    torch.set_num_threads(num_threads)


def _try_to_embed(
    replica: _Replica, pixels_BHWC: NDArray[np.uint8], forward: Callable[[_Replica, Tensor], tuple[Tensor, ...]]
) -> tuple[NDArray[np.float16], ...] | None:
    """None where the pictures do not fit into memory; nothing of the pass is left in it then."""
    try:
        return tuple(_to_float16(values) for values in forward(replica, torch.from_numpy(pixels_BHWC)))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return None


def _choose_attention(model: nn.Module, batch_size: int) -> None:
    """Has a processor compute attention in bfloat16 by plain products where its weights stay in the cache."""
    num_tokens = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if num_tokens is None:
        return
    num_tokens += int(getattr(model, "num_prefix_tokens", 0))
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "fused_attn") and hasattr(module, "num_heads"):
            num_bytes = 2 * batch_size * module.num_heads * num_tokens**2
            module.fused_attn = module.fused_attn and num_bytes > _MAX_ATTENTION_BYTES


def usable_devices(device: Device) -> list[torch.device]:
    """The devices behind the name: the processors, which count as one, or all visible GPUs. Raises ModelError."""
    if choose_device(device).type == "cpu":
        return [torch.device("cpu")]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that the device, or this machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED", "CUDA error: out of memory"
    return any(word in str(error) for word in words)


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


def _channel_mixing(spec: ModelSpec, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """(shares_C3, constant_C): how the model's channels come from red, green and blue; None where they are these.

    A channel that a picture has nothing for is its mean, 0 after normalisation.
    """
    if spec.seen_channels == _COLOURS:
        return None
    mixing_C4 = torch.tensor(
        [
            (0.0, 0.0, 0.0, 255 * mean) if name == "nothing" else _CHANNELS[name]
            for name, mean in zip(spec.seen_channels, spec.mean, strict=True)
        ],
        dtype=torch.float32,
        device=device,
    )
    return mixing_C4[:, :3].contiguous(), mixing_C4[:, 3]


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
    preset = timm.get_pretrained_cfg(spec.architecture) if timm.is_model(spec.architecture) else None
    classifier_name: Any = preset.classifier if preset else "head"
    if isinstance(classifier_name, tuple):  # a distilled DeiT has two
        classifier_name = classifier_name[0]
    # Weights with a classifier load whole, strictly; its output is never used.
    classifier = weights.get(f"{classifier_name}.weight")
    model = _build_model(spec, None if classifier is None else classifier.shape[0])
    _load_strictly(model, weights, spec)
    _set_input_size(model, spec)
    return model.eval().requires_grad_(False)


def random_model(spec: ModelSpec) -> nn.Module:
    """The same with random weights, drawn from torch's generator; in evaluation mode. Raises as `load_model` does."""
    model = _build_model(spec)
    _set_input_size(model, spec)
    return model.eval()


def _build_model(spec: ModelSpec, num_classes: int | None = None) -> nn.Module:
    """The architecture as timm builds it. Raises ArchitectureUnknown."""
    if not timm.is_model(spec.architecture):
        raise ArchitectureUnknown(
            f"timm {timm.__version__} has no architecture {spec.architecture!r}, which {spec.weights_path} is for"
        )
    arguments: dict[str, Any] = {"num_classes": 0, **spec.architecture_args}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        model: nn.Module = timm.create_model(spec.architecture, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ArchitectureUnknown(f"timm refuses {spec.architecture} with {arguments}: {error}") from error
    return model


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

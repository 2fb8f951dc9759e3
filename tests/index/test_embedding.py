"""Batches on devices: which one gets which, and what happens when one does not fit into memory."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bad_files import picture
from dino_index import backbones
from dino_index.backbones import Backbone, Device
from dino_index.embedding import EmbeddedFile, EmbeddingSettings, embed_files
from dino_index.errors import OutOfMemory
from dino_index.image_files import list_images
from dino_index.model_files import resolve_model
from sample_collections import save_tiny_model, write_pictures

Vectors = tuple[NDArray[np.float16], NDArray[np.float16]]


def squares(number: int, side: int = 32) -> NDArray[np.uint8]:
    return np.stack([np.asarray(picture(side, side, seed=seed)) for seed in range(number)])


def loaded(model: Path, *, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    return Backbone(resolve_model(model), device=device, dtype=dtype)


def assert_alike(ours: Vectors, expected: Vectors) -> None:
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=2e-3, atol=2e-3)


def small_memory(
    monkeypatch: pytest.MonkeyPatch, capacity: int, error: Callable[[], BaseException] | None = None
) -> list[int]:
    """Forward passes of more pictures than that run out of memory; returns the sizes of those that were tried."""
    forward = backbones._Replica.forward
    tried: list[int] = []

    def bounded(self: Any, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        tried.append(len(pixels_BHWC))
        if len(pixels_BHWC) > capacity:
            raise error() if error else torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, pixels_BHWC)

    monkeypatch.setattr(backbones._Replica, "forward", bounded)
    return tried


@pytest.fixture
def three_devices(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Names of the processor that the code takes for three devices."""
    devices = [torch.device("cpu", number) for number in range(3)]
    monkeypatch.setattr(backbones, "usable_devices", lambda device: list(devices))
    return devices


def slow_device(monkeypatch: pytest.MonkeyPatch, device: torch.device | None) -> list[tuple[torch.device, int]]:
    """Forward passes take 10 ms, and 100 ms on one device; returns (device, thread) of each pass."""
    forward = backbones._Replica.forward
    passes: list[tuple[torch.device, int]] = []

    def watched(self: Any, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        passes.append((self.device, threading.get_ident()))
        time.sleep(0.1 if self.device == device else 0.01)
        return forward(self, pixels_BHWC)

    monkeypatch.setattr(backbones._Replica, "forward", watched)
    return passes


# --- memory


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        lambda: MemoryError(),
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_batch_that_does_not_fit_is_done_in_halves_and_so_are_later_ones(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Callable[[], BaseException],
) -> None:
    backbone = loaded(tiny_model)
    pixels = squares(10)
    expected = backbone.embed(pixels)
    tried = small_memory(monkeypatch, 3, error)
    with caplog.at_level(logging.WARNING):
        assert_alike(backbone.embed(pixels), expected)
    assert tried == [10, 5, 2, 2, 2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "10 pictures do not fit into the memory of cpu; going on with 5 at a time",
        "5 pictures do not fit into the memory of cpu; going on with 2 at a time",
    ]
    tried.clear()
    assert_alike(backbone.embed(pixels), expected)
    assert tried == [2, 2, 2, 2, 2]


def test_a_failed_pass_leaves_nothing_in_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = loaded(tiny_model)
    forward = backbones._Replica.forward
    activations: list[weakref.ref[Tensor]] = []

    def greedy(self: Any, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        assert all(activation() is None for activation in activations)
        taken = torch.zeros(1)
        activations.append(weakref.ref(taken))
        if len(pixels_BHWC) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, pixels_BHWC)

    monkeypatch.setattr(backbones._Replica, "forward", greedy)
    assert len(backbone.embed(squares(8))[0]) == 8
    assert len(activations) == 2 + 4


def test_a_single_picture_that_does_not_fit_is_an_error_that_says_what_to_do(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = loaded(tiny_model)
    tried = small_memory(monkeypatch, 0)
    with pytest.raises(OutOfMemory, match=r"one picture of 32x32 px does not fit into the memory of cpu under .*tiny"):
        backbone.embed(squares(4))
    assert tried == [4, 2, 1]


def test_other_errors_of_a_forward_pass_are_not_taken_for_a_lack_of_memory(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = loaded(tiny_model)
    tried = small_memory(monkeypatch, 0, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        backbone.embed(squares(4))
    assert tried == [4]


def test_a_lack_of_memory_on_the_way_changes_no_outcome(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "photos", *(f"{number:02}.jpg" for number in range(20)))
    expected = embedded(loaded(tiny_model), tmp_path / "photos", batch_size=8)
    tried = small_memory(monkeypatch, 2)
    assert_same_files(embedded(loaded(tiny_model), tmp_path / "photos", batch_size=8), expected)
    assert max(tried) == 8


def embedded(backbone: Backbone, folder: Path, batch_size: int = 2) -> list[EmbeddedFile]:
    """All pictures of a folder, embedded by the loop that indexing uses."""
    settings = EmbeddingSettings(batch_size=batch_size)
    files = list_images([folder]).files
    batches = embed_files(files, lambda: backbone, backbone.spec.input_size, lambda sha256: None, settings)
    outcomes = [outcome for batch in batches for outcome in batch]
    assert [outcome.file for outcome in outcomes] == files
    return [outcome for outcome in outcomes if isinstance(outcome, EmbeddedFile)]


def vectors_of(item: EmbeddedFile) -> Vectors:
    assert item.cls_D is not None
    assert item.gem_D is not None
    return item.cls_D, item.gem_D


def assert_same_files(ours: list[EmbeddedFile], expected: list[EmbeddedFile]) -> None:
    assert [(one.file, one.facts) for one in ours] == [(one.file, one.facts) for one in expected]
    for one, other in zip(ours, expected, strict=True):
        assert_alike(vectors_of(one), vectors_of(other))


# --- what is fast on a processor


def attention_of(backbone: Backbone) -> list[bool]:
    """Whether each attention layer is a fused one."""
    model: Any = backbone._replicas[0].model
    return [block.attn.fused_attn for block in model.blocks]


@pytest.mark.parametrize(
    ("input_size", "dtype", "fused"),
    [(32, torch.bfloat16, False), (2048, torch.bfloat16, True), (32, torch.float32, True)],
)
def test_attention_is_plain_where_its_weights_stay_in_the_cache(
    tmp_path: Path, input_size: int, dtype: torch.dtype, fused: bool
) -> None:
    model = save_tiny_model(tmp_path / "tiny.safetensors", input_size=input_size)
    assert attention_of(loaded(model, dtype=dtype)) == [fused]


def test_plain_and_fused_attention_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Backbone(resolve_model(), device="cpu", dtype=torch.bfloat16)
    pixels = squares(4, plain.spec.input_size)
    monkeypatch.setattr(backbones, "_choose_attention", lambda *_: None)
    fused = Backbone(resolve_model(), device="cpu", dtype=torch.bfloat16)
    assert set(attention_of(plain)) == {False}
    assert set(attention_of(fused)) == {True}
    for one, other in zip(plain.embed(pixels), fused.embed(pixels), strict=True):
        wide = [vectors.astype(np.float32) for vectors in (one, other)]
        cosines = (wide[0] * wide[1]).sum(1) / np.linalg.norm(wide[0], axis=1) / np.linalg.norm(wide[1], axis=1)
        assert cosines.min() > 0.9995


# --- several devices


def test_every_device_belongs_to_one_thread_and_the_free_one_gets_the_next_batch(
    tiny_model: Path, three_devices: list[torch.device], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "photos", *(f"{number:02}.jpg" for number in range(48)))
    expected = embedded(loaded(tiny_model), tmp_path / "photos")
    backbone = loaded(tiny_model)
    passes = slow_device(monkeypatch, three_devices[1])
    assert_same_files(embedded(backbone, tmp_path / "photos"), expected)
    owners: dict[torch.device, set[int]] = {}
    for device, thread in passes:
        owners.setdefault(device, set()).add(thread)
    assert set(owners) == set(three_devices)
    assert all(len(threads) == 1 for threads in owners.values())
    assert len(set.union(*owners.values())) == 3
    counts = Counter(device for device, _ in passes)
    assert counts.total() == 24
    assert 0 < counts[three_devices[1]] < min(counts[three_devices[0]], counts[three_devices[2]])


def test_a_device_without_room_for_the_model_is_left_out_with_a_remark(
    tiny_model: Path,
    three_devices: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    move = torch.nn.Module.to

    def move_or_fail(self: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        if three_devices[1] in arguments:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return move(self, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "to", move_or_fail)
    write_pictures(tmp_path / "photos", *(f"{number:02}.jpg" for number in range(24)))
    passes = slow_device(monkeypatch, None)
    with caplog.at_level(logging.WARNING):
        assert len(embedded(loaded(tiny_model), tmp_path / "photos")) == 24
    assert {device for device, _ in passes} == {three_devices[0], three_devices[2]}
    assert "does not fit into the memory of cpu:1" in caplog.text
    assert "going on without it" in caplog.text


def test_a_model_that_fits_nowhere_is_an_error_that_says_what_to_do(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    with pytest.raises(OutOfMemory, match="does not fit into the memory of cpu: end what else uses it"):
        loaded(tiny_model)


def test_a_device_with_less_memory_is_the_only_one_to_take_smaller_batches(
    tiny_model: Path, three_devices: list[torch.device], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backbone = loaded(tiny_model)
    forward = backbones._Replica.forward
    sizes: dict[torch.device, set[int]] = {device: set() for device in three_devices}

    def uneven(self: Any, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        if self.device == three_devices[2] and len(pixels_BHWC) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        sizes[self.device].add(len(pixels_BHWC))
        time.sleep(0.01)
        return forward(self, pixels_BHWC)

    monkeypatch.setattr(backbones._Replica, "forward", uneven)
    write_pictures(tmp_path / "photos", *(f"{number:02}.jpg" for number in range(48)))
    assert len(embedded(backbone, tmp_path / "photos", batch_size=4)) == 48
    assert sizes == {three_devices[0]: {4}, three_devices[1]: {4}, three_devices[2]: {2}}


def test_pictures_are_stacked_in_their_order(tiny_model: Path) -> None:
    pixels = squares(5)
    np.testing.assert_array_equal(loaded(tiny_model).stack(list(pixels)), pixels)


# --- real GPUs


@pytest.fixture
def on_gpu(tmp_path: Path) -> Backbone:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")  # and none is promised, in CI neither
    return loaded(save_tiny_model(tmp_path / "tiny.safetensors"), device="cuda")


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_processor(on_gpu: Backbone, tiny_model: Path) -> None:
    pixels = squares(9)
    assert_alike(on_gpu.embed(on_gpu.stack(list(pixels))), loaded(tiny_model).embed(pixels))


@pytest.mark.gpu
def test_pixels_for_a_gpu_lie_in_page_locked_memory(on_gpu: Backbone) -> None:
    pixels = squares(5)
    stacked = on_gpu.stack(list(pixels))
    assert torch.from_numpy(stacked).is_pinned()
    np.testing.assert_array_equal(stacked, pixels)


@pytest.mark.gpu
def test_all_visible_gpus_embed(on_gpu: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", *(f"{number:02}.jpg" for number in range(64)))
    passes = slow_device(monkeypatch, None)
    assert len(embedded(on_gpu, tmp_path / "photos")) == 64
    assert len({device for device, _ in passes}) == torch.cuda.device_count()


@pytest.mark.gpu
def test_a_batch_larger_than_the_gpu_allows_is_done_in_parts(on_gpu: Backbone) -> None:
    pixels = squares(8).repeat(512, axis=0)
    expected = on_gpu.embed(pixels)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved(0) + 24 * 2**20  # what one pass over all of it takes and more
    torch.cuda.set_per_process_memory_fraction(allowed / total, 0)
    try:
        assert_alike(on_gpu.embed(pixels), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert on_gpu._replicas[0].max_pictures < len(pixels)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from bad_files import picture
from dino_index.backbones import Backbone
from dino_index.errors import ArchitectureUnknown, ModelError, WeightsMismatch
from dino_index.model_files import resolve_model
from sample_collections import TINY_DIM, TINY_VIT, save_tiny_model


def squares(number: int, side: int) -> NDArray[np.uint8]:
    return np.stack([np.asarray(picture(side, side, seed=seed)) for seed in range(number)])


def normalised(pixels_BHWC: NDArray[np.uint8]) -> torch.Tensor:
    """Pictures as timm takes them, by ImageNet's mean and deviation."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.from_numpy(pixels_BHWC).float() / 255).sub(mean).div(std).permute(0, 3, 1, 2)


def saved(folder: Path, architecture: str, input_size: int, **arguments: Any) -> tuple[Path, Any]:
    """A safetensors file of a timm model with random weights, described beside it; and the model."""
    model = timm.create_model(architecture, **arguments).eval()
    path = folder / "weights.safetensors"
    save_file(model.state_dict(), path)
    description = {"architecture": architecture, "input_size": input_size}
    built = {key: value for key, value in arguments.items() if key != "num_classes"}
    path.with_suffix(".json").write_text(json.dumps(description | {"architecture_args": built}))
    return path, model


def float32(path: Path | str = "bundled") -> Backbone:
    return Backbone(resolve_model(path), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def bundled() -> Backbone:
    return float32()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return float32(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors"))


# --- the same as timm


@torch.inference_mode()
def test_bundled_cls_is_the_first_token_of_timms_features(bundled: Backbone) -> None:
    spec = resolve_model()
    model: Any = timm.create_model(spec.architecture, **spec.architecture_args, dynamic_img_size=True).eval()
    model.load_state_dict({key: value.float() for key, value in load_file(spec.weights_path).items()})
    pixels = squares(3, spec.input_size)
    cls_BD, gem_BD = bundled.embed_tensor(torch.from_numpy(pixels))
    expected = model.forward_features(normalised(pixels))
    torch.testing.assert_close(cls_BD, expected[:, 0], rtol=1e-3, atol=1e-3)
    assert (bundled.dim, cls_BD.shape, gem_BD.shape) == (192, (3, 192), (3, 192))


@pytest.mark.parametrize(
    ("architecture", "input_size", "arguments", "dim"),
    [
        ("resnet10t", 64, {}, 512),
        ("convnext_atto", 64, {"depths": [1, 1, 1, 1]}, 320),
        ("swin_tiny_patch4_window7_224", 56,
         {"img_size": 56, "embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2]}, 48),
        ("vit_small_patch16_dinov3", 64, {"depth": 1}, 384),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_any_timm_architecture_embeds(
    tmp_path: Path, architecture: str, input_size: int, arguments: dict[str, Any], dim: int
) -> None:
    path, model = saved(tmp_path, architecture, input_size, num_classes=0, **arguments)
    backbone = float32(path)
    pixels = squares(2, input_size)
    cls_BD, gem_BD = backbone.embed_tensor(torch.from_numpy(pixels))
    features = model.forward_features(normalised(pixels))
    expected = features[:, 0] if features.ndim == 3 else model(normalised(pixels))
    assert cls_BD.shape == (2, dim)
    torch.testing.assert_close(cls_BD, expected, rtol=1e-3, atol=1e-3)
    assert gem_BD.shape == (2, dim)
    torch.testing.assert_close(gem_BD.norm(dim=1), torch.ones(2))


@torch.inference_mode()
def test_what_timm_saves_for_its_hub_loads_whole(tmp_path: Path) -> None:
    model: Any = timm.create_model("resnet10t", num_classes=7).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization="both")
    backbone = float32(tmp_path / "model.safetensors")
    pixels = squares(2, backbone.spec.input_size)
    expected = model.forward_head(model.forward_features(normalised(pixels)), pre_logits=True)
    torch.testing.assert_close(backbone.embed_tensor(torch.from_numpy(pixels))[0], expected, rtol=1e-3, atol=1e-3)


def test_the_whole_picture_is_seen_and_the_channels_are_in_order(tiny: Backbone) -> None:
    pixels = squares(1, 32)
    base = tiny.embed(pixels)[0]
    assert not np.array_equal(base, tiny.embed(pixels[..., ::-1].copy())[0])
    corner = pixels.copy()
    corner[0, -1, -1] ^= 255
    assert not np.array_equal(base, tiny.embed(corner)[0])


@torch.inference_mode()
def test_a_model_of_grey_pictures_sees_their_luminance(tmp_path: Path) -> None:
    path, model = saved(tmp_path, "vit_tiny_patch16_224", 32, num_classes=0, in_chans=1, depth=1, img_size=32)
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"mean": [0.45], "std": [0.22]}))
    pixels = squares(3, 32)
    luminance_BHW = np.stack([np.asarray(Image.fromarray(square).convert("L")) for square in pixels])
    expected = model.forward_features((torch.from_numpy(luminance_BHW).unsqueeze(1).float() / 255 - 0.45) / 0.22)
    # Pillow rounds luminance to whole numbers.
    torch.testing.assert_close(
        float32(path).embed_tensor(torch.from_numpy(pixels))[0], expected[:, 0], atol=0.03, rtol=0
    )
    as_grey = luminance_BHW[..., None].repeat(3, axis=-1)
    exact = float32(path).embed_tensor(torch.from_numpy(as_grey))[0]
    torch.testing.assert_close(exact, expected[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [None, ["blue", "nothing", "grey", "opacity", "red"]])
@torch.inference_mode()
def test_each_channel_sees_what_the_description_says(tmp_path: Path, channels: list[str] | None) -> None:
    number = len(channels) if channels else 4
    path, model = saved(tmp_path, "vit_tiny_patch16_224", 32, num_classes=0, in_chans=number, depth=1, img_size=32)
    mean, std = [0.1 * place for place in range(1, number + 1)], [0.2 + 0.01 * place for place in range(number)]
    beside = path.with_suffix(".json")
    described = json.loads(beside.read_text()) | {"mean": mean, "std": std}
    beside.write_text(json.dumps(described | ({"channels": channels} if channels else {})))
    pixels = squares(2, 32)
    red, green, blue = (torch.from_numpy(pixels[..., place]).float() / 255 for place in range(3))
    seen = {
        "red": red, "green": green, "blue": blue, "grey": 0.299 * red + 0.587 * green + 0.114 * blue,
        "opacity": torch.ones_like(red), "nothing": None,
    }  # fmt: skip
    planes = [
        torch.zeros_like(red) if (plane := seen[name]) is None else (plane - mean[place]) / std[place]
        for place, name in enumerate(channels or ["red", "green", "blue", "opacity"])
    ]
    expected = model.forward_features(torch.stack(planes, dim=1))
    found = float32(path).embed_tensor(torch.from_numpy(pixels))[0]
    torch.testing.assert_close(found, expected[:, 0], rtol=1e-3, atol=1e-3)


# --- strictness


def change_weights(path: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(path)
    for name, value in changes.items():
        key = name.replace("__", ".")
        weights = {k: v for k, v in weights.items() if k != key} | ({} if value is None else {key: value})
    save_file(weights, path, metadata={"dino_search": json.dumps(TINY_VIT)})


def test_weights_that_do_not_fit_are_listed_each(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny.safetensors")
    change_weights(path, norm__bias=None, norm__weight=torch.zeros(3), extra=torch.zeros(1))
    with pytest.raises(WeightsMismatch) as caught:
        Backbone(resolve_model(path), device="cpu")
    message = str(caught.value)
    assert "missing norm.bias" in message
    assert "unexpected extra" in message
    assert "norm.weight is [3], expected [64]" in message
    assert str(path) in message
    assert "\n" not in message


def test_a_long_list_of_differences_is_cut_with_a_count(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny.safetensors")
    change_weights(path, **{f"extra_{number}": torch.zeros(1) for number in range(12)})
    with pytest.raises(WeightsMismatch, match=r"and 4 more$"):
        Backbone(resolve_model(path), device="cpu")


@pytest.mark.parametrize(("architecture", "num_classes"), [("vit_tiny_patch16_224", 5), ("resnet10t", 3)])
@torch.inference_mode()
def test_weights_with_a_classifier_load_and_it_changes_nothing(
    tmp_path: Path, architecture: str, num_classes: int
) -> None:
    arguments = {"depth": 1, "img_size": 64} if "vit" in architecture else {}
    path, model = saved(tmp_path, architecture, 64, num_classes=num_classes, **arguments)
    pixels = squares(2, 64)
    features = model.forward_features(normalised(pixels))
    expected = features[:, 0] if "vit" in architecture else features.mean((2, 3))
    torch.testing.assert_close(float32(path).embed_tensor(torch.from_numpy(pixels))[0], expected, rtol=1e-3, atol=1e-3)


def test_an_architecture_that_timm_lacks_is_named(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny.safetensors", architecture="vit_gigantic")
    with pytest.raises(ArchitectureUnknown, match="vit_gigantic"):
        Backbone(resolve_model(path), device="cpu")


def test_arguments_that_the_architecture_lacks_are_refused(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny.safetensors", architecture_args={"colour": "red"})
    with pytest.raises(ArchitectureUnknown, match="colour"):
        Backbone(resolve_model(path), device="cpu")


def test_a_damaged_weights_file_is_a_model_error(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"tiny\.safetensors"):
        Backbone(resolve_model(path), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found no usable GPU"):
        Backbone(resolve_model(save_tiny_model(tmp_path / "tiny.safetensors")), device="cuda")


# --- what must not matter


def test_batch_order_and_batch_size_do_not_matter(tiny: Backbone) -> None:
    pixels = squares(9, 32)
    together = np.concatenate(tiny.embed(pixels), axis=1).astype(np.float32)
    backwards = np.concatenate(tiny.embed(pixels[::-1].copy()), axis=1)[::-1].astype(np.float32)
    alone = np.stack([np.concatenate(tiny.embed(square[None]), axis=1)[0] for square in pixels]).astype(np.float32)
    np.testing.assert_allclose(backwards, together, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(alone, together, rtol=2e-3, atol=2e-3)


def test_pixels_are_left_as_they_were(tiny: Backbone) -> None:
    pixels = squares(2, 32)
    tiny.embed(pixels)
    np.testing.assert_array_equal(pixels, squares(2, 32))


def test_bfloat16_agrees_with_float32(bundled: Backbone) -> None:
    fast = Backbone(resolve_model(), device="cpu", dtype=torch.bfloat16)
    pixels = squares(6, bundled.spec.input_size)
    for exact_ND, fast_ND in zip(bundled.embed(pixels), fast.embed(pixels), strict=True):
        exact, rough = (wide / np.linalg.norm(wide, axis=1, keepdims=True)
                        for wide in (exact_ND.astype(np.float32), fast_ND.astype(np.float32)))  # fmt: skip
        assert (exact * rough).sum(1).min() > 0.999
        np.testing.assert_allclose(rough @ rough.T, exact @ exact.T, atol=0.002)


# --- input size


@torch.inference_mode()
def test_another_input_size_interpolates_as_timm_does(tmp_path: Path) -> None:
    backbone = float32(save_tiny_model(tmp_path / "tiny.safetensors", input_size=80))
    model: Any = timm.create_model(
        TINY_VIT["architecture"], num_classes=0, dynamic_img_size=True, **TINY_VIT["architecture_args"]
    ).eval()
    model.load_state_dict(load_file(tmp_path / "tiny.safetensors"))
    pixels = squares(2, 80)
    expected = model.forward_features(normalised(pixels))
    torch.testing.assert_close(backbone.embed_tensor(torch.from_numpy(pixels))[0], expected[:, 0], rtol=1e-3, atol=1e-3)
    assert backbone.dim == TINY_DIM


def test_an_input_size_that_cuts_patches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="multiple of the patch size 16"):
        Backbone(resolve_model(save_tiny_model(tmp_path / "tiny.safetensors", input_size=40)), device="cpu")


def test_vectors_are_stored_in_float16_and_finite(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny.safetensors")
    change_weights(path, norm__weight=torch.full((64,), 1e6))
    for vectors in float32(path).embed(squares(1, 32)):
        assert vectors.dtype == np.float16
        assert np.isfinite(vectors).all()


# --- patches


@torch.inference_mode()
def test_patches_join_tokens_of_a_third_and_two_thirds_of_the_depth(tmp_path: Path) -> None:
    path, model = saved(tmp_path, "vit_tiny_patch16_224", 48, num_classes=0, img_size=48, depth=6)
    pixels = squares(2, 48)
    _, _, patches_BhwP = float32(path).embed_with_patches(pixels)
    maps = model.forward_intermediates(normalised(pixels), indices=[1, 3], intermediates_only=True)
    expected = torch.cat([torch.nn.functional.normalize(map_BPhw, dim=1) for map_BPhw in maps], dim=1) / 2**0.5
    assert patches_BhwP.shape == (2, 3, 3, 2 * 192)
    assert patches_BhwP.dtype == np.float16
    np.testing.assert_allclose(patches_BhwP, expected.permute(0, 2, 3, 1), atol=2e-3)


@pytest.mark.parametrize(
    ("architecture", "input_size", "arguments", "shape"),
    [
        ("resnet10t", 96, {}, (6, 6, 256)),
        ("convnext_atto", 64, {"depths": [1, 1, 1, 1]}, (4, 4, 160)),
        ("swin_tiny_patch4_window7_224", 56,
         {"img_size": 56, "embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2]}, (7, 7, 48)),
        ("vit_small_patch16_dinov3", 64, {"depth": 1}, (4, 4, 384)),
        ("cait_xxs24_224", 32, {"img_size": 32, "depth": 3}, (2, 2, 384)),
    ],
)  # fmt: skip
def test_any_timm_architecture_gives_patches_and_the_same_vectors(
    tmp_path: Path, architecture: str, input_size: int, arguments: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    path, _ = saved(tmp_path, architecture, input_size, num_classes=0, **arguments)
    backbone = float32(path)
    pixels = squares(3, input_size)
    cls_BD, gem_BD, patches_BhwP = backbone.embed_with_patches(pixels)
    for ours, expected in zip((cls_BD, gem_BD), backbone.embed(pixels), strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), expected.astype(np.float32), rtol=2e-3, atol=2e-3)
    assert patches_BhwP.shape == (3, *shape)
    np.testing.assert_allclose(np.linalg.norm(patches_BhwP.astype(np.float32), axis=3), 1, atol=2e-2)


@torch.inference_mode()
def test_an_architecture_without_intermediates_gives_its_last_map(tmp_path: Path, monkeypatch: Any) -> None:
    path, model = saved(tmp_path, "vit_tiny_patch16_224", 48, num_classes=0, img_size=48, depth=2)
    backbone = float32(path)
    monkeypatch.setattr(backbone._replicas[0].model, "feature_info", None)
    pixels = squares(1, 48)
    expected = torch.nn.functional.normalize(model.forward_features(normalised(pixels))[:, 1:], dim=-1)
    patches_BhwP = backbone.embed_with_patches(pixels)[2]
    np.testing.assert_allclose(patches_BhwP.reshape(1, 9, 192), expected, atol=2e-3)


def test_patches_of_a_batch_that_does_not_fit_are_done_in_halves(tiny: Backbone, monkeypatch: Any) -> None:
    pixels = squares(5, tiny.spec.input_size)
    expected = tiny.embed_with_patches(pixels)
    forward = type(tiny._replicas[0]).forward_with_patches
    tried: list[int] = []

    def bounded(self: Any, pixels_BHWC: torch.Tensor) -> Any:
        tried.append(len(pixels_BHWC))
        if len(pixels_BHWC) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, pixels_BHWC)

    monkeypatch.setattr(type(tiny._replicas[0]), "forward_with_patches", bounded)
    monkeypatch.setattr(tiny._replicas[0], "max_pictures", 100)
    for ours, wanted in zip(tiny.embed_with_patches(pixels), expected, strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), wanted.astype(np.float32), rtol=2e-3, atol=2e-3)
    assert tried == [5, 2, 2, 1]

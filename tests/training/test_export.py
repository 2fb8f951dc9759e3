from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dino_index.backbones import Backbone
from dino_index.descriptors import descriptors
from dino_index.errors import OutputUnwritable
from dino_index.model_files import resolve_model
from dino_training import Recipe, pretrain
from dino_training.export import export_backbone, same_architecture
from dino_training.networks import build_backbone, use_attention
from dino_training.views import normalise
from small_disks import fill, mounted
from tiny_runs import assert_same, final_state, quick_runs, tiny_recipe, write_noise

GREY = {"in_chans": 1, "mean": (0.45,), "std": (0.22,)}
KINDS: dict[str, dict[str, Any]] = {
    "colour": {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1)},
    "grey": GREY,
    "another size": {"export_size": 40},
    "convolutional": {"architecture": "resnet10t", "architecture_args": {}, "global_size": 32, "local_size": 32},
}


@pytest.fixture(autouse=True, scope="module")
def _tiny_and_quick() -> Iterator[None]:
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module", params=KINDS)
def finished(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """A recipe and the folder of its finished run."""
    recipe = tiny_recipe(**KINDS[request.param] | {"epochs": 1, "momentum": 0.5})
    run = tmp_path_factory.mktemp("run")
    pretrain([images], run, recipe)
    return recipe, run


def teacher_of(recipe: Recipe, run: Path) -> torch.nn.Module:
    """The teacher's backbone as the last checkpoint has it."""
    backbone = build_backbone(recipe, student=False)
    use_attention(backbone, fused=False)
    network = final_state(run)["teacher"]["network"]
    own = {key.removeprefix("backbone."): value for key, value in network.items() if key.startswith("backbone.")}
    backbone.load_state_dict(own, strict=True)
    return backbone.eval()


def test_exported_weights_give_the_descriptors_of_the_runs_teacher(finished: tuple[Recipe, Path]) -> None:
    recipe, run = finished
    backbone = Backbone(resolve_model(run / "backbone.safetensors"), device="cpu", dtype=torch.float32)
    size = recipe.input_size
    assert backbone.spec.input_size == size
    pixels_BSSC = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    pictures_BCSS = torch.from_numpy(pixels_BSSC).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        expected = descriptors(teacher_of(recipe, run), normalise(pictures_BCSS, recipe), "normalised")
    for found_BD, expected_BD in zip(backbone.embed_tensor(torch.from_numpy(pixels_BSSC)), expected, strict=True):
        torch.testing.assert_close(found_BD, expected_BD, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[0][0], expected[0][1], atol=1e-4)


def test_the_files_own_metadata_says_everything_that_is_needed(finished: tuple[Recipe, Path]) -> None:
    recipe, run = finished
    spec = resolve_model(run / "backbone.safetensors")
    assert (spec.architecture, spec.origin) == (recipe.architecture, "the file's metadata")
    assert (spec.mean, spec.std, spec.input_size) == (recipe.mean, recipe.std, recipe.input_size)
    assert spec.architecture_args.items() >= recipe.architecture_args.items()


def test_the_card_says_what_the_weights_come_from(images: Path, tmp_path: Path) -> None:
    (images / "bad.png").write_bytes(b"bad")
    try:
        pretrain([images], tmp_path / "run", tiny_recipe(name="mine", seed=3))
    finally:
        (images / "bad.png").unlink()
    with safe_open(tmp_path / "run" / "backbone.safetensors", "pt") as file:
        card = json.loads(file.metadata()["dino_search"])["card"]
    figures = card.pop("figures")
    assert card == {
        "recipe": "mine", "method": "self-distillation (DINO)", "teacher": None, "loss": "cross_entropy",
        "images": 26, "epochs": 2.0, "steps": 6, "batch_size": 8, "training_size": 16, "seed": 3,
        "started_from": None, "hours": 0.0,
    }  # fmt: skip
    assert set(figures) == {"knn_top1", "copies_found", "embedding_std"}


@pytest.mark.mounts
def test_a_full_disk_leaves_the_earlier_weights(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    with mounted(tmp_path / "disk", "400k") as disk:
        path = disk / "weights.safetensors"
        export_backbone(build_backbone(recipe, student=False), recipe, path, {"steps": 1})
        earlier = path.read_bytes()
        fill(disk)
        with pytest.raises(OutputUnwritable, match=r"weights\.safetensors cannot be written"):
            export_backbone(build_backbone(recipe, student=False), recipe, path, {"steps": 2})
        assert path.read_bytes() == earlier
        assert sorted(found.name for found in disk.iterdir()) == ["filler", "weights.safetensors"]


# --- which weights fit


def small(**changed: Any) -> Recipe:
    return Recipe(architecture="vit_tiny_patch16_224", **changed)


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        (small(), {}),
        (small(), {"img_size": 64, "dynamic_img_size": True, "num_classes": 7}),
        (small(global_size=96, local_size=48), {"patch_size": 16, "depth": 12}),  # as shapes of tensors tell
        (small(architecture_args={"patch_size": 8}), {"patch_size": 8, "depth": 12, "img_size": 64}),
        (small(architecture_args={"depth": 12}), {}),
    ],
)
def test_weights_of_the_same_architecture_fit_at_any_size(recipe: Recipe, arguments: dict[str, Any]) -> None:
    assert same_architecture(recipe, "vit_tiny_patch16_224", arguments) is None


@pytest.mark.parametrize(
    ("recipe", "architecture", "arguments"),
    [
        (small(), "vit_small_patch16_224", {}),
        (small(), "vit_tiny_patch16_224", {"patch_size": 8}),
        (small(), "vit_tiny_patch16_224", {"depth": 11}),
        (small(architecture_args={"patch_size": 8}), "vit_tiny_patch16_224", {}),
        (small(), "vit_tiny_patch16_224", {"num_heads": 6}),  # which leaves no trace in the shapes
        (small(**GREY), "vit_tiny_patch16_224", {}),
        (small(), "vit_tiny_patch16_224", {"in_chans": 1}),
    ],
)
def test_weights_of_another_architecture_do_not(recipe: Recipe, architecture: str, arguments: dict[str, Any]) -> None:
    found = same_architecture(recipe, architecture, arguments)
    assert found is not None
    assert found.startswith("expected vit_tiny_patch16_224")
    assert "\n" not in found


def test_weights_that_only_their_shapes_describe_can_be_started_from(images: Path, tmp_path: Path) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    recipe = tiny_recipe(architecture_args={"depth": 1}, global_size=32, local_size=16, epochs=1, learning_rate=0.0)
    pretrain([images], tmp_path / "run", recipe, init=tmp_path / "plain.safetensors")
    assert_same(load_file(tmp_path / "run" / "best.safetensors"), plain.state_dict())


def test_a_grey_run_sees_grey_as_indexing_does(images: Path, tmp_path: Path) -> None:
    grey = [Image.open(path).convert("RGB") for path in sorted(images.iterdir())[:4]]
    pixels_BSSC = torch.from_numpy(np.stack([np.asarray(picture) for picture in grey]))
    recipe = tiny_recipe(**GREY, epochs=1)
    pretrain([images], tmp_path / "run", recipe)
    backbone = Backbone(resolve_model(tmp_path / "run" / "backbone.safetensors"), device="cpu", dtype=torch.float32)
    luminance_BSS = (pixels_BSSC.double() * torch.tensor([0.299, 0.587, 0.114]).double()).sum(-1)
    as_grey = luminance_BSS.unsqueeze(-1).expand(-1, -1, -1, 3)
    torch.testing.assert_close(backbone.embed_tensor(as_grey)[0], backbone.embed_tensor(pixels_BSSC)[0])

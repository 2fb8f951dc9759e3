from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dino_index.errors import ArchitectureUnknown, ModelError, ModelNotFound
from dino_index.model_files import ModelSpec, resolve_model
from sample_collections import TINY_VIT, save_tiny_model

BUNDLED_V5_FINGERPRINT = "3a20b428cd21ea52ac8ebe0d980c1c0098ea3f1a463c72b87633454243690b60"


def plain_vit_tensors(*, width: int = 192, patch_size: int = 8, grid: int = 4) -> dict[str, NDArray[Any]]:
    """The tensors by which a plain ViT is recognised, of two blocks."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, 3, patch_size, patch_size),
        "blocks.0.norm1.weight": (width,),
        "blocks.1.attn.qkv.bias": (3 * width,),
        "norm.weight": (width,),
    }
    return {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}


def save_anything(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file whose tensors belong to no architecture."""
    save_file({"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}, path, metadata=metadata)
    return path


def description(**changed: Any) -> str:
    return json.dumps({"architecture": "resnet18", "input_size": 96} | changed)


def test_bundled_is_a_version_that_is_there() -> None:
    spec = resolve_model()
    assert spec.name == "bundled_v5"
    assert spec.weights_path.is_file()
    assert spec == resolve_model("bundled") == resolve_model("bundled_v5")


def test_resolving_and_fingerprinting_load_no_torch() -> None:
    script = (
        "import sys; from dino_index.model_files import resolve_model; resolve_model().fingerprint; "
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "timm", "faiss", "safetensors"} & set(loaded)


# --- where the architecture is read


def test_the_files_own_metadata_comes_first(tmp_path: Path) -> None:
    path = save_anything(tmp_path / "vit_small_patch16_224.safetensors", {"dino_search": description(input_size=64)})
    path.with_suffix(".json").write_text(description(input_size=128))
    spec = resolve_model(path)
    assert (spec.architecture, spec.input_size, spec.origin) == ("resnet18", 64, "the file's metadata")


def test_a_description_beside_the_file_comes_next(tmp_path: Path) -> None:
    path = save_anything(tmp_path / "weights.safetensors", {"format": "pt"})
    path.with_suffix(".json").write_text(description(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], card={"by": "me"}))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
    spec = resolve_model(path)
    assert (spec.architecture, spec.input_size, spec.origin) == ("resnet18", 96, "weights.json")
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_the_config_that_timm_writes_is_understood(tmp_path: Path) -> None:
    config = {
        "architecture": "vit_small_patch16_224",
        "num_classes": 0,
        "model_args": {"img_size": 98, "patch_size": 14},
        "pretrained_cfg": {"input_size": [3, 98, 98], "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = resolve_model(save_anything(tmp_path / "model.safetensors"))
    assert (spec.architecture, spec.input_size) == ("vit_small_patch16_224", 98)
    assert spec.architecture_args == {"img_size": 98, "patch_size": 14}
    assert (spec.mean, spec.std) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))


def test_a_timm_config_without_preprocessing_gets_the_usual_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": None}))
    spec = resolve_model(save_anything(tmp_path / "model.safetensors"))
    assert (spec.architecture, spec.input_size) == ("resnet18", 224)


@pytest.mark.parametrize(
    ("width", "patch_size", "grid", "name"),
    [(192, 8, 4, "vit_tiny"), (384, 16, 14, "vit_small"), (768, 16, 2, "vit_base"), (1024, 14, 3, "vit_large")],
)
def test_a_plain_vit_is_known_by_its_shapes(tmp_path: Path, width: int, patch_size: int, grid: int, name: str) -> None:
    path = tmp_path / "teacher.safetensors"
    save_file(plain_vit_tensors(width=width, patch_size=patch_size, grid=grid), path)
    spec = resolve_model(path)
    assert spec.architecture == f"{name}_patch16_224"
    assert spec.input_size == patch_size * grid
    assert spec.architecture_args == {"patch_size": patch_size, "img_size": patch_size * grid, "depth": 2}


@pytest.mark.parametrize("tensor", ["reg_token", "blocks.0.ls1.gamma", "head_dist.weight"])
def test_a_vit_with_more_than_the_plain_parts_is_not_guessed(tmp_path: Path, tensor: str) -> None:
    path = tmp_path / "teacher.safetensors"
    save_file(plain_vit_tensors() | {tensor: np.zeros(192, np.float16)}, path)
    with pytest.raises(ArchitectureUnknown):
        resolve_model(path)


def test_the_files_name_comes_last(tmp_path: Path) -> None:
    spec = resolve_model(save_anything(tmp_path / "vit_small_patch16_224.dino.safetensors"))
    assert (spec.architecture, spec.input_size, spec.origin) == ("vit_small_patch16_224", 224, "the file's name")
    assert spec.mean == (0.485, 0.456, 0.406)


def test_the_tag_in_a_name_decides_the_preprocessing(tmp_path: Path) -> None:
    spec = resolve_model(save_anything(tmp_path / "vit_small_patch16_224.augreg_in21k.safetensors"))
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_a_tag_that_is_none_of_timms_does_not_matter(tmp_path: Path) -> None:
    spec = resolve_model(save_anything(tmp_path / "vit_small_patch16_224.mine.safetensors"))
    assert (spec.architecture, spec.input_size) == ("vit_small_patch16_224", 224)


def test_a_model_of_grey_pictures_has_one_mean_and_deviation(tmp_path: Path) -> None:
    path = save_anything(tmp_path / "weights.safetensors")
    path.with_suffix(".json").write_text(description(architecture_args={"in_chans": 1}, mean=[0.4], std=[0.2]))
    spec = resolve_model(path)
    assert (spec.mean, spec.std) == ((0.4,), (0.2,))
    assert ModelSpec.from_config(spec.name, json.loads(json.dumps(spec.config()))).config() == spec.config()


def test_what_channels_see_is_part_of_the_fingerprint_where_it_is_not_the_usual(tmp_path: Path) -> None:
    path = save_anything(tmp_path / "weights.safetensors")
    fingerprints = []
    for changed in ({}, {"channels": ["red", "green", "blue"]}, {"channels": ["blue", "green", "red"]}):
        path.with_suffix(".json").write_text(description(**changed))
        spec = resolve_model(path)
        fingerprints.append(spec.fingerprint)
        assert ModelSpec.from_config(spec.name, json.loads(json.dumps(spec.config()))).fingerprint == spec.fingerprint
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_timms_config_of_a_grey_model_keeps_the_colours_values(tmp_path: Path) -> None:
    config = {"architecture": "resnet18", "model_args": {"in_chans": 1},
              "pretrained_cfg": {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.2, 0.2]}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = resolve_model(save_anything(tmp_path / "model.safetensors"))
    assert spec.mean == pytest.approx((0.4,))
    assert spec.std == pytest.approx((0.2,))


# --- what cannot be used


def test_weights_that_nothing_describes_are_refused_with_a_way_out(tmp_path: Path) -> None:
    path = save_anything(tmp_path / "my-model.safetensors")
    with pytest.raises(ArchitectureUnknown, match=r"my-model\.json beside it"):
        resolve_model(path)


@pytest.mark.parametrize(
    "name",
    ["vit_gigantic", "missing.safetensors", "", "no/such/folder/x.safetensors", "~nobody-of-that-name/x", "x" * 300],
)
def test_a_model_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ModelNotFound, match="expected 'bundled' or the path"):
        resolve_model(name)


def with_header(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        b"This is not a model, whatever its name says.",
        struct.pack("<Q", 500) + b"{}",
        with_header("[]"),
        with_header('{"a": '),
        with_header('{"a": 1}'),
        with_header('{"a": {"dtype": "F32", "shape": [1]}}'),
        with_header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'),
        with_header('{"__metadata__": []}'),
        with_header('{"__metadata__": {"dino_search": 1}}'),
    ],
    ids=str,
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "resnet18.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"resnet18\.safetensors"):
        _ = resolve_model(path).fingerprint


@pytest.mark.parametrize("missing", [1, 100, 10_000])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, missing: int) -> None:
    path = save_tiny_model(tmp_path / "tiny.safetensors")
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(ModelError, match="cut short"):
        _ = resolve_model(path).fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (description(colour="red"), r"unknown keys \['colour'\]"),
        (json.dumps({"architecture": "resnet18"}), r"lacks \['input_size'\]"),
        (description(input_size=0), "input_size must be between 8 and 4096"),
        (description(input_size="large"), "wrong kind"),
        (description(mean=[0.5]), "mean and std must have 3 values, one a colour channel"),
        (description(mean=[0.5], std=[0.5]), "mean and std must have 3 values, one a colour channel"),
        (description(architecture_args={"in_chans": 1}), "mean and std must have 1 value, as in_chans is 1"),
        (description(architecture_args={"in_chans": 1}, mean=[0.5]), "mean and std must have 1 value"),
        (description(architecture_args={"in_chans": 4}), "mean and std must have 4 values"),
        (
            description(architecture_args={"in_chans": 5}, mean=[0.5] * 5, std=[0.5] * 5),
            "'channels' what each one sees",
        ),
        (description(channels=["red", "infrared", "blue"]), "channels may be red, .* found infrared"),
        (description(channels=["red"]), "must name what each of 3 channels sees"),
        (description(std=[0.5, 0.5, 0.0]), "std must be above 0"),
        (description(architecture_args=3), "wrong kind"),
        ("[1, 2]", "JSON object"),
        ("{", "expected JSON"),
        ("\udcff", "expected JSON"),
    ],
)
def test_a_description_is_held_to_what_it_may_say(tmp_path: Path, text: str, message: str) -> None:
    path = save_anything(tmp_path / "weights.safetensors")
    path.with_suffix(".json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=message):
        resolve_model(path)


# --- fingerprint


def test_the_fingerprint_ignores_name_and_metadata(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "one.safetensors")
    moved = tmp_path / "deeper" / "two.safetensors"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    described_beside = tmp_path / "three.safetensors"
    save_file(load_file(path), described_beside, metadata={"author": "somebody"})
    described_beside.with_suffix(".json").write_text(json.dumps(TINY_VIT | {"card": {"licence": "none"}}))
    assert len({resolve_model(place).fingerprint for place in (path, moved, described_beside)}) == 1


def test_the_fingerprint_ignores_the_order_of_tensors_in_the_file(tmp_path: Path) -> None:
    first, second = struct.pack("<2f", 1, 2), struct.pack("<f", 3)
    entries = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    entries["b"] = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}
    swapped = {"a": entries["a"] | {"data_offsets": [4, 12]}, "b": entries["b"] | {"data_offsets": [0, 4]}}
    paths = []
    for name, header, data in (("one", entries, first + second), ("two", swapped, second + first)):
        paths.append(tmp_path / f"{name}.safetensors")
        paths[-1].write_bytes(with_header(json.dumps(header), data))
        paths[-1].with_suffix(".json").write_text(description())
    assert resolve_model(paths[0]).fingerprint == resolve_model(paths[1]).fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"input_size": 48},
        {"mean": [0.5, 0.456, 0.406]},
        {"std": [0.5, 0.224, 0.225]},
        {"architecture": "vit_small_patch16_224"},
        {"architecture_args": TINY_VIT["architecture_args"] | {"qkv_bias": True}},
    ],
)
def test_the_fingerprint_follows_every_setting(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = save_tiny_model(tmp_path / "one.safetensors")
    other = save_tiny_model(tmp_path / "two.safetensors", **changed)
    assert resolve_model(path).fingerprint != resolve_model(other).fingerprint


def test_the_fingerprint_follows_the_pooling(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "one.safetensors")
    assert resolve_model(path).fingerprint != resolve_model(path, pooling="reference").fingerprint


def test_the_fingerprint_follows_one_changed_weight(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "one.safetensors")
    weights = load_file(path)
    weights["norm.bias"][3] += np.float32(1e-3)
    other = tmp_path / "two.safetensors"
    save_file(weights, other, metadata={"dino_search": json.dumps(TINY_VIT)})
    assert resolve_model(path).fingerprint != resolve_model(other).fingerprint


def test_the_fingerprint_of_the_bundled_model_is_what_collections_have_stored() -> None:
    # Another value would refuse every collection that exists: then the version in the model's name must grow too.
    assert resolve_model().fingerprint == BUNDLED_V5_FINGERPRINT


def test_a_spec_survives_being_stored(tmp_path: Path) -> None:
    spec = resolve_model(save_tiny_model(tmp_path / "one.safetensors"), pooling="reference")
    again = ModelSpec.from_config(spec.name, json.loads(json.dumps(spec.config())))
    assert again.fingerprint == spec.fingerprint
    assert again.config() == spec.config()

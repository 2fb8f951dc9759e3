from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dino_index.backbones import Backbone, load_model
from dino_index.checkpoints import read_checkpoint
from dino_index.errors import ArchitectureUnknown, CheckpointRefused, ModelError, OutputUnwritable, WeightsMismatch
from dino_index.model_files import ModelSpec, resolve_model
from foreign_checkpoints import (
    State,
    dino_full_checkpoint,
    dinov2_chunked,
    dinov2_layout,
    random_model,
    save,
    wrapped,
)


def dino_vit(**changed: Any) -> Any:
    """What DINO publishes as ViT-S/16, but narrower in pixels and of two blocks."""
    return random_model("vit_small_patch16_224", **({"depth": 2, "img_size": 64} | changed))


@torch.inference_mode()
def assert_same_features(spec: ModelSpec, model: Any, *, channels: int = 3) -> None:
    pictures = torch.randn(2, channels, spec.input_size, spec.input_size)
    loaded: Any = load_model(spec)
    torch.testing.assert_close(loaded.forward_features(pictures), model.forward_features(pictures))


# --- DINO


DINO_FORMS: dict[str, Callable[[State], Any]] = {
    "backbone alone": lambda state: state,
    "full checkpoint": dino_full_checkpoint,
    "student alone": lambda state: {"student": wrapped(state)},
    "wrapped network": wrapped,
    "compiled and wrapped": lambda state: wrapped(state, prefix="module._orig_mod."),
    "under state_dict": lambda state: {"state_dict": wrapped(state), "epoch": 3},
    "under model": lambda state: {"model": state},
}


@pytest.mark.parametrize("form", DINO_FORMS)
def test_every_form_of_dinos_files_gives_the_models_outputs(tmp_path: Path, form: str) -> None:
    model = dino_vit()
    path = save(DINO_FORMS[form](model.state_dict()), tmp_path / "dino_pretrain.pth")
    spec = resolve_model(path, models=tmp_path / "models")
    assert (spec.architecture, spec.input_size, spec.name) == ("vit_small_patch16_224", 64, str(path))
    assert spec.weights_path.parent == tmp_path / "models"
    assert_same_features(spec, model)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_format_of_old_pytorch_versions_is_read_too(tmp_path: Path, legacy: bool) -> None:
    model = dino_vit()
    torch.save(
        dino_full_checkpoint(model.state_dict()), tmp_path / "old.pth", _use_new_zipfile_serialization=not legacy
    )
    assert_same_features(resolve_model(tmp_path / "old.pth", models=tmp_path / "models"), model)


def test_what_is_chosen_and_left_out_is_said_once(tmp_path: Path) -> None:
    path = save(dino_full_checkpoint(dino_vit().state_dict()), tmp_path / "checkpoint.pth")
    said: list[str] = []
    resolve_model(path, models=tmp_path / "models", on_remark=said.append)
    assert said == [
        "checkpoint.pth: the teacher's weights are taken, not args, dino_loss, epoch, fp16_scaler and 2 more",
        "checkpoint.pth: the projection head is left out (2 tensors)",
    ]
    resolve_model(path, models=tmp_path / "models", on_remark=said.append)
    assert len(said) == 2


@pytest.mark.parametrize("depth", [1, 3])
def test_dinos_resnet50_is_known_by_its_tensors(tmp_path: Path, depth: int) -> None:
    # Narrow enough to be quick where only the pattern of layers counts; the real one below.
    model = random_model("resnet50" if depth == 3 else "resnet18")
    path = save(dino_full_checkpoint(model.state_dict()), tmp_path / "dino_resnet50_pretrain_full_checkpoint.pth")
    spec = resolve_model(path, models=tmp_path / "models")
    assert spec.architecture == ("resnet50" if depth == 3 else "resnet18")
    assert_same_features(spec, model)


def test_a_backbone_of_grey_pictures_is_known_and_embeds(tmp_path: Path) -> None:
    model = dino_vit(in_chans=1)
    spec = resolve_model(save(model.state_dict(), tmp_path / "grey.pth"), models=tmp_path / "models")
    assert (spec.architecture_args["in_chans"], len(spec.mean)) == (1, 1)
    assert_same_features(spec, model, channels=1)
    cls_BD, _ = Backbone(spec, device="cpu").embed_tensor(torch.rand(2, 64, 64, 3) * 255)
    assert torch.isfinite(cls_BD).all()


# --- DINOv2


def dinov2_vit(architecture: str, **changed: Any) -> Any:
    return random_model(architecture, **({"depth": 2, "img_size": 56} | changed))


def dinov2_original(model: Any) -> State:
    registers = "reg_token" in model.state_dict()
    return dinov2_layout(model.state_dict(), positions_of_cls=torch.randn(1, 1, model.embed_dim) if registers else None)


@pytest.mark.parametrize("architecture", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("form", ["backbone alone", "training checkpoint"])
def test_dinov2s_files_give_the_models_outputs(tmp_path: Path, architecture: str, form: str) -> None:
    model = dinov2_vit(architecture)
    state = dinov2_original(model)
    if form == "training checkpoint":
        heads = {"dino_head.mlp.0.weight": torch.zeros(3, 3), "ibot_head.mlp.0.weight": torch.zeros(3, 3)}
        state = {f"backbone.{name}": value for name, value in dinov2_chunked(state, 1).items()} | heads
    content = {"teacher": state} if form == "training checkpoint" else state
    spec = resolve_model(save(content, tmp_path / "dinov2_pretrain.pth"), models=tmp_path / "models")
    assert (spec.architecture, spec.input_size) == (architecture, 56)
    assert_same_features(spec, model)


def test_the_published_size_of_dinov2_needs_no_arguments(tmp_path: Path) -> None:
    model = random_model("vit_small_patch14_dinov2")
    spec = resolve_model(save(dinov2_original(model), tmp_path / "dinov2_vits14_pretrain.pth"), models=tmp_path)
    assert (spec.architecture, spec.architecture_args, spec.input_size) == ("vit_small_patch14_dinov2", {}, 518)


def test_dinov2s_giant_has_a_gated_perceptron_under_other_names(tmp_path: Path) -> None:
    arguments = {"depth": 1, "embed_dim": 48, "num_heads": 2, "img_size": 28}
    model = random_model("vit_giant_patch14_dinov2", **arguments)
    names = {"fc1": "w12", "fc2": "w3"}
    state = {
        ".".join(names.get(part, part) for part in name.split(".")): value
        for name, value in dinov2_original(model).items()
    }
    assert "blocks.0.mlp.w12.weight" in state
    path = save(state, tmp_path / "small_giant.pth")
    # Of no published width: the description beside the file says what it is for.
    path.with_suffix(".json").write_text(
        json.dumps({"architecture": "vit_giant_patch14_dinov2", "architecture_args": arguments, "input_size": 28})
    )
    spec = resolve_model(path, models=tmp_path / "models")
    assert spec.origin == "small_giant.json"
    assert_same_features(spec, model)


@torch.inference_mode()
def test_another_input_size_interpolates_positions_as_timm_does(tmp_path: Path) -> None:
    model = dinov2_vit("vit_small_patch14_reg4_dinov2")
    path = save(dinov2_original(model), tmp_path / "dinov2.pth")
    spec = resolve_model(path, models=tmp_path / "models", input_size=112)
    model.set_input_size(img_size=(112, 112))
    assert spec.input_size == 112
    assert_same_features(spec, model)


# --- what a model is


def test_a_checkpoint_is_the_same_model_as_its_tensors_in_safetensors(tmp_path: Path) -> None:
    state = dino_vit().state_dict()
    save_file(state, tmp_path / "other_name.safetensors")
    forms = [save(content(state), tmp_path / f"{number}.pth") for number, content in enumerate(DINO_FORMS.values())]
    fingerprints = {resolve_model(path, models=tmp_path / "models").fingerprint for path in forms}
    assert fingerprints == {resolve_model(tmp_path / "other_name.safetensors").fingerprint}


def test_a_checkpoint_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(dino_vit().state_dict(), tmp_path / "dino.pth")
    first = resolve_model(path, models=tmp_path / "models")
    monkeypatch.setattr("torch.load", None)
    assert resolve_model(path, models=tmp_path / "models").weights_path == first.weights_path
    assert [file.name for file in (tmp_path / "models").iterdir()] == [first.weights_path.name]


def test_another_content_under_the_same_name_is_another_model(tmp_path: Path) -> None:
    path = save(dino_vit().state_dict(), tmp_path / "checkpoint.pth")
    first = resolve_model(path, models=tmp_path / "models").fingerprint
    save(dino_vit(seed=1).state_dict(), path)
    assert resolve_model(path, models=tmp_path / "models").fingerprint != first


def test_the_converted_file_can_be_asked_for_by_name(tmp_path: Path) -> None:
    spec = resolve_model(save(dino_vit().state_dict(), tmp_path / "dino.pth"), models=tmp_path / "models")
    assert resolve_model(spec.weights_path.stem, models=tmp_path / "models").fingerprint == spec.fingerprint


# --- strictness


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    state = dino_vit().state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    state["blocks.1.attn.extra"] = torch.zeros(3)
    path = save({"teacher": wrapped(state)}, tmp_path / "vit_small_patch16_224.mine.pth")
    path.with_suffix(".json").write_text(
        json.dumps({"architecture": "vit_small_patch16_224", "architecture_args": {"depth": 2, "img_size": 64},
                    "input_size": 64})
    )  # fmt: skip
    with pytest.raises(WeightsMismatch, match=r"missing blocks\.1\.mlp\.fc2\.bias; unexpected blocks\.1\.attn\.extra"):
        load_model(resolve_model(path, models=tmp_path / "models"))


def test_tensors_that_keep_a_checkpoint_from_being_known_are_named(tmp_path: Path) -> None:
    path = save({"teacher": dino_vit().state_dict() | {"extra": torch.zeros(1)}}, tmp_path / "dino.pth")
    with pytest.raises(ArchitectureUnknown, match=r"\(a known one but for extra\)"):
        resolve_model(path, models=tmp_path / "models")
    path = save({name: value for name, value in dino_vit().state_dict().items() if name != "norm.bias"}, path)
    with pytest.raises(WeightsMismatch, match=r"missing norm\.bias$"):
        load_model(resolve_model(path, models=tmp_path / "models"))


def test_a_checkpoint_of_an_unknown_architecture_says_how_to_describe_it(tmp_path: Path) -> None:
    path = save({"fc.weight": torch.zeros(2, 3)}, tmp_path / "mystery.pth")
    with pytest.raises(ArchitectureUnknown, match=r"mystery\.pth does not say .* put mystery\.json beside it"):
        resolve_model(path, models=tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_two_tensors_of_one_name_are_no_single_backbone(tmp_path: Path) -> None:
    state = dino_vit().state_dict()
    path = save(state | {f"module.{name}": value for name, value in state.items()}, tmp_path / "both.pth")
    with pytest.raises(ModelError, match=r"holds \S+ twice, under different prefixes"):
        resolve_model(path, models=tmp_path / "models")


def test_values_that_are_no_tensors_are_reported(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(dino_vit().state_dict() | {"version": 3}, tmp_path / "dino.pth"))
    assert checkpoint.remarks == ["left out, as they are no tensors: version"]


# --- hostile and damaged files


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.evidence),)


class Calls:
    """Runs a line of Python when it is unpickled."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.evidence)!r}, 'w')",)


@pytest.mark.parametrize("kind", [RunsCode, Calls])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(
    tmp_path: Path, kind: Callable[[Path], Any], form: str
) -> None:
    path, evidence = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"teacher": {"cls_token": kind(evidence), "args": 1}}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointRefused, match=r"evil\.pth .*(mkdir|eval), which could run code; nothing in it was"):
        resolve_model(path, models=tmp_path / "models")
    assert not evidence.exists()
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_is_not_run_whatever_the_pickles_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"teacher": RunsCode(tmp_path / "ran")}, protocol=protocol))
    with pytest.raises(ModelError, match=r"evil\.pth cannot be read .* nothing in it was run") as caught:
        resolve_model(path, models=tmp_path / "models")
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(caught.value)


def test_the_options_of_a_dino_run_may_not_smuggle_code(tmp_path: Path) -> None:
    content = dino_full_checkpoint(dino_vit().state_dict())
    content["args"].output_dir = RunsCode(tmp_path / "ran")
    with pytest.raises(CheckpointRefused, match="mkdir"):
        resolve_model(save(content, tmp_path / "evil.pth"), models=tmp_path / "models")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept_frac", [0.0, 0.001, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_is_cut_short_is_a_model_error(tmp_path: Path, legacy: bool, kept_frac: float) -> None:
    path = tmp_path / "cut.pth"
    torch.save(dino_vit(depth=1).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept_frac)])
    with pytest.raises(ModelError, match=r"cut\.pth cannot be read .* copy it again") as caught:
        resolve_model(path, models=tmp_path / "models")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"epoch": 3}, torch.zeros(3), {"teacher": {"head.mlp.0.weight": torch.zeros(1)}}],
    ids=["list", "numbers", "one tensor", "a head alone"],
)
def test_a_file_without_a_backbone_says_what_it_holds(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ModelError, match=r"weights\.pth: expected .*, found "):
        resolve_model(save(content, tmp_path / "weights.pth"), models=tmp_path / "models")


def test_a_home_that_cannot_be_written_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where a folder should be")
    path = save(dino_vit(depth=1).state_dict(), tmp_path / "dino.pth")
    with pytest.raises(OutputUnwritable, match="cannot be written"):
        resolve_model(path, models=tmp_path / "models")

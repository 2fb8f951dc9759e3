from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coloured_sets import write_coloured
from dino_index.backbones import Backbone, load_model
from dino_index.errors import EvaluationImpossible, OutOfMemory, OutputUnwritable, TrainingDiverged
from dino_index.model_files import resolve_model
from dino_training.evaluation.features import FeatureStore
from dino_training.evaluation.finetune import (
    FinetuneOptions,
    _Training,
    build_classifier,
    evaluate_finetune,
    layer_groups,
)

QUICK: dict[str, Any] = {
    "epochs": 6, "batch_size": 8, "learning_rate": 0.1, "warmup_epochs": 1.0, "drop_path": 0.0, "erasing": 0.0,
    "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    return write_coloured(tmp_path / "train", 8), write_coloured(tmp_path / "val", 4, seed=1)


@pytest.mark.parametrize("from_scratch", [False, True])
def test_training_learns_what_can_be_told_apart(
    sets: tuple[Path, Path], store: FeatureStore, from_scratch: bool
) -> None:
    options = FinetuneOptions(from_scratch=from_scratch, **QUICK)
    found = evaluate_finetune(store, *sets, options).to_json()
    assert found["top1"] == 1.0
    assert len(found["losses"]) == 6
    assert found["losses"][-1] < found["losses"][0]
    assert found["train_top1"] == 1.0
    assert found["layer_decay"] == (1.0 if from_scratch else 0.75)
    assert found["protocol"].startswith("supervised" if from_scratch else "fine-tuning")


def test_rates_fall_from_the_last_layer_to_the_first_by_the_decay(tiny_model: Path) -> None:
    spec = resolve_model(tiny_model)
    spec = replace(spec, architecture_args=spec.architecture_args | {"depth": 4})
    options = FinetuneOptions(from_scratch=True, layer_decay=0.5, weight_decay=0.1)
    model = build_classifier(spec, 3, options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales, decays = {}, {}
    for group in layer_groups(model, options):
        for parameter in group["params"]:
            scales[names[id(parameter)]] = group["lr_scale"]
            decays[names[id(parameter)]] = group["weight_decay"]
    assert set(scales) == set(names.values())
    for name, scale in scales.items():
        block = re.match(r"blocks\.(\d)\.", name)
        layers_behind = 4 - int(block[1]) if block else {"head": 0, "norm": 1}.get(name.split(".")[0], 5)
        assert scale == pytest.approx(0.5**layers_behind), name
    undecayed = {name for name, decay in decays.items() if decay == 0}
    assert {"cls_token", "pos_embed", "norm.bias", "norm.weight", "blocks.0.attn.qkv.bias"} <= undecayed
    assert {decays["head.weight"], decays["blocks.3.mlp.fc1.weight"], decays["patch_embed.proj.weight"]} == {0.1}


def test_a_decay_moves_early_layers_less(sets: tuple[Path, Path], store: FeatureStore, tmp_path: Path) -> None:
    before = load_model(store.spec).state_dict()
    moved = []
    for decay in (1.0, 0.1):
        path = tmp_path / f"{decay}.safetensors"
        options = FinetuneOptions(layer_decay=decay, **QUICK | {"epochs": 1, "batch_size": 24, "learning_rate": 0.1})
        evaluate_finetune(store, *sets, options, save=path)
        after = load_model(resolve_model(path)).state_dict()
        moved.append({name: (after[name] - before[name]).abs().max().item() for name in after})
    # One step of AdamW, whose length is the rate.
    assert moved[1]["norm.weight"] == pytest.approx(0.1 * moved[0]["norm.weight"], rel=0.05)
    name = "patch_embed.proj.bias"
    assert moved[1][name] == pytest.approx(0.01 * moved[0][name], rel=0.05)


def test_everything_follows_from_the_seed_and_no_generator_is_disturbed(
    sets: tuple[Path, Path], store: FeatureStore
) -> None:
    options = QUICK | {"epochs": 2, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.5, "drop_path": 0.2}
    runs = []
    for seed in (0, 0, 1):
        before = str(np.random.get_state()), random.getstate()
        runs.append(evaluate_finetune(store, *sets, FinetuneOptions(seed=seed, **options)).to_json())
        assert (str(np.random.get_state()), random.getstate()) == before
    assert runs[0] == runs[1]
    assert runs[0]["losses"] != runs[2]["losses"]


@pytest.mark.parametrize("input_size", [32, 48])
def test_the_saved_backbone_is_what_index_takes(
    sets: tuple[Path, Path], tiny_model: Path, tmp_path: Path, input_size: int
) -> None:
    store = FeatureStore(resolve_model(tiny_model, input_size=input_size), device="cpu")
    path = tmp_path / "new/tuned.safetensors"
    result = evaluate_finetune(store, *sets, FinetuneOptions(**QUICK), save=path)
    spec = resolve_model(path)
    assert (spec.input_size, spec.mean) == (input_size, store.spec.mean)
    pixels = np.random.default_rng(0).integers(0, 256, (2, input_size, input_size, 3), np.uint8)
    tuned, untuned = (Backbone(spec, device="cpu").embed(pixels)[0] for spec in (spec, store.spec))
    assert tuned.shape == untuned.shape
    assert np.abs(tuned - untuned).max() > 0.1
    again = evaluate_finetune(FeatureStore(spec, device="cpu"), *sets, FinetuneOptions(**QUICK | {"epochs": 1}))
    assert again.to_json()["losses"][0] < result.to_json()["losses"][0]  # it goes on from what was learnt
    store.close()


def test_a_loss_that_is_no_number_stops_the_training(sets: tuple[Path, Path], store: FeatureStore) -> None:
    with pytest.raises(TrainingDiverged, match="lower the learning rate") as caught:
        evaluate_finetune(store, *sets, FinetuneOptions(**QUICK | {"learning_rate": 1e30}))
    assert "\n" not in str(caught.value)


def test_a_step_that_does_not_fit_into_memory_says_what_to_change(
    sets: tuple[Path, Path], store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(model: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("timm.models.VisionTransformer.forward", run_out)
    with pytest.raises(OutOfMemory, match="8 pictures of 32 px in a step do not fit"):
        evaluate_finetune(store, *sets, FinetuneOptions(**QUICK))


def test_an_architecture_of_one_channel_is_trained_on_grey(
    sets: tuple[Path, Path], store: FeatureStore, tmp_path: Path
) -> None:
    spec = replace(
        store.spec, architecture_args=store.spec.architecture_args | {"in_chans": 1}, mean=(0.4,), std=(0.2,)
    )
    options = FinetuneOptions(from_scratch=True, **QUICK)
    evaluate_finetune(FeatureStore(spec, device="cpu"), *sets, options, save=tmp_path / "grey.safetensors")
    saved = resolve_model(tmp_path / "grey.safetensors")
    assert (saved.mean, saved.seen_channels) == ((0.4,), ("grey",))
    assert load_model(saved).state_dict()["patch_embed.proj.weight"].shape[1] == 1


def test_a_place_to_save_that_cannot_be_made_is_said_before_training(
    sets: tuple[Path, Path], store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("dino_training.evaluation.finetune._Training.run", lambda self: pytest.fail("trained"))
    with pytest.raises(OutputUnwritable, match="choose another --save"):
        evaluate_finetune(store, *sets, save=tmp_path / "file/x.safetensors")


@pytest.mark.parametrize(("per_class", "batch_size", "expected"), [(1, 256, 2), (8, 7, 6), (8, 1, 1)])
def test_pictures_are_mixed_in_pairs_however_few_there_are(
    sets: tuple[Path, Path], store: FeatureStore, per_class: int, batch_size: int, expected: int
) -> None:
    options = QUICK | {"epochs": 1, "mixup": 0.8, "batch_size": batch_size}
    found = evaluate_finetune(store, *sets, FinetuneOptions(per_class=per_class, **options)).to_json()
    assert (found["batch_size"], found["train"]["used"]) == (expected, 3 * per_class)


def test_classes_only_in_val_are_wrong_and_unreadable_files_counted(
    sets: tuple[Path, Path], store: FeatureStore
) -> None:
    (sets[1] / "blue").rename(sets[1] / "azure")
    for path in sets:
        (path / "red/broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    result = evaluate_finetune(store, *sets, FinetuneOptions(**QUICK))
    found = result.to_json()
    assert found["top1"] == pytest.approx(2 / 3)
    assert [len(found[part]["unreadable"]) for part in ("train", "val")] == [1, 1]
    assert "count as wrong: azure" in " ".join(result.remarks)


def test_images_that_vanish_while_it_trains_are_left_out_of_what_is_judged(
    sets: tuple[Path, Path], store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _Training.run

    def run_and_remove(self: _Training) -> list[float]:
        losses = run(self)
        (sets[1] / "red/0.png").unlink()
        return losses

    monkeypatch.setattr(_Training, "run", run_and_remove)
    found = evaluate_finetune(store, *sets, FinetuneOptions(**QUICK)).to_json()
    assert (found["top1"], found["val"]["used"], len(found["val"]["unreadable"])) == (1.0, 11, 1)


def test_one_class_is_an_error(tmp_path: Path, store: FeatureStore) -> None:
    write_coloured(tmp_path / "all", 2)
    with pytest.raises(EvaluationImpossible, match=r"found one \(red\)"):
        evaluate_finetune(store, tmp_path / "all/red", tmp_path / "all")


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"layer_decay": 1.5}, {"learning_rate": 0.0}, {"smoothing": 1.0}, {"erasing": 2.0}, {"mixup": -1}],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FinetuneOptions(**wrong)

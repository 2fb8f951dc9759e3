from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from dino_index.descriptors import global_token
from dino_index.errors import EvaluationImpossible
from dino_index.model_files import resolve_model
from dino_training.evaluation.features import FeatureStore
from dino_training.evaluation.labelled_batches import centre_view
from dino_training.evaluation.labelled_images import LabelledImages
from dino_training.evaluation.probe_features import FeatureKind, ProbeFeatures
from sample_collections import write_pictures


def tiny_vit(**changed: Any) -> Any:
    arguments: dict[str, Any] = {"depth": 6, "embed_dim": 64, "num_heads": 2, "img_size": 32} | changed
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments).eval()


@torch.inference_mode()
def test_features_are_the_normalised_cls_of_the_last_blocks() -> None:
    model = tiny_vit()
    pictures = torch.randn(3, 3, 32, 32)
    tokens = model._pos_embed(model.patch_embed(pictures))
    expected = []
    for number, block in enumerate(model.blocks):
        tokens = block(tokens)
        if number >= 2:
            expected.append(model.norm(tokens)[:, 0])
    kind = FeatureKind.of(model)
    assert (kind.name, kind.num_features(64)) == ("cls-of-4", 256)
    found = kind.features(model, pictures)
    torch.testing.assert_close(found, torch.cat(expected, dim=1))
    layers = model.get_intermediate_layers(pictures, n=4, return_prefix_tokens=True, norm=True)
    torch.testing.assert_close(found, torch.cat([prefix[:, 0] for _, prefix in layers], dim=1))
    torch.testing.assert_close(found[:, -64:], model.forward_features(pictures)[:, 0])


@torch.inference_mode()
def test_wide_transformers_give_cls_and_the_mean_patch_of_the_last_block() -> None:
    model = tiny_vit(embed_dim=768, depth=2)
    kind = FeatureKind.of(model)
    assert (kind.name, kind.num_features(768)) == ("cls-of-1-and-mean-patch", 1536)
    tokens = model.forward_features(pictures := torch.randn(2, 3, 32, 32))
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(kind.features(model, pictures), expected)


@torch.inference_mode()
def test_networks_without_blocks_give_their_pooled_features() -> None:
    model: Any = timm.create_model("resnet10t", num_classes=0).eval()
    kind = FeatureKind.of(model)
    assert (kind.name, kind.num_features(512)) == ("pooled", 512)
    pictures = torch.randn(2, 3, 64, 64)
    expected = global_token(model, model.forward_features(pictures))
    torch.testing.assert_close(kind.features(model, pictures), expected)
    with pytest.raises(EvaluationImpossible, match="expected an architecture with blocks"):
        FeatureKind.of(model, num_blocks=4)


def test_what_is_asked_for_goes_before_what_the_architecture_says() -> None:
    model = tiny_vit()
    assert FeatureKind.of(model, 2, True).name == "cls-of-2-and-mean-patch"
    assert FeatureKind.of(tiny_vit(depth=1)).num_blocks == 1
    with pytest.raises(EvaluationImpossible, match="the model has 6 blocks, expected 7"):
        FeatureKind.of(model, 7)


def probe(store: FeatureStore) -> ProbeFeatures:
    return ProbeFeatures(store, FeatureKind.of(store.backbone.model))


def test_features_of_a_set_are_those_of_each_image_alone_and_come_from_the_cache_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "set", *(f"{name}/{n}.jpg" for name in ("cat", "dog") for n in range(7)))
    (tmp_path / "set/cat/8.jpg").write_bytes(b"\xff\xd8\xff nothing")
    store = FeatureStore(resolve_model(tiny_model), device="cpu", cache=tmp_path / "cache")
    images, features = probe(store).of_centres(LabelledImages.open(tmp_path / "set", "train"))
    assert (len(images), features.shape, len(images.unreadable)) == (14, (14, 64), 1)
    for number in range(14):
        square = centre_view(images.load(number), 32)
        alone = probe(store).of_batches([(square[None], np.zeros(1, np.int64))])
        np.testing.assert_allclose(next(alone)[0][0], features[number], rtol=2e-2, atol=2e-2)
    monkeypatch.setattr(type(store.backbone), "describe", lambda *arguments: pytest.fail("computed again"))
    _, again = probe(store).of_centres(LabelledImages.open(tmp_path / "set", "train"))
    np.testing.assert_array_equal(again, features)
    store.close()


def test_the_middle_is_what_resizing_to_256_and_cutting_224_leaves() -> None:
    pixels = np.zeros((256, 320, 3), np.uint8)
    pixels[16:240, 48:272] = 255
    assert (centre_view(pixels, 224) == 255).all()
    assert not (centre_view(pixels, 256) == 0).any()
    pixels[:, :49] = 0  # one column further in
    assert (centre_view(pixels, 224)[:, 0] < 255).all()
    assert centre_view(pixels[::4, ::4], 112).shape == (112, 112, 3)  # enlarged

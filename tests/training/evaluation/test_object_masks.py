from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_index.attention_masks import ObjectMask
from dino_index.errors import EvaluationImpossible, ImageError, SourceNotFound
from dino_index.images import ReadLimits
from dino_training.evaluation.object_masks import MaskFolder, MaskScores, mask_result, read_mask

OBJECT = np.zeros((8, 12), np.uint8)
OBJECT[2:6, 3:9] = 1


def saved(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(OBJECT),
        Image.fromarray(OBJECT * 255),
        Image.fromarray(OBJECT > 0),
        Image.fromarray(OBJECT.astype(np.uint16) * 40_000),
        Image.fromarray(np.stack([OBJECT * 0, OBJECT * 128, OBJECT * 0], axis=-1)),
        Image.fromarray(np.stack([OBJECT * 0 + 255] * 3 + [OBJECT * 255], axis=-1)),
        Image.merge("LA", [Image.fromarray(OBJECT * 255), Image.fromarray(OBJECT * 0 + 255)]),
    ],
    ids=["classes", "black and white", "one bit", "16 bit", "colour", "transparent around", "grey and alpha"],
)
def test_masks_of_every_kind_say_the_same(image: Image.Image, tmp_path: Path) -> None:
    mask = read_mask(saved(tmp_path / "m.png", image), ReadLimits())
    assert mask.object_YX.tolist() == (OBJECT > 0).tolist()
    assert not mask.void_YX.any()


def test_index_255_of_a_palette_is_void_as_in_pascal_voc(tmp_path: Path) -> None:
    values = OBJECT * 7
    values[2] = 255
    image = Image.fromarray(values)
    image.putpalette([number for number in range(256) for _ in range(3)])
    mask = read_mask(saved(tmp_path / "m.png", image), ReadLimits())
    assert mask.object_YX.tolist() == (values == 7).tolist()
    assert mask.void_YX.tolist() == (values == 255).tolist()


def test_a_mask_that_cannot_be_read_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    with pytest.raises(ImageError):
        read_mask(tmp_path / "m.png", ReadLimits())


def test_a_mask_is_found_beside_its_picture_or_by_its_name_alone(tmp_path: Path) -> None:
    for name in ("a/x.png", "x.png", "y.png"):
        saved(tmp_path / name, Image.fromarray(OBJECT))
    masks = MaskFolder(tmp_path, ["a/x", "b/x", "c/y", "z"])
    assert masks.find("a/x") == tmp_path / "a/x.png"
    assert masks.find("b/x") is None  # x.png may be that of either
    assert masks.find("c/y") == tmp_path / "y.png"
    assert masks.find("z") is None


def test_a_folder_of_masks_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="expected a folder of masks, found none"):
        MaskFolder(tmp_path / "none", [])


def scores(*jaccards: float, share: float = 0.5, area: float = 0.25) -> MaskScores:
    values = np.array(jaccards)
    return MaskScores(jaccard_H=values, on_object_H=np.full(len(values), share), object_area=area)


def test_scores_of_a_head_that_sees_the_object_and_of_one_that_does_not() -> None:
    maps_Hhw = np.full((2, 4, 4), 1e-3, np.float32)
    maps_Hhw[0, 1:3, 1:3] = 0.2
    maps_Hhw[1, 0, :] = 0.2
    object_YX = np.zeros((40, 80), bool)
    object_YX[10:30, 20:60] = True
    found = MaskScores.of(maps_Hhw, ObjectMask(object_YX=object_YX, void_YX=np.zeros_like(object_YX)), 0.9)
    assert found.jaccard_H.tolist() == [1.0, 0.0]
    assert found.on_object_H == pytest.approx([0.8 / 0.812, 0.004 / 0.812], rel=1e-4)
    assert found.object_area == 0.25
    printed = found.to_json()
    assert printed["best_head"] == 0
    assert printed["attention_on_object"] + printed["attention_on_background"] == 1


def test_figures_are_means_over_pictures_and_the_best_head_is_each_picture_s_own() -> None:
    result = mask_result([scores(0.9, 0.1, share=0.6), scores(0.3, 0.5, share=0.8)], protocol="p", mass=0.6)
    printed = result.to_json()
    assert printed["jaccard"] == pytest.approx({"best_head": 0.7, "0": 0.6, "1": 0.3})
    assert printed["attention"] == pytest.approx({"object": 0.7, "background": 0.3})
    assert printed["object_area"] == 0.25
    low, high = printed["confidence"]["jaccard"]["best_head"]
    assert 0.5 <= low <= 0.7 <= high <= 0.9
    assert low < high


def test_without_any_mask_there_is_nothing_to_say() -> None:
    with pytest.raises(EvaluationImpossible, match="expected masks with an object"):
        mask_result([], protocol="p", mass=0.6)


def test_pictures_without_any_mask_are_said_before_anything_else(tmp_path: Path) -> None:
    saved(tmp_path / "x.png", Image.fromarray(OBJECT))
    MaskFolder(tmp_path, ["a/x", "z"]).require_any(["a/x", "z"])
    with pytest.raises(EvaluationImpossible, match=r"such as a/x\.png, found none for any of 2"):
        MaskFolder(tmp_path, ["a/x", "b/x"]).require_any(["a/x", "b/x"])

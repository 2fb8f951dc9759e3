"""`dino-search attention`: what it writes, compares, reports and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from bad_files import encoded, exif_orientation, picture, png_16_bit
from commands_in_process import Command
from dino_index.attention_masks import enlarge, jaccard, keep_mass
from dino_index.backbones import Backbone
from dino_index.image_bytes import ReadLimits
from dino_index.images import load_image
from dino_index.model_files import resolve_model
from dino_training import pretrain
from dino_training.evaluation.object_masks import read_mask
from opencv_stand_in import FRAME_SIZE, install_opencv, remove_opencv, write_video
from sample_collections import jpeg, write_pictures, write_shard
from tiny_runs import quick_runs, tiny_recipe


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def test_each_picture_gets_an_overlay_and_a_map_and_a_mask_for_each_head(
    dino_search: Command, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = dino_search("attention", photos, "--out", out, "--model", tiny_model, "--grid", "--json")
    assert ended.code == 0
    printed = ended.json()
    assert len(printed["pictures"]) == 8
    for drawn in printed["pictures"]:
        source = Path(drawn["path"])
        assert Path(drawn["folder"]) == out / source.relative_to(photos).with_suffix("")
        files = [drawn["overlay"], *drawn["heads"], *drawn["masks"]]
        assert sorted(path.name for path in Path(drawn["folder"]).iterdir()) == sorted(Path(f).name for f in files)
        assert len(drawn["heads"]) == len(drawn["masks"]) == 1
        assert {size_of(Path(file)) for file in files} == {size_of(source)} == {(drawn["width"], drawn["height"])}
        assert drawn["patches"] == [2, 2]
        assert 0 < drawn["attention_to_patches"][0] < 1
    assert printed["grid"] == str(out / "grid.png")
    width, height = size_of(out / "grid.png")
    assert width > 3 * 160
    assert height > 8 * 50
    assert (printed["failed"], printed["mass"], printed["input_size"]) == ([], 0.6, 32)


def test_masks_are_those_of_the_model_s_own_attention(
    dino_search: Command, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    source = photos / "cat/1.jpg"
    out = tmp_path / "out"
    options = ["--model", tiny_model, "--input-size", "64", "--mass", ".4", "--device", "cpu", "--json"]
    (drawn,) = dino_search("attention", source, "--out", out, *options).json()["pictures"]
    assert drawn["patches"] == [4, 4]
    backbone = Backbone(resolve_model(tiny_model, input_size=64), device="cpu")
    maps_Hhw = backbone.attention(load_image(source, size=(64, 64)).pixels_HWC[None])[0]
    with Image.open(drawn["masks"][0]) as image:
        written = np.asarray(image) > 0
    assert written.tolist() == enlarge(keep_mass(maps_Hhw, 0.4)[0], size_of(source)).tolist()


def test_pictures_of_any_mode_and_orientation_keep_their_size(
    dino_search: Command, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    turned = picture(60, 40)
    (folder / "turned.jpg").write_bytes(encoded(turned, "JPEG", exif=exif_orientation(6)))
    rgba = picture(50, 30).convert("RGBA")
    rgba.putalpha(90)
    (folder / "clear.png").write_bytes(encoded(rgba, "PNG"))
    (folder / "deep.png").write_bytes(png_16_bit(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100))
    (folder / "line.png").write_bytes(encoded(picture(90, 1), "PNG"))
    ended = dino_search("attention", folder, "--out", tmp_path / "out", "--model", tiny_model, "--grid", "--json")
    sizes = {
        Path(drawn["path"]).name: (drawn["width"], drawn["height"], size_of(Path(drawn["overlay"])))
        for drawn in ended.json()["pictures"]
    }
    assert sizes == {
        "turned.jpg": (40, 60, (40, 60)),
        "clear.png": (50, 30, (50, 30)),
        "deep.png": (30, 20, (30, 20)),
        "line.png": (90, 1, (90, 1)),
    }


def test_pictures_with_the_same_name_do_not_overwrite_each_other(
    dino_search: Command, tiny_model: Path, tmp_path: Path
) -> None:
    paths = write_pictures(tmp_path, "a/x.jpg", "b/x.jpg", "b/X.png")
    ended = dino_search("attention", *paths, "--out", tmp_path / "out", "--model", tiny_model, "--json")
    folders = [Path(drawn["folder"]).name for drawn in ended.json()["pictures"]]
    assert folders == ["x", "x-2", "X-3"]
    assert f"{paths[1]}: x is another picture's; this one is in x-2" in ended.err
    overlays = {(tmp_path / "out" / folder / "overlay.png").read_bytes() for folder in folders}
    assert len(overlays) == 3


def test_a_broken_file_is_reported_and_the_others_go_on(
    dino_search: Command, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (photos / "cat/1.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (photos / "notes.txt").write_text("words")
    (photos / "film.mp4").write_text("film")
    ended = dino_search("attention", photos, "--out", tmp_path / "out", "--model", tiny_model, "--json")
    printed = ended.json()
    assert ended.code == 0
    assert len(printed["pictures"]) == 7
    assert [(failed["path"], bool(failed["reason"])) for failed in printed["failed"]] == [
        (str(photos / "cat/1.jpg"), True)
    ]
    assert printed["ignored"] == {"text": 1, "video": 1}
    assert "left out" in ended.err
    assert "1 failed" in ended.err
    assert "name them to have their frames drawn" in ended.err
    assert not (tmp_path / "out/cat/1").exists()


def test_when_no_picture_can_be_read_the_exit_status_is_1(
    dino_search: Command, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    ended = dino_search("attention", tmp_path / "bad.jpg", "--out", tmp_path / "out", "--model", tiny_model, "--grid")
    assert ended.code == 1
    assert "no picture could be read" in ended.err
    (tmp_path / "masks").mkdir()
    options = ["--out", tmp_path / "out", "--model", tiny_model, "--masks", tmp_path / "masks", "--json"]
    empty = dino_search("attention", tmp_path / "masks", *options)
    assert (empty.code, empty.json()["pictures"]) == (1, [])
    missing = dino_search("attention", tmp_path / "none.jpg", "--out", tmp_path / "out", "--model", tiny_model)
    assert missing.code == 1
    assert "no such file" in missing.err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_without_force(
    dino_search: Command, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    command = ["attention", photos / "cat/0.jpg", "--out", tmp_path / "out", "--model", tiny_model]
    assert dino_search(*command).code == 0
    left_over = tmp_path / "out/0/head-07.png"
    left_over.write_bytes(b"of a model with more heads")
    (tmp_path / "out/0/mine.txt").write_text("kept")
    refused = dino_search(*command, "--json")
    assert refused.code == 1
    assert "exists already" in refused.err
    assert left_over.exists()
    assert dino_search(*command, "--force").code == 0
    assert not left_over.exists()
    assert (tmp_path / "out/0/mine.txt").read_text() == "kept"


def test_a_convolutional_network_is_refused_in_one_line(dino_search: Command, photos: Path, tmp_path: Path) -> None:
    weights = tmp_path / "resnet18.safetensors"
    model = timm.create_model("resnet18", pretrained=False, num_classes=0)
    save_file(
        model.state_dict(),
        weights,
        metadata={"dino_search": json.dumps({"architecture": "resnet18", "input_size": 32})},
    )
    ended = dino_search("attention", photos, "--out", tmp_path / "out", "--model", weights)
    assert ended.code == 1
    assert "need a vision transformer of timm with a [CLS] token, found resnet18" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mass", ["0", "1.5", "-1"])
def test_a_mass_that_is_no_share_is_wrong_usage(
    dino_search: Command, photos: Path, tmp_path: Path, mass: str
) -> None:  # fmt: skip
    ended = dino_search("attention", photos, "--out", tmp_path / "out", "--mass", mass)
    assert ended.code == 2
    assert "mass must be above 0 and at most 1" in ended.err


def test_an_out_that_is_a_file_is_refused(
    dino_search: Command, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:  # fmt: skip
    (tmp_path / "out").write_text("a file")
    ended = dino_search("attention", photos, "--out", tmp_path / "out", "--model", tiny_model)
    assert ended.code == 1
    assert "cannot be written" in ended.err


@pytest.fixture
def masks(photos: Path, tmp_path: Path) -> Path:
    """Of two cats, one in another size than the picture, one without an object, and one that is no picture."""
    folder = tmp_path / "masks"
    (folder / "cat").mkdir(parents=True)
    width, height = size_of(photos / "cat/0.jpg")
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2] = 255
    Image.fromarray(mask).save(folder / "cat/0.png")
    Image.fromarray(np.eye(2, dtype=np.uint8) * 255).save(folder / "cat/1.png")
    Image.fromarray(mask * 0).save(folder / "cat/2.png")
    (folder / "cat/3.png").write_bytes(b"nothing")
    return folder


def test_masks_give_jaccard_and_shares_with_intervals(
    dino_search: Command, photos: Path, tiny_model: Path, masks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = dino_search("attention", photos, "--out", out, "--model", tiny_model, "--masks", masks, "--json")
    assert ended.code == 0
    printed = ended.json()
    by_name = {Path(drawn["path"]).relative_to(photos).as_posix(): drawn for drawn in printed["pictures"]}
    assert [name for name, drawn in by_name.items() if "jaccard" in drawn] == ["cat/0.jpg", "cat/1.jpg"]
    with Image.open(by_name["cat/0.jpg"]["masks"][0]) as image:
        drawn_mask = np.asarray(image) > 0
    truth = read_mask(masks / "cat/0.png", ReadLimits())
    assert by_name["cat/0.jpg"]["jaccard"] == pytest.approx([jaccard(drawn_mask, truth)])
    assert printed["masks"] == 2
    assert printed["jaccard"]["best_head"] == pytest.approx(
        np.mean([by_name[f"cat/{number}.jpg"]["jaccard"][0] for number in range(2)])
    )
    assert printed["attention"]["object"] + printed["attention"]["background"] == pytest.approx(1)
    assert len(printed["confidence"]["jaccard"]["best_head"]) == 2
    assert "it was resized" in ended.err
    assert "has no object and was left out" in ended.err
    assert "cannot be read and was left out" in ended.err
    assert "6 pictures have no mask of their own" in ended.err
    assert json.loads((out / "result.json").read_text())["jaccard"] == printed["jaccard"]
    assert "| jaccard best_head |" in (out / "table.md").read_text()
    assert min(size_of(out / "plot.png")) > 100


def test_masks_are_a_table_for_people_and_results_are_not_overwritten(
    dino_search: Command, photos: Path, tiny_model: Path, masks: Path, tmp_path: Path
) -> None:
    command = ["attention", photos, "--out", tmp_path / "out", "--model", tiny_model, "--masks", masks]
    ended = dino_search(*command)
    assert [line.split("\t")[0].strip() for line in ended.out.splitlines()] == [
        "jaccard best_head", "jaccard 0", "attention object", "attention background", "object_area",
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "out/cat")
    shutil.rmtree(tmp_path / "out/dog")
    refused = dino_search(*command)
    assert refused.code == 1
    assert "result.json exists already" in refused.err


def test_masks_without_an_object_are_an_error(
    dino_search: Command, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:  # fmt: skip
    (tmp_path / "masks/cat").mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / "masks/cat/0.png")
    options = ["--out", tmp_path / "out", "--model", tiny_model, "--masks", tmp_path / "masks"]
    ended = dino_search("attention", photos, *options)
    assert ended.code == 1
    assert "expected masks with an object" in ended.err


def test_pictures_that_share_a_name_share_no_mask(dino_search: Command, tiny_model: Path, tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, "a/x.jpg", "b/x.jpg", "b/y.jpg")
    (tmp_path / "masks").mkdir()
    for name in ("x", "x-2", "y"):
        Image.new("L", (9, 9), 1).save(tmp_path / f"masks/{name}.png")
    options = ["--out", tmp_path / "out", "--model", tiny_model, "--masks", tmp_path / "masks", "--json"]
    drawn = dino_search("attention", *paths, *options).json()["pictures"]
    assert ["jaccard" in picture for picture in drawn] == [False, False, True]


def test_masks_that_fit_no_picture_are_an_error(
    dino_search: Command, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "masks").mkdir()
    options = ["--out", tmp_path / "out", "--model", tiny_model, "--masks"]
    ended = dino_search("attention", photos, *options, tmp_path / "masks")
    assert ended.code == 1
    assert "expected masks named as the pictures" in ended.err
    assert not (tmp_path / "out").exists()
    Image.new("L", (9, 9)).save(tmp_path / "masks/0.png")  # of cat/0 or of dog/0
    assert "found none for any of 8" in dino_search("attention", photos, *options, tmp_path / "masks").err
    assert not (tmp_path / "out").exists()
    missing = dino_search("attention", photos, *options, tmp_path / "nowhere")
    assert missing.code == 1
    assert "expected a folder of masks" in missing.err


def test_frames_of_a_video_are_drawn_where_opencv_is(
    dino_search: Command, photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_opencv(monkeypatch)
    video = write_video(tmp_path / "clip.mp4", num_frames=5)
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    ended = dino_search(
        "attention", video, broken, photos / "dog/0.jpg", "--out", tmp_path / "out", "--model", tiny_model,
        "--every", "2", "--json",
    )  # fmt: skip
    printed = ended.json()
    assert ended.code == 0
    frames = [drawn for drawn in printed["pictures"] if "frame" in drawn]
    assert [drawn["frame"] for drawn in frames] == [0, 2, 4]
    assert [Path(drawn["folder"]) for drawn in frames] == [
        tmp_path / f"out/clip/frame-00000{number}" for number in (0, 2, 4)
    ]
    assert {size_of(Path(drawn["overlay"])) for drawn in frames} == {FRAME_SIZE}
    assert len(printed["pictures"]) == 4
    assert [failed["path"] for failed in printed["failed"]] == [str(broken)]
    refused = dino_search("attention", video, "--out", tmp_path / "out", "--model", tiny_model)
    assert refused.code == 1


def test_a_video_without_opencv_is_an_error_that_says_what_to_install(
    dino_search: Command, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_opencv(monkeypatch)
    video = write_video(tmp_path / "clip.mp4", num_frames=5)
    ended = dino_search("attention", video, "--out", tmp_path / "out", "--model", tiny_model)
    assert ended.code == 1
    assert "pip install opencv-python-headless" in ended.err
    assert not (tmp_path / "out").exists()


def test_the_home_s_default_model_draws_where_none_is_named(
    dino_search: Command, photos: Path, tmp_path: Path
) -> None:  # fmt: skip
    ended = dino_search("attention", photos / "cat/0.jpg", "--out", tmp_path / "out", "--json")
    printed = ended.json()
    assert printed["model"].startswith("bundled_v")
    assert len(printed["pictures"][0]["heads"]) == 3


def test_a_fetched_model_and_one_s_own_backbone_draw_as_well(
    dino_search: Command, photos: Path, home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (home / "models").mkdir(parents=True)
    shutil.copy(tiny_model, home / "models/vit_of_mine.safetensors")
    with quick_runs():
        recipe = tiny_recipe(epochs=1, architecture_args={"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2})
        pretrain([photos], tmp_path / "run", recipe)
    for number, (model, num_heads, patches) in enumerate(
        [("vit_of_mine", 1, [2, 2]), (tmp_path / "run/backbone.safetensors", 2, [4, 4])]
    ):
        options = ["--out", tmp_path / f"out-{number}", "--model", model, "--json"]
        (drawn,) = dino_search("attention", photos / "dog/2.jpg", *options).json()["pictures"]
        assert (len(drawn["heads"]), drawn["patches"]) == (num_heads, patches)


def test_pictures_of_a_shard_are_drawn_under_their_names(
    dino_search: Command, tiny_model: Path, tmp_path: Path
) -> None:  # fmt: skip
    shard = write_shard(tmp_path / "s.tar", {"a/0.jpg": jpeg(0), "a/1.jpg": jpeg(1)})
    ended = dino_search("attention", shard, "--out", tmp_path / "out", "--model", tiny_model, "--json")
    folders = [Path(drawn["folder"]) for drawn in ended.json()["pictures"]]
    assert folders == [tmp_path / "out/a/0", tmp_path / "out/a/1"]


def test_rows_of_a_manifest_that_name_a_file_again_are_counted(
    dino_search: Command, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{photos}/cat/0.jpg\n{photos}/cat/0.jpg\n{photos}/gone.jpg\n")
    ended = dino_search("attention", listed, "--out", tmp_path / "out", "--model", tiny_model, "--json")
    printed = ended.json()
    assert len(printed["pictures"]) == 1
    assert [failed["reason"] for failed in printed["failed"]] == ["vanished"]
    assert "1 rows of manifests name a file again" in ended.err

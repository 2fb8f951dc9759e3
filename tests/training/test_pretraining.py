from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dino_index.errors import (
    NoImagesFound,
    OutputUnwritable,
    RecipeError,
    RunError,
    RunExists,
    RunNotFound,
    TooFewImages,
    TrainingDiverged,
    WeightsMismatch,
)
from dino_training import Recipe, RunSummary, load_recipe, losses, pretrain
from dino_training.batches import Batch
from dino_training.checkpoints import list_checkpoints
from dino_training.export import BEST_WEIGHTS, WEIGHTS
from dino_training.probe import Figures, Probe
from sample_collections import save_tiny_model, write_pictures
from tiny_runs import (
    STEPS_PER_EPOCH,
    TINY_RUN,
    assert_same,
    events,
    final_state,
    quick_runs,
    stop_after,
    tiny_recipe,
    write_noise,
)

TWO_BLOCKS = TINY_RUN["architecture_args"] | {"depth": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("teacher") / "teacher.safetensors"))


@pytest.fixture(autouse=True, scope="module")
def _tiny_and_quick() -> Iterator[None]:
    with quick_runs():
        yield


# --- resume equals uninterrupted

CASES: dict[str, dict[str, Any]] = {
    "dino": {"edits": {"reencode": 0.3, "paste": 0.3}},
    "infonce with a queue": {"loss": "infonce", "num_negatives": 20, "predictor": True},
    "previous iteration": {"teacher": "previous_iteration", "centring": "sinkhorn"},
    "previous epoch": {"teacher": "previous_epoch", "center_init": "first_batch", "head_batch_norm": True},
    "frozen teacher": {"teacher": "frozen", "loss": "infonce", "whiten_dim": 8, "num_negatives": 30},
    "float16": {"precision": "float16"},
    "sgd": {"optimizer": "sgd", "loss": "kl", "center_of": "probabilities", "norm_last_layer": False},
}


@pytest.fixture(scope="module", params=CASES)
def whole(
    request: pytest.FixtureRequest, images: Path, teacher_file: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """A recipe, and what nine steps of it leave when nothing interrupts them."""
    case = CASES[request.param]
    recipe = tiny_recipe(
        architecture_args=TWO_BLOCKS, drop_path=0.3, patch_drop=0.25, momentum=0.9, epochs=3, evaluate_every_epochs=1.0,
        koleo_weight=0.1, workers=3, teacher_model=teacher_file if case.get("teacher") == "frozen" else None, **case,
    )  # fmt: skip
    run = tmp_path_factory.mktemp("whole")
    assert pretrain([images], run, recipe).num_steps == 3 * STEPS_PER_EPOCH
    return recipe, run


@pytest.mark.parametrize("stops", [[2], [STEPS_PER_EPOCH], [1, 4]], ids=["in an epoch", "at its end", "twice"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(
    whole: tuple[Recipe, Path], images: Path, tmp_path: Path, stops: list[int]
) -> None:
    recipe, expected = whole
    run = tmp_path / "run"
    for number, num_steps in enumerate(stops):
        summary = pretrain([images], run, recipe, resume=number > 0, should_stop=stop_after(num_steps))
        assert (summary.status, summary.num_steps) == ("stopped", sum(stops[: number + 1]))
    summary = pretrain([images], run, recipe, resume=True)
    assert (summary.status, summary.num_steps) == ("finished", 3 * STEPS_PER_EPOCH)
    assert_same(final_state(run), final_state(expected))
    for event in ("step", "evaluation"):
        assert events(run, event) == events(expected, event)
    for name in (WEIGHTS, BEST_WEIGHTS, "recipe.yaml"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_stop_after_the_last_step_is_the_end_and_going_on_changes_nothing(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tiny_recipe()
    assert pretrain([images], run, recipe, should_stop=stop_after(2 * STEPS_PER_EPOCH)).status == "finished"
    before, lines = final_state(run), (run / "metrics.jsonl").read_text("utf-8")
    again = pretrain([images], run, recipe, resume=True)
    assert (again.status, again.num_steps, again.after is not None) == ("finished", 2 * STEPS_PER_EPOCH, True)
    assert_same(final_state(run), before)
    assert (run / "metrics.jsonl").read_text("utf-8") == lines


def test_a_resumed_run_goes_on_from_before_a_damaged_checkpoint_and_says_so(images: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    recipe = tiny_recipe(save_every_minutes=0.0)
    pretrain([images], whole, recipe)
    pretrain([images], run, recipe, should_stop=stop_after(4))
    *_, newest = list_checkpoints(run)
    newest.write_bytes(newest.read_bytes()[:2000])
    remarks: list[str] = []
    pretrain([images], run, recipe, resume=True, on_remark=remarks.append)
    assert remarks[0].startswith("step-00000004.pt cannot be read")
    assert remarks[1] == "going on from step 3"
    assert_same(final_state(run), final_state(whole))
    assert events(run, "step") == events(whole, "step")


# --- what a resumed run may change


def test_a_resumed_run_keeps_its_recipe_and_names_what_was_changed(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain([images], run, tiny_recipe(), should_stop=stop_after(1))
    for key, value in (("momentum", 0.5), ("num_prototypes", 32), ("seed", 1), ("global_scale", (0.5, 1.0))):
        with pytest.raises(RecipeError, match=rf"a resumed run keeps its recipe: {key} was .*, found "):
            pretrain([images], run, tiny_recipe(**{key: value}), resume=True)
    assert pretrain([images], run, tiny_recipe(), resume=True).status == "finished"


def test_a_resumed_run_may_change_the_machine_and_how_it_is_watched_and_its_length(
    images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain([images], run, tiny_recipe(), should_stop=stop_after(1))
    changed: dict[str, Any] = {
        "name": "renamed", "epochs": 3, "precision": "bfloat16", "attention": "fused", "workers": 2, "cache_gb": 0.0,
        "evaluate_every_epochs": 1.0, "num_evaluated": 9, "save_every_minutes": 1.0, "log_every_steps": 2,
        "gradient_checkpointing": True, "gradient_accumulation": 2, "compile": "off",
    }  # fmt: skip
    summary = pretrain([images], run, tiny_recipe(**changed), resume=True)
    assert summary.num_steps == 3 * STEPS_PER_EPOCH
    saved = load_recipe(run / "recipe.yaml")
    assert {key: getattr(saved, key) for key in changed} == changed
    # A later --resume takes the recipe that lies there.
    assert pretrain([images], run, saved, resume=True).num_steps == 3 * STEPS_PER_EPOCH


def test_the_recipe_that_began_a_run_also_goes_on_with_it(images: Path, tmp_path: Path) -> None:
    # As given: what was chosen by the number of images, and warm-ups that shrank, are chosen again.
    run = tmp_path / "run"
    recipe = tiny_recipe(
        num_prototypes="auto", momentum="auto", warmup_epochs=10.0, teacher_temperature_warmup_epochs=30.0
    )
    pretrain([images], run, recipe, should_stop=stop_after(1))
    assert pretrain([images], run, recipe, resume=True).status == "finished"
    assert load_recipe(run / "recipe.yaml").num_prototypes == 1024


@pytest.mark.parametrize("change", ["added", "removed", "grown"])
def test_a_resumed_run_refuses_other_images(tmp_path: Path, change: str) -> None:
    images, run = write_noise(tmp_path / "images"), tmp_path / "run"
    pretrain([images], run, tiny_recipe(), should_stop=stop_after(1))
    if change == "added":
        (images / "new.png").write_bytes((images / "000.png").read_bytes())
    elif change == "removed":
        (images / "000.png").unlink()
    else:
        with open(images / "000.png", "ab") as file:
            file.write(b"more")
    with pytest.raises(RunError, match=r"not those that the run began with.*--init RUN/backbone\.safetensors"):
        pretrain([images], run, tiny_recipe(), resume=True)


def test_a_run_is_neither_overwritten_nor_resumed_out_of_nothing(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RunNotFound, match="none was written yet; start without --resume"):
        pretrain([images], run, tiny_recipe(), resume=True)
    assert not run.exists()
    pretrain([images], run, tiny_recipe(), should_stop=stop_after(1))
    with pytest.raises(RunExists, match="go on with it by --resume, or choose another --out"):
        pretrain([images], run, tiny_recipe())


# --- what must not matter


def weights_after(run: Path) -> dict[str, Any]:
    state = final_state(run)
    return {key: state[key] for key in ("student", "teacher", "center")}


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as it is."""
    run = tmp_path_factory.mktemp("plain")
    pretrain([images], run, tiny_recipe(architecture_args=TWO_BLOCKS, drop_path=0.3))
    return run


@pytest.mark.parametrize("changed", [{"gradient_checkpointing": True}, {"workers": 4}, {"cache_gb": 0.0}], ids=str)
def test_settings_of_the_machine_do_not_change_the_weights(
    images: Path, plain: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    pretrain([images], tmp_path / "run", tiny_recipe(architecture_args=TWO_BLOCKS, drop_path=0.3, **changed))
    assert_same(weights_after(tmp_path / "run"), weights_after(plain), **CLOSE)


@pytest.mark.parametrize("teacher", ["momentum", "frozen"])
def test_a_batch_in_parts_gives_the_same_weights(images: Path, teacher_file: str, tmp_path: Path, teacher: str) -> None:
    # Without random layers: their draws go over a whole part.
    case = {"teacher": "frozen", "teacher_model": teacher_file, "loss": "infonce"} if teacher == "frozen" else {}
    for parts in (1, 2, 4):
        # SGD: AdamW would blow up the rounding of gradients that are 0.
        recipe = tiny_recipe(drop_path=0.0, optimizer="sgd", gradient_accumulation=parts, **case)
        pretrain([images], tmp_path / str(parts), recipe)
    for parts in (2, 4):
        assert_same(weights_after(tmp_path / str(parts)), weights_after(tmp_path / "1"), **CLOSE)
        for found, expected in zip(events(tmp_path / str(parts), "step"), events(tmp_path / "1", "step"), strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_queue_is_filled_with_the_whole_batch_whatever_its_parts(images: Path, tmp_path: Path) -> None:
    for parts in (1, 2):
        recipe = tiny_recipe(
            drop_path=0.0, loss="infonce", num_negatives=20, learning_rate=0.0, gradient_accumulation=parts
        )
        pretrain([images], tmp_path / str(parts), recipe)
    queues = [final_state(tmp_path / parts)["negatives"] for parts in ("1", "2")]
    assert queues[0].shape == (20, 8)
    assert_same(*queues, **CLOSE)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_on_a_processor(tmp_path: Path, precision: str) -> None:
    write_pictures(tmp_path / "images", *(f"{number}.jpg" for number in range(24)))
    recipe = tiny_recipe(
        precision=precision, epochs=20, warmup_epochs=2.0, learning_rate=0.02, loss="infonce", num_negatives=0,
        contrast_temperature=0.1, centring="none", momentum=0.9, num_local_views=0, global_scale=(0.6, 1.0),
        jitter_prob=0.0, grey_prob=0.0, solarise_prob=(0.0, 0.0, 0.0),
    )  # fmt: skip
    run = tmp_path / "run"
    pretrain([tmp_path / "images"], run, recipe)
    seen = [step["loss"] for step in events(run, "step") if step["loss"] is not None]
    assert sum(seen[-6:]) < 0.7 * sum(seen[:6])
    assert json.loads((run / "run.json").read_text("utf-8"))["precision"] == precision
    assert {tensor.dtype for tensor in load_file(run / WEIGHTS).values()} == {torch.float32}
    if precision == "float16":  # which looks for its scale by skipping steps
        assert 0 < events(run, "step")[-1]["skipped_steps"] < 20


# --- steps that are not finite


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], kind: str) -> None:
    """What goes wrong in these steps, counted from 1: pictures that are not numbers, or gradients alone."""
    views, compare = Batch.views, losses.cross_entropy
    calls = {"views": 0, "compare": 0}

    def spoilt_views(self: Batch, recipe: Recipe, device: torch.device) -> list[Tensor]:
        calls["views"] += 1
        factor = math.nan if kind == "pictures" and calls["views"] in steps else 1.0
        return [view * factor for view in views(self, recipe, device)]

    def spoilt_gradients(logits_VBK: Tensor, *arguments: Any) -> Tensor:
        calls["compare"] += 1
        loss = compare(logits_VBK, *arguments)
        # The square root of 0 adds nothing, and has no slope.
        return loss + (logits_VBK * 0).sum().sqrt() if kind == "gradients" and calls["compare"] in steps else loss

    monkeypatch.setattr(Batch, "views", spoilt_views)
    monkeypatch.setattr(losses, "cross_entropy", spoilt_gradients)


@pytest.mark.parametrize("kind", ["pictures", "gradients"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = tmp_path / "run"
    # Batch normalisation counts and averages in the forward pass, before anybody knows.
    recipe = tiny_recipe(head_batch_norm=True, momentum=0.9)
    spoil(monkeypatch, {2}, kind)
    pretrain([images], run, recipe, should_stop=stop_after(1))
    before = final_state(run)
    summary = pretrain([images], run, recipe, resume=True, should_stop=stop_after(1))
    after = final_state(run)
    same = ("student", "teacher", "center", "optimizer")
    assert_same({key: after[key]["state"] if key == "optimizer" else after[key] for key in same},
                {key: before[key]["state"] if key == "optimizer" else before[key] for key in same})  # fmt: skip
    assert (after["step"], after["num_skipped"], summary.num_steps) == (2, 1, 2)
    assert (events(run, "step")[1]["loss"] is None) == (kind == "pictures")
    assert [row["message"] for row in events(run, "remark")][-1].startswith("step 2 skipped: loss ")

    assert pretrain([images], run, recipe, resume=True).status == "finished"
    assert [row["skipped_steps"] for row in events(run, "step")] == [0, 1, 1, 1, 1, 1]
    end = final_state(run)
    assert all(torch.isfinite(tensor).all() for key in ("student", "center") for tensor in end[key].values())
    assert not torch.equal(end["center"]["value"], before["center"]["value"])


def test_four_bad_steps_in_a_row_are_got_over_and_five_are_not(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(epochs=4, save_every_minutes=0.0)
    spoil(monkeypatch, {2, 3, 4, 5}, "pictures")
    assert pretrain([images], tmp_path / "four", recipe).status == "finished"
    spoil(monkeypatch, {2, 3, 4, 5, 6}, "pictures")
    with pytest.raises(TrainingDiverged, match=r"not finite in 5 steps in a row, up to step 6; start a new run with"):
        pretrain([images], tmp_path / "five", recipe)
    status = json.loads((tmp_path / "five" / "run.json").read_text("utf-8"))
    assert status["status"] == "failed"
    assert "5 steps in a row" in status["warnings"][-1]
    assert final_state(tmp_path / "five")["step"] == 5


def test_an_absurd_learning_rate_is_called_a_divergence(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="lower learning_rate"):
        pretrain([images], tmp_path / "run", tiny_recipe(learning_rate=1e30, epochs=4))


def test_a_divergence_in_half_precision_may_be_gone_in_float32(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="or go on with --resume --set precision=float32"):
        pretrain([images], tmp_path / "run", tiny_recipe(learning_rate=1e30, epochs=4, precision="bfloat16"))


# --- starting from weights


@pytest.fixture(scope="module")
def weights(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a tiny run, for pictures normalised in a way of their own."""
    run = tmp_path_factory.mktemp("first")
    pretrain([images], run, tiny_recipe(seed=7, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    return run / WEIGHTS


def backbone_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state["student"].items() if key.startswith("backbone.")}


def head_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state["student"].items() if key.startswith("head.")}


def test_weights_to_start_from_get_their_head_warmed_up_before_they_change(
    images: Path, weights: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    remarks: list[str] = []
    recipe = tiny_recipe(epochs=3)
    given = {f"backbone.{name}": tensor for name, tensor in load_file(weights).items()}

    pretrain([images], run, recipe, init=weights, should_stop=stop_after(1), on_remark=remarks.append)
    assert remarks == [f"pixels are normalised as {weights} has them: mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)"]
    first = final_state(run)
    pretrain([images], run, recipe, resume=True, should_stop=stop_after(STEPS_PER_EPOCH - 1))
    warm = final_state(run)
    for state in (first, warm):
        assert_same(backbone_of(state), given)
    assert any(not torch.equal(warm["student"][key], value) for key, value in head_of(first).items())
    teacher = {key: value for key, value in warm["teacher"]["network"].items() if key.startswith("backbone.")}
    assert_same(teacher, given, rtol=1e-5, atol=1e-6)

    summary = pretrain([images], run, recipe, resume=True)
    assert any(not torch.equal(value, given[key]) for key, value in backbone_of(final_state(run)).items())
    assert summary.before is not None
    assert summary.after is not None
    assert events(run, "evaluation")[0]["copies_found"] == pytest.approx(summary.before.copies_found)


def test_a_resumed_run_from_weights_equals_an_uninterrupted_one_and_needs_them_no_more(
    images: Path, weights: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(weights.read_bytes())
    recipe = tiny_recipe(epochs=3)
    for run, num_steps in (("stopped", 2), ("whole", 100)):
        pretrain([images], tmp_path / run, recipe, init=gone, should_stop=stop_after(num_steps))
    gone.unlink()
    pretrain([images], tmp_path / "stopped", recipe, init=gone, resume=True)
    assert_same(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))


def test_a_pytorch_checkpoint_is_where_a_run_starts_too(images: Path, weights: Path, tmp_path: Path) -> None:
    given = {f"backbone.{name}": tensor for name, tensor in load_file(weights).items()}
    torch.save({"teacher": given | {"head.mlp.0.bias": torch.zeros(2)}}, tmp_path / "mine.pth")
    with safe_open(weights, "pt") as file:
        described = json.loads(file.metadata()["dino_search"])
    described.pop("card", None)
    (tmp_path / "mine.json").write_text(json.dumps(described))
    remarks: list[str] = []
    pretrain(
        [images], tmp_path / "run", tiny_recipe(), init=tmp_path / "mine.pth", should_stop=stop_after(1),
        on_remark=remarks.append,
    )  # fmt: skip
    assert_same(backbone_of(final_state(tmp_path / "run")), given)
    assert "mine.pth: the projection head is left out (1 tensors)" in remarks


def test_figures_that_got_worse_are_said_to_have_and_the_weights_to_keep(
    images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, figures in (("worse", [0.8, 0.5]), ("better", [0.5, 0.8])):
        found = [Figures(knn_top1=None, copies_found=value, embedding_std=1.0) for value in reversed(figures)]
        monkeypatch.setattr(Probe, "figures", lambda self, embed, found=found: found.pop())
        summary = pretrain([images], tmp_path / name, tiny_recipe(), init=weights)
        assert [asdict(one)["copies_found"] for one in (summary.before, summary.after) if one] == figures
        expected = [
            f"the figure got worse: 0.800 before, 0.500 after; keep {weights}, or lower learning_rate or epochs "
            "(best.safetensors holds the best)"
        ]
        assert summary.warnings == (expected if name == "worse" else [])
        assert summary.best_step == (0 if name == "worse" else 2 * STEPS_PER_EPOCH)
    assert_same(load_file(tmp_path / "worse" / BEST_WEIGHTS), load_file(weights))


def test_weights_for_another_size_of_picture_get_their_positions_resampled(
    images: Path, weights: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain([images], run, tiny_recipe(global_size=32, local_size=16), init=weights, should_stop=stop_after(1))
    given, found = load_file(weights), load_file(run / BEST_WEIGHTS)  # of step 0
    assert given["pos_embed"].shape == (1, 1 + 2 * 2, 32)
    assert found["pos_embed"].shape == (1, 1 + 4 * 4, 32)
    for name in given.keys() - {"pos_embed"}:
        assert_same(found[name], given[name])
    class_position = given["pos_embed"][:, :1]
    grid = given["pos_embed"][:, 1:].reshape(1, 2, 2, 32).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True)
    expected = torch.cat([class_position, grid.flatten(2).mT], dim=1)
    torch.testing.assert_close(found["pos_embed"], expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "vit_small_patch16_224"}, "expected vit_small_patch16_224, found vit_tiny_patch16_224"),
        ({"architecture_args": TWO_BLOCKS}, r"expected .*'depth': 2.*, found .*'depth': 1"),
        ({"in_chans": 1, "mean": (0.5,), "std": (0.5,)}, r"expected .*'in_chans': 1.*, found "),
    ],
)
def test_weights_of_another_architecture_are_refused(
    images: Path, weights: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        pretrain([images], tmp_path / "run", tiny_recipe(**changed), init=weights)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_what_they_say_of_themselves_are_refused(images: Path, tmp_path: Path) -> None:
    described = {"architecture_args": TINY_RUN["architecture_args"], "input_size": 16}
    damaged = save_tiny_model(tmp_path / "damaged.safetensors", **described)
    with pytest.raises(WeightsMismatch, match="does not fit vit_tiny_patch16_224"):
        pretrain([images], tmp_path / "run", tiny_recipe(), init=damaged)


# --- images


def test_too_few_images_are_counted(tmp_path: Path) -> None:
    images = write_noise(tmp_path / "images", 7)
    with pytest.raises(TooFewImages, match=r"a batch takes 8 images, found 7 .* --set batch_size=7"):
        pretrain([images], tmp_path / "run", tiny_recipe())
    for number in range(100, 105):
        (images / f"{number}.png").write_bytes(b"bad")
    with pytest.raises(TooFewImages, match="found 7 that can be read"):
        pretrain([images], tmp_path / "run", tiny_recipe())
    assert pretrain([images], tmp_path / "run", tiny_recipe(batch_size=7)).status == "finished"


def test_images_of_which_none_can_be_read_are_refused(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nbad")
    with pytest.raises(NoImagesFound, match="none of the 9 listed can be read"):
        pretrain([tmp_path], tmp_path / "run", tiny_recipe())


@pytest.mark.parametrize("cache_gb", [0.0, 4.0])
def test_unreadable_images_are_counted_and_others_stand_in_for_them(tmp_path: Path, cache_gb: float) -> None:
    images = write_noise(tmp_path / "images")
    for number in (3, 7, 25):
        path = images / f"{number:03}.png"
        path.write_bytes(path.read_bytes()[:100])
    summary = pretrain([images], tmp_path / "run", tiny_recipe(cache_gb=cache_gb))
    assert (summary.status, summary.num_unreadable) == ("finished", 3)
    assert events(tmp_path / "run", "step")[-1]["unreadable"] == 3
    status = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert (status["images"], status["unreadable"]) == (26, 3)


# --- how a run ends


def test_an_interrupted_run_is_no_failed_one(images: Path, tmp_path: Path) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt(2)

    with pytest.raises(KeyboardInterrupt):
        pretrain([images], tmp_path / "run", tiny_recipe(), should_stop=interrupt)
    status = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert (status["status"], status["warnings"]) == ("interrupted", [])


def test_a_run_that_fails_says_why_in_its_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OutputUnwritable("no room")

    monkeypatch.setattr("dino_training.pretraining.save_checkpoint", fail)
    with pytest.raises(OutputUnwritable):
        pretrain([images], tmp_path / "run", tiny_recipe())
    status = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert (status["status"], status["warnings"]) == ("failed", ["no room"])


@pytest.mark.parametrize("out", ["file/run", "x" * 300])
def test_a_folder_that_cannot_be_made_is_named(images: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputUnwritable, match=r"cannot be written: .*; choose another --out"):
        pretrain([images], tmp_path / out, tiny_recipe())


def test_progress_is_told_from_decoding_to_the_last_step(images: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    summary: RunSummary = pretrain(
        [images], tmp_path / "run", tiny_recipe(), on_progress=lambda at: told.append((at.activity, at.done, at.total))
    )
    assert told[0][0] == "decoding"
    training = [at for at in told if at[0] == "training"]
    assert training == [("training", step, 6) for step in range(1, 7)]
    assert summary.images_seen == 6 * 8

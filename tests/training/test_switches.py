"""Every key of a recipe that changes the method changes what a tiny run learns, in the way it says.

Runs of 16 pictures of 16 pixels: a vision transformer of one block, two epochs of two steps each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_training.checkpoints import load_checkpoint
from dino_training.pretraining import pretrain
from dino_training.recipe import Recipe
from tiny_runs import TINY_RUN, events, quick_runs, stop_after, write_noise

State = dict[str, Tensor]

NUM_IMAGES, BATCH_SIZE, NUM_STEPS = 16, 8, 4
K, C = 16, 8
VIT: dict[str, Any] = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 1}
# Peak of the learning rate at this batch size.
PEAK = 0.05 * BATCH_SIZE / 256

BASE: dict[str, Any] = TINY_RUN | {
    "architecture_args": VIT, "drop_path": 0.0, "global_scale": (0.4, 1.0), "local_scale": (0.2, 0.6),
    "head_bottleneck": C, "num_prototypes": K, "momentum": 0.9, "batch_size": BATCH_SIZE, "learning_rate": 0.05,
    "precision": "float32", "attention": "plain", "compile": "off",
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a run left: weights by name, the rest of its state, and what was logged of each step."""

    student: State
    teacher: State
    previous: State | None
    center: Tensor
    negatives: Tensor
    steps: list[dict[str, Any]]

    @property
    def backbone(self) -> State:
        return {name: tensor for name, tensor in self.student.items() if name.startswith("backbone.")}

    def logged(self, key: str) -> list[float]:
        return [step[key] for step in self.steps]


# Trains with the base recipe but for the given keys; the same run again is remembered.
Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    folder = tmp_path_factory.mktemp("runs")
    images = write_noise(folder / "images", NUM_IMAGES)
    known: dict[str, Trained] = {}

    def run(*, num_steps: int = NUM_STEPS, again: bool = False, **changed: Any) -> Trained:
        key = repr((num_steps, sorted(changed.items())))
        if key not in known or again:
            out = folder / f"run-{len(known)}-{again}"
            known[key] = _train(images, out, num_steps, Recipe(**BASE | changed))
        return known[key]

    with quick_runs():
        yield run


def _train(images: Path, run: Path, num_steps: int, recipe: Recipe) -> Trained:
    pretrain([images], run, recipe, should_stop=stop_after(num_steps))
    state = load_checkpoint(run)
    assert state["step"] == num_steps
    return Trained(
        state["student"], state["teacher"]["network"], state["teacher"]["previous"], state["center"]["value"],
        state["negatives"], events(run, "step"),
    )  # fmt: skip


def distance(one: State, other: State) -> float:
    """The largest difference between weights of the same name."""
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one.keys() & other.keys())


def assert_same(one: State, other: State, *, atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    assert distance(one, other) <= atol


@pytest.fixture(scope="module")
def initial(train: Train) -> State:
    """The weights that every run with the base's networks starts from."""
    return train(num_steps=1, learning_rate=0.0, min_learning_rate=0.0).student


# --- every switch


INFONCE: dict[str, Any] = {"loss": "infonce", "centring": "none"}
DEEPER = {"architecture_args": VIT | {"depth": 2}}
SWITCHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"seed": 1}),
    ({}, {"teacher": "student"}),
    ({}, {"teacher": "previous_iteration"}),
    ({}, {"teacher": "previous_epoch"}),
    ({}, {"momentum": 0.5}),
    ({}, {"final_momentum": 0.5}),
    ({}, {"loss": "mse"}),
    ({}, INFONCE),
    (INFONCE, {"contrast_temperature": 0.5}),
    (INFONCE, {"num_negatives": 0}),
    (INFONCE, {"num_negatives": 9}),
    (INFONCE, {"centring": "mean"}),
    ({"loss": "mse"}, {"centring": "none"}),
    ({}, {"centring": "none"}),
    ({}, {"centring": "sinkhorn"}),
    ({}, {"center_of": "probabilities"}),
    ({}, {"center_init": "first_batch"}),
    ({}, {"center_momentum": 0.5}),
    ({}, {"sharpening": False}),
    ({}, {"student_temperature": 0.2}),
    ({}, {"teacher_temperature": 0.07}),
    ({"teacher_temperature_warmup_epochs": 1.0}, {"initial_teacher_temperature": 0.02}),
    ({"initial_teacher_temperature": 0.02}, {"teacher_temperature_warmup_epochs": 1.0}),
    ({}, {"predictor": True}),
    ({}, {"koleo_weight": 0.1}),
    ({}, {"student_features": "cls_gem"}),
    ({}, {"patch_drop": 0.5}),
    (DEEPER, {"drop_path": 0.5}),
    ({}, {"multi_crop": False}),
    ({}, {"num_local_views": 3}),
    ({}, {"num_global_views": 3}),
    ({}, {"local_source": "global"}),
    ({}, {"local_scale": (0.1, 0.3)}),
    ({}, {"global_scale": (0.7, 1.0)}),
    ({}, {"aspect_ratio": (1.0, 1.0)}),
    ({}, {"flip_prob": 1.0}),
    ({}, {"jitter_prob": 0.0}),
    ({}, {"jitter": (0.4, 0.4, 0.2, 0.0)}),
    ({}, {"grey_prob": 1.0}),
    ({}, {"blur_prob": (0.0, 0.0, 0.0)}),
    ({}, {"blur_sigma": (3.0, 4.0)}),
    ({}, {"solarise_prob": (0.0, 0.0, 1.0)}),
    ({}, {"edits": {"noise": 1.0}}),
    ({}, {"mean": (0.2, 0.2, 0.2)}),
    ({}, {"in_chans": 1, "mean": (0.5,), "std": (0.2,)}),
    ({}, {"head_layers": 2}),
    ({}, {"head_batch_norm": True}),
    ({}, {"norm_last_layer": False}),
    ({}, {"freeze_last_layer_epochs": 1.0}),
    ({}, {"optimizer": "sgd"}),
    ({}, {"warmup_epochs": 1.0}),
    ({}, {"min_learning_rate": 0.001}),
    ({}, {"weight_decay": 0.0}),
    ({}, {"final_weight_decay": 0.0}),
    ({"optimizer": "sgd"}, {"clip_grad": 0.01}),
    ({}, {"batch_size": 4}),
]  # fmt: skip


def named(value: dict[str, Any]) -> str:
    return ",".join(f"{key}={setting}" for key, setting in value.items()) or "base"


@pytest.mark.parametrize(("base", "changed"), SWITCHES, ids=named)
def test_a_switch_changes_what_the_backbone_learns(train: Train, base: dict[str, Any], changed: dict[str, Any]) -> None:
    without, switched = train(**base), train(**base | changed)
    assert distance(without.backbone, switched.backbone) > 1e-5
    assert all(math.isfinite(loss) for loss in switched.logged("loss"))


def test_the_same_recipe_learns_the_same(train: Train) -> None:
    one, other = train(), train(again=True)
    assert_same(one.student, other.student)
    assert_same(one.teacher, other.teacher)
    assert one.logged("loss") == other.logged("loss")


@pytest.mark.parametrize(
    "changed",
    [
        {"attention": "fused"},
        {"gradient_checkpointing": True},
        {"workers": 3},
        {"cache_gb": 0.0},
        {"num_evaluated": 16},
    ],
    ids=named,
)
def test_what_the_machine_does_changes_nothing(train: Train, changed: dict[str, Any]) -> None:
    # AdamW turns gradients of rounding errors into steps as long as any: SGD shows their true size.
    one, other = train(optimizer="sgd"), train(optimizer="sgd", **changed)
    assert_same(one.student, other.student, atol=1e-5)


# --- the teacher


def test_a_momentum_teacher_lies_between_its_start_and_the_student(train: Train, initial: State) -> None:
    after = train(num_steps=1, momentum=0.75)
    for name, tensor in after.teacher.items():
        torch.testing.assert_close(tensor, 0.75 * initial[name] + 0.25 * after.student[name], atol=1e-6, rtol=0)
    assert distance(after.student, initial) > 1e-4


def test_a_teacher_that_is_the_student_has_its_weights_after_each_step(train: Train) -> None:
    after = train(num_steps=3, teacher="student")
    assert_same(after.teacher, after.student)


def test_a_teacher_of_the_previous_iteration_is_one_step_behind(train: Train, initial: State) -> None:
    one, three = (train(num_steps=steps, teacher="previous_iteration") for steps in (1, 3))
    two = train(num_steps=2, teacher="previous_iteration")
    assert_same(one.teacher, initial)
    assert_same(three.teacher, two.student)
    assert three.previous is not None
    assert_same(three.previous, three.student)


def test_a_teacher_of_the_previous_epoch_changes_when_an_epoch_ends(train: Train, initial: State) -> None:
    one, two, three = (train(num_steps=steps, teacher="previous_epoch") for steps in (1, 2, 3))
    assert_same(one.teacher, initial)
    assert_same(two.teacher, two.student)
    assert_same(three.teacher, two.student)
    assert distance(three.student, two.student) > 1e-4


def test_the_predictor_learns_and_the_teacher_has_none(train: Train) -> None:
    start, after = (train(num_steps=steps, predictor=True, learning_rate=rate) for steps, rate in ((1, 0.0), (4, 0.05)))
    names = {name for name in after.student if name.startswith("predictor.")}
    assert after.student.keys() - after.teacher.keys() == names
    assert len(names) == 4
    assert all((after.student[name] - start.student[name]).abs().max() > 1e-4 for name in names)


# --- loss and targets


def test_kl_learns_what_the_cross_entropy_learns_and_logs_the_difference(train: Train) -> None:
    cross_entropy, kl = train(optimizer="sgd"), train(optimizer="sgd", loss="kl")
    assert_same(cross_entropy.student, kl.student, atol=1e-5)
    for one, other in zip(cross_entropy.steps, kl.steps, strict=True):
        assert other["loss"] == pytest.approx(one["loss"] - one["teacher_entropy"], abs=1e-4)
        assert other["kl"] == pytest.approx(one["kl"], abs=1e-4)


def test_the_loss_starts_where_each_kind_has_to(train: Train) -> None:
    assert train().logged("loss")[0] > train().logged("teacher_entropy")[0] > 0
    assert 0 <= train(loss="mse", centring="none").logged("loss")[0] <= 4
    # All images look alike to a fresh network.
    assert train(**INFONCE).logged("loss")[0] == pytest.approx(math.log(BATCH_SIZE), rel=0.3)


def test_without_sharpening_the_teacher_is_as_warm_as_the_student(train: Train) -> None:
    sharp, flat = train(num_steps=1), train(num_steps=1, sharpening=False)
    assert sharp.logged("teacher_temperature") == [0.04]
    assert flat.logged("teacher_temperature") == [0.1]
    assert flat.logged("teacher_entropy")[0] > sharp.logged("teacher_entropy")[0] + 0.01


def test_the_center_starts_at_nothing_or_at_the_first_batch(train: Train) -> None:
    from_zero, from_batch = train(num_steps=1), train(num_steps=1, center_init="first_batch")
    assert from_zero.center.abs().max() > 1e-4
    torch.testing.assert_close(from_batch.center, 10 * from_zero.center)


def test_a_center_of_probabilities_is_a_distribution(train: Train) -> None:
    center = train(center_of="probabilities").center
    assert center.shape == (K,)
    assert center.min() > 0
    assert center.sum().item() == pytest.approx(1, abs=1e-5)
    assert train(loss="mse").center.shape == (C,)


def test_sinkhorn_uses_all_prototypes_alike_and_no_centring_does_not(train: Train) -> None:
    balanced, plain = train(num_steps=1, centring="sinkhorn"), train(num_steps=1, centring="none")
    assert balanced.logged("mean_entropy")[0] > plain.logged("mean_entropy")[0] + 0.05
    assert balanced.logged("mean_entropy")[0] == pytest.approx(math.log(K), abs=0.1)


@pytest.mark.parametrize("gradient_accumulation", [1, 2])
def test_negatives_are_the_latest_projections(train: Train, gradient_accumulation: int) -> None:
    after = {
        num_steps: train(num_steps=num_steps, num_negatives=20, gradient_accumulation=gradient_accumulation, **INFONCE)
        for num_steps in (1, 2, 3)
    }
    assert [len(trained.negatives) for trained in after.values()] == [8, 16, 20]
    torch.testing.assert_close(after[3].negatives.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(after[2].negatives[:8], after[1].negatives)
    torch.testing.assert_close(after[3].negatives[:12], after[2].negatives[4:])


def test_koleo_is_logged_where_it_is_asked_for(train: Train) -> None:
    assert train().logged("koleo") == [None] * NUM_STEPS
    after = train(koleo_weight=0.1)
    assert all(math.isfinite(value) for value in after.logged("koleo"))
    # The loss that is logged is that of the method alone.
    assert after.logged("loss")[0] == pytest.approx(train().logged("loss")[0], abs=1e-5)


def test_no_multi_crop_is_no_local_views(train: Train) -> None:
    assert_same(train(multi_crop=False).student, train(num_local_views=0).student)


# --- optimisation


def test_the_prototypes_stay_as_they_are_while_they_are_frozen(train: Train, initial: State) -> None:
    name = "head.last_layer.weight"
    free, frozen, later = (
        train(num_steps=steps, freeze_last_layer_epochs=epochs).student
        for steps, epochs in ((2, 0.0), (2, 1.0), (3, 1.0))
    )
    assert (free[name] - initial[name]).abs().max() > 1e-4
    assert torch.equal(frozen[name], initial[name])
    assert (later[name] - initial[name]).abs().max() > 1e-4
    assert (frozen["head.mlp.0.weight"] - initial["head.mlp.0.weight"]).abs().max() > 1e-4


def test_learnt_lengths_of_prototypes_are_learnt(train: Train) -> None:
    name = "head.last_layer.length"
    assert name not in train().student
    assert (train(norm_last_layer=False).student[name] - 1).abs().max() > 1e-4


def test_no_parameter_moves_further_than_its_clipped_gradient(train: Train, initial: State) -> None:
    sgd: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 0.0, "final_weight_decay": 0.0, "num_steps": 1}
    free, clipped = train(clip_grad=0.0, **sgd).student, train(clip_grad=0.01, **sgd).student
    at_limit = 0
    for name, start in initial.items():
        moved, moved_clipped = free[name] - start, clipped[name] - start
        limit = PEAK * 0.01
        assert moved_clipped.norm() <= limit * 1.01
        if moved.norm() > limit * 1.1:
            at_limit += 1
            assert moved_clipped.norm().item() == pytest.approx(limit, rel=0.02)
            assert torch.cosine_similarity(moved.flatten(), moved_clipped.flatten(), dim=0) > 0.999
        else:
            torch.testing.assert_close(moved_clipped, moved, atol=1e-7, rtol=0.1)
    assert at_limit >= 3


def test_weight_decay_shrinks_matrices_and_leaves_vectors(train: Train, initial: State) -> None:
    plain = train(num_steps=1, weight_decay=0.0).student
    decayed = train(num_steps=1, weight_decay=2.0).student
    for name, start in initial.items():
        shrunk = PEAK * 2.0 * start if start.ndim > 1 else torch.zeros_like(start)
        torch.testing.assert_close(plain[name] - decayed[name], shrunk, atol=1e-6, rtol=1e-4)


def test_schedules_follow_the_recipe(train: Train) -> None:
    after = train(
        warmup_epochs=1.0, min_learning_rate=0.0001, weight_decay=0.04, final_weight_decay=0.4, final_momentum=1.0,
        initial_teacher_temperature=0.02, teacher_temperature=0.06, teacher_temperature_warmup_epochs=1.0,
    )  # fmt: skip

    def falling(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    quarters = [step / NUM_STEPS for step in range(NUM_STEPS)]
    assert after.logged("learning_rate") == pytest.approx([0, PEAK, PEAK, falling(PEAK, 0.0001, 0.5)])
    assert after.logged("weight_decay") == pytest.approx([falling(0.04, 0.4, share) for share in quarters])
    assert after.logged("momentum") == pytest.approx([falling(0.9, 1.0, share) for share in quarters])
    assert after.logged("teacher_temperature") == pytest.approx([0.02, 0.04, 0.06, 0.06])


def test_batch_norm_in_the_head_keeps_statistics_in_both_networks(train: Train) -> None:
    after = train(head_batch_norm=True, num_steps=1)
    name = "head.mlp.1.running_mean"
    assert name not in train().student
    assert after.student[name].abs().max() > 0
    torch.testing.assert_close(after.teacher[name], 0.1 * after.student[name])
    assert (
        int(after.teacher["head.mlp.1.num_batches_tracked"]) == int(after.student["head.mlp.1.num_batches_tracked"]) > 0
    )


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("method", [{}, {"loss": "mse"}, {"center_of": "probabilities"}], ids=named)
def test_a_batch_in_parts_learns_what_it_learns_as_a_whole(train: Train, parts: int, method: dict[str, Any]) -> None:
    whole = train(optimizer="sgd", **method)
    in_parts = train(optimizer="sgd", gradient_accumulation=parts, **method)
    assert_same(in_parts.student, whole.student, atol=1e-5)
    assert_same(in_parts.teacher, whole.teacher, atol=1e-5)
    torch.testing.assert_close(in_parts.center, whole.center, atol=1e-5, rtol=0)
    for key in ("loss", "grad_norm"):
        assert in_parts.logged(key) == pytest.approx(whole.logged(key), rel=1e-3)


def test_a_first_batch_in_parts_gives_the_center_of_the_whole(train: Train) -> None:
    whole, in_parts = (train(num_steps=1, center_init="first_batch", gradient_accumulation=parts) for parts in (1, 4))
    torch.testing.assert_close(in_parts.center, whole.center, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    compile_it = torch.compile

    def counting(function: Any) -> Any:
        compiled.append(function)
        return compile_it(function)

    monkeypatch.setattr(torch, "compile", counting)
    losses = [train(compile=switch).logged("loss") for switch in ("on", "off")]
    assert len(compiled) == 2  # student and teacher
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-4)

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino_index.attention import attention_maps
from dino_index.errors import RecipeError
from dino_training.networks import (
    Network,
    Outputs,
    Teacher,
    build_backbone,
    clip_gradients,
    copy_weights,
    parameter_groups,
    use_attention,
)
from dino_training.recipe import Recipe

State = dict[str, Tensor]

B, D, C, K = 3, 32, 8, 11


def recipe(**changed: Any) -> Recipe:
    tiny: dict[str, Any] = {
        "architecture_args": {"patch_size": 8, "depth": 2, "embed_dim": D, "num_heads": 2},
        "global_size": 32, "local_size": 16, "num_local_views": 2, "drop_path": 0.0,
        "head_hidden": 16, "head_bottleneck": C, "num_prototypes": K,
    }  # fmt: skip
    return Recipe(**tiny | changed)


def student_of(wanted: Recipe) -> Network:
    torch.manual_seed(1)
    return Network(build_backbone(wanted, student=True), wanted, predictor=wanted.predictor)


def views(*sizes: int, in_chans: int = 3, seed: int = 0, num_images: int = B) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_images, in_chans, size, size, generator=generator) for size in sizes]


def state_of(network: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def train_a_little(network: nn.Module, seed: int) -> None:
    """Stands in for a step of the optimiser: every parameter and buffer changes."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator))
        else:
            tensor.add_(seed + 1)


def assert_same(found: nn.Module, expected: State) -> None:
    torch.testing.assert_close(found.state_dict(), {name: expected[name] for name in found.state_dict()})


def differ(one: State, other: State) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


# --- the teacher


def test_a_momentum_teacher_averages_parameters_and_statistics_and_copies_counters() -> None:
    wanted = recipe(head_batch_norm=True)
    student = student_of(wanted)
    teacher = Teacher(student, wanted)
    expected = {name: tensor.double().numpy().copy() for name, tensor in student.state_dict().items()}
    buffers = {"head.mlp.1.running_mean", "head.mlp.1.running_var", "head.mlp.1.num_batches_tracked"}
    assert buffers <= expected.keys() == teacher.network.state_dict().keys()
    for step, momentum in enumerate((0.9, 0.95, 0.5, 1.0, 0.0)):
        train_a_little(student, step)
        teacher.follow(student, momentum, epoch_ended=step == 2)
        for name, tensor in student.state_dict().items():
            value = tensor.double().numpy()
            is_counter = name.endswith("num_batches_tracked")
            expected[name] = value.copy() if is_counter else momentum * expected[name] + (1 - momentum) * value
        for name, tensor in teacher.network.state_dict().items():
            np.testing.assert_allclose(tensor.double().numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


# What each kind shows the student at a step, in terms of the student's weights before the steps 0, 1, ...
HISTORIES = {
    "student": [0, 1, 2, 3, 4, 5, 6],
    "previous_iteration": [0, 0, 1, 2, 3, 4, 5],
    "previous_epoch": [0, 0, 0, 3, 3, 3, 6],
}


@pytest.mark.parametrize("kind", sorted(HISTORIES))
def test_a_teacher_without_momentum_is_the_student_of_an_earlier_step(kind: str) -> None:
    wanted = recipe(teacher=kind)
    student = student_of(wanted)
    teacher = Teacher(student, wanted)
    history = []
    for step, expected in enumerate(HISTORIES[kind]):
        history.append(state_of(student))
        assert_same(teacher.network, history[expected])
        train_a_little(student, step)
        teacher.follow(student, 0.9, epoch_ended=(step + 1) % 3 == 0)


@pytest.mark.parametrize("kind", [*sorted(HISTORIES), "momentum"])
def test_a_restored_teacher_goes_on_as_the_one_that_was_saved(kind: str) -> None:
    wanted = recipe(teacher=kind)
    student = student_of(wanted)
    teacher = Teacher(student, wanted)
    train_a_little(student, 1)
    teacher.follow(student, 0.9, epoch_ended=False)
    restored = Teacher(student_of(wanted), wanted)
    restored.load_state_dict(copy.deepcopy(teacher.state_dict()))
    for step in range(2):
        train_a_little(student, 2 + step)
        for each in (teacher, restored):
            each.follow(student, 0.9, epoch_ended=step == 0)
        assert_same(restored.network, state_of(teacher.network))


def test_a_teacher_starts_as_the_student_and_no_gradient_reaches_it() -> None:
    wanted = recipe(predictor=True)
    student = student_of(wanted)
    teacher = Teacher(student, wanted)
    assert_same(teacher.network, state_of(student))
    assert student.predictor is not None
    assert teacher.network.predictor is None
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    outputs = teacher.network(views(32))
    assert not outputs.projections.requires_grad


def test_the_teachers_statistics_change_only_with_the_students() -> None:
    wanted = recipe(architecture="resnet10t", architecture_args={})
    teacher = Teacher(student_of(wanted), wanted)
    before = state_of(teacher.network)
    teacher.network.train()
    one, other = teacher.network(views(32, seed=1)), teacher.network(views(32, 32, seed=1))
    # It normalises by the statistics of the batch, as the student does.
    assert not torch.allclose(one.features, other.features[:B], atol=1e-3)
    after = teacher.network.state_dict()
    for name, tensor in before.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(after[name], tensor), name


def test_drop_path_makes_the_student_vary_and_never_the_teacher() -> None:
    wanted = recipe(drop_path=0.5)
    student = student_of(wanted)
    teacher = Teacher(student, wanted)
    student.train()
    teacher.network.train()
    pictures = views(32, num_images=8)
    with torch.no_grad():
        students = [student(pictures).features for _ in range(4)]
        teachers = [teacher.network(pictures).features for _ in range(4)]
        assert all(torch.equal(features, teachers[0]) for features in teachers)
        assert any(not torch.equal(features, students[0]) for features in students)
        # Without it, both are the same function of the pictures.
        torch.testing.assert_close(student.eval()(pictures).features, teachers[0])


def test_drop_path_rises_linearly_over_the_students_blocks() -> None:
    args = {"patch_size": 8, "depth": 5, "embed_dim": D, "num_heads": 2}
    blocks = list(build_backbone(recipe(architecture_args=args, drop_path=0.2), student=True).blocks)  # type: ignore[arg-type]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


# --- forward passes


def rows(outputs: Outputs) -> list[Tensor]:
    assert outputs.logits is not None
    return [outputs.features, outputs.projections, outputs.logits]


@pytest.mark.parametrize("sizes", [(32, 32, 16, 16, 16), (32, 16, 32), (16, 16), (32,)])
@pytest.mark.parametrize("student_features", ["cls", "cls_gem"])
def test_views_of_several_sizes_go_through_as_they_would_alone(sizes: tuple[int, ...], student_features: str) -> None:
    network = student_of(recipe(student_features=student_features, predictor=True))
    pictures = views(*sizes)
    together = rows(network(pictures))
    alone = [rows(network([picture])) for picture in pictures]
    for found, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert len(found) == B * len(sizes)
        torch.testing.assert_close(found, torch.cat(parts))


def test_the_head_sees_the_cls_token_of_the_backbone() -> None:
    network = student_of(recipe())
    picture = views(32)[0]
    tokens_BND = network.backbone.forward_features(picture)  # type: ignore[operator]
    outputs = network([picture])
    torch.testing.assert_close(outputs.features, tokens_BND[:, 0])
    torch.testing.assert_close(outputs.projections, network.head(tokens_BND[:, 0]))
    assert network.head.last_layer is not None
    torch.testing.assert_close(outputs.logits, network.head.last_layer(outputs.projections))


def test_the_head_sees_cls_and_pooled_patches_side_by_side_where_asked_for() -> None:
    network = student_of(recipe(student_features="cls_gem"))
    picture = views(32)[0]
    tokens = network.backbone.forward_features(picture).detach().double().numpy()  # type: ignore[operator]
    inputs = np.zeros((B, 2 * D))
    for b in range(B):
        cls, patches = tokens[b, 0], tokens[b, 1:]
        pooled = np.zeros(D)
        for d in range(D):
            powers = [max(patch[d] / np.linalg.norm(patch), 1e-6) ** 4 for patch in patches]
            pooled[d] = (sum(powers) / len(powers)) ** 0.25
        inputs[b] = np.concatenate([cls / np.linalg.norm(cls), pooled / np.linalg.norm(pooled)]) * math.sqrt(D)
    torch.testing.assert_close(network([picture]).projections, network.head(torch.from_numpy(inputs).float()))


def test_fused_and_plain_attention_agree() -> None:
    network = student_of(recipe())
    pictures = views(32, 32, 16)
    found = []
    for fused in (True, False):
        use_attention(network.backbone, fused=fused)
        assert [module.fused_attn for module in network.modules() if hasattr(module, "fused_attn")] == [fused] * 2
        network.zero_grad()
        outputs = network(pictures)
        assert outputs.logits is not None
        outputs.logits.square().sum().backward()
        found.append((outputs.logits, [parameter.grad for parameter in network.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_compiled_backbone_trains_so_and_is_itself_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(pictures_BCHW: Tensor) -> Tensor:
            calls.append(len(pictures_BCHW))
            return function(pictures_BCHW)

        return call

    monkeypatch.setattr(torch, "compile", counted)
    student = student_of(recipe()).eval()
    expected = student(views(32, 16))
    student.compile_backbone()
    torch.testing.assert_close(student(views(32, 16)).features, expected.features)
    assert calls == [B, B]
    # Hooks, which attention maps are taken with, are not called inside compiled code.
    assert len(attention_maps(student.backbone, *views(32))) == B
    assert calls == [B, B]


def test_a_frozen_backbone_gets_no_gradient_while_the_head_does() -> None:
    network = student_of(recipe())
    network.freeze_backbone(True)
    network(views(32)).logits.sum().backward()
    assert all(parameter.grad is None for parameter in network.backbone.parameters())
    assert all(parameter.grad is not None for parameter in network.head.parameters())
    network.freeze_backbone(False)
    network(views(32)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.backbone.parameters())


def num_tokens(network: Network, pictures: list[Tensor]) -> list[int]:
    """Tokens that go through the first block, for each size of view."""
    seen: list[int] = []
    blocks: nn.ModuleList = network.backbone.blocks  # type: ignore[assignment]
    hook = blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        network(pictures)
    hook.remove()
    return seen


def test_tokens_are_left_out_of_the_students_views_alone() -> None:
    wanted = recipe(patch_drop=0.25)
    student = student_of(wanted).train()
    teacher = Teacher(student, wanted)
    teacher.network.train()
    pictures = views(32, 32, 16, 16)
    assert num_tokens(student, pictures) == [1 + 12, 1 + 3]
    assert num_tokens(teacher.network, pictures) == [1 + 16, 1 + 4]
    assert num_tokens(student.eval(), pictures) == [1 + 16, 1 + 4]


# --- the optimiser's view


def test_biases_and_other_vectors_have_no_weight_decay() -> None:
    network = student_of(recipe(norm_last_layer=False, head_batch_norm=True, predictor=True))
    decayed, plain = parameter_groups(network)
    assert (decayed["decays"], plain["decays"], plain["weight_decay"]) == (True, False, 0.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    in_decayed, in_plain = ({names[id(parameter)] for parameter in group["params"]} for group in (decayed, plain))
    assert in_decayed.isdisjoint(in_plain)
    assert in_decayed | in_plain == set(names.values())
    for name, parameter in network.named_parameters():
        assert (name in in_plain) == (name.endswith(".bias") or len(parameter.shape) == 1), name
    assert {"backbone.norm.weight", "backbone.patch_embed.proj.bias"} <= in_plain
    assert "head.last_layer.length" in in_decayed
    assert {"backbone.cls_token", "backbone.pos_embed", "head.last_layer.weight"} <= in_decayed


def test_parameters_that_do_not_train_are_in_no_group() -> None:
    network = student_of(recipe())
    network.backbone.requires_grad_(False)
    found = {id(parameter) for group in parameter_groups(network) for parameter in group["params"]}
    assert found == {id(parameter) for parameter in network.head.parameters()}


@pytest.mark.parametrize("highest_norm", [0.0, 0.5, 3.0])
def test_each_gradient_is_clipped_by_itself(highest_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2), (7,), (1,))]
    for parameter, scale in zip(parameters[:4], (10.0, 0.01, 1.0, 0.3), strict=True):
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    gradients = [parameter.grad.double().numpy() for parameter in parameters if parameter.grad is not None]
    expected = []
    for gradient in gradients:
        norm = math.sqrt((gradient**2).sum())
        coefficient = highest_norm / (norm + 1e-6)
        expected.append(gradient * coefficient if highest_norm and coefficient < 1 else gradient.copy())
    total = math.sqrt(sum((gradient**2).sum() for gradient in gradients))
    assert clip_gradients(parameters, highest_norm).item() == pytest.approx(total, rel=1e-5)
    for parameter, values in zip(parameters[:4], expected, strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.double().numpy(), values, rtol=1e-5, atol=1e-8)
    assert parameters[4].grad is None


def test_copying_weights_takes_buffers_along() -> None:
    wanted = recipe(head_batch_norm=True, predictor=True)
    one, other = student_of(wanted), student_of(replace_predictor(wanted))
    train_a_little(one, 5)
    copy_weights(one, other)
    assert_same(other, state_of(one))
    train_a_little(one, 6)
    assert differ(state_of(other), state_of(one))


def replace_predictor(wanted: Recipe) -> Recipe:
    return recipe(head_batch_norm=wanted.head_batch_norm, predictor=False)


# --- architectures


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_vit_tiny_takes_patches_of_any_size(patch_size: int) -> None:
    args = {"patch_size": patch_size, "depth": 1}
    wanted = recipe(architecture="vit_tiny_patch16_224", architecture_args=args)
    network = student_of(wanted)
    outputs = network(views(32, 32, 16, 16))
    assert outputs.features.shape == (4 * B, 192)
    pos_embed: Tensor = network.backbone.pos_embed  # type: ignore[assignment]
    assert pos_embed.shape == (1, 1 + (32 // patch_size) ** 2, 192)


def test_a_vit_of_twelve_narrow_layers_takes_grey_digits() -> None:
    args = {"patch_size": 8, "depth": 12, "embed_dim": 192, "num_heads": 4, "mlp_ratio": 4.0}
    wanted = recipe(architecture="vit_tiny_patch16_224", architecture_args=args, in_chans=1, mean=(0.13,), std=(0.31,))
    network = student_of(wanted)
    blocks: Any = network.backbone.blocks
    assert len(blocks) == 12
    for block in blocks:
        assert (block.attn.num_heads, block.attn.head_dim) == (4, 48)
        assert block.mlp.fc1.weight.shape == (768, 192)
    outputs = network(views(32, 32, 16, in_chans=1))
    assert outputs.features.shape == (3 * B, 192)
    assert network.backbone.patch_embed.proj.weight.shape == (192, 1, 8, 8)  # type: ignore[union-attr]


@pytest.mark.parametrize("student_features", ["cls", "cls_gem"])
def test_a_convolutional_network_learns_like_a_transformer(student_features: str) -> None:
    wanted = recipe(architecture="resnet10t", architecture_args={}, student_features=student_features, drop_path=0.1)
    student = student_of(wanted).train()
    teacher = Teacher(student, wanted)
    pictures = views(32, 32, 16, 16)
    outputs = student(pictures)
    assert outputs.features.shape == (4 * B, 512)
    assert outputs.logits is not None
    outputs.logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    clip_gradients(student.parameters(), 3.0)
    torch.optim.SGD(parameter_groups(student), lr=0.1).step()
    teacher.follow(student, 0.5, epoch_ended=False)
    assert student.eval()(pictures[:1]).features.shape == (B, 512)
    pooled_BD = student.backbone.forward_features(pictures[0]).mean(dim=(2, 3))  # type: ignore[operator]
    torch.testing.assert_close(student(pictures[:1]).features, pooled_BD)


def test_the_teachers_backbone_is_the_students_without_its_random_layers() -> None:
    wanted = recipe(drop_path=0.3, patch_drop=0.5)
    student, teacher = (build_backbone(wanted, student=student) for student in (True, False))
    assert student.state_dict().keys() == teacher.state_dict().keys()
    assert {"DropPath", "PatchDropout"} <= kinds(student)
    assert {"DropPath", "PatchDropout"}.isdisjoint(kinds(teacher))


def kinds(module: nn.Module) -> set[str]:
    return {type(part).__name__ for part in module.modules()}


def vit_args(**changed: Any) -> dict[str, Any]:
    return {"architecture_args": {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 1} | changed}


# What the message must name, and the recipe's keys.
WRONG_RECIPES: list[tuple[str, dict[str, Any]]] = [
    ("nonsense", {"architecture": "nonsense"}),
    ("architecture", {"architecture": ""}),
    ("architecture_args", vit_args(nonsense=1)),
    ("architecture_args", vit_args(depth="twelve")),
    ("architecture_args", vit_args(num_heads=3)),
    ("architecture_args", vit_args(num_heads=0)),
    ("architecture_args", vit_args(patch_size=0)),
    ("architecture_args", vit_args(patch_size=[8])),
    ("architecture_args", vit_args(norm_layer="nonsense")),
    ("architecture_args", vit_args(pretrained=True)),
    ("global_size", vit_args(in_chans=1)),
    ("global_size", {"global_size": 36}),
    ("local_size", {"local_size": 20}),
    ("export_size", {"export_size": 20}),
    ("global_size", {"architecture": "test_vit_relpos", "architecture_args": {}}),
    ("patch_drop_rate", {"architecture": "test_resnet", "architecture_args": {}, "patch_drop": 0.5}),
    ("features", {"architecture": "mobilenetv3_small_050", "architecture_args": {}}),
]


@pytest.mark.parametrize(("named", "changed"), WRONG_RECIPES)
def test_what_does_not_fit_is_a_recipe_error_that_names_it(named: str, changed: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=named):
        build_backbone(recipe(**changed), student=True)


def test_sizes_of_views_that_there_are_not_do_not_matter() -> None:
    build_backbone(recipe(local_size=20, multi_crop=False), student=True)
    build_backbone(recipe(local_size=20, num_local_views=0), student=True)


def test_checking_sizes_leaves_statistics_mode_and_random_numbers_alone() -> None:
    wanted = recipe(architecture="resnet10t", architecture_args={})
    backbone = build_backbone(wanted, student=True)
    assert backbone.training
    assert int(backbone.state_dict()["bn1.num_batches_tracked"]) == 0
    torch.manual_seed(4)
    build_backbone(recipe(patch_drop=0.5, drop_path=0.5), student=True)
    after = torch.rand(1)
    torch.manual_seed(4)
    build_backbone(recipe(patch_drop=0.5, drop_path=0.5, multi_crop=False), student=True)
    assert torch.rand(1) == after

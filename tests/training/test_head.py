from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_index.errors import RecipeError
from dino_training.head import Predictor, ProjectionHead, Prototypes
from dino_training.networks import Network, Teacher, build_backbone
from dino_training.recipe import Recipe

Floats = NDArray[np.float64]

B, D, HIDDEN, C, K = 6, 10, 12, 5, 9


def recipe(**changed: Any) -> Recipe:
    tiny: dict[str, Any] = {
        "architecture_args": {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 1},
        "global_size": 16, "local_size": 8, "num_local_views": 1,
        "head_hidden": HIDDEN, "head_bottleneck": C, "num_prototypes": K,
    }  # fmt: skip
    return Recipe(**tiny | changed)


def features() -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(7))


def floats(tensor: Tensor) -> Floats:
    values: Floats = tensor.detach().double().numpy()
    return values


def spread_weights(module: nn.Module) -> None:
    """Weights large enough that every layer of the formula shows in the result."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def gelu(values: Floats) -> Floats:
    return np.array([[0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in row] for row in values])


def batch_norm(values: Floats, scale: Floats, shift: Floats) -> Floats:
    deviation = np.sqrt(values.var(axis=0) + 1e-5)
    normed: Floats = (values - values.mean(axis=0)) / deviation * scale + shift
    return normed


def naive_mlp(mlp: nn.Sequential, values: Floats) -> Floats:
    """Linear, (batch norm,) GELU, ..., linear; then unit length."""
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            values = values @ floats(layer.weight).T + floats(layer.bias)
        elif isinstance(layer, nn.BatchNorm1d):
            values = batch_norm(values, floats(layer.weight), floats(layer.bias))
        else:
            assert isinstance(layer, nn.GELU)
            values = gelu(values)
    return np.array([row / math.sqrt((row**2).sum()) for row in values])


def kinds(mlp: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in mlp]


# --- the head


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_the_head_is_a_chain_of_linear_layers_scaled_to_unit_length(num_layers: int, batch_norm: bool) -> None:
    head = ProjectionHead(D, recipe(head_layers=num_layers, head_batch_norm=batch_norm))
    hidden = ["Linear", "BatchNorm1d", "GELU"] if batch_norm else ["Linear", "GELU"]
    assert kinds(head.mlp) == hidden * (num_layers - 1) + ["Linear"]
    spread_weights(head)
    projections = head(features())
    assert projections.shape == (B, C)
    np.testing.assert_allclose(floats(projections), naive_mlp(head.mlp, floats(features())), atol=1e-5)
    torch.testing.assert_close(projections.norm(dim=-1), torch.ones(B))


def test_the_widths_are_those_of_the_recipe() -> None:
    head = ProjectionHead(D, recipe())
    shapes = [tuple(layer.weight.shape) for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert shapes == [(HIDDEN, D), (HIDDEN, HIDDEN), (C, HIDDEN)]
    assert head.last_layer is not None
    assert head.last_layer(head(features())).shape == (B, K)


def test_without_layers_the_features_themselves_are_projected() -> None:
    head = ProjectionHead(D, recipe(head_layers=0, head_bottleneck=D, loss="infonce", centring="none"))
    assert list(head.parameters()) == []
    torch.testing.assert_close(head(features()), torch.nn.functional.normalize(features(), dim=1))


def test_without_layers_features_of_another_width_are_refused() -> None:
    with pytest.raises(RecipeError, match=f"expected head_bottleneck {D} .* found {C}"):
        ProjectionHead(D, recipe(head_layers=0))


def test_a_loss_without_prototypes_has_none() -> None:
    assert ProjectionHead(D, recipe(loss="mse")).last_layer is None


def test_weights_start_from_a_normal_of_deviation_two_hundredths_and_biases_from_zero() -> None:
    wide = recipe(head_hidden=512, head_bottleneck=128)
    for mlp in (ProjectionHead(384, wide).mlp, Predictor(wide).mlp):
        for layer in mlp:
            if isinstance(layer, nn.Linear):
                weights = floats(layer.weight).ravel()
                assert abs(weights.mean()) < 3e-4
                assert weights.std() == pytest.approx(0.02, rel=0.02)
                # As a normal has it: a uniform of the same deviation ends at .035.
                assert np.abs(weights).max() > 0.06
                assert (np.abs(weights) < 0.02).mean() == pytest.approx(0.683, abs=0.01)
                assert not layer.bias.any()


# --- prototypes


@pytest.mark.parametrize("fixed_length", [True, False])
def test_prototypes_equal_pytorchs_weight_norm_in_outputs_and_gradients(fixed_length: bool) -> None:
    prototypes = Prototypes(C, K, fixed_length=fixed_length)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(C, K, bias=False), dim=0)
    lengths, directions = reference.parametrizations.weight.original0, reference.parametrizations.weight.original1
    with torch.no_grad():
        lengths.fill_(1.0)
        directions.copy_(prototypes.weight)
        if prototypes.length is not None:
            prototypes.length.copy_(torch.linspace(0.5, 2, K)[:, None])
            lengths.copy_(torch.linspace(0.5, 2, K)[:, None])
    generator = torch.Generator().manual_seed(1)
    projections, upstream = torch.randn(B, C, generator=generator), torch.randn(B, K, generator=generator)
    ours, theirs = (projections.clone().requires_grad_() for _ in range(2))
    found, expected = prototypes(ours), reference(theirs)
    torch.testing.assert_close(found, expected)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(prototypes.weight.grad, directions.grad)
    if prototypes.length is not None:
        assert prototypes.length.grad is not None
        torch.testing.assert_close(prototypes.length.grad, lengths.grad)


def test_prototypes_of_fixed_length_say_the_cosine_whatever_their_weights_length() -> None:
    prototypes = Prototypes(C, K, fixed_length=True)
    assert [name for name, _ in prototypes.named_parameters()] == ["weight"]
    projections = nn.functional.normalize(torch.randn(B, C), dim=-1)
    before = prototypes(projections)
    for b in range(B):
        for k in range(K):
            direction = floats(prototypes.weight)[k]
            cosine = floats(projections)[b] @ direction / np.linalg.norm(direction)
            assert before[b, k].item() == pytest.approx(cosine, abs=1e-5)
    with torch.no_grad():
        prototypes.weight.mul_(5)
    torch.testing.assert_close(prototypes(projections), before)


def test_learnt_lengths_start_at_one() -> None:
    head = ProjectionHead(D, recipe(norm_last_layer=False))
    assert head.last_layer is not None
    assert head.last_layer.length is not None
    assert head.last_layer.length.tolist() == [[1.0]] * K
    assert ProjectionHead(D, recipe()).last_layer.length is None  # type: ignore[union-attr]


def test_prototypes_start_as_a_linear_layer_of_pytorch() -> None:
    weights = floats(Prototypes(64, 500, fixed_length=True).weight)
    assert np.abs(weights).max() <= 1 / 8
    assert weights.std() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)


# --- the predictor


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_predictor_is_one_hidden_layer_back_to_the_projections_width(batch_norm: bool) -> None:
    predictor = Predictor(recipe(head_batch_norm=batch_norm))
    spread_weights(predictor)
    projections = torch.randn(B, C)
    assert kinds(predictor.mlp) == ["Linear", *["BatchNorm1d"] * batch_norm, "GELU", "Linear"]
    np.testing.assert_allclose(floats(predictor(projections)), naive_mlp(predictor.mlp, floats(projections)), atol=1e-5)


def test_the_predictor_comes_between_projection_and_prototypes_on_the_student_alone() -> None:
    with_predictor = recipe(predictor=True, drop_path=0.0)
    student = Network(build_backbone(with_predictor, student=True), with_predictor, predictor=True)
    spread_weights(student)
    teacher = Teacher(student, with_predictor).network
    views = [torch.randn(2, 3, 16, 16)]
    plain, predicted = teacher(views), student(views)
    assert student.predictor is not None
    assert teacher.predictor is None
    expected = naive_mlp(student.predictor.mlp, floats(plain.projections))
    np.testing.assert_allclose(floats(predicted.projections), expected, atol=1e-4)
    assert student.head.last_layer is not None
    np.testing.assert_allclose(
        floats(predicted.logits), floats(student.head.last_layer(predicted.projections)), atol=1e-5
    )
    assert not torch.allclose(predicted.projections, plain.projections, atol=1e-2)

"""Student and teacher: a backbone of timm with a projection head on it, and how the teacher follows the student.

Shapes: B images, D channels of the backbone, C channels of the projection, K prototypes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_index.descriptors import descriptors_of, global_token
from dino_index.errors import RecipeError
from dino_training.head import Predictor, ProjectionHead
from dino_training.recipe import Recipe


@dataclass(frozen=True)
class Outputs:
    """What a network says of some views, one row a view and image, views in order.

    features: the backbone's [CLS]. projections: of unit length, float32. logits: over the prototypes, float32; None
    where the loss has none.
    """

    features: Tensor
    projections: Tensor
    logits: Tensor | None


class Network(nn.Module):
    """Backbone, head and, on the student's side, the predictor."""

    def __init__(self, backbone: nn.Module, recipe: Recipe, *, predictor: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.student_features = recipe.student_features
        dim = int(backbone.num_features)  # type: ignore[arg-type]
        self.head = ProjectionHead(2 * dim if recipe.student_features == "cls_gem" else dim, recipe)
        self.predictor = Predictor(recipe) if predictor else None
        self._backbone_frozen = False
        self._forward_features: Callable[[Tensor], Tensor] = backbone.forward_features  # type: ignore[assignment]

    def compile_backbone(self) -> None:
        """Trains through torch.compile. Who calls the backbone itself (figures, attention maps) gets it as it was."""
        self._forward_features = torch.compile(self._forward_features)

    def freeze_backbone(self, frozen: bool) -> None:
        """Trains the head alone: the backbone then runs without gradients and keeps its running statistics."""
        if frozen != self._backbone_frozen:
            self._backbone_frozen = frozen
            self.backbone.train(not frozen)

    def forward(self, views: Sequence[Tensor]) -> Outputs:
        """views: normalised pictures, B x C x H x W each; those of one size in a row go through together."""
        pairs = []
        with torch.no_grad() if self._backbone_frozen else nullcontext():
            for _, same_size in itertools.groupby(views, key=lambda view: view.shape[-2:]):
                pairs.append(self._features(torch.cat(list(same_size))))
        features, head_inputs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        projections = self.head(head_inputs)
        if self.predictor is not None:
            projections = self.predictor(projections)
        prototypes = self.head.last_layer
        return Outputs(features, projections, prototypes(projections).float() if prototypes is not None else None)

    def _features(self, pictures_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The [CLS], and what the head projects."""
        features = self._forward_features(pictures_BCHW)
        if self.student_features == "cls_gem":
            cls_BD, gem_BD = descriptors_of(self.backbone, features, "normalised")
            # Both halves count alike, at the scale of a layer-normalised token.
            scale = cls_BD.shape[1] ** 0.5
            return cls_BD, torch.cat([F.normalize(cls_BD, dim=-1), gem_BD], dim=1) * scale
        cls_BD = global_token(self.backbone, features)
        return cls_BD, cls_BD


class Teacher:
    """The network whose outputs the student learns to predict; no gradient reaches it."""

    def __init__(self, student: Network, recipe: Recipe) -> None:
        self.kind = recipe.teacher
        self.network = Network(build_backbone(recipe, student=False), recipe, predictor=False)
        self.network.to(next(student.parameters()).device)
        copy_weights(student, self.network)
        self.network.requires_grad_(False)
        for module in self.network.modules():
            # Batch statistics as the student has them; the running ones are averaged in `follow` and nowhere else.
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0
        self._previous: Network | None = copy.deepcopy(self.network) if self.kind == "previous_iteration" else None

    @torch.no_grad()
    def follow(self, student: Network, momentum: float, *, epoch_ended: bool) -> None:
        """The teacher for the next step, after the student's. momentum: share of the old teacher that stays.

        With a frozen teacher this network is the student's average, kept for what is exported.
        """
        if self.kind == "student":
            copy_weights(student, self.network)
        elif self.kind == "previous_iteration":
            # The student as it was before the step that has just been made.
            assert self._previous is not None
            copy_weights(self._previous, self.network)
            copy_weights(student, self._previous)
        elif self.kind == "previous_epoch":
            if epoch_ended:
                copy_weights(student, self.network)
        else:
            _average_into(self.network, student, momentum)

    def state_dict(self) -> dict[str, Any]:
        previous = self._previous.state_dict() if self._previous is not None else None
        return {"network": self.network.state_dict(), "previous": previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self._previous is not None:
            self._previous.load_state_dict(state["previous"])


def build_backbone(recipe: Recipe, *, student: bool) -> nn.Module:
    """The recipe's timm architecture with random weights; drop path and token dropping for the student alone.

    Raises RecipeError.
    """
    if not timm.is_model(recipe.architecture):
        raise RecipeError(
            f"architecture must be a name that timm {timm.__version__} knows, found {recipe.architecture!r}"
        )
    arguments = architecture_args(recipe)
    if student and recipe.drop_path:
        arguments["drop_path_rate"] = recipe.drop_path
    if student and recipe.patch_drop:
        arguments["patch_drop_rate"] = recipe.patch_drop
    try:
        backbone: nn.Module = timm.create_model(recipe.architecture, pretrained=False, num_classes=0, **arguments)
    except Exception as error:  # whatever timm makes of arguments that do not fit
        reason = f"{type(error).__name__}: {error}"
        raise RecipeError(f"architecture_args do not fit {recipe.architecture}: {reason}") from error
    _check_view_sizes(backbone, recipe)
    return backbone


def architecture_args(recipe: Recipe) -> dict[str, Any]:
    """Arguments for timm that make the architecture fit the recipe's views; those of the exported backbone."""
    arguments: dict[str, Any] = dict(recipe.architecture_args)
    if recipe.in_chans != 3:
        arguments["in_chans"] = recipe.in_chans
    if is_transformer(recipe.architecture):
        arguments |= {"img_size": recipe.global_size, "dynamic_img_size": True}
    return arguments


def is_transformer(architecture: str) -> bool:
    """Whether the architecture is one of timm's vision transformers, whose position embeddings have a size."""
    return str(timm.models.model_entrypoint(architecture).__module__).endswith((".vision_transformer", ".deit", ".eva"))


def use_attention(backbone: nn.Module, *, fused: bool) -> None:
    """Chooses how attention is computed: PyTorch's fused kernel, or plain matrix products; equal but for rounding."""
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those without: biases and all others of one dimension.

    As facebookresearch/dino at 7c446df (utils.get_params_groups).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], highest_norm: float) -> Tensor:
    """Scales each gradient that is longer than `highest_norm` down to it, each by itself; 0: none.

    Returns the norm of all gradients together, before clipping.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if highest_norm:
        factors = (highest_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    total: Tensor = torch.linalg.vector_norm(norms)
    return total


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Parameters and buffers of the same name; what the target lacks (a predictor) is left out."""
    values = source.state_dict()
    for name, tensor in target.state_dict().items():
        tensor.copy_(values[name])


def _average_into(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * network, buffers included; whole numbers are copied."""
    values = network.state_dict()
    averages, others = [], []
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            averages.append(tensor)
            others.append(values[name])
        else:
            tensor.copy_(values[name])
    torch._foreach_lerp_(averages, others, 1 - momentum)


def _check_view_sizes(backbone: nn.Module, recipe: Recipe) -> None:
    """Raises RecipeError unless the backbone takes pictures of every size that it will get."""
    keys = {recipe.input_size: "export_size"}
    keys |= {recipe.local_size: "local_size"} if recipe.local_views else {}
    keys |= {recipe.global_size: "global_size"}
    patch_size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    for size, key in keys.items():
        if isinstance(patch_size, tuple) and size % patch_size[0]:
            raise RecipeError(f"{key} must be a multiple of the patch size {patch_size[0]}, found {size}")
        try:
            token_1D = _trial(backbone, torch.zeros(1, recipe.in_chans, size, size))
        except Exception as error:
            raise RecipeError(f"{recipe.architecture} does not take {key} {size}: {error}") from error
        if token_1D.shape != (1, backbone.num_features):
            raise RecipeError(
                f"{recipe.architecture} gives {token_1D.shape[1]} features of an image, expected "
                f"{backbone.num_features}, as many as its patches have; choose another architecture"
            )


@torch.no_grad()
def _trial(backbone: nn.Module, pictures_BCHW: Tensor) -> Tensor:
    """The backbone's [CLS] without any trace: no random numbers are drawn, no statistics kept."""
    was_training = backbone.training
    try:
        backbone.eval()
        return global_token(backbone, backbone.forward_features(pictures_BCHW))  # type: ignore[operator]
    finally:
        backbone.train(was_training)

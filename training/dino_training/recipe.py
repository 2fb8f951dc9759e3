"""Recipes: every setting of a pretraining run, from a YAML file, checked before anything starts.

A recipe file holds only what differs from the defaults below, or names another recipe to start from (`base: NAME`).
The values after `resolve` are saved with the run and decide it completely, together with the images.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import yaml

from dino_index.edits import EDITS
from dino_index.errors import OutputUnwritable, RecipeError

Auto = Literal["auto"]
AUTO: Auto = "auto"

_HERE = Path(__file__).parent
# In a wheel the recipes lie in the package; in a checkout, beside it.
_RECIPE_FOLDERS = (_HERE / "recipes", _HERE.parent / "recipes")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One pretraining run. The defaults are the published ViT-S/16 settings (facebookresearch/dino at 7c446df)."""

    name: str = "dino"
    """What the run is called in its report and in the exported weights."""
    seed: int = 0
    """Order, views and initial weights depend on the seed alone."""

    # -- backbone
    architecture: str = "vit_small_patch16_224"
    """A timm architecture: any ViT, or a convolutional network such as resnet50."""
    architecture_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of that timm architecture: patch_size, depth, embed_dim, num_heads, mlp_ratio, ..."""
    in_chans: int = 3
    """Colour channels the backbone takes: 3, or 1 for grey images."""
    drop_path: float = 0.1
    """Stochastic depth rate of the student's last block, rising linearly from the first; the teacher has none."""
    patch_drop: float = 0.0
    """Fraction of patch tokens that the student leaves out of each view, for speed."""

    # -- views
    global_size: int = 224
    """Side of the global views in pixels."""
    export_size: int = 0
    """Input size of the exported backbone in pixels, at which the figures are taken, too; 0: global_size."""
    num_global_views: int = 2
    """Global views of an image: both networks see them (a frozen teacher sees the original instead)."""
    multi_crop: bool = True
    """Local views as well; off: the global views alone."""
    local_size: int = 96
    """Side of the local views in pixels."""
    num_local_views: int = 8
    """Local views of an image; only the student sees them."""
    local_source: Literal["image", "global"] = "image"
    """What local views are cut from: the image, or its global views in turn, before their colours change."""
    global_scale: tuple[float, ...] = (0.4, 1.0)
    """Area of a global view as a fraction of what it is cut from: lowest and highest."""
    local_scale: tuple[float, ...] = (0.05, 0.4)
    """The same for local views."""
    aspect_ratio: tuple[float, ...] = (0.75, 4 / 3)
    """Width / height of the part that is cut out: lowest and highest."""
    flip_prob: float = 0.5
    """Probability that a view is mirrored left to right."""
    jitter_prob: float = 0.8
    """Probability that a view's colours are jittered."""
    jitter: tuple[float, ...] = (0.4, 0.4, 0.2, 0.1)
    """Strength of the jitter: brightness, contrast, saturation, hue."""
    grey_prob: float = 0.2
    """Probability that a view loses its colour."""
    blur_prob: tuple[float, ...] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur: first global view, the other global views, local views."""
    blur_sigma: tuple[float, ...] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view: lowest and highest."""
    solarise_prob: tuple[float, ...] = (0.0, 0.2, 0.0)
    """Probability of solarisation: first global view, the other global views, local views."""
    edits: dict[str, float] = field(default_factory=dict)
    """Extra augmentation for copy detection: probability of each edit, such as {reencode: .3, paste: .2}.

    Applied to a view before its colours change. Kinds: those of `dino_index.edits`; paste uses any image
    of the run as the background.
    """
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each colour channel, 0..1, that pixels are normalised with; one for each of in_chans."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel."""

    # -- projection head
    head_layers: int = 3
    """Linear layers before the prototypes. 0: none, the features themselves are projected, all `head_bottleneck` of
    them: the backbone then cannot leave to a head what an edit changes, and its own cosines are what is trained."""
    head_hidden: int = 2048
    """Width of the hidden layers."""
    head_bottleneck: int = 256
    """Width of the last of them, whose output is scaled to unit length."""
    head_batch_norm: bool = False
    """Batch normalisation in the hidden layers (as BYOL has it)."""
    num_prototypes: int | Auto = 65536
    """K: outputs of the head. auto: from the number of images."""
    norm_last_layer: bool = True
    """Prototypes of fixed length 1; off: their lengths are learnt."""
    predictor: bool = False
    """A further network on the student's side alone (as BYOL has it)."""
    student_features: Literal["cls", "cls_gem"] = "cls"
    """What the head projects: [CLS], or [CLS] and GeM-pooled patch tokens side by side as copy detection uses them."""

    # -- teacher and loss
    teacher: Literal["momentum", "student", "previous_iteration", "previous_epoch", "frozen"] = "momentum"
    """The teacher's weights: an average of the student's, the student's own, those one iteration or one epoch ago,
    or a fixed backbone's (`teacher_model`)."""
    teacher_model: str | None = None
    """Frozen teacher: a safetensors file, `bundled`, or a timm name with weights on this machine."""
    teacher_size: int = 0
    """Side in pixels at which a frozen teacher sees the original; 0: what its file says."""
    whiten_dim: int = 256
    """Principal components that a frozen teacher's embedding is whitened to."""
    momentum: float | Auto = 0.996
    """Teacher momentum at the start. auto: from the number of images."""
    final_momentum: float = 1.0
    """Teacher momentum at the end; cosine in between."""
    loss: Literal["cross_entropy", "kl", "mse", "infonce"] = "cross_entropy"
    """cross_entropy and kl compare distributions over the prototypes; mse and infonce unit-length projections."""
    centring: Literal["mean", "sinkhorn", "none"] = "mean"
    """How no prototype comes to dominate: subtract the running mean, Sinkhorn-Knopp on the batch, or not at all."""
    center_of: Literal["logits", "probabilities"] = "logits"
    """What the center averages: the teacher's raw outputs, or its softmax (divided by it, and normalised again)."""
    center_init: Literal["zeros", "first_batch"] = "zeros"
    """Where the center starts: at nothing, or at the mean of the first batch."""
    center_momentum: float = 0.9
    """Share of the old center that each step keeps."""
    sharpening: bool = True
    """A teacher temperature below the student's; off: the student's temperature for both."""
    student_temperature: float = 0.1
    """Softmax temperature of the student."""
    teacher_temperature: float | Auto = 0.04
    """Softmax temperature of the teacher after its warm-up. auto: from the number of images."""
    initial_teacher_temperature: float | Auto = 0.04
    """Softmax temperature of the teacher at the start."""
    teacher_temperature_warmup_epochs: float = 0.0
    """Epochs over which it rises linearly."""
    contrast_temperature: float = 0.2
    """Temperature of infonce."""
    num_negatives: int = 4096
    """Embeddings of earlier images (infonce) or of all images (frozen teacher) that a view is told apart from;
    0: only the others of the batch."""
    koleo_weight: float = 0.0
    """Weight of the KoLeo term that spreads the student's [CLS] over the sphere (as DINOv2 has it)."""

    # -- optimisation
    epochs: int | Auto = 100
    """Passes over the images. auto: from their number."""
    batch_size: int = 1024
    """Images in one optimiser step, over all processes and accumulated parts."""
    gradient_accumulation: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum .9."""
    learning_rate: float = 0.0005
    """Peak learning rate for a batch of 256 images; scaled with batch_size / 256."""
    min_learning_rate: float = 1e-6
    """Learning rate at the end of the cosine, not scaled."""
    warmup_epochs: float = 10.0
    """Epochs over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.04
    """Weight decay at the start; none on biases and other 1-D parameters."""
    final_weight_decay: float = 0.4
    """Weight decay at the end; cosine in between."""
    clip_grad: float = 3.0
    """Highest norm of each parameter's gradient; 0: no clipping."""
    freeze_last_layer_epochs: float = 1.0
    """Epochs during which the prototypes stay as they are."""
    init_head_warmup_epochs: float = 1.0
    """With initial weights: epochs that train the head alone on the frozen backbone."""

    # -- machine: none of these is meant to change the result
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the forward pass. auto: bfloat16 where the hardware is faster with it, float16 on older GPUs, else float32."""
    attention: Literal["auto", "fused", "plain"] = "auto"
    """auto: fused on GPUs, plain matrix products on processors, where they are faster in training."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on GPUs."""
    workers: int = 0
    """Threads that prepare views; 0: one for each processor."""
    cache_gb: float = 4.0
    """Decoded images are kept in memory if all of them fit into so many gigabytes."""
    decode_size: int | Auto = AUTO
    """Images are decoded so that their shorter side is no longer than this. auto: what the smallest local view of
    full sharpness needs, at most four times global_size."""

    # -- watching the run
    labels: str = "none"
    """For the k-NN figure: `none`, `folders`, or a CSV file with the columns path and label. Training sees none."""
    evaluate_every_epochs: float = 1.0
    """How often the figure is taken; 0: at the start and the end only."""
    num_evaluated: int = 1024
    """Images that the figure is taken on."""
    save_every_minutes: float = 5.0
    """How often a checkpoint is written, beside one at each stop and at the end."""
    log_every_steps: int = 10
    """Steps between two lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_values(self)

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """Side of each view of an image, global views first."""
        return (self.global_size,) * self.num_global_views + (self.local_size,) * self.local_views

    @property
    def input_size(self) -> int:
        """Side in pixels of the images that the exported backbone takes."""
        return self.export_size or self.global_size

    @property
    def local_views(self) -> int:
        """Local views that there are after all: none without multi-crop."""
        return self.num_local_views if self.multi_crop else 0

    @property
    def uses_prototypes(self) -> bool:
        """Whether the loss compares distributions over the prototypes."""
        return self.loss in ("cross_entropy", "kl")

    @property
    def longest_local_source(self) -> int:
        """Side in pixels that a square image needs so that its smallest local view is not enlarged."""
        smallest_frac = self.local_scale[0] if self.local_views else self.global_scale[0]
        side = self.local_size if self.local_views else self.global_size
        return min(4 * self.global_size, max(self.global_size, math.ceil(side / math.sqrt(smallest_frac))))

    def to_yaml(self) -> str:
        """The whole recipe as a recipe file."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)

    def resolve(self, num_images: int, *, from_weights: bool = False) -> tuple[Recipe, list[str]]:
        """The recipe with every `auto` chosen by the number of images and warm-ups that fit, and remarks for the user.

        from_weights: whether training starts from existing weights, and so with a warm-up of the head.
        """
        remarks: list[str] = []
        changed: dict[str, Any] = {}
        for key, choose in _CHOICES_BY_SIZE.items():
            if getattr(self, key) == AUTO:
                changed[key] = choose(num_images)
        if self.decode_size == AUTO:
            changed["decode_size"] = self.longest_local_source
        if changed:
            chosen = ", ".join(f"{key} {value}" for key, value in changed.items() if key != "decode_size")
            if chosen:
                remarks.append(f"chosen for {num_images:,} images: {chosen}")
        recipe = replace(self, **changed)
        shrunk, more = _fit_warmups(recipe, from_weights)
        return shrunk, remarks + more


_DOCUMENTED = tuple(field.name for field in fields(Recipe))


def load_recipe(name_or_file: str | Path = "small", overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name (`small`, `ablation/byol`) or a YAML file, with `key=value` overrides.

    Raises RecipeError: no such recipe, not YAML, an unknown key, a value of the wrong kind or out of range.
    """
    values = _read_recipe(str(name_or_file), Path())
    overriding: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"expected key=value to set, found {override!r}")
        overriding[key.strip()] = _parse_yaml(text, f"the value of {key.strip()}")
    _check_keys(overriding, "--set")
    return recipe_from(values | overriding, str(name_or_file))


def recipe_from(values: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe from plain values, as a recipe file holds them. Raises RecipeError; origin: where they came from."""
    _check_keys(values, origin)
    types = typing.get_type_hints(Recipe)
    return Recipe(**{key: _coerce(types[key], value) for key, value in values.items()})


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    folder = _recipe_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe file, whole or not at all. Raises OutputUnwritable."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(recipe.to_yaml(), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputUnwritable(f"{path} cannot be written: {error.strerror}") from error


def _choose_prototypes(num_images: int) -> int:
    """K by the size of the set: few images cannot fill many prototypes, and the teacher's entropy drifts to ln K."""
    for most_images, prototypes in (
        (20_000, 1024),
        (50_000, 2048),
        (100_000, 4096),
        (200_000, 16384),
        (500_000, 32768),
    ):
        if num_images <= most_images:
            return prototypes
    return 65536


def _choose_initial_temperature(num_images: int) -> float:
    return 0.02 if num_images <= 50_000 else 0.03 if num_images <= 200_000 else 0.04


# What `auto` means, by key. Small sets start with a sharper teacher that follows the student faster.
_CHOICES_BY_SIZE: dict[str, Any] = {
    "num_prototypes": _choose_prototypes,
    "momentum": lambda num_images: 0.99 if num_images <= 50_000 else 0.992 if num_images <= 200_000 else 0.996,
    "initial_teacher_temperature": _choose_initial_temperature,
    "teacher_temperature": lambda num_images: 0.04,
    "epochs": lambda num_images: min(300, max(10, round(1_000_000 / max(1, num_images)))),
}  # fmt: skip


def _fit_warmups(recipe: Recipe, from_weights: bool) -> tuple[Recipe, list[str]]:
    """Warm-ups that would take more than half of the run, shrunk to take the share they have in a run of 100 epochs."""
    assert isinstance(recipe.epochs, int)
    keys = ["warmup_epochs", "teacher_temperature_warmup_epochs", "freeze_last_layer_epochs"]
    keys += ["init_head_warmup_epochs"] if from_weights else []
    changed: dict[str, Any] = {}
    remarks = []
    for key in keys:
        epochs = getattr(recipe, key)
        if epochs > recipe.epochs / 2:
            changed[key] = round(recipe.epochs * min(0.5, epochs / 100), 4)
            remarks.append(f"{key} shrunk from {epochs:g} to {changed[key]:g}, as the run has {recipe.epochs} epochs")
    return replace(recipe, **changed), remarks


def _recipe_folder() -> Path:
    return next(folder for folder in _RECIPE_FOLDERS if folder.is_dir())


def _read_recipe(name_or_file: str, folder: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe over those of its base. folder: what a relative path starts from."""
    if name_or_file in recipe_names():
        path = _recipe_folder() / f"{name_or_file}.yaml"
    else:
        path = Path(os.path.normpath(folder / os.path.expanduser(name_or_file)))
    if path in seen:
        raise RecipeError(f"{seen[-1]}: its base {name_or_file!r} starts from itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        expected = ", ".join(recipe_names())
        raise RecipeError(f"no recipe {name_or_file!r}: expected a YAML file or one of {expected}") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"the recipe {str(path)!r} cannot be read: {error}") from error
    values = _parse_yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected lines of `key: value`, found {type(values).__name__}")
    base = values.pop("base", None)
    _check_keys(values, str(path))
    return values if base is None else _read_recipe(str(base), path.parent, (*seen, path)) | values


def _check_keys(values: Mapping[Any, Any], origin: str) -> None:
    if unknown := [key for key in values if key not in _DOCUMENTED]:
        close = difflib.get_close_matches(str(unknown[0]), _DOCUMENTED, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "; the keys stand in training/README.md"
        raise RecipeError(f"{origin}: unknown recipe key {unknown[0]!r}{hint}")


def _parse_yaml(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is not YAML: {' '.join(str(error).split())}") from error


def _coerce(expected: Any, value: Any) -> Any:
    """YAML's values as the field has them: lists as tuples, whole numbers and `1e-4` as floats."""
    if get_origin(expected) is tuple and isinstance(value, list):
        return tuple(_coerce(float, item) for item in value)
    if get_origin(expected) is dict and isinstance(value, dict):
        return {key: _coerce(get_args(expected)[1], item) for key, item in value.items()}
    kinds = (
        get_args(expected) if isinstance(expected, UnionType) or get_origin(expected) is typing.Union else (expected,)
    )
    if float in kinds and not isinstance(value, bool) and isinstance(value, (int, str)) and value != AUTO:
        try:
            return float(value)  # YAML 1.1 reads 1e-4, without a point, as text
        except (ValueError, OverflowError):
            return value
    # `none` is text for YAML, which writes null or ~.
    if expected is str and value is None:
        return "none"
    if type(None) in kinds and value == "none":
        return None
    # YAML 1.1 reads on and off as truth values.
    if get_origin(expected) is Literal and isinstance(value, bool) and "on" in get_args(expected):
        return "on" if value else "off"
    return value


def _check_types(recipe: Recipe) -> None:
    types = typing.get_type_hints(Recipe)
    for key in _DOCUMENTED:
        if not _fits(types[key], value := getattr(recipe, key)):
            raise RecipeError(f"{key} must be {_in_words(types[key])}, found {value!r}")


def _fits(expected: Any, value: Any) -> bool:
    origin = get_origin(expected)
    if origin is Literal:
        return value in get_args(expected)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(float, item) for item in value)
    if origin is dict:
        key_type, value_type = get_args(expected)
        return isinstance(value, dict) and all(
            isinstance(key, key_type) and (value_type is Any or _fits(value_type, item)) for key, item in value.items()
        )
    if isinstance(expected, UnionType) or origin is typing.Union:
        return any(_fits(kind, value) for kind in get_args(expected))
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _in_words(expected: Any) -> str:
    origin = get_origin(expected)
    if origin is Literal:
        return " or ".join(map(repr, get_args(expected)))
    if origin is tuple:
        return "a list of numbers"
    if origin is dict:
        return "a mapping"
    if isinstance(expected, UnionType) or origin is typing.Union:
        return " or ".join("none" if kind is type(None) else _in_words(kind) for kind in get_args(expected))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(expected, str(expected))


_FRACTIONS = (
    "flip_prob", "jitter_prob", "grey_prob", "center_momentum", "final_momentum", "momentum",
)  # fmt: skip
_AT_LEAST = {
    "seed": 0, "global_size": 8, "export_size": 0, "local_size": 8, "num_global_views": 1, "num_local_views": 0,
    "head_layers": 0, "head_hidden": 1, "head_bottleneck": 1, "num_prototypes": 1, "teacher_size": 0, "whiten_dim": 1,
    "num_negatives": 0,
    "koleo_weight": 0, "epochs": 1, "batch_size": 1, "gradient_accumulation": 1, "learning_rate": 0, "warmup_epochs": 0,
    "min_learning_rate": 0, "weight_decay": 0, "final_weight_decay": 0, "clip_grad": 0, "freeze_last_layer_epochs": 0,
    "init_head_warmup_epochs": 0, "teacher_temperature_warmup_epochs": 0, "workers": 0, "cache_gb": 0, "decode_size": 8,
    "evaluate_every_epochs": 0, "num_evaluated": 8, "save_every_minutes": 0, "log_every_steps": 1,
}  # fmt: skip
_ABOVE_ZERO = ("student_temperature", "teacher_temperature", "initial_teacher_temperature", "contrast_temperature")
_LENGTHS = {
    "global_scale": 2, "local_scale": 2, "aspect_ratio": 2, "blur_sigma": 2, "jitter": 4, "blur_prob": 3,
    "solarise_prob": 3,
}  # fmt: skip


def _check_values(recipe: Recipe) -> None:
    def require(key: str, fits: bool, expected: str) -> None:
        if not fits:
            raise RecipeError(f"{key} must be {expected}, found {getattr(recipe, key)!r}")

    for key, lowest in _AT_LEAST.items():
        value = getattr(recipe, key)
        require(key, value == AUTO or value >= lowest, f"{lowest} or more")
    for key in _FRACTIONS:
        value = getattr(recipe, key)
        require(key, value == AUTO or 0 <= value <= 1, "between 0 and 1")
    for key in _ABOVE_ZERO:
        value = getattr(recipe, key)
        require(key, value == AUTO or value > 0, "above 0")
    for key, length in _LENGTHS.items():
        require(key, len(getattr(recipe, key)) == length, f"a list of {length} numbers")
    for key in ("global_scale", "local_scale"):
        lowest_frac, highest_frac = getattr(recipe, key)
        require(key, 0 < lowest_frac <= highest_frac <= 1, "two fractions above 0 and at most 1, the lower first")
    for key in ("aspect_ratio", "blur_sigma"):
        lower, upper = getattr(recipe, key)
        require(key, 0 < lower <= upper, "two numbers above 0, the lower first")
    for key in ("blur_prob", "solarise_prob"):
        require(key, all(0 <= value <= 1 for value in getattr(recipe, key)), "three probabilities between 0 and 1")
    require(
        "jitter", min(recipe.jitter) >= 0 and recipe.jitter[3] <= 0.5, "four strengths of 0 or more, hue at most 0.5"
    )
    for key in ("drop_path", "patch_drop"):
        require(key, 0 <= getattr(recipe, key) < 1, "at least 0 and below 1")
    require("in_chans", recipe.in_chans in (1, 3), "1 (grey) or 3 (colour)")
    for key in ("mean", "std"):
        require(key, len(getattr(recipe, key)) == recipe.in_chans, f"one number for each of {recipe.in_chans} channels")
    require("std", min(recipe.std) > 0, "above 0")
    for kind, probability in recipe.edits.items():
        if kind not in EDITS:
            raise RecipeError(f"edits must be among {', '.join(EDITS)}, found {kind!r}")
        require("edits", 0 <= probability <= 1, "probabilities between 0 and 1")
    if recipe.batch_size % recipe.gradient_accumulation:
        raise RecipeError(
            f"batch_size {recipe.batch_size} must be a multiple of gradient_accumulation {recipe.gradient_accumulation}"
        )
    _check_combinations(recipe)


def _check_combinations(recipe: Recipe) -> None:
    if recipe.teacher == "frozen":
        if recipe.teacher_model is None:
            raise RecipeError("teacher: frozen needs a teacher_model (--teacher NAME|FILE)")
        if recipe.uses_prototypes:
            raise RecipeError(
                f"a frozen teacher takes loss infonce (contrast) or mse (regression), found {recipe.loss!r}"
            )
    elif recipe.teacher_model is not None:
        raise RecipeError(f"teacher_model is for teacher: frozen, found teacher: {recipe.teacher}")
    elif recipe.num_global_views < 2 and not (recipe.num_global_views == 1 and recipe.local_views):
        raise RecipeError("self-distillation needs two views of an image or more: found one global and no local view")
    if recipe.centring == "sinkhorn" and not recipe.uses_prototypes:
        raise RecipeError(f"centring: sinkhorn is for losses over prototypes, found loss {recipe.loss!r}")
    if recipe.center_of == "probabilities" and not recipe.uses_prototypes:
        raise RecipeError(f"center_of: probabilities is for losses over prototypes, found loss {recipe.loss!r}")
    if recipe.teacher != "frozen" and recipe.loss == "infonce" and recipe.batch_size < 2:
        raise RecipeError("infonce needs a batch_size of 2 or more")

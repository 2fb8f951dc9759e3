"""Fine-tuning of a whole backbone with a classifier on it, and the same training from random weights.

The transfer protocol that the paper takes over from DeiT (arXiv 2012.12877): AdamW under a cosine with warm-up, mixup
and CutMix, label smoothing, random erasing, stochastic depth; with learning rates that fall from the last block to the
first. Differences: no RandAugment, no repeated augmentation, no average of the weights; a rate that decays by layer and
fewer epochs, as later fine-tuning does, in place of 1,000 epochs at one low rate.

Shapes: B images, Q images to be classified, L classes, S side of a picture, C = 3 colours, H x W a picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn

from dino_index.allocator import keep_freed_memory
from dino_index.backbones import Normaliser, fastest_dtype, load_model, random_model
from dino_index.errors import ArchitectureUnknown, OutOfMemory, OutputUnwritable, TrainingDiverged
from dino_index.indexing import Progress
from dino_index.model_files import ModelSpec
from dino_training.evaluation.classification import LabelledSets, places_of_logits
from dino_training.evaluation.features import FeatureStore, StrPath
from dino_training.evaluation.labelled_batches import (
    TrainingBatches,
    centre_decode_size,
    centre_views,
    crop_decode_size,
)
from dino_training.evaluation.labelled_images import LabelledImages
from dino_training.evaluation.metrics import top_k_accuracy
from dino_training.evaluation.results import EvaluationResult
from dino_training.export import save_weights
from dino_training.networks import is_transformer, use_attention
from dino_training.schedules import cosine, scaled_learning_rate

_INITIAL_STD = 0.02
# Decoded training images are kept in memory if all of them fit into so much.
_CACHE_BYTES = 4 * 10**9
_JUDGED_AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """How the network is trained."""

    from_scratch: bool = False
    """From random weights: the supervised baseline, on the same schedule."""
    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 0.0005
    """Peak rate of the classifier for a batch of 256, scaled with the batch."""
    min_learning_rate: float = 1e-6
    layer_decay: float | None = None
    """Factor of the rate from a block to the one before; None for .75, and for 1 from scratch."""
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    """None on biases and other parameters of one dimension, [CLS] and position embeddings."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block, rising linearly from the first; of Vision Transformers."""
    mixup: float = 0.8
    cutmix: float = 1.0
    """Parameters of the beta distributions that mixing draws from; 0 for none."""
    smoothing: float = 0.1
    erasing: float = 0.25
    """Probability that a part of a picture is replaced by noise."""
    per_class: int | None = None
    """Training images of each class that are used, drawn at random; None for all."""
    seed: int = 0

    def __post_init__(self) -> None:
        def require(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise ValueError(f"{name} must be {expected}, found {getattr(self, name)}")

        for name in ("epochs", "batch_size", "per_class"):
            require(name, (value := getattr(self, name)) is None or value >= 1, "1 or more")
        for name in ("min_learning_rate", "warmup_epochs", "weight_decay", "mixup", "cutmix"):
            require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("drop_path", "smoothing"):
            require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        require("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0")
        require("erasing", 0 <= self.erasing <= 1, "between 0 and 1")
        require("layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "above 0 and at most 1")

    @property
    def decay(self) -> float:
        """The layer decay as resolved."""
        return self.layer_decay or (1.0 if self.from_scratch else 0.75)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def evaluate_finetune(
    store: FeatureStore, train: StrPath, val: StrPath, options: FinetuneOptions | None = None, *,
    save: Path | None = None,
) -> EvaluationResult:  # fmt: skip
    """Top-1 and top-5 accuracy on `val` of the store's model, fine-tuned on `train`.

    save: a safetensors file for the backbone, without the classifier, that `index --model` takes.
    A class that only `val` has counts as always wrong, and is reported.
    Raises EvaluationImpossible for fewer than two classes to learn, or nothing to judge; TrainingDiverged;
    SourceNotFound, NoImagesFound, TruthUnusable, ModelError, OutOfMemory, OutputUnwritable; ImageError for a training
    image that can no longer be read.
    """
    options = options or FinetuneOptions()
    if save is not None:
        _make_folder(save.parent)
    if store.device.type == "cpu":
        keep_freed_memory()
    size, workers = store.spec.input_size, store.settings.workers
    sets = LabelledSets.open(train, val, per_class=options.per_class, seed=options.seed)
    sets.val.source.prepare(decode_size=centre_decode_size(size), cache_bytes=0)
    sets.train.source.prepare(decode_size=crop_decode_size(size), cache_bytes=_CACHE_BYTES, workers=workers)
    sets = sets.with_train(sets.train.checked(workers)).with_val(sets.val.checked(workers))
    training = _Training(store, sets, options)
    try:
        losses = training.run()
        logits_QL, judged = training.logits(sets.val)
        logits_NL, learnt = training.logits(sets.train)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{training.batches.batch_size} pictures of {size} px in a step do not fit into the memory of "
            f"{store.device}: end what else uses it, or take fewer in a step with --batch-size"
        ) from error
    train_places = places_of_logits(logits_NL, torch.from_numpy(sets.numbers_of(learnt.labels)))
    if save is not None:
        save_finetuned(training.model, store.spec, save, training.card(losses))
    return sets.with_val(judged).result(
        "supervised training from scratch" if options.from_scratch else "fine-tuning",
        store,
        logits_QL,
        {
            "from_scratch": options.from_scratch,
            "epochs": options.epochs,
            "batch_size": training.batches.batch_size,
            "learning_rate": options.learning_rate,
            "layer_decay": options.decay,
            "precision": str(training.precision).removeprefix("torch."),
            "losses": losses,
            "train_top1": top_k_accuracy(train_places.numpy(), 1),
        },
        [],
    )


class _Training:
    """One network on its way."""

    def __init__(self, store: FeatureStore, sets: LabelledSets, options: FinetuneOptions) -> None:
        self._store, self._sets, self._options = store, sets, options
        self._device = store.device
        self.precision = fastest_dtype(self._device)
        self._normalise = Normaliser(store.spec, self._device)
        torch.manual_seed(options.seed)
        self.model = build_classifier(store.spec, len(sets.classes), options).to(self._device)
        use_attention(self.model, fused=self._device.type == "cuda")
        num_images = len(sets.train)
        batch_size = min(options.batch_size, num_images)
        if options.mixes and batch_size > 1:
            batch_size -= batch_size % 2  # pictures are mixed in pairs
        self.batches = TrainingBatches(
            sets.train, sets.train_numbers,
            size=store.spec.input_size, batch_size=batch_size, seed=options.seed, workers=store.settings.workers,
        )  # fmt: skip
        self._optimizer = torch.optim.AdamW(layer_groups(self.model, options), lr=options.learning_rate, fused=True)

    def run(self) -> list[float]:
        """The mean loss of each epoch. Raises TrainingDiverged."""
        options, per_epoch = self._options, self.batches.steps_per_epoch
        num_steps = options.epochs * per_epoch
        mix = _mixing(options, len(self._sets.classes)) if self.batches.batch_size > 1 else None
        erase = RandomErasing(options.erasing, mode="pixel", device=self._device)  # type: ignore[no-untyped-call]
        one_hot_LL = torch.eye(len(self._sets.classes), device=self._device)
        soft_LL = one_hot_LL * (1 - options.smoothing) + options.smoothing / len(one_hot_LL)
        losses: list[float] = []
        total = torch.zeros((), device=self._device)
        self.model.train()
        for step, (pixels_BSSC, classes_B) in enumerate(self.batches(options.epochs)):
            # -- schedule
            peak = scaled_learning_rate(options.learning_rate, self.batches.batch_size)
            warmup_steps = min(round(options.warmup_epochs * per_epoch), num_steps // 2)
            rate = cosine(peak, options.min_learning_rate, step, num_steps, warmup_steps=warmup_steps)
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]

            # -- batch
            with _seeded(options.seed + 1_000_003 * (1 + step)):
                pictures_BCHW = self._normalise(torch.from_numpy(pixels_BSSC))
                own_B = torch.from_numpy(classes_B).to(self._device)
                if options.erasing:
                    pictures_BCHW = erase(pictures_BCHW)
                if mix is not None:
                    pictures_BCHW, targets_BL = mix(pictures_BCHW, own_B)
                else:
                    targets_BL = soft_LL[own_B]

                # -- forward and backward
                with self._autocast():
                    logits_BL = self.model(pictures_BCHW)
                loss = F.cross_entropy(logits_BL.float(), targets_BL)
                self._optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]

            # -- step
            self._optimizer.step()
            total += loss.detach()
            num_images = len(classes_B)
            self._store.on_progress(Progress(done=(step + 1) * num_images, total=num_steps * num_images, failed=0))

            # -- log
            if (step + 1) % per_epoch == 0:
                losses.append(total.item() / per_epoch)
                total.zero_()
                if not np.isfinite(losses[-1]):
                    raise TrainingDiverged(
                        f"the loss is no number any more in epoch {len(losses)} of {options.epochs}: lower the "
                        f"learning rate, which is {options.learning_rate:g} for a batch of 256"
                    )
                self._store.on_remark(f"epoch {len(losses)}/{options.epochs}: loss {losses[-1]:.3f}")
        return losses

    @torch.inference_mode()
    def logits(self, images: LabelledImages) -> tuple[Tensor, LabelledImages]:
        """(logits_NL of the middle of each image, on the processor; the images that could still be read)."""
        self.model.eval()
        parts = [self._logits_of(pixels_BSSC) for pixels_BSSC in self._middles(images)]
        num_classes = len(self._sets.classes)
        return torch.cat([torch.zeros(0, num_classes), *parts]), images.readable()

    def card(self, losses: list[float]) -> dict[str, Any]:
        """What the saved weights come from."""
        return {
            "method": "supervised" if self._options.from_scratch else "fine-tuned with labels",
            "started_from": None if self._options.from_scratch else self._store.spec.name,
            "images": len(self._sets.train),
            "classes": len(self._sets.classes),
            "epochs": self._options.epochs,
            "batch_size": self.batches.batch_size,
            "seed": self._options.seed,
            "loss": losses[-1],
        }

    def _middles(self, images: LabelledImages) -> Iterator[NDArray[np.uint8]]:
        squares: list[NDArray[np.uint8]] = []
        for _, pixels_SSC in centre_views(images, self._store.spec.input_size, self._store.settings.workers):
            squares.append(pixels_SSC)
            if len(squares) == _JUDGED_AT_A_TIME:
                yield np.stack(squares)
                squares = []
        if squares:
            yield np.stack(squares)

    def _logits_of(self, pixels_BSSC: NDArray[np.uint8]) -> Tensor:
        with self._autocast():
            logits_BL: Tensor = self.model(self._normalise(torch.from_numpy(pixels_BSSC)))
        return logits_BL.float().cpu()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self.precision, enabled=self.precision != torch.float32)


def build_classifier(spec: ModelSpec, num_classes: int, options: FinetuneOptions) -> nn.Module:
    """The backbone, from its weights or from scratch, with a new linear classifier on it. Raises ModelError."""
    if options.drop_path and timm.is_model(spec.architecture) and is_transformer(spec.architecture):
        spec = replace(spec, architecture_args={**spec.architecture_args, "drop_path_rate": options.drop_path})
    model = random_model(spec) if options.from_scratch else load_model(spec)
    if not hasattr(model, "reset_classifier"):
        raise ArchitectureUnknown(
            f"{spec.architecture} takes no classifier: expected an architecture of images to classes"
        )
    model.reset_classifier(num_classes)  # type: ignore[operator]
    classifier = model.get_classifier()  # type: ignore[operator]
    for module in classifier if isinstance(classifier, tuple) else (classifier,):
        nn.init.trunc_normal_(module.weight, std=_INITIAL_STD)
        nn.init.zeros_(module.bias)
    return model.requires_grad_(True)


def layer_groups(model: nn.Module, options: FinetuneOptions) -> list[dict[str, Any]]:
    """Parameters by layer and weight decay.

    `lr_scale` of a group: the layer decay to the power of how many layers come behind it; the final norm counts to the
    last block, what comes before the first block is one layer.
    """
    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model, weight_decay=options.weight_decay, no_weight_decay_list=undecayed, layer_decay=options.decay
    )
    return groups


def save_finetuned(model: nn.Module, spec: ModelSpec, path: Path, card: dict[str, Any]) -> None:
    """Writes the backbone without its classifier, which is taken off the model. Raises OutputUnwritable."""
    description: dict[str, Any] = spec.config() | {"card": card}
    for key in ("weights_path", "pooling"):
        del description[key]
    if getattr(getattr(model, "patch_embed", None), "img_size", None) is not None:
        # Position embeddings were fitted to the input size.
        description["architecture_args"] = spec.architecture_args | {"img_size": spec.input_size}
    model.reset_classifier(0)  # type: ignore[operator]
    save_weights(model, description, path)


def _make_folder(folder: Path) -> None:
    """Before the training that would be lost without it. Raises OutputUnwritable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputUnwritable(f"{folder} cannot be made: {error.strerror}; choose another --save") from error


def _mixing(options: FinetuneOptions, num_classes: int) -> Mixup | None:
    if not options.mixes:
        return None
    return Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, label_smoothing=options.smoothing,
        num_classes=num_classes,
    )  # fmt: skip


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What timm draws from the generators of Python, NumPy and torch follows from the seed.

    The first two go on afterwards as if nothing had been drawn.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)

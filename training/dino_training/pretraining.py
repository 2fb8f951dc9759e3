"""One pretraining run, from images and a recipe to a backbone: the loop, top to bottom.

Method: DINO (Caron et al., arXiv 2104.14294) as facebookresearch/dino at 7c446df implements it; every deviation that a
recipe can ask for is a branch that names its recipe key.

Shapes: B images, G views that the teacher sees, V views that the student sees, C channels of the projection,
K prototypes, N negatives.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_index.allocator import keep_freed_memory
from dino_index.backbones import choose_device
from dino_index.descriptors import descriptors
from dino_index.errors import OutputUnwritable, RecipeError, TooFewImages, TrainingDiverged
from dino_training import losses
from dino_training.batches import Batch, BatchLoader
from dino_training.center import Center
from dino_training.checkpoints import save_checkpoint
from dino_training.collapse import CollapseWatch
from dino_training.distributed import Processes, joined
from dino_training.export import BEST_WEIGHTS, WEIGHTS, export_backbone
from dino_training.frozen_teacher import prepare_teacher, stored_embeddings
from dino_training.image_source import ImageSource
from dino_training.networks import (
    Network,
    Outputs,
    Teacher,
    build_backbone,
    clip_gradients,
    parameter_groups,
    use_attention,
)
from dino_training.probe import Figures, Probe
from dino_training.recipe import Recipe, save_recipe
from dino_training.report import write_report
from dino_training.run_log import METRICS, RunLog
from dino_training.run_start import (
    CONVERTED,
    begin_or_resume,
    choose_precision,
    initial_spec,
    load_initial_weights,
    resumed_recipe,
    wants_fused_attention,
)
from dino_training.schedules import cosine, linear, scaled_learning_rate
from dino_training.snapshots import save_attention, save_views
from dino_training.views import normalise

RECIPE = "recipe.yaml"
_MAX_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, for whoever shows it."""

    activity: str
    """`decoding`, `teacher` (embedding the images with a frozen teacher), `training` or `evaluating`."""
    done: int
    total: int
    figures: dict[str, float | None]
    """loss, teacher_entropy, kl, images_per_second and the last knn_top1 or copies_found, as far as there are any."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended."""

    run: Path
    status: str
    """`finished` or `stopped`."""
    num_steps: int
    images_seen: int
    num_unreadable: int
    before: Figures | None
    """The figures of the weights that training started from."""
    after: Figures | None
    best_step: int | None
    warnings: list[str]


def pretrain(
    paths: Sequence[str | Path],
    run: str | Path,
    recipe: Recipe,
    *,
    init: str | Path | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_remark: Callable[[str], None] = lambda remark: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunSummary:
    """Trains a backbone on the images under `paths` and writes everything into the folder `run`.

    init: weights to start from, as `resolve_model` takes them. resume: goes on from the last checkpoint in `run`.
    should_stop: asked after each step; then a checkpoint is saved and the call returns.
    Raises RecipeError, RunError, ModelError, SourceError, OutputUnwritable.
    """
    device = choose_device(recipe.device)
    with joined(device) as processes:
        training = Training(
            paths, Path(run), recipe, init=init, resume=resume, processes=processes,
            on_progress=on_progress if processes.is_first else lambda progress: None,
            on_remark=on_remark if processes.is_first else lambda remark: None,
        )  # fmt: skip
        try:
            return training.loop(should_stop)
        except BaseException as error:
            training.fail(error)
            raise
        finally:
            training.close()


class Training:
    """The parts of one run, put together by `__init__`, and the loop over them."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        run: Path,
        recipe: Recipe,
        *,
        processes: Processes,
        init: str | Path | None = None,
        resume: bool = False,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_remark: Callable[[str], None] = lambda remark: None,
    ) -> None:
        """As `pretrain`, which is what to call."""
        self.run, self.processes = run, processes
        self.device = device = choose_device(recipe.device)
        self.on_progress, self.on_remark = on_progress, on_remark
        self.warnings: list[str] = []
        self.last_figures: Figures | None = None
        self._shown: dict[str, float | None] = {}
        state = begin_or_resume(run, resume, processes, on_remark)
        if device.type == "cpu":
            keep_freed_memory()

        # -- images, and what depends on their number
        spec = initial_spec(init, recipe, run / CONVERTED, on_remark) if init is not None and state is None else None
        if spec is not None and (recipe.mean, recipe.std) != (spec.mean, spec.std):
            recipe = replace(recipe, mean=spec.mean, std=spec.std)
            on_remark(f"pixels are normalised as {init} has them: mean {spec.mean}, std {spec.std}")
        self.source = ImageSource.open([str(path) for path in paths], labels=recipe.labels)
        if state is not None:
            recipe = resumed_recipe(state, recipe, self.source)
            on_remark(f"going on from step {state['step']}")
        else:
            recipe, remarks = recipe.resolve(len(self.source), from_weights=init is not None)
            for remark in remarks:
                on_remark(remark)
        assert isinstance(recipe.decode_size, int)
        self.source.prepare(
            decode_size=recipe.decode_size,
            cache_bytes=int(recipe.cache_gb * 1e9),
            workers=recipe.workers,
            on_progress=lambda done, total: self._tell("decoding", done, total),
        )
        self.source.load_readable(0)  # raises NoImagesFound before anything is written
        num_readable = self.source.num_readable
        if num_readable < recipe.batch_size:
            raise TooFewImages(
                f"a batch takes {recipe.batch_size} images, found {num_readable} that can be read; "
                f"give more images or --set batch_size={max(1, num_readable)}"
            )
        if recipe.batch_size % (recipe.gradient_accumulation * processes.size):
            raise RecipeError(
                f"batch_size {recipe.batch_size} must be a multiple of gradient_accumulation "
                f"{recipe.gradient_accumulation} times {processes.size} processes"
            )
        self.frozen_NC = self._frozen_embeddings(recipe) if recipe.teacher == "frozen" else None
        if self.frozen_NC is not None and recipe.head_bottleneck != (num_components := self.frozen_NC.shape[1]):
            recipe = replace(recipe, head_bottleneck=num_components)
            on_remark(f"head_bottleneck is {num_components}: so many components the teacher's embeddings have")
        assert isinstance(recipe.epochs, int)
        self.recipe = recipe
        self.loader = BatchLoader(
            self.source.load_readable, len(self.source), recipe, rank=processes.rank, num_processes=processes.size
        )
        self.num_steps = recipe.epochs * self.loader.steps_per_epoch

        # -- networks
        torch.manual_seed(recipe.seed)
        self.student = Network(build_backbone(recipe, student=True), recipe, predictor=recipe.predictor)
        if spec is not None:
            load_initial_weights(self.student.backbone, spec)
        self.student.to(device)
        self.teacher = Teacher(self.student, recipe)
        for network in (self.student, self.teacher.network):
            use_attention(network.backbone, fused=wants_fused_attention(recipe, device))
        if recipe.gradient_checkpointing:
            self.student.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        width = recipe.num_prototypes if recipe.uses_prototypes else recipe.head_bottleneck
        assert isinstance(width, int)
        self.center = Center(width, recipe).to(device)
        self.negatives_NC = torch.zeros(0, recipe.head_bottleneck, device=device)
        self._new_negatives: list[Tensor] = []
        has_new_head = any(True for _ in self.student.head.parameters())
        self.head_warmup_steps = self._steps(recipe.init_head_warmup_epochs) if spec is not None and has_new_head else 0

        # -- optimiser
        optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adamw": lambda groups: torch.optim.AdamW(groups, fused=True),
            "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.9),
        }
        self.optimizer = optimizers[recipe.optimizer](parameter_groups(self.student))
        self.precision = choose_precision(recipe, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.step = 0
        self.before: Figures | None = None
        self.started_from = str(init) if init is not None else None
        self.best_step: int | None = None
        self.best_figure = -math.inf
        self.evaluated_step: int | None = None
        self.num_skipped = 0
        self.seconds_before = 0.0
        if state is not None:
            self._restore(state)

        # -- files
        if processes.is_first:
            run.mkdir(parents=True, exist_ok=True)
            self.log = RunLog(run, last_step=self.step if state is not None else None)
            if state is None:
                (run / METRICS).unlink(missing_ok=True)
            save_recipe(recipe, run / RECIPE)
            self._save_status("running")
        self.probe: Probe | None = None
        self.watch = CollapseWatch(
            recipe.num_prototypes if recipe.uses_prototypes else None,  # type: ignore[arg-type]
            ignore_steps=min(self.num_steps // 4, max(200, self._steps(recipe.warmup_epochs))),
        )

        # -- how the student is called: compiled, and with gradients averaged over processes
        self.forward_student: Callable[[Sequence[Tensor]], Outputs] = self.student
        self.parallel: nn.parallel.DistributedDataParallel | None = None
        if processes.size > 1:
            if device.type == "cuda":
                for network in (self.student, self.teacher.network):
                    nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
            self.parallel = nn.parallel.DistributedDataParallel(
                self.student,
                # While the head warms up, the backbone has no gradients.
                find_unused_parameters=self.head_warmup_steps > 0,
            )
            self.forward_student = self.parallel
        if recipe.compile == "on" or (recipe.compile == "auto" and device.type == "cuda"):
            for network in (self.student, self.teacher.network):
                network.compile_backbone()

    def loop(self, should_stop: Callable[[], bool]) -> RunSummary:
        """All steps from the current one on. Returns after the last, or after the one that `should_stop` follows."""
        recipe, processes = self.recipe, self.processes
        steps_per_epoch = self.loader.steps_per_epoch
        parameters = list(self.student.parameters())
        # Running statistics of batch normalisation change in the forward pass already.
        statistics = [*self.student.buffers(), *self.teacher.network.buffers()]
        skipped_in_a_row = 0
        stopped = False
        last_saved = started = time.monotonic()
        first_step = self.step
        # The first one, or one that a stop left out.
        if self.step == 0 or (self._is_evaluated_after(self.step) and self.evaluated_step != self.step):
            self._evaluate()
        self.student.train()
        self.teacher.network.train()
        window_began, images_in_window = time.monotonic(), 0

        for batch in self.loader.batches(first_step, self.num_steps):
            step = self.step
            # Random layers (drop path, token dropping) depend on the seed, the step and the process alone.
            torch.manual_seed(recipe.seed + 1_000_003 * (1 + step) + 7919 * processes.rank)
            self.student.freeze_backbone(step < self.head_warmup_steps)

            # -- schedules
            rates = self._schedules(step)
            for group in self.optimizer.param_groups:
                group["lr"] = rates["learning_rate"]
                group["weight_decay"] = rates["weight_decay"] if group["decays"] else 0.0

            # -- forward and backward, a part at a time
            statistics_before = [tensor.clone() for tensor in statistics]
            totals: dict[str, Tensor] = {}
            self._new_negatives.clear()
            for number, part in enumerate(batch.parts(recipe.gradient_accumulation)):
                last_part = number == recipe.gradient_accumulation - 1
                with self._gradients_stay_here() if not last_part else contextlib.nullcontext():
                    loss, figures = self._forward(part, rates["teacher_temperature"])
                    self.scaler.scale(loss / recipe.gradient_accumulation).backward()  # type: ignore[no-untyped-call]
                for key, value in figures.items():
                    totals[key] = totals.get(key, 0) + value / recipe.gradient_accumulation
            totals = {key: processes.mean(value) for key, value in totals.items()}

            # -- step, unless something is not finite
            if step < self._steps(recipe.freeze_last_layer_epochs) and self.student.head.last_layer is not None:
                for parameter in self.student.head.last_layer.parameters():
                    parameter.grad = None
            self.scaler.unscale_(self.optimizer)
            gradient_norm = clip_gradients(parameters, recipe.clip_grad)
            finite = bool(torch.isfinite(totals["loss"]) & torch.isfinite(gradient_norm))
            if processes.any(not finite, self.device):
                finite = False
            if finite:
                self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)

            # -- center and teacher follow
            if finite:
                if "center" in totals:
                    self.center.update(totals["center"])
                self._queue_negatives()
                self.teacher.follow(self.student, rates["momentum"], epoch_ended=(step + 1) % steps_per_epoch == 0)
                skipped_in_a_row = 0
            else:
                for tensor, before in zip(statistics, statistics_before, strict=True):
                    tensor.copy_(before)
                self.num_skipped += 1
                skipped_in_a_row += 1
            self.step = step = step + 1
            images_in_window += recipe.batch_size

            # -- log
            if not finite:
                self._remark(f"step {step} skipped: loss {totals['loss'].item()}, gradient norm {gradient_norm.item()}")
                # float16 finds its scale by skipping steps; only at scale 1 is something wrong.
                if skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW and self.scaler.get_scale() <= 1:
                    raise TrainingDiverged(
                        f"loss or gradients were not finite in {skipped_in_a_row} steps in a row, up to step {step}; "
                        "start a new run with a lower learning_rate or a higher warmup_epochs"
                        + (", or go on with --resume --set precision=float32" * (self.precision != torch.float32))
                    )
            else:
                self._watch_for_collapse(totals)
            if step % recipe.log_every_steps == 0 or step == self.num_steps:
                now = time.monotonic()
                self._log_step(totals, rates, gradient_norm, images_in_window / (now - window_began))
                window_began, images_in_window = now, 0

            # -- evaluate, save
            stopped = processes.any(should_stop(), self.device)
            if self._is_evaluated_after(step) and (not stopped or step == self.num_steps):
                paused = time.monotonic()
                self._evaluate(batch)
                window_began += time.monotonic() - paused
            due = time.monotonic() - last_saved > 60 * recipe.save_every_minutes
            if stopped or step == self.num_steps or processes.any(due, self.device):
                paused = time.monotonic()
                self.seconds_before += paused - started
                started = paused
                self._save()
                last_saved = time.monotonic()
                window_began += last_saved - paused
            if stopped:
                break
        return self._finish("stopped" if stopped and self.step < self.num_steps else "finished")

    # -- forward

    def _forward(self, batch: Batch, teacher_temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one part of a batch, and what is averaged over parts and processes."""
        recipe = self.recipe
        views = batch.views(recipe, self.device)
        with self._autocast():
            student = self.forward_student(views)
        num_views = len(views)
        projections_VBC = _by_view(student.projections, num_views)
        figures: dict[str, Tensor] = {}
        if self.frozen_NC is not None:
            loss = self._loss_to_stored(projections_VBC, batch)
            figures["spread"] = _spread(projections_VBC[0].detach())
        else:
            with torch.no_grad(), self._autocast():
                teacher = self.teacher.network(views[: recipe.num_global_views])
            if recipe.uses_prototypes:
                assert student.logits is not None
                assert teacher.logits is not None
                logits_GBK = _by_view(teacher.logits, recipe.num_global_views)
                self._begin_center(logits_GBK, teacher_temperature)
                targets_GBK = self.center.distributions(logits_GBK, teacher_temperature, self.processes.add_up)
                compare = losses.kl_divergence if recipe.loss == "kl" else losses.cross_entropy
                loss = compare(_by_view(student.logits, num_views), targets_GBK, recipe.student_temperature)
                figures["entropy"] = losses.entropy(targets_GBK).mean()
                figures["mean_probs"] = targets_GBK.mean(dim=(0, 1))
                figures["center"] = self.center.observe(logits_GBK, teacher_temperature)
            else:
                projections_GBC = _by_view(teacher.projections, recipe.num_global_views)
                self._begin_center(projections_GBC, teacher_temperature)
                targets_GBC = self.center.projections(projections_GBC)
                loss = self._loss_of_projections(projections_VBC, targets_GBC)
                figures["center"] = self.center.observe(projections_GBC, teacher_temperature)
                self._new_negatives.append(targets_GBC[0])
            figures["spread"] = _spread(teacher.projections)
        figures["loss"] = loss.detach()
        if recipe.koleo_weight:
            features_VBD = _by_view(student.features, num_views)
            spreading = torch.stack([losses.koleo(view) for view in features_VBD[: recipe.num_global_views]]).mean()
            figures["koleo"] = spreading.detach()
            loss = loss + recipe.koleo_weight * spreading
        return loss, figures

    def _loss_of_projections(self, student_VBC: Tensor, targets_GBC: Tensor) -> Tensor:
        if self.recipe.loss == "mse":
            return losses.squared_distance(student_VBC, targets_GBC)
        return losses.infonce(
            student_VBC,
            targets_GBC,
            self.recipe.contrast_temperature,
            others_GNC=self.processes.others(targets_GBC),
            negatives_NC=self.negatives_NC,
        )

    def _loss_to_stored(self, student_VBC: Tensor, batch: Batch) -> Tensor:
        """Contrast with, or regression on, the frozen teacher's stored embeddings of the originals."""
        assert self.frozen_NC is not None
        own_B = torch.from_numpy(batch.positions_B)
        teacher_BC = self.frozen_NC[own_B].to(self.device)
        if self.recipe.loss == "mse":
            return losses.distance_to_stored(student_VBC, teacher_BC)
        rng = np.random.default_rng([self.recipe.seed, 2, self.step])
        others_N = own_B
        if self.recipe.num_negatives:
            others_N = torch.from_numpy(rng.integers(0, len(self.frozen_NC), self.recipe.num_negatives))
        same_BN = (own_B[:, None] == others_N[None, :]).to(self.device)
        return losses.contrast_with_stored(
            student_VBC, teacher_BC, self.frozen_NC[others_N].to(self.device), same_BN, self.recipe.contrast_temperature
        )

    def _begin_center(self, outputs_GBK: Tensor, temperature: float) -> None:
        if self.center.awaits_first_batch:
            self.center.begin(self.processes.mean(self.center.observe(outputs_GBK, temperature)))

    def _queue_negatives(self) -> None:
        """The batch's teacher projections become negatives of the steps to come, the oldest fall out."""
        if self.recipe.loss == "infonce" and self._new_negatives and self.recipe.num_negatives:
            # In the order of the batch, in every process: which are the oldest must not depend on who asks.
            newest = [self.processes.gather(part_BC) for part_BC in self._new_negatives]
            self.negatives_NC = torch.cat([self.negatives_NC, *newest])[-self.recipe.num_negatives :]

    def _gradients_stay_here(self) -> contextlib.AbstractContextManager[None]:
        """Gradients of all parts but the last are not exchanged between processes yet."""
        return self.parallel.no_sync() if self.parallel is not None else contextlib.nullcontext()

    def _schedules(self, step: int) -> dict[str, float]:
        recipe = self.recipe
        warmup_steps = self._steps(recipe.warmup_epochs)
        peak = scaled_learning_rate(recipe.learning_rate, recipe.batch_size)
        assert not isinstance(recipe.momentum, str)
        teacher_temperature = recipe.student_temperature
        if recipe.sharpening:
            teacher_temperature = linear(
                recipe.initial_teacher_temperature,  # type: ignore[arg-type]
                recipe.teacher_temperature,  # type: ignore[arg-type]
                step,
                self._steps(recipe.teacher_temperature_warmup_epochs),
            )
        return {
            "learning_rate": cosine(peak, recipe.min_learning_rate, step, self.num_steps, warmup_steps=warmup_steps),
            "weight_decay": cosine(recipe.weight_decay, recipe.final_weight_decay, step, self.num_steps),
            "momentum": cosine(recipe.momentum, recipe.final_momentum, step, self.num_steps),
            "teacher_temperature": teacher_temperature,
        }

    def _steps(self, epochs: float) -> int:
        return round(epochs * self.loader.steps_per_epoch)

    def _is_evaluated_after(self, step: int) -> bool:
        every = self._steps(self.recipe.evaluate_every_epochs)
        return step == self.num_steps or (every > 0 and step % every == 0)

    # -- seeing what happens

    def _watch_for_collapse(self, totals: dict[str, Tensor]) -> None:
        found = self.watch.observe(
            self.step,
            entropy=totals["entropy"].item() if "entropy" in totals else math.nan,
            mean_entropy=losses.entropy(totals["mean_probs"]).item() if "mean_probs" in totals else math.nan,
            spread=totals["spread"].item(),
        )
        if found is not None:
            self._warn(found.message)

    def _log_step(
        self, totals: dict[str, Tensor], rates: dict[str, float], gradient_norm: Tensor, images_per_second: float
    ) -> None:
        if not self.processes.is_first:
            return
        loss = totals["loss"].item()
        entropy = totals["entropy"].item() if "entropy" in totals else None
        cross_entropy = loss if self.recipe.loss != "kl" or entropy is None else loss + entropy
        values: dict[str, float | None] = {
            "loss": loss,
            "teacher_entropy": entropy,
            "mean_entropy": losses.entropy(totals["mean_probs"]).item() if "mean_probs" in totals else None,
            "kl": cross_entropy - entropy if entropy is not None else None,
            "spread": totals["spread"].item(),
            "koleo": totals["koleo"].item() if "koleo" in totals else None,
            **rates,
            "grad_norm": gradient_norm.item(),
            "images_per_second": images_per_second,
        }
        self.log.write(
            "step", self.step, epoch=self._epoch(), images=self.step * self.recipe.batch_size, **values,
            skipped_steps=self.num_skipped, unreadable=self.source.num_unreadable,
        )  # fmt: skip
        self._shown = {key: values[key] for key in ("loss", "teacher_entropy", "kl", "images_per_second")}
        self._tell("training", self.step, self.num_steps)

    def _evaluate(self, batch: Batch | None = None) -> None:
        """The figures of the network that will be exported, its attention, and the best weights so far."""
        self.evaluated_step = self.step
        if not self.processes.is_first:
            self.processes.wait()
            return
        recipe = self.recipe
        self._tell("evaluating", self.step, self.num_steps)
        if self.probe is None:
            self.probe = Probe(
                self.source.load, len(self.source), self.source.labels,
                num_probed=recipe.num_evaluated, size=recipe.input_size, seed=recipe.seed,
            )  # fmt: skip
            if recipe.labels != "none" and self.probe.labels_N is None:
                self._remark("k-NN accuracy is left out: expected images of two labels or more, found fewer")
        backbone = self.teacher.network.backbone.eval()
        figures = self.last_figures = self.probe.figures(self._embed)
        if self.step == 0:
            self.before = figures
        better = figures.main > self.best_figure
        if better:
            self.best_figure, self.best_step = figures.main, self.step
            export_backbone(backbone, recipe, self.run / BEST_WEIGHTS, self._card())
        self.log.write(
            "evaluation", self.step, epoch=self._epoch(), images=self.step * recipe.batch_size,
            knn_top1=figures.knn_top1, copies_found=figures.copies_found, embedding_std=figures.embedding_std,
            best=better,
        )  # fmt: skip
        save_attention(backbone, self.probe.pixels_NSSC[:16], recipe, self.device, self.run, self.step)
        if batch is not None and not (self.run / "views.png").exists():
            save_views(next(batch.parts(1)).views(recipe, torch.device("cpu")), recipe, self.run)
        self.teacher.network.train()
        write_report(self.run)
        self._tell("evaluating", self.step, self.num_steps)
        self.processes.wait()

    def _embed(self, pixels_BHWC: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """(cls_BD, gem_BD) by the exported network, as indexing embeds."""
        pictures_BCHW = torch.from_numpy(pixels_BHWC).to(self.device).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode(), self._autocast():
            return descriptors(self.teacher.network.backbone, normalise(pictures_BCHW, self.recipe), "normalised")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def _epoch(self) -> float:
        return self.step / self.loader.steps_per_epoch

    def _tell(self, activity: str, done: int, total: int) -> None:
        figures: dict[str, float | None] = dict(self._shown)
        if self.last_figures is not None:
            name = "copies_found" if self.last_figures.knn_top1 is None else "knn_top1"
            figures[name] = self.last_figures.main
        self.on_progress(Progress(activity=activity, done=done, total=total, figures=figures))

    def _remark(self, message: str) -> None:
        if self.processes.is_first:
            self.log.write("remark", self.step, message=message)
        self.on_remark(message)

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self._remark(message)

    def _save_status(self, status: str) -> None:
        recipe = self.recipe
        self.log.save_status(
            status, recipe=recipe.name, step=self.step, num_steps=self.num_steps, images=len(self.source),
            unreadable=self.source.num_unreadable, precision=str(self.precision).removeprefix("torch."),
            num_prototypes=recipe.num_prototypes if recipe.uses_prototypes else None,
            best_step=self.best_step, device=str(self.device),
            warnings=self.warnings,
        )  # fmt: skip

    # -- keeping what was done

    def _card(self) -> dict[str, Any]:
        """What the exported weights come from."""
        recipe = self.recipe
        return {
            "recipe": recipe.name,
            "method": "distilled from a frozen teacher" if recipe.teacher == "frozen" else "self-distillation (DINO)",
            "teacher": recipe.teacher_model,
            "loss": recipe.loss,
            "images": self.source.num_readable,
            "epochs": round(self._epoch(), 3),
            "steps": self.step,
            "batch_size": recipe.batch_size,
            "training_size": recipe.global_size,
            "seed": recipe.seed,
            "started_from": self.started_from,
            "figures": asdict(self.last_figures) if self.last_figures else None,
            "hours": round(self.seconds_before / 3600, 2),
        }

    def _save(self) -> None:
        """Checkpoint, weights and status, by the first process; the others wait."""
        if self.processes.is_first:
            save_checkpoint(self.run, self.step, self._state())
            export_backbone(self.teacher.network.backbone, self.recipe, self.run / WEIGHTS, self._card())
            self._save_status("running")
        self.processes.wait()

    def _state(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the images."""
        return {
            "recipe": self.recipe.to_yaml(),
            "images": self.source.digest,
            "step": self.step,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "center": self.center.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "negatives": self.negatives_NC,
            "head_warmup_steps": self.head_warmup_steps,
            "started_from": self.started_from,
            "best_step": self.best_step,
            "best_figure": self.best_figure,
            "evaluated_step": self.evaluated_step,
            "before": asdict(self.before) if self.before else None,
            "last_figures": asdict(self.last_figures) if self.last_figures else None,
            "num_skipped": self.num_skipped,
            "seconds": self.seconds_before,
            "warnings": self.warnings,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.center.load_state_dict(state["center"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.negatives_NC = state["negatives"].to(self.device)
        self.head_warmup_steps = state["head_warmup_steps"]
        self.started_from = state["started_from"]
        self.best_step, self.best_figure = state["best_step"], state["best_figure"]
        self.evaluated_step = state.get("evaluated_step")
        self.before = Figures(**state["before"]) if state["before"] else None
        self.last_figures = Figures(**state["last_figures"]) if state["last_figures"] else None
        self.num_skipped, self.seconds_before = state["num_skipped"], state["seconds"]
        self.warnings = list(state["warnings"])

    def _frozen_embeddings(self, recipe: Recipe) -> Tensor:
        """The frozen teacher's embedding of every image: all processes compute a part of them, and read all."""
        name_or_file = recipe.teacher_model
        assert name_or_file is not None
        weights = self.processes.from_first(lambda: str(prepare_teacher(name_or_file, self.run / "teacher")))
        return stored_embeddings(
            Path(weights), self.source.load_readable, len(self.source), self.run,
            size=recipe.teacher_size, num_components=recipe.whiten_dim, device=recipe.device,
            identity=self.source.digest, processes=self.processes,
            on_progress=lambda done, total: self._tell("teacher", done, total),
        )  # fmt: skip

    def _finish(self, status: str) -> RunSummary:
        before, after = self.before, self.last_figures
        if status == "finished" and self.started_from is not None and before and after and after.main < before.main:
            self._warn(
                f"the figure got worse: {before.main:.3f} before, {after.main:.3f} after; keep {self.started_from}, "
                f"or lower learning_rate or epochs ({BEST_WEIGHTS} holds the best)"
            )
        if self.processes.is_first:
            self._save_status(status)
            write_report(self.run)
        return RunSummary(
            run=self.run,
            status=status,
            num_steps=self.step,
            images_seen=self.step * self.recipe.batch_size,
            num_unreadable=self.source.num_unreadable,
            before=self.before,
            after=self.last_figures,
            best_step=self.best_step,
            warnings=self.warnings,
        )

    def fail(self, error: BaseException) -> None:
        """Records in run.json and the report that the run ended with an error, or was interrupted."""
        if self.processes.is_first:
            with contextlib.suppress(OutputUnwritable):
                if isinstance(error, KeyboardInterrupt):
                    self._save_status("interrupted")
                else:
                    self.warnings.append(str(error) or type(error).__name__)
                    self._save_status("failed")
                write_report(self.run)

    def close(self) -> None:
        if self.processes.is_first:
            self.log.close()


def _spread(projections_BC: Tensor) -> Tensor:
    """Deviation of unit-length projections over images: 1 if spread over the whole sphere, 0 if all are the same."""
    spread: Tensor = projections_BC.float().std(dim=0, correction=0).mean() * projections_BC.shape[1] ** 0.5
    return spread


def _by_view(rows: Tensor, num_views: int) -> Tensor:
    """Rows of all views, one after the other, with a dimension for the view in front."""
    return rows.view(num_views, -1, *rows.shape[1:])

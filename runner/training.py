"""The LightningModule: one step for train, validation and test, and what goes into a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor

from runner.batches import Batch
from runner.checkpoints import random_states, set_random_states
from runner.compiled import CompiledStep, Step, StepResult
from runner.config import PlateauConfig, TrainConfig
from runner.errors import RunError
from runner.fields import LABELS
from runner.losses import Loss, Whole, over_processes
from runner.metrics import Grouping, SplitMetrics
from runner.optimization import Average, build_optimizer
from runner.potentials import Potential
from runner.processes import gathered

MONITOR = "val/loss/total_loss"
STRUCTURES_FOR_GRADIENTS = 8
# steps that are taken as they are while the step is compiled, also where it is compiled already
STEPS_MEANWHILE = 32
# in a checkpoint the weights to use are called "potential", those that are trained "averaged"
AVERAGED = ("potential.", "averaged.module.")


class Training(lightning.LightningModule):
    """A potential in training."""

    def __init__(
        self,
        potential: Potential,
        loss: Loss,
        config: TrainConfig,
        passport: Mapping[str, Any],
        groupings: Sequence[Grouping] = (),
        incomplete: Collection[str] = (),
        compile_step: bool = False,
        compile_evaluation: bool = False,
    ) -> None:
        """Train `potential`.

        Args:
            potential: what is trained.
            loss: what is minimised.
            config: the `[train]` table.
            passport: plain data that travels in every checkpoint, see `runner.predictor`.
            groupings: of what validation and test errors are measured apart.
            incomplete: labels that some structure of the data lacks.
            compile_step: whether training steps are compiled.
            compile_evaluation: whether what measures the other splits is.
        """
        super().__init__()
        self.potential, self.loss, self.config = potential, loss, config
        self.passport = dict(passport)
        self.latest: dict[str, dict[str, float]] = {}  # by split
        self.epochs_done = 0
        self._random: dict[str, Any] = {}
        self._gradient_norms: dict[str, Tensor | float] = {}  # by term, measured once an epoch
        self.average = None if config.average is None else Average(config.average, potential)
        # so that it is saved, and moved to a device
        self.averaged = None if self.average is None else self.average.model
        measured = config.measured
        self._started = self._validation_started = time.perf_counter()
        self._validating, self._trained = 0.0, 0
        needed = {*measured, *loss.quantities}
        self.derivatives = {name: name in needed for name in ("forces", "stress")}
        self.step = Step(potential, self.loss, self.derivatives)
        self.compiled: CompiledStep | None = None
        if compile_step:
            self.compiled = CompiledStep(self.step, incomplete)
        self.evaluation: CompiledStep | None = None
        if compile_evaluation:
            self.evaluation = CompiledStep(self.step, incomplete, learns=False)
        self.say: Callable[[str], None] = lambda _: None
        self.name_of: Callable[[str, int], str] = lambda split, number: f"{split} {number}"
        self.splits = torch.nn.ModuleDict(
            # "train" is an attribute of every module, so the keys carry a suffix
            {
                f"{name}_split": SplitMetrics(name, loss, measured, apart)
                for name, apart in (("train", ()), ("val", groupings), ("test", groupings))
            }
        )

    def training_step(self, batch: Batch) -> Tensor:
        """The loss of one batch, of which Lightning takes the share that `n` batches' has.

        The last batches of an epoch may be fewer than `n`; theirs is the mean over them.
        """
        total, n = self._step(batch, "train"), self.trainer.accumulate_grad_batches
        if n == 1:
            return total
        done = self.trainer.fit_loop.epoch_loop.batch_idx // n * n
        together = min(n, int(self.trainer.num_training_batches) - done)
        return total if together == n else total * (n / together)

    def validation_step(self, batch: Batch) -> None:
        """Measure one batch."""
        self._step(batch, "val")

    def test_step(self, batch: Batch) -> None:
        """Measure one batch."""
        self._step(batch, "test")

    def _step(self, batch: Batch, split: str) -> Tensor:
        weights = self._weights()
        if split == "train":
            alone = self.trainer.world_size == 1
            whole = None if alone else over_processes(self.loss.counts(batch))
            result = self._learnt(batch, weights, whole)
        else:
            result = self._measured(batch, weights)
        self._stop_if_not_finite(result, batch, split)
        self._metrics(split).update(result.sums, result.prediction, batch)
        return result.total

    def _stop_if_not_finite(self, result: StepResult, batch: Batch, split: str) -> None:
        """Name terms and structures; at once on a CPU, where looking at a number costs nothing.

        A GPU would have to be waited for: there the end of the epoch tells.
        """
        total = result.total.detach()
        if total.device.type != "cpu" or math.isfinite(total.item()):
            return
        terms = [name for name, s in result.sums.items() if not math.isfinite(s.total.item())]
        terms = terms or ["total_loss"]  # a weight is too large
        found: set[int] = set()
        for name in {n for t in terms if t in result.sums for n in self.loss.quantities_of(t)}:
            values = result.prediction[name].detach()
            rows = ~values.isfinite().reshape(len(values), -1).all(dim=1)
            wrong = batch.structure[rows] if LABELS[name].per == "atom" else rows.nonzero()
            found |= set(wrong.flatten().tolist())
        found = found or set(range(batch.n_structures))  # its squares, or the sum, are too large
        names = [self.name_of(split, int(batch.index[s])) for s in sorted(found)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RunError(
            f"{', '.join(f'{split}/loss/{name}' for name in terms)} is not a finite number in "
            f"epoch {self.current_epoch}, at step {self.global_step}",
            where=f"{len(names)} of {batch.n_structures} structures of a batch of the {split} "
            f"split: {'; '.join(names[:3])}{more}",
            remedy="lower train.optimizer.lr or train.trainer.gradient_clip_val, and look at "
            "these structures: atoms that are too near each other, or the largest forces",
        )

    def _weights(self) -> dict[str, float]:
        """Those of the loss's terms now."""
        return self.loss.weights_at(self.current_epoch, float(self.global_step))

    def _learnt(
        self, batch: Batch, weights: Mapping[str, float], whole: Whole | None = None
    ) -> StepResult:
        """A step of the weights that are trained, with gradients."""
        return self._result(self._program, self.step, batch, weights, whole)

    @property
    def _program(self) -> CompiledStep | None:
        """The compiled step, from a step on that no clock decides."""
        return self.compiled if self.global_step >= STEPS_MEANWHILE else None

    def _measured(self, batch: Batch, weights: Mapping[str, float]) -> StepResult:
        """What the weights that are kept predict."""
        return self._result(self.evaluation, self.measured, batch, weights, None)

    def _result(
        self,
        compiled: CompiledStep | None,
        step: Step,
        batch: Batch,
        weights: Mapping[str, float],
        whole: Whole | None,
    ) -> StepResult:
        """What the compiled step gives, where there is one and it takes such a batch."""
        if compiled is None or not compiled.fits(batch):
            return step(batch, weights, whole)
        if compiled.step.potential is not step.potential:
            compiled.use(step)
        if compiled.is_waited_for:
            self.say(f"the compiler is waited for, after {self.global_step} steps")
        try:
            return compiled(batch, weights, whole)
        except RunError as error:
            if self.config.compile is True:
                raise
            torch.set_num_threads(compiled.threads)
            self.close()
            self.compiled = self.evaluation = None
            self.say(f"steps are no longer compiled: {error.what}")
            return step(batch, weights, whole)

    def _compile_aside(self, batch: Batch) -> None:
        """Begin to compile both steps, each in a process of its own, while the first are taken."""
        if self.trainer.world_size > 1:
            return
        if self.compiled is not None:
            self.compiled.compile_aside(batch, self._weights())
        if self.evaluation is None or self.evaluation.begun:
            return
        step = self.measured
        modules = [*step.potential.modules(), *step.loss.modules()]
        before = [module.training for module in modules]
        for module in modules:
            module.training = False  # as they will be when they measure
        self.evaluation.use(step)
        self.evaluation.compile_aside(batch, self._weights())
        for module, training in zip(modules, before, strict=True):
            module.training = training

    def _measure_gradients(self, batch: Batch) -> None:
        """Norm of the gradient of every term, with its weight, for some structures of a batch."""
        some = batch.parts(max(1, len(batch.n_atoms) // STRUCTURES_FOR_GRADIENTS))[0]
        parameters = [p for p in self.potential.parameters() if p.requires_grad]
        weights, together = self._weights(), None
        if self._program is None or not self._program.fits(some):
            together = self.step(some, weights).sums  # one prediction serves all terms
        for term, weight in weights.items():
            if together is None:
                alone = dict.fromkeys(weights, 0.0) | {term: weight}
                total = self._learnt(some, alone).total
            else:
                total = weight * together[term].mean
            found: tuple[Tensor | None, ...] = ()
            if total.requires_grad:  # a term may be one of labels and geometry alone
                found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([g for g in found if g is not None])
            self._gradient_norms[term] = norm

    def close(self) -> None:
        """Leave no process behind."""
        for compiled in (self.compiled, self.evaluation):
            if compiled is not None:
                compiled.close()

    def on_train_start(self) -> None:
        """Go on with the random numbers of the checkpoint that is resumed."""
        if self._random:
            set_random_states(self._random)

    def on_train_epoch_start(self) -> None:
        """Start the clock."""
        self._switch("train")
        self._started, self._validating, self._trained = time.perf_counter(), 0.0, 0

    def on_train_epoch_end(self) -> None:
        """Validation came before: the epoch is over, and makes one row of the logs."""
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        times = self._times()
        row = {"epoch": self.current_epoch, "lr": rate} | times
        norms = self._gradient_norms.items()
        row |= {f"train/gradient_norm/{term}": float(norm) for term, norm in norms}
        self._gradient_norms = {}
        self._write(row | self._finish("train") | self.latest["val"])
        self.latest["train"] |= times
        self.epochs_done = self.current_epoch + 1
        plateau = self.lr_schedulers()
        if isinstance(plateau, torch.optim.lr_scheduler.ReduceLROnPlateau):
            plateau.step(self.trainer.callback_metrics[MONITOR])

    def lr_scheduler_step(self, *_: Any) -> None:
        """Nothing: Lightning would take it after the epoch's checkpoint, which would lack it."""

    def _times(self) -> dict[str, float]:
        """Seconds that training waited for batches, and computed; structures a second."""
        waited = getattr(self.trainer.train_dataloader, "waited", 0.0)
        took = time.perf_counter() - self._started - self._validating
        return {
            "time/data": waited,
            "time/compute": max(took - waited, 0.0),
            "time/structures_per_s": self._trained * self.trainer.world_size / took,
        }

    def on_validation_epoch_start(self) -> None:
        """Validation is timed apart."""
        self._switch("eval")
        self._validation_started = time.perf_counter()

    def on_validation_epoch_end(self) -> None:
        """Measure the validation split."""
        self._finish("val")
        self._validating += time.perf_counter() - self._validation_started

    def on_test_epoch_end(self) -> None:
        """Measure the test split, and log it."""
        self._write(self._finish("test"))

    def _finish(self, split: str) -> dict[str, float]:
        """The values of a split; what Lightning's callbacks look at they see too, in float32."""
        metrics = self._metrics(split)
        # scheduled weights as they end, so that the epochs of a validation can be compared
        weights = self.loss.weights_at(self.config.epochs - 1, math.inf)
        if split == "train":  # as they were in its last step
            last = max(self.global_step - 1, 0)
            weights = self.loss.weights_at(self.current_epoch, float(last))
        if self.trainer.world_size > 1:
            metrics.join(gathered)
        values = metrics.compute(self.loss, weights)
        metrics.reset()
        if f"{split}/loss/total_loss" not in values and split != "test":
            raise RunError(
                f"no structure of the {split} split has {' or '.join(self.loss.labels)}",
                where=f"prepare.split.{split}",
                remedy="choose the splits so that each has what train.loss asks for",
            )
        self._refuse_non_finite(values, split)
        if MONITOR in values:  # each value that goes through Lightning takes a millisecond
            self.log(MONITOR, values[MONITOR], logger=False)
        self.latest[split] = values
        return values

    def _switch(self, mode: str) -> None:
        """Tell the optimiser which weights it has to put in place, if it has several."""
        switch = getattr(self._optimizer, mode, None) if self.trainer.optimizers else None
        if switch is not None:
            switch()

    @property
    def measured(self) -> Step:
        """The step of the weights that are measured and kept: the averaged ones, if there are."""
        if self.average is None or not self.average.begun:
            return self.step
        potential = self.average.model.module
        assert isinstance(potential, Potential)
        return Step(potential, self.loss, self.derivatives)

    def _write(self, row: Mapping[str, float | int]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(row), step=self.trainer.global_step)
            logger.save()

    def _refuse_non_finite(self, values: Mapping[str, float], split: str) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        bad = [name for name in bad if "/loss/" in name] or bad
        if bad:
            raise RunError(
                f"{', '.join(bad)} is not a finite number in epoch {self.current_epoch}",
                where=f"the {split} split",
                remedy="lower train.optimizer.lr or train.trainer.gradient_clip_val, and look at "
                "the largest forces in the data",
            )

    def _metrics(self, split: str) -> SplitMetrics:
        metrics = self.splits[f"{split}_split"]
        assert isinstance(metrics, SplitMetrics)
        return metrics

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate: a function of the epoch and of nothing else, but on plateaus.

        Before the first batch of an epoch gradients are measured: after it would be too late for a
        checkpoint that is written there.
        """
        if not self._gradient_norms:
            self._compile_aside(batch)
            self._measure_gradients(batch)
        n = self.trainer.num_training_batches
        rate = self.rate_at(self.current_epoch + batch_idx / n, 1 / n)
        if rate is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = rate

    def rate_at(self, epoch: float, step: float) -> float | None:
        """The learning rate after so many epochs; none if it is what plateaus have made of it.

        Args:
            epoch: with the part that is done of the one under way.
            step: the part of an epoch that a step is.
        """
        schedule, rate = self.config.schedule, self.config.optimizer.lr
        begun = [s for s in self.config.stage if s.lr is not None and s.start <= epoch]
        waits = isinstance(schedule, PlateauConfig)
        if begun:
            stage = begun[-1]
            return None if waits and epoch - step >= stage.start else stage.lr
        if waits and epoch - step >= schedule.warmup:
            return None
        return rate * schedule.relative_rate(epoch, self.config.epochs)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self.trainer.optimizers[0]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does it, with all parameters at once where there is one process."""
        if self.trainer.world_size > 1:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in parameters if p.grad is not None], foreach=True
            )
            # where looking at a number costs nothing, it is looked at
            if self.device.type != "cpu" or not norm <= gradient_clip_val:
                torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm, True)

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        """A step, and the average after it."""
        super().optimizer_step(*arguments, **named)
        if self.average is not None:
            self.average.after_step(self.potential)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """After the last step of an epoch, average its weights."""
        self._trained += len(batch.n_atoms)
        if self.average is not None and self.trainer.is_last_batch:
            self.average.after_epoch(self.potential, self.current_epoch)

    def configure_optimizers(self) -> Any:
        """The optimiser; on plateaus of the validation loss its rate is lowered, if asked for."""
        schedule = self.config.schedule
        optimizer = build_optimizer(self.config.optimizer, self.potential)
        if not isinstance(schedule, PlateauConfig):
            return optimizer
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=schedule.factor, patience=schedule.patience, min_lr=schedule.min_lr
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": MONITOR},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes absolute energies of the weights: plain data, float64 as Python floats."""
        checkpoint["runner"] = self.passport
        if self.average is not None and self.average.begun:
            _swap(checkpoint["state_dict"], *AVERAGED)
        norms = {term: float(norm) for term, norm in self._gradient_norms.items()}
        metrics = self._metrics("train").state()
        mine = {"random": random_states(), "metrics": metrics, "gradient_norms": norms}
        first, *others = gathered(mine)
        checkpoint["training"] = {"epochs_done": self.epochs_done, **first, "others": others}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where it was written."""
        if self.average is not None and int(checkpoint["state_dict"]["averaged.n_averaged"]):
            _swap(checkpoint["state_dict"], *AVERAGED)
        training = checkpoint["training"]
        self.epochs_done = training["epochs_done"]
        mine, n = training, 1 + len(training.get("others", []))
        if n == self.trainer.world_size and self.trainer.global_rank > 0:
            mine = training["others"][self.trainer.global_rank - 1]
        self._random = mine["random"]
        if n != self.trainer.world_size:  # it is between two epochs, and nothing is added yet
            return
        if "waiting" in mine["metrics"]:
            self._metrics("train").set_state(mine["metrics"])
        else:
            self.say("the checkpoint is one of version 0.5: what was measured of its epoch is lost")
        self._gradient_norms = dict(mine.get("gradient_norms", {}))


def _swap(weights: dict[str, Tensor], one: str, other: str) -> None:
    """Exchange the tensors of two prefixes."""
    for name in [name for name in weights if name.startswith(one)]:
        twin = other + name.removeprefix(one)
        weights[name], weights[twin] = weights[twin], weights[name]

"""`[train]`: batches, devices, loggers, and all that a training is told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from runner.config.losses import LossConfig, MetricsConfig
from runner.config.optimization import (
    AdamWConfig,
    AnyAverageConfig,
    AnyOptimizerConfig,
    AnyScheduleConfig,
    PlateauConfig,
    StageConfig,
    SWAConfig,
)
from runner.config.potentials import PotentialConfig
from runner.config.values import Count, NonNegative, Positive, Section, reject, shown
from runner.fields import FROM_CHARGES


class BatchConfig(Section):
    """The size of a batch of one device: one of these, never above it; 32 structures unless
    given."""

    structures: Count | None = None
    """Structures in a batch."""
    atoms: Count | None = None
    """Atoms in a batch, of structures that are packed to fill it."""
    pairs: Count | None = None
    """Pairs (i, j) within the cutoff in a batch, packed likewise; an atom without any counts as
    one."""

    @model_validator(mode="before")
    @classmethod
    def _usual_size(cls, given: Any) -> Any:
        return given or {"structures": 32} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _one_size(self) -> BatchConfig:
        named = [f"{name} = {value}" for name, value in self if value is not None]
        if len(named) != 1:
            raise reject(
                f"found {' and '.join(named) or 'none'}; the size of a batch is given in "
                "structures, in atoms or in pairs. Replace the table by one with a single key; "
                "on the command line --set 'train.batch={atoms = 2048}'"
            )
        return self

    @property
    def unit(self) -> Literal["structures", "atoms", "pairs"]:
        """What is counted."""
        if self.atoms is not None:
            return "atoms"
        return "structures" if self.structures is not None else "pairs"

    @property
    def limit(self) -> int:
        """How many of them are in a batch at most."""
        return self.structures or self.atoms or self.pairs or 0


class WeightsConfig(Section):
    """How often the structures of each source, or group, come in an epoch.

    An epoch stays as long as without weights.
    """

    by: Literal["source", "group"]
    """`source`: the file; `group`: as `prepare.split.group_by` has it."""
    values: dict[str, NonNegative] | None = None
    """How often a structure comes, by the name of its source or group, relative to those not named,
    which have 1. Unless given, all sources, or groups, come equally often."""


class DataConfig(Section):
    """`[train.data]`: where batches come from."""

    residence: Literal["auto", "memory", "stream", "device"] = "auto"
    """`memory`: all in RAM, with the neighbour lists; `stream`: read from disk every epoch, for
    what is larger; `device`: all on the GPU, where the batches are made. `auto`: the GPU if all
    fits in half of what is free there, else RAM likewise, else the disk. The batches are the
    same."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Threads that make batches ahead; 0: each when it is needed. One for a GPU or a stream, else
    none, unless given."""
    train_size: Count | None = None
    """Only so many structures of the training split, for learning curves; a smaller set is part of
    a larger one. The self-energies are those of the whole split."""
    weights: WeightsConfig | None = None
    """Every structure once an epoch, unless given."""
    rotate: bool = False
    """Whether training structures are turned at random each time, with every label that is a vector
    or a tensor; for potentials that are not equivariant by construction."""


class EarlyStoppingConfig(Section):
    """`[train.early_stopping]`: end when the validation loss no longer improves."""

    patience: Count = 50
    """Epochs without improvement after which training ends."""
    min_delta: NonNegative = 0.0
    """Smallest change of the validation loss that counts as improvement."""


class CheckpointsConfig(Section):
    """`[train.checkpoints]`: what a run goes on from (`runner train --resume`)."""

    minutes: Positive = 10.0
    """After so many minutes of training the last checkpoint is written anew, within an epoch too;
    it is also written after every epoch, and when the run is asked to stop."""


class WandbConfig(Section):
    """`[train.logger.wandb]`: Weights & Biases too (`pip install 'nnp-runner[wandb]'`)."""

    project: str | None = None
    """Project there; `WANDB_PROJECT`, or else nnp-runner, unless given."""
    entity: str | None = None
    """User or team; `WANDB_ENTITY`, or else your own, unless given."""
    name: str | None = None
    """What the run is called; as its run directory, unless given."""
    group: str | None = None
    """What it is shown with; the runs of its experiment, unless given."""
    tags: list[str] = []
    """Words to find it by."""
    mode: Literal["online", "offline"] | None = None
    """`"offline"`: into the run directory alone, for `wandb sync`; `WANDB_MODE`, or else online,
    unless given."""


class MLflowConfig(Section):
    """`[train.logger.mlflow]`: MLflow too (`pip install 'nnp-runner[mlflow]'`)."""

    tracking_uri: str | None = None
    """Where it is kept, such as `"http://host:5000"`; `MLFLOW_TRACKING_URI`, or else a database
    beside the runs, `runs/mlflow.db`, unless given."""
    experiment: str | None = None
    """Experiment there; `MLFLOW_EXPERIMENT_NAME`, or else as the folder of the experiment, unless
    given."""
    name: str | None = None
    """What the run is called; as its run directory, unless given."""
    tags: dict[str, str] = {}
    """Names and values to find it by."""


class LoggerConfig(Section):
    """`[train.logger]`: where a training is logged besides `metrics.csv` and TensorBoard."""

    wandb: WandbConfig | None = None
    """Weights & Biases, if the table is there; it may be empty."""
    mlflow: MLflowConfig | None = None
    """MLflow, if the table is there; it may be empty."""


def _devices(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str | list):
        raise reject(f'found {shown(value)}; it is a number, a list of numbers, or "auto"')
    if value in (0, "0", "", []):
        raise reject(f"found {shown(value)}; a training needs one device at least")
    return value


class TrainerConfig(Section):
    """`[train.trainer]`: handed to `lightning.Trainer`, which documents the keys."""

    accelerator: str = "auto"
    """`"auto"`: a CUDA GPU if there is one, else the CPU."""
    devices: Annotated[int | str | list[int], BeforeValidator(_devices)] = "auto"
    """How many of each machine, or which GPUs; -1: all GPUs. A process trains on each, with a
    batch of its own. `"auto"`: one, or as many as torchrun or SLURM have started."""
    num_nodes: Count = 1
    """Machines; torchrun or SLURM tell it too."""
    strategy: str = "auto"
    """How several devices train: `"auto"` and `"ddp"` average their gradients."""
    accumulate_grad_batches: Count = 1
    """Batches whose gradients are averaged for a step of the optimiser, each counting the same; at
    the end of an epoch they may be fewer."""
    gradient_clip_val: NonNegative = 10.0
    """Largest norm of the gradient; a longer one is scaled down to it. 0: no limit."""
    deterministic: bool = True
    """Same seed, same machine: the same numbers."""


class TrainConfig(Section):
    """`[train]`: what is trained, on what, how."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights and of the order of the batches."""
    epochs: Count = 100
    """Passes over the training split, at most."""
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"
    """Floating-point numbers of the training: single or double precision, or matrix products in
    bfloat16 and the rest in single, for GPUs; look at what it costs in accuracy."""
    tf32: bool = False
    """Whether matrix products of single precision may be done with TF32, on GPUs that have it."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the training step: three to five times as fast on a CPU, the same numbers to
    rounding. Compiling takes 10 to 90 s, in which the first 32 steps are taken as they are; the
    program is kept in TORCHINDUCTOR_CACHE_DIR for the next training with the same potential, losses
    and kind of data. It needs a C++ compiler. `auto`:
    where a training is long enough to gain by it, as its pairs and epochs tell; if it fails, the
    step stays as it is."""
    batch: BatchConfig = BatchConfig()
    data: DataConfig = DataConfig()
    potential: PotentialConfig
    """The architecture, by its `name`, with its hyperparameters."""
    loss: LossConfig
    metrics: MetricsConfig | None = None
    """Those of the loss's quantities, mae and rmse, unless given."""
    optimizer: AnyOptimizerConfig = AdamWConfig()
    """The optimiser, by its `name`."""
    schedule: AnyScheduleConfig = PlateauConfig()
    """How the learning rate changes, by its `name`."""
    average: AnyAverageConfig | None = None
    """An average of the weights, which is then measured and kept; the last step's unless given."""
    stage: list[StageConfig] = []
    """What changes on the way."""
    early_stopping: EarlyStoppingConfig | None = None
    """All epochs are trained, unless given."""
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    logger: LoggerConfig = LoggerConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="before")
    @classmethod
    def _free_of_schedule(cls, given: Any) -> Any:
        """Without a schedule, an optimiser that needs none has none."""
        optimizer = given.get("optimizer") if isinstance(given, dict) else None
        free = isinstance(optimizer, dict) and optimizer.get("name") == "schedule_free"
        if not free or not isinstance(given, dict):
            return given
        schedule = given.setdefault("schedule", {"name": "constant"})
        if not isinstance(schedule, dict) or schedule.get("name") != "constant":
            raise reject(
                'train.optimizer.name = "schedule_free" goes without a schedule; take '
                "train.schedule out (its warm-up is train.optimizer.warmup_steps)"
            )
        if "average" in given:
            raise reject("schedule_free averages the weights by itself; take train.average out")
        return given

    @model_validator(mode="after")
    def _compiled_precision(self) -> TrainConfig:
        if self.precision == "bf16-mixed" and self.compile is True:
            raise reject(
                'train.precision = "bf16-mixed" is not compiled; take train.compile out, or set it '
                "to false"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> TrainConfig:
        starts = [stage.start for stage in self.stage]
        if starts != sorted(set(starts)) or any(start >= self.epochs for start in starts):
            raise reject(
                f"the stages start at epochs {', '.join(map(str, starts))}; each has to start "
                f"after the one before and before {self.epochs}, the number of epochs; they count "
                "from 0"
            )
        for stage in self.stage:
            unknown = sorted(set(stage.weights) - set(self.loss.terms))
            if unknown:
                raise reject(
                    f"a stage gives {unknown[0]} a weight, which is no term of the loss: "
                    f"{', '.join(self.loss.terms)}"
                )
        weights = [term.highest_weight for term in self.loss.terms.values()]
        if not any([*weights, *(w for stage in self.stage for w in stage.weights.values())]):
            raise reject(
                f"every weight of the loss is 0, so that nothing is trained: "
                f"{', '.join(self.loss.terms)}; give one of them a weight"
            )
        if isinstance(self.average, SWAConfig) and self.average.start > self.epochs:
            raise reject(f"train.average starts in epoch {self.average.start} of {self.epochs}")
        return self

    @model_validator(mode="after")
    def _charges_are_learnt(self) -> TrainConfig:
        """Charges that nothing trains, or that nothing can train, are mistakes."""
        potential, trained = self.potential, FROM_CHARGES & set(self.loss.terms)
        asked = sorted(f"train.metrics.{name}" for name in FROM_CHARGES & set(self.measured))
        asked = ["train.potential.charges"] if potential.charges is not None else asked
        terms = ", ".join(f"train.loss.{name}" for name in sorted(FROM_CHARGES))
        spin = "spin_multiplicity"
        if spin in self.measured and spin not in self.loss.terms and not self.loss.own:
            raise reject(
                f"train.metrics.{spin} asks for spins, and nothing trains them; add "
                f"train.loss.{spin}"
            )
        if asked and not trained and potential.coulomb is None and not self.loss.own:
            raise reject(
                f"{asked[0]} asks for partial charges, and nothing trains them; add one of "
                f"{terms}, or train.potential.coulomb"
            )
        equalised = potential.charges is not None and potential.charges.equalise
        if equalised and "total_charge" in trained:
            raise reject(
                "train.loss.total_charge is always zero, because train.potential.charges.equalise "
                "makes the charges sum to it; take one of them out"
            )
        return self

    @property
    def measured(self) -> dict[str, list[str]]:
        """The metrics of every measured quantity."""
        if self.metrics is not None and self.metrics.properties:
            return self.metrics.properties
        return {name: ["mae", "rmse"] for name in self.loss.terms if name not in self.loss.own}

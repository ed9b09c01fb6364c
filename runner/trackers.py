"""Weights & Biases and MLflow: a run there for as long as a run directory goes on."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from runner.config import LoggerConfig, MLflowConfig, WandbConfig
from runner.errors import ConfigError
from runner.experiment import RunDirectory

PROJECT = "nnp-runner"
Say = Callable[[str], None]
Row = Mapping[str, float | int]


def require_installed(config: LoggerConfig) -> None:
    """See that there is the package of each logger that is asked for.

    Raises:
        ConfigError: there is not.
    """
    for name in config.model_fields_set:
        wanted = getattr(config, name) is not None
        spec = importlib.util.find_spec(name) if wanted else None
        if wanted and (spec is None or spec.origin is None):  # a folder wandb/ is no package
            raise ConfigError(
                f"train.logger.{name} needs the package {name}",
                where=f"train.logger.{name}",
                remedy=f"pip install 'nnp-runner[{name}]', or take the table out",
            )


@contextlib.contextmanager
def trackers(
    config: LoggerConfig,
    settings: Mapping[str, Any],
    run: RunDirectory,
    rows: Sequence[Row],
    say: Say,
) -> Iterator[list[Wandb | MLflow]]:
    """The loggers of a run, which are told how it ends.

    Their names for it are kept in its manifest, so that a run that goes on goes on there too.

    Args:
        config: the `[train.logger]` table.
        settings: the whole config as tables, to be shown there.
        run: the run directory.
        rows: of the epochs that are done; a logger that does not know the run gets them first.
        say: where to complain of one that cannot be reached.
    """
    opened: list[Wandb | MLflow] = []
    status = "failed"
    try:
        if config.wandb is not None:
            opened.append(Wandb.open(config.wandb, run, say))
        if config.mlflow is not None:
            opened.append(MLflow.open(config.mlflow, run, say))
        for tracker in opened:
            tracker.begin(settings, rows)
        yield opened
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        for tracker in opened:
            tracker.end(status)


class Wandb(WandbLogger):
    """A run of Weights & Biases, whose steps are those of the optimiser.

    A row of an epoch that it has already, which a killed run had written after its checkpoint, is
    left out there. Errors of the test are in its summary.
    """

    # the second is what W&B itself says after Ctrl-C
    EXIT_CODES: ClassVar = {"finished": 0, "interrupted": 255, "failed": 1}
    say: Say

    @classmethod
    def open(cls, config: WandbConfig, run: RunDirectory, say: Say) -> Wandb:
        """Begin a run, or go on with the one that a run directory knows.

        Raises:
            ConfigError: W&B refuses, most often because nobody is logged in.
        """
        import wandb

        logger = cls(
            project=config.project or os.environ.get("WANDB_PROJECT", PROJECT),
            entity=config.entity,
            name=config.name or run.path.name,
            group=config.group or run.path.resolve().parent.parent.name,
            tags=config.tags or None,
            mode=config.mode,
            save_dir=run.path,
            id=_known(run, "wandb").get("id"),
        )
        logger._wandb_init.pop("anonymous", None)  # Lightning gives it, W&B warns of it
        try:
            identity = logger.experiment.id
        except wandb.errors.Error as error:
            raise ConfigError(
                f"Weights & Biases cannot be used: {error}",
                where="train.logger.wandb",
                remedy='run `wandb login` once, or set train.logger.wandb.mode = "offline"',
            ) from error
        _remember(run, "wandb", id=identity, project=logger.name)
        logger.say = say
        return logger

    def begin(self, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Show the config, and the epochs that are done.

        What goes on offline is a folder of its own. W&B would put it in the place of the one
        before, so it begins with the rows of that.
        """
        self.log_hyperparams(dict(settings))
        for row in rows if not self.experiment.resumed else ():
            self.log_metrics(*_without_step(row))

    def log_metrics(self, metrics: Row, step: int | None = None) -> None:
        """Add a row, at once."""
        if "epoch" not in metrics:
            self.experiment.summary.update(dict(metrics))
        elif step is None or step >= self.experiment.step:
            row = dict(metrics) | {"trainer/global_step": step}
            self.experiment.log(row, step=step, commit=True)

    def finalize(self, status: str) -> None:
        """Nothing: Lightning ends here after the fit, and after the test."""

    def end(self, status: str) -> None:
        """Say how the run ended."""
        self.experiment.finish(exit_code=self.EXIT_CODES[status])


class MLflow(MLFlowLogger):
    """A run of MLflow."""

    say: Say
    known: bool
    STATES: ClassVar = {
        "finished": "FINISHED",
        "interrupted": "KILLED",
        "failed": "FAILED",
    }

    @classmethod
    def open(cls, config: MLflowConfig, run: RunDirectory, say: Say) -> MLflow:
        """Begin a run, or go on with the one that a run directory knows.

        Raises:
            ConfigError: MLflow refuses, most often because there is no server.
        """
        from mlflow.exceptions import MlflowException

        for name in ("alembic", "mlflow.store"):  # what they say of a new database
            logging.getLogger(name).setLevel(logging.WARNING)
        runs = run.path.resolve().parent
        uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        experiment = config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        logger = cls(
            experiment_name=experiment or runs.parent.name,
            run_name=config.name or run.path.name,
            tracking_uri=uri or f"sqlite:///{runs / 'mlflow.db'}",
            tags=dict(config.tags),
            artifact_location=None if uri else (runs / "mlartifacts").as_uri(),
        )
        logger.say = say
        try:
            logger.find(_known(run, "mlflow").get("run_id"))
        except MlflowException as error:
            raise ConfigError(
                f"MLflow cannot be used: {error}",
                where="train.logger.mlflow",
                allowed='a tracking_uri such as "http://host:5000" or "sqlite:////folder/mlflow.db"',
                remedy="correct train.logger.mlflow.tracking_uri, or MLFLOW_TRACKING_URI",
            ) from error
        _remember(run, "mlflow", run_id=logger.run_id, tracking_uri=logger._tracking_uri)
        return logger

    def find(self, identity: str | None) -> None:
        """Go on with a run of this name, if there is one, or begin another."""
        from mlflow.exceptions import MlflowException

        client = self._mlflow_client
        self.known = False
        if identity is not None:
            with contextlib.suppress(MlflowException):
                client.update_run(identity, status="RUNNING")
                self._run_id, self.known = identity, True
        if client.get_experiment_by_name(self._experiment_name) is None:
            client.create_experiment(self._experiment_name, self._artifact_location)
        before = os.environ.get("MLFLOW_TRACKING_URI")
        _ = self.experiment  # sets that variable, which another training would then obey
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before

    def begin(self, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Show the config, and the epochs that are done.

        A parameter of MLflow cannot change: a setting that has changed is a tag too.
        """
        shown = {key: str(value)[:250] for key, value in _flat(settings)}
        with self._unharmed("MLflow has not got the config"):
            before = self.experiment.get_run(self.run_id).data.params
            self.log_hyperparams({key: value for key, value in shown.items() if key not in before})
            for key in (key for key in before if shown.get(key, before[key]) != before[key]):
                self.experiment.set_tag(self.run_id, key, shown[key])
        for row in rows if not self.known else ():
            self.log_metrics(*_without_step(row))

    def log_metrics(self, metrics: Row, step: int | None = None) -> None:
        """Add a row."""
        with self._unharmed("MLflow has not got a row, which metrics.csv has"):
            super().log_metrics(metrics, step)

    def finalize(self, status: str = "success") -> None:
        """Nothing: Lightning ends here after the fit, and after the test."""

    def end(self, status: str) -> None:
        """Say how the run ended."""
        with self._unharmed(f"MLflow was not told how the run ended: {status}"):
            self.experiment.set_terminated(self.run_id, self.STATES[status])

    @contextlib.contextmanager
    def _unharmed(self, what: str) -> Iterator[None]:
        """A server that is gone does not end a training."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            self.say(f"warning: {what}: {error}")


def _known(run: RunDirectory, name: str) -> dict[str, Any]:
    known: dict[str, Any] = run.manifest.get("loggers", {}).get(name, {})
    return known


def _remember(run: RunDirectory, name: str, **entries: Any) -> None:
    run.note(loggers=run.manifest.get("loggers", {}) | {name: entries})


def _without_step(row: Row) -> tuple[dict[str, float | int], int]:
    values = dict(row)
    return values, int(values.pop("step"))


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value

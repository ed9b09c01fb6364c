"""Checkpoints: when they are written, how they stay whole, how a run ends where it can go on."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from runner.processes import STOPPING, agreed

LAST, BEST = "last.ckpt", "best.ckpt"
AT_ONCE = 2  # checkpoints that wait in memory for being written


def last_checkpoint(run: Path) -> Path:
    """What a run goes on from: its last checkpoint, or the best one, if the last is not there."""
    last, best = (run / "checkpoints" / name for name in (LAST, BEST))
    return best if best.is_file() and not last.is_file() else last


class WholeFiles(TorchCheckpointIO):
    """Checkpoints are there whole or not at all, whatever is killed.

    They are written by a thread, in the order in which they were asked for: a disk takes its time.
    """

    def __init__(self) -> None:
        """Begin with nothing to write."""
        super().__init__()
        self._writer: ThreadPoolExecutor | None = None
        self._writing: deque[Future[None]] = deque()

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,  # noqa: ARG002
    ) -> None:
        """Take what is in the checkpoint now, and have it written.

        Raises:
            OSError: an earlier one could not be written.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        self._wait(AT_ONCE - 1)
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._writing.append(self._writer.submit(_write, Path(path), content))

    def _wait(self, n: int = 0) -> None:
        """Until no more than `n` are still to be written."""
        while len(self._writing) > n or (self._writing and self._writing[0].done()):
            self._writing.popleft().result()

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file."""
        self._wait()
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None
        self._wait()


def _write(file: Path, content: io.BytesIO) -> None:
    """Aside, in the same folder, and rename."""
    aside = file.with_name(f".{file.name}.part")
    try:
        with aside.open("wb") as stream:
            stream.write(content.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error


def checkpoints(folder: Path, monitor: str) -> list[Callback]:
    """The best epoch's, and the last one's."""
    best = Resumable(folder, Path(BEST).stem, monitor=monitor, enable_version_counter=False)
    return [best, Resumable(folder, Path(LAST).stem, enable_version_counter=False)]


class Resumable(ModelCheckpoint):
    """A checkpoint from which a run can go on exactly, also if its directory was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on; Lightning would forget the best epoch of a run that was moved."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        state = dict(state_dict) | {"dirpath": str(self.dirpath)}
        for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
            state[name] = here(state[name])
        scores = state["best_k_models"].items()
        state["best_k_models"] = {here(path): score for path, score in scores}
        super().load_state_dict(state)


class EarlyStopping(callbacks.EarlyStopping):
    """Ends a training that no longer gets better: also one that goes on after it has been ended.

    Lightning would train on, and be as patient as before, whatever the config says now.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, as patient as the config says."""
        super().load_state_dict(state_dict | {"patience": self.patience})
        if not has_ended(state_dict, self.patience):
            self.stopping_reason_message = None

    def on_fit_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Train no more, where the training has been ended."""
        trainer.should_stop = trainer.should_stop or self.stopping_reason_message is not None


def has_ended(state: Mapping[str, Any], patience: int) -> bool:
    """Whether early stopping that is so patient has ended a training, as its state says."""
    return state["stopping_reason_message"] is not None and state["wait_count"] >= patience


def may_stop_after(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether a checkpoint after a batch holds all: no gradient that waits for more batches.

    After the last batch of an epoch its validation is still to come, and Lightning would leave it
    out.
    """
    whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return whole and not trainer.is_last_batch


class Interruptions(Callback):
    """Writes the last checkpoint within an epoch: every few minutes, and where the run has to stop.

    A run that is asked to stop ends after the batch that is under way; after the last batch of an
    epoch it is validated first. Of several processes each may be asked: all end after the same.

    Asked by Ctrl-C, by SIGTERM, or by SIGUSR1, which SLURM sends before a time limit if it is told
    to. Within a batch a checkpoint would hold weights of one step and counters of another. Who asks
    twice is not waited for: the run then goes on from its last checkpoint.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], minutes: float) -> None:
        """Write the checkpoint to `folder` every `minutes`; `say` that a request has come."""
        super().__init__()
        self.folder, self.say, self.minutes = folder, say, minutes
        self._written = time.monotonic()
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, *_: Any) -> None:
        """Listen, instead of Lightning, which would stop wherever it is."""
        self._written = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in STOPPING}

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        text = f"{name}: the run ends after this batch, or after its validation; again: at once"
        # in a thread of its own: here something else may be half said
        threading.Thread(target=self.say, args=(text,)).start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, if it is time or the end has come, and the place is a good one."""
        del module, outputs, batch
        if not may_stop_after(trainer, batch_idx):
            return
        due = time.monotonic() > self._written + 60 * self.minutes
        asked, due = agreed(self._asked, due)
        if asked or due:
            trainer.save_checkpoint(self.folder / LAST)
            self._written = time.monotonic()
        if asked:
            raise KeyboardInterrupt

    def on_train_epoch_start(self, *_: Any) -> None:
        """End, if asked to while the last epoch was measured, which has its checkpoint."""
        if any(agreed(self._asked)):
            raise KeyboardInterrupt

    def teardown(self, *_: Any, **__: Any) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def random_states() -> dict[str, Any]:
    """Where all generators of random numbers are: tensors and plain data."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, state, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, torch.tensor(state), gauss],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put them back there; of GPUs, that of the one in use."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0].cpu())
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))
    version, state, gauss = states["python"]
    random.setstate((version, tuple(torch.as_tensor(state).tolist()), gauss))

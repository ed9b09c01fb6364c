"""Training on several devices: here processes on a CPU, which talk through gloo."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from molecules import springs, without, write_experiment
from test_processes import ENDINGS, GIVEN, check_endings, free_ports, start

from runner.batches import make_batch
from runner.config import TrainerConfig, load_config
from runner.errors import ConfigError
from runner.predictor import Predictor
from runner.prepare import find_prepared, prepare
from runner.processes import Place
from runner.terminal import Terminal
from runner.train import _strategy, train
from runner.training import STEPS_MEANWHILE

ROOT = Path(__file__).parent.parent
DOUBLE = ("train.precision=64-true", "train.epochs=2")
EVERY_STEP = (  # what happens between batches, and with the weights
    "train.trainer.accumulate_grad_batches=2",
    "train.trainer.gradient_clip_val=0.5",
    'train.average={name="ema", decay=0.5}',
    'train.optimizer={name="muon", lr=0.01}',
    "train.loss.forces.reduction=atom",
)
# settings of two processes, and of the one that they have to equal
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # 48 structures: 10 and 10, 10 and 10, 8 and none
    "uneven": (("train.batch.structures=10",), ("train.batch.structures=20",)),
    "every step": (
        ("train.batch.structures=7", *EVERY_STEP),
        ("train.batch.structures=14", *EVERY_STEP),
    ),
}
BUDGET = ("train.batch={atoms=30}", 'train.data={weights={by="source", values={"data.extxyz"=1}}}')


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*GIVEN, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def _experiment(folder: Path) -> Path:
    """Structures of which few have forces, and only one process's batches have dipoles."""
    structures = without(springs(), "forces", [*range(0, 60, 3), *range(1, 60, 4)])
    config_file = write_experiment(folder, without(structures, "dipole", list(range(50))))
    text = config_file.read_text()
    for unit in ("eV/angstrom", "e*angstrom"):
        text = text.replace(f'unit = "{unit}" }}', f'unit = "{unit}", missing = "nan" }}')
    config_file.write_text(text)
    return config_file


def _alone_trained(config_file: Path, *settings: str) -> dict[str, Any]:
    config = load_config(config_file, settings)
    folder = config_file.parent.parent / "prepared"
    prepare(config, folder, Terminal())
    return train(config, config_file, folder, Terminal(), command=[])


def _numbers(result: dict[str, Any]) -> list[dict[str, float]]:
    with (Path(result["run"]) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # gradients are measured for a few structures of the first process
    kept = [k for k in rows[0] if "time/" not in k and "gradient_norm" not in k]
    return [{k: float(r[k]) for k in kept if r[k]} for r in rows]


def _weights(run: str | Path, name: str = "last") -> dict[str, torch.Tensor]:
    checkpoint = torch.load(Path(run) / "checkpoints" / f"{name}.ckpt", weights_only=True)
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return state


def _close(ones: list[dict[str, float]], others: list[dict[str, float]], rel: float) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one == pytest.approx(other, rel=rel)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained each case."""
    folder = tmp_path_factory.mktemp("two")
    for name in (*CASES, "budget"):
        config_file = _experiment(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        for name in GIVEN:
            patch.delenv(name, raising=False)
        prepare(load_config(config_file), folder / "prepared", Terminal())
    asked = {name: [*DOUBLE, *settings] for name, (settings, _) in CASES.items()}
    asked["budget"] = [*DOUBLE, *BUDGET]
    started = start(2, ENDINGS + len(asked), str(folder), json.dumps(asked))
    for rank, process in enumerate(started):
        assert process.returncode == 0, process.stderr
        (folder / f"endings-{rank}.json").write_text(process.stdout.splitlines()[0])
    return folder


def test_two_processes_end_with_the_error_of_one_which_the_first_one_says(two: Path) -> None:
    check_endings(*((two / f"endings-{rank}.json").read_text() for rank in range(2)))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_losses_and_weights_of_one_with_the_double_batch(
    two: Path, tmp_path: Path, name: str
) -> None:
    both = json.loads((two / f"{name}-0.json").read_text())
    one = _alone_trained(_experiment(tmp_path / name), *DOUBLE, *CASES[name][1])
    _close(_numbers(both), _numbers(one), 1e-10)
    assert both["steps"] == one["steps"]
    assert both["test"] == pytest.approx(one["test"], rel=1e-10)
    found, expected = _weights(both["run"]), _weights(one["run"])
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*CASES, "budget"])
def test_all_processes_have_the_same_weights_to_the_bit_and_the_first_one_writes(
    two: Path, name: str
) -> None:
    first, second = (torch.load(two / f"{name}-{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((two / f"{name}-1.json").read_text()) == {}
    runs = [path for path in (two / name / "runs").iterdir() if not path.is_symlink()]
    assert len(runs) == 1
    assert json.loads((runs[0] / "manifest.json").read_text())["status"] == "finished"
    names = [path.name for path in runs[0].iterdir()]
    writers = {name.split(".")[-2] for name in names if name.startswith("events.out.tfevents")}
    assert len(writers) == 1  # its process id
    assert {"parity.png", "learning_curves.png", "test_metrics.json"} <= set(names)


def test_every_structure_is_measured_once_whatever_the_batches_hold(two: Path) -> None:
    result = json.loads((two / "budget-0.json").read_text())
    predictor = Predictor.load(Path(result["run"]))
    config_file = two / "budget" / "config.toml"
    structures = find_prepared(load_config(config_file), two / "prepared", "").read("test")
    batch = make_batch(structures, predictor.potential.cutoff, dtype=torch.float64)
    values = predictor.potential(batch)
    error = values["energy"].detach().numpy() - structures.structures["energy"]
    assert result["test"]["energy_rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-10)
    labelled = ~np.isnan(structures.atoms["forces"])
    error = values["forces"].detach().numpy() - structures.atoms["forces"]
    assert result["test"]["forces_mae"] == pytest.approx(np.abs(error[labelled]).mean(), rel=1e-10)


def _runner(
    folder: Path, *arguments: str, program: Sequence[str] = ("-m", "runner"), **settings: Any
) -> subprocess.Popen[str]:
    """The command line, as a user gives it in a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env=environment | {"RUNNER_DATA_DIR": str(folder / "prepared")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


TWO = ("--set", "train.trainer.devices=2", "--set", "train.precision=64-true")


def test_the_first_process_starts_the_others_and_ends_with_them_when_one_is_killed(
    tmp_path: Path,
) -> None:
    write_experiment(tmp_path / "mine")
    endless = ("--set", "train.epochs=100000", "--set", "train.compile=false")
    with _Started(_runner(tmp_path, "run", "mine", *TWO, *endless)) as run:
        run.reach("epoch 2/")
        os.kill(run.child(), signal.SIGKILL)
        code, said = run.end(60)
    assert code == 2
    assert "error: process 1 of 2" in said
    assert "was ended by SIGKILL" in said
    assert "--resume goes on from the last checkpoint" in said
    assert said.count("prepared /") == said.count("potential painn") == 1
    manifest = json.loads((tmp_path / "mine" / "runs" / "latest" / "manifest.json").read_text())
    assert manifest["status"] == "failed"


class _Started:
    """A command that runs, whose lines are read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (process.stdout, process.stderr)
        ]

    def _read(self, stream: Iterator[str]) -> None:
        for line in stream:
            self.lines.append(line)

    def __enter__(self) -> _Started:
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def reach(self, text: str) -> None:
        """Wait until it says something."""
        until = time.monotonic() + 120
        while text not in "".join(self.lines):
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < until
            time.sleep(0.05)

    def child(self) -> int:
        """The process that it has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def end(self, seconds: float) -> tuple[int, str]:
        """How it ends, and what it has said."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(seconds)  # the last process that could write has ended
            assert not reader.is_alive()
        return code, "".join(self.lines)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Where an experiment is prepared."""
    config_file = write_experiment(tmp_path / "mine")
    prepare(load_config(config_file), tmp_path / "prepared", Terminal())
    return tmp_path


ASKED_IN = """
import os, signal
from {module} import {name}
from runner.cli import main
done = {name}.{method}
def asked(*given, **more):
    os.kill(os.getpid(), signal.SIGTERM)
    return done(*given, **more)
{name}.{method} = asked
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "method"),
    [
        ("runner.training", "Training", "test_step"),
        ("runner.training", "Training", "configure_optimizers"),
        ("runner.datamodule", "PreparedDataModule", "train_dataloader"),
    ],
)
def test_all_end_when_one_is_asked_to_where_no_batch_is_trained(
    prepared: Path, module: str, name: str, method: str
) -> None:
    script = ASKED_IN.format(module=module, name=name, method=method)
    settings = (*TWO, "--set", "train.epochs=1", "--set", "train.compile=false")
    with _Started(_runner(prepared, "train", "mine", *settings, program=("-c", script))) as run:
        code, said = run.end(90)
    assert code == 130, said
    assert "interrupted" in said
    manifest = json.loads((prepared / "mine" / "runs" / "latest" / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"


@pytest.mark.slow
def test_who_asks_twice_does_not_wait_for_a_process_that_is_stuck(prepared: Path) -> None:
    endless = ("--set", "train.epochs=100000", "--set", "train.compile=false")
    with _Started(_runner(prepared, "train", "mine", *TWO, *endless)) as run:
        run.reach("epoch 2/")
        child = run.child()
        os.kill(child, signal.SIGSTOP)
        time.sleep(1)
        for _ in range(2):
            run.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        code, said = run.end(60)
    assert code == 130, said
    assert "interrupted" in said
    until = time.monotonic() + 10
    while _is_alive(child):
        assert time.monotonic() < until
        time.sleep(0.1)


def _is_alive(process: int) -> bool:
    """Whether there is such a process, other than one whose end nobody has asked about."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_the_others_end_when_the_first_process_is_killed(prepared: Path, compiled: str) -> None:
    endless = ("--set", "train.epochs=100000", "--set", f"train.compile={compiled}")
    with _Started(_runner(prepared, "train", "mine", *TWO, *endless)) as run:
        run.reach("epoch 2/" if compiled == "false" else "data in memory")
        run.process.kill()
        code, said = run.end(60)
    assert code == -signal.SIGKILL
    assert "error: process 0 of 2 is gone, and so process 1 ends" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom"),
    [(signal.SIGINT, "group"), (signal.SIGTERM, "other"), (signal.SIGUSR1, "first")],
)
def test_whichever_is_asked_to_stop_all_stop_and_the_run_goes_on_to_the_bit(
    prepared: Path, number: signal.Signals, whom: str
) -> None:
    settings = (*TWO, "--set", "train.compile=false", "--set", "train.epochs=6")
    many = (*settings, "--set", "train.batch.structures=1")  # 24 steps an epoch
    whole, _ = _finished(prepared, "train", "mine", *many, "--json")
    with _Started(_runner(prepared, "train", "mine", *many, start_new_session=True)) as run:
        run.reach("epoch 2/")
        if whom == "group":
            os.killpg(run.process.pid, number)
        else:
            os.kill(run.process.pid if whom == "first" else run.child(), number)
        code, said = run.end(60)
    assert code == 130, said
    assert said.count("interrupted\n") == 1
    stopped = (prepared / "mine" / "runs" / "latest").resolve()
    last = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(last["training"]["others"]) == 1
    resumed, said = _finished(prepared, "train", "mine", *many, "--resume", "--json")
    assert Path(prepared / resumed["run"]).resolve() == stopped
    os.chdir(prepared)
    assert _numbers(resumed) == _numbers(whole)
    found, expected = _weights(resumed["run"]), _weights(whole["run"])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def _finished(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    process = _runner(folder, *arguments)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return json.loads(out), err


@pytest.mark.slow
def test_another_number_of_devices_goes_on_between_epochs_and_not_within_one(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared)
    precision = TWO[2:]
    three = (*precision, "--set", "train.epochs=3", "--set", "train.compile=false")
    first, _ = _finished(prepared, "train", "mine", *TWO, "--set", "train.epochs=2", "--json")
    alone, said = _finished(prepared, "train", "mine", *three, "--resume", first["run"], "--json")
    assert "train.trainer.devices: 2 before, auto now" in said
    assert alone["epochs"] == 3
    assert alone["steps"] == 2 * 3 + 6  # 48 structures in batches of 8
    endless = (*precision, "--set", "train.epochs=100000", "--set", "train.compile=false")
    with _Started(_runner(prepared, "train", "mine", *TWO, *endless)) as run:
        run.reach("epoch 2/")
        run.process.send_signal(signal.SIGINT)
        run.end(60)
    last = prepared / "mine" / "runs" / "latest" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    content["PreparedDataModule"] |= {"batches": 2}  # wherever it was
    torch.save(content, last)
    config = load_config(prepared / "mine" / "config.toml", ["train.precision=64-true"])
    with pytest.raises(ConfigError, match=r"within an epoch of 2 devices, and can go on with 1"):
        train(
            config,
            prepared / "mine" / "config.toml",
            prepared / "prepared",
            Terminal(),
            [],
            last.parent.parent,
        )


@pytest.mark.slow
def test_torchrun_and_slurm_start_processes(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared)
    (port,) = free_ports(1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += [f"--master-port={port}", "-m"]
    results = []
    command = ["runner", "run", "mine", *TWO[2:], "--json"]
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    common |= {"RUNNER_DATA_DIR": str(prepared / "anew")}
    done = subprocess.run(
        [*torchrun, *command], env=common, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    results.append(json.loads(done.stdout))
    shutil.rmtree(prepared / "anew")
    slurm = {"STEP_NUM_TASKS": 2, "STEP_NUM_NODES": 1, "NTASKS": 2, "NTASKS_PER_NODE": 2}
    slurm |= {"NNODES": 1, "NODEID": 0, "JOB_ID": port}
    common |= {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    common |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NAME": "mine"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env=common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert said[1] == ""
    results.append(json.loads(said[0]))
    assert not results[0]["prepare"]["reused"]
    assert not results[1]["prepare"]["reused"]
    by_itself, _ = _finished(prepared, "train", "mine", *TWO, "--json")
    for result in results:
        assert _numbers(result["train"]) == _numbers(by_itself)


@pytest.mark.slow
def test_compiled_steps_of_several_processes_give_what_plain_ones_do(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last step of an epoch one of them has no structure, and computes it plainly."""
    monkeypatch.chdir(prepared)
    results = {
        compiled: _finished(
            prepared, "train", "mine", *TWO, "--json",
            "--set", "train.batch.structures=10", "--set", f"train.compile={compiled}",
            "--set", f"train.epochs={STEPS_MEANWHILE // 3 + 3}",
        )
        for compiled in ("true", "false")
    }  # fmt: skip
    assert "training steps are compiled" in results["true"][1]
    assert "no longer compiled" not in results["true"][1]
    _close(_numbers(results["true"][0]), _numbers(results["false"][0]), 1e-8)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_ends_all_with_its_name(prepared: Path) -> None:
    process = _runner(prepared, "train", "mine", *TWO, "--set", "train.optimizer.lr=1e200")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert err.count("is not a finite number in epoch 0") == 1
    assert "lower train.optimizer.lr" in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("strategy", ["fsdp", "ddp_spawn"])
def test_strategies_that_do_not_go_with_it_are_refused(strategy: str) -> None:
    place = Place.of(TrainerConfig(devices=2))
    with pytest.raises(ConfigError, match=f"not trained by the strategy {strategy}") as caught:
        _strategy(strategy, place)
    assert ("derivative" in str(caught.value)) == (strategy == "fsdp")
    assert 'strategy = "auto"' in str(caught.value)

"""Several processes: their places, what they tell each other, how they end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from runner import processes
from runner.config import TrainerConfig
from runner.errors import ConfigError, RunError
from runner.processes import Place, agreed, gathered, together

HERE = Path(__file__).parent
ENDINGS = 7  # that `ranks.py` tries
GIVEN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "SLURM_STEP_NUM_TASKS",
)


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(n: int, n_ports: int, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Run `ranks.py` in so many processes, and wait for them."""
    common = os.environ | {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "PORTS": json.dumps(free_ports(n_ports)),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]
    try:
        said = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *both)
        for process, both in zip(started, said, strict=True)
    ]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*GIVEN, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def _given(monkeypatch: pytest.MonkeyPatch, **variables: int) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("devices", "n"), [("auto", 1), (1, 1), (3, 3), ("3", 3), ([0, 2], 2), ("0,2", 2)]
)
def test_the_first_process_starts_one_for_each_device(devices: Any, n: int) -> None:
    place = Place.of(TrainerConfig(devices=devices))
    assert (place.rank, place.n, place.n_local, place.launches) == (0, n, n, n > 1)


def test_torchrun_and_slurm_say_where_a_process_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    _given(monkeypatch, RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4)
    for config in (TrainerConfig(), TrainerConfig(devices=4, num_nodes=2)):
        place = Place.of(config)
        assert (place.rank, place.n, place.local, place.n_local) == (5, 8, 1, 4)
        assert place.n_nodes == 2
        assert not place.launches
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    _given(monkeypatch, SLURM_STEP_NUM_TASKS=6, SLURM_STEP_NUM_NODES=2)
    _given(monkeypatch, SLURM_PROCID=4, SLURM_LOCALID=1, SLURM_NTASKS=6)
    with pytest.raises(ConfigError, match="Use `--ntasks-per-node=6` instead"):
        Place.of(TrainerConfig())
    _given(monkeypatch, SLURM_NTASKS_PER_NODE=3)
    place = Place.of(TrainerConfig())
    assert (place.rank, place.n, place.local, place.n_local) == (4, 6, 1, 3)


def test_each_machine_starts_its_own_where_nobody_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrainerConfig(devices=2, num_nodes=3)
    with pytest.raises(ConfigError, match=r"3 machines(.|\n)*srun or torchrun"):
        Place.of(config)
    _given(monkeypatch, NODE_RANK=2, MASTER_PORT=4000)
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    place = Place.of(config)
    assert (place.rank, place.n, place.local, place.launches) == (4, 6, 0, True)


@pytest.mark.parametrize("config", [{"devices": 1}, {"devices": 2, "num_nodes": 2}])
def test_other_numbers_than_were_started_are_refused(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, int]
) -> None:
    _given(monkeypatch, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    with pytest.raises(ConfigError, match=r"2 processes a machine(.|\n)*devices = \"auto\""):
        Place.of(TrainerConfig(**config))


def test_machines_with_unlike_numbers_of_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _given(monkeypatch, SLURM_STEP_NUM_TASKS=3, SLURM_STEP_NUM_NODES=2, SLURM_PROCID=0)
    with pytest.raises(ConfigError, match=r"3 processes on 2 machines(.|\n)*ntasks-per-node"):
        Place.of(TrainerConfig())


def test_a_first_process_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    _given(monkeypatch, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, MASTER_PORT=port)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(processes, "START", timedelta(seconds=1))
    with (
        pytest.raises(RunError, match=f"process 1 of 2 does not find(.|\n)*MASTER_PORT={port}"),
        together(Place.of_follower()),
    ):
        pass
    _given(monkeypatch, RANK=0, LOCAL_RANK=0)
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(RunError, match="another MASTER_PORT"),
        together(Place.of_follower()),
    ):
        pass


def test_nobody_has_to_follow_where_nobody_leads() -> None:
    with pytest.raises(ConfigError, match="use `runner train`"):
        Place.of_follower()


def test_one_process_agrees_with_itself() -> None:
    before = dict(os.environ)
    with together(Place.of(TrainerConfig())) as alone:
        assert alone.first
        alone.tell({})
    assert agreed(True, False) == [True, False]
    assert gathered("mine") == ["mine"]
    assert dict(os.environ) == before


def check_endings(*said: str) -> None:
    """What the first process, any between, and the last one have made of each way to end."""
    first, *between, last = (json.loads(text) for text in said)
    votes = f"([True, False], [False], {[{'rank': torch.tensor(r)} for r in range(len(said))]})"
    quiet = "SystemExit: 1"
    refused = "RunError: it went wrong\n  where:   there\n  remedy:  do not"
    bug = "ZeroDivisionError: by zero"
    expected = {  # of the first, those between, the last
        "told": ("told", "{'run': 'here'}", "{'run': 'here'}"),
        "votes": (votes, votes, votes),
        "last refuses": (refused, quiet, quiet),
        "last has a bug": (f"RunError: process {len(between) + 1} failed: {bug}", quiet, bug),
        "last is interrupted": ("KeyboardInterrupt: ", quiet, quiet),
        "first refuses": ("ConfigError: it is not allowed", quiet, quiet),
        "first is interrupted": ("KeyboardInterrupt: ", quiet, quiet),
    }
    for name, (of_first, of_others, of_last) in expected.items():
        found = [first[name], *(other[name] for other in between), last[name]]
        assert found == [of_first, *[of_others] * len(between), of_last], name


@pytest.mark.slow
def test_three_processes_end_with_the_error_of_one_which_the_first_one_says() -> None:
    check_endings(*(process.stdout for process in start(3, ENDINGS)))

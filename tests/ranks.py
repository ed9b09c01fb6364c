"""What tests of several processes start: each of these processes runs the same script.

python ranks.py                  how processes hear of each other's end, printed as JSON
python ranks.py FOLDER CASES     the same, then one training after the other; CASES is JSON
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from runner.errors import ConfigError, RunError
from runner.processes import Place, Processes, agreed, gathered, together

RANK = int(os.environ["RANK"])
PORTS = iter(json.loads(os.environ["PORTS"]))


def _together(what: Any) -> str:
    """How this process ends where it does something together with others."""
    os.environ["MASTER_PORT"] = str(next(PORTS))
    try:
        with together(Place.of_follower()) as processes:
            return str(what(processes))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def _told(processes: Processes) -> Any:
    if not processes.first:
        return processes.told()
    processes.tell({"run": "here"})
    return "told"


def _last_fails(error: BaseException) -> Any:
    def what(processes: Processes) -> None:
        if processes.place.rank == processes.place.n - 1:
            raise error
        if processes.first:  # as a process whose connection with the last one is lost
            processes._must_end.wait(30)  # type: ignore[attr-defined]
            raise RuntimeError("Connection closed by peer")
        processes.told()

    return what


def _first_fails(error: BaseException) -> Any:
    def what(processes: Processes) -> None:
        if processes.first:
            raise error
        processes.told()

    return what


def _votes(processes: Processes) -> Any:
    place = processes.place
    torch.distributed.init_process_group("gloo", rank=place.rank, world_size=place.n)
    return agreed(place.rank == 1, False), agreed(False), gathered({"rank": torch.tensor(RANK)})


def endings() -> None:
    """Each way in which processes can end, in turn."""
    refused = RunError("it went wrong", where="there", remedy="do not")
    found = {
        "told": _together(_told),
        "votes": _together(_votes),
        "last refuses": _together(_last_fails(refused)),
        "last has a bug": _together(_last_fails(ZeroDivisionError("by zero"))),
        "last is interrupted": _together(_last_fails(KeyboardInterrupt())),
        "first refuses": _together(_first_fails(ConfigError("it is not allowed"))),
        "first is interrupted": _together(_first_fails(KeyboardInterrupt())),
    }
    print(json.dumps(found))


def trainings(folder: Path, cases: dict[str, list[str]]) -> None:
    """Train each case, and write its result and the weights that this process ends with."""
    from runner import train as train_module  # takes seconds
    from runner.config import load_config
    from runner.terminal import Terminal

    fit = train_module._fit
    for name, settings in cases.items():
        config_file = folder / name / "config.toml"

        def fitted(trainer: Any, module: Any, *rest: Any, name: str = name) -> None:
            fit(trainer, module, *rest)
            torch.save(module.state_dict(), folder / f"{name}-{RANK}.pt")

        train_module._fit = fitted
        os.environ["MASTER_PORT"] = str(next(PORTS))
        config = load_config(config_file, settings)
        with together(Place.of_follower()) as processes:
            result = train_module.train(
                config, config_file, folder / "prepared", Terminal(), [], processes=processes
            )
        (folder / f"{name}-{RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    endings()
    if sys.argv[1:]:
        trainings(Path(sys.argv[1]), json.loads(sys.argv[2]))

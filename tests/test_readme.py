"""What the README and the experiments show works; .ci/run runs the README's two commands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from runner.config import load_config
from runner.prepare import prepare
from runner.terminal import Terminal
from runner.train import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


SHOWN = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
SHORTEST, POTENTIAL, TRAINING, DEVICES, BATCHES = SHOWN
WITH_POTENTIAL = SHORTEST.replace('[train.potential]\nname = "painn"\n', POTENTIAL).replace(
    "forces =", 'total_charge = { key = "total_charge" }\nforces =', 1
)


@pytest.mark.parametrize(
    "text",
    [SHORTEST + BATCHES, WITH_POTENTIAL + TRAINING],
    ids=["short with batches", "potential with training"],
)
def test_the_configs_that_are_shown_prepare_and_train(tmp_path: Path, text: str) -> None:
    assert text.count("[train.potential]") == 1
    config_file = tmp_path / "experiments" / "short" / "config.toml"
    config_file.parent.mkdir(parents=True)
    config_file.write_text(text)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "small-molecules.extxyz", tmp_path / "data")
    settings = ["train.potential.features=8", "train.batch={structures=64}"]
    config = load_config(config_file, settings)
    assert config.train is not None
    settings += ["train.epochs=1", *(["train.stage=[]"] if config.train.stage else [])]
    config = load_config(config_file, settings)
    prepared = prepare(config, tmp_path / "prepared", Terminal())
    assert prepared["elements"] == ["H", "C", "N", "O"]
    assert prepared["fit"]["rank"] == 4
    result = train(config, config_file, tmp_path / "prepared", Terminal(), [])
    assert set(result["test"]) >= {"energy_mae", "forces_mae"}


def test_the_devices_that_are_shown_are_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(SHORTEST + DEVICES)
    config = load_config(tmp_path / "config.toml")
    assert config.train is not None
    assert config.train.trainer.devices == 4


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*/config.toml")), ids=str)
def test_every_experiment_has_a_valid_config(path: Path) -> None:
    assert load_config(path).train is not None


@pytest.mark.parametrize("heading", ["### 1. Run the main job", "### 2. Pass the tests"])
def test_each_set_up_command_makes_its_own_environment(heading: str) -> None:
    command = README.partition(heading)[2].split("```")[1]
    assert command.startswith("bash\npython3 -m venv .venv && .venv/bin/pip install -e ")
    assert heading in (ROOT / ".ci" / "run").read_text()


def test_no_placeholder_is_left_in_the_readme() -> None:
    assert not re.findall(r"@[A-Z]+@", README)

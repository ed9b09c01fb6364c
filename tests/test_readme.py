"""What the README and the experiments show works; .ci/run runs the README's two commands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from runner.config import load_config
from runner.prepare import prepare
from runner.reference import TABLES
from runner.terminal import Terminal
from runner.train import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


SHOWN = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
SHORTEST, POTENTIAL, TRAINING, DEVICES, LOSSES, BATCHES = SHOWN
(OWN_LOSS,) = re.findall(r"```python\n(class Angle.*?)```", README, re.DOTALL)
CHARGED = SHORTEST.replace("forces =", 'total_charge = { key = "total_charge" }\nforces =', 1)
WITH_POTENTIAL = CHARGED.replace('[train.potential]\nname = "painn"\n', POTENTIAL)
WITH_CHARGES = CHARGED.partition("[train.loss.energy]")[0]


@pytest.mark.parametrize(
    "text",
    [SHORTEST + BATCHES, WITH_POTENTIAL + TRAINING, WITH_CHARGES + LOSSES],
    ids=["short with batches", "potential with training", "losses and metrics"],
)
def test_the_configs_that_are_shown_prepare_and_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    own = f"import torch\nimport runner.losses\n\n{OWN_LOSS}"
    (tmp_path / "my_losses.py").write_text(own)
    text = text.replace("noisy.xyz", "small-molecules.extxyz")
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
def test_every_experiment_has_a_valid_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNP_DATA", "/where/the/data/is")
    assert load_config(path).train is not None


@pytest.mark.parametrize("heading", ["### 1. Run the main job", "### 2. Pass the tests"])
def test_each_set_up_command_makes_its_own_environment(heading: str) -> None:
    command = README.partition(heading)[2].split("```")[1]
    assert command.startswith("bash\npython3 -m venv .venv && .venv/bin/pip install -e ")
    assert heading in (ROOT / ".ci" / "run").read_text()


def test_no_placeholder_is_left_in_the_readme() -> None:
    assert not re.findall(r"@[A-Z]+@", README)


EVERY = ROOT / "experiments" / "every_option" / "config.toml"


def test_every_option_of_a_training_stands_in_one_experiment() -> None:
    text = EVERY.read_text()
    for heading, section in TABLES.items():
        if "[train" in heading or heading.startswith("A weight"):
            for key in section.model_fields:
                assert re.search(rf"\b{key}\b( =|[].])", text), f"{key} of {heading}"


def test_what_is_commented_out_there_is_right_too(tmp_path: Path) -> None:
    table, found = "", 0
    text = EVERY.read_text().replace("../../data", str(ROOT / "data"))
    for line in text.splitlines():
        table = line[1:-1] if re.fullmatch(r"\[[\w.]+\]", line) else table
        if line.startswith("# or name"):
            others, other = text, f"{table}={{{line.removeprefix('# or ')}}}"
            if "schedule_free" in line:
                others = re.sub(r"(?m)^\[train.(schedule|average)\]\n(.+\n)+", "", text)
            (tmp_path / "config.toml").write_text(others)
            config = load_config(tmp_path / "config.toml", [other])
            assert config.train is not None
            found += 1
    assert found == 12
    (tmp_path / "config.toml").write_text(re.sub(r"(?m)^# (wandb|mlflow) =", r"\1 =", text))
    config = load_config(tmp_path / "config.toml")
    assert config.train is not None
    assert config.train.logger.mlflow is not None


def test_every_option_at_once_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    (tmp_path / "every").mkdir()
    config_file = tmp_path / "every" / "config.toml"
    config_file.write_text(EVERY.read_text().replace("../../data", str(ROOT / "data")))
    small = ("epochs=2", "stage=[]", "data.train_size=64", "potential.features=8", "compile=false")
    config = load_config(config_file, [f"train.{setting}" for setting in small])
    prepare(config, tmp_path / "prepared", Terminal())
    result = train(config, config_file, tmp_path / "prepared", Terminal(), [])
    assert 0 <= result["test"]["forces_Within"] <= 1
    assert {"forces_mae_by_element/H", "charges_PearsonCorrCoef"} <= set(result["test"])

"""Potentials of the user's own: what fits, and what is said of what does not."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from molecules import write_experiment

from runner.check_potential import check_potential
from runner.config import load_config, potential_config
from runner.config import potentials as config_module
from runner.errors import ConfigError
from runner.potentials import build_potential, foreign
from runner.predictor import Predictor
from runner.prepare import prepare
from runner.terminal import Terminal
from runner.train import train

ROOT = Path(__file__).parent.parent
OWN = "experiments.own_potential.potential:PairPotential"

MODULE = """
import torch
from torch import nn

class Zero(nn.Module):
    def __init__(self, cutoff: float, *, width: int, mode: str = "a") -> None:
        super().__init__()
        self.kept = (cutoff, width, mode)

    def forward(self, batch):
        return {"energies": batch.positions[:, 0] * 0}

class NoCutoff(nn.Module):
    pass

class Anything(Zero):
    def __init__(self, elements, heads, inputs, **more):
        super().__init__(more.pop("cutoff"), width=1)
        self.kept = (elements, sorted(heads), inputs, more)

    def forward(self, batch):
        return super().forward(batch) | {"charges": batch.positions[:, 1]}

class Tuple(nn.Module):
    def __init__(self, cutoff):
        super().__init__()

    def forward(self, batch):
        return batch.positions, 1

class PerStructure(Tuple):
    def forward(self, batch):
        return {"energies": batch.positions[:2, 0]}

class Refusing(Tuple):
    def __init__(self, cutoff):
        raise ValueError("a cutoff of 5 will not do")

def function(batch):
    return batch
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def _built(name: str, quantities: tuple[str, ...] = ("energy",), **more: object) -> torch.nn.Module:
    return build_potential(potential_config({"name": name, **more}), quantities, {}, ["H", "O"])


@pytest.mark.usefixtures("own")
def test_further_keys_go_to_the_constructor() -> None:
    assert _built("own_module:Zero", width=3).architecture.kept == (5.0, 3, "a")
    chosen = _built("own_module:Zero", width=3, mode="b", cutoff="4 angstrom")
    assert chosen.architecture.kept == (4.0, 3, "b")
    offered = _built("own_module:Anything", ("dipole",), inputs=["total_charge"], extra=[1, 2])
    assert offered.architecture.kept == (
        ["H", "O"],
        ["charges"],
        ["total_charge"],
        {"extra": [1, 2]},
    )


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "more", "text"),
    [
        (
            "own_modul:Zero",
            {},
            r"be imported: No module named 'own_modul'(.|\n)*current dir",
        ),
        ("own_module:Zeros", {}, r"no Zeros in own_module; did you mean \"Zero\"\?(.|\n)*allowed"),
        ("own_module:function", {}, r"own_module:function is not a class of torch.nn.Module"),
        ("own_module:NoCutoff", {}, r"does not take the cutoff(.|\n)*parameter `cutoff`, in Å"),
        ("own_module:Zero", {}, r"train.potential.width\n +this key is missing"),
        ("own_module:Zero", {"width": "3"}, r"train.potential.width\n +found '3'; it should be"),
        (
            "own_module:Zero",
            {"width": 3, "moed": "b"},
            r"potential.moed\n +unknown key; did you mean \"mode\"\?(.|\n)*allowed: +width, mode",
        ),
        (
            "own_module:Zero",
            {"width": 3, "inputs": ["total_charge"]},
            r"has no inputs, and total_charge is asked for(.|\n)*take out train.potential.inputs",
        ),
        ("own_module:Tuple", {}, r"no energies of the shape \(n_atoms,\); (.|\n)*it gives tuple"),
        ("own_module:PerStructure", {}, r"for 5 atoms it gives energies \(2,\)"),
        ("own_module:Refusing", {}, r"cannot be built: a cutoff of 5 will not do"),
    ],
)
def test_what_does_not_fit_is_said(name: str, more: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _built(name, **more)


@pytest.mark.usefixtures("own")
def test_charges_of_a_class_without_heads_are_refused() -> None:
    text = r"has no heads, and charges is asked for(.|\n)*train.loss.charges, total_charge, dipole"
    with pytest.raises(ConfigError, match=text):
        _built("own_module:Zero", ("energy", "dipole"), width=3)


def test_a_name_that_is_nowhere_lists_what_there_is(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["train.potential.name=nequip"])
    for name in ("painn", "schnet", "tensornet", "mace", "package.module:Class"):
        assert name in str(caught.value)


@pytest.mark.usefixtures("own")
def test_an_installed_package_offers_a_potential_by_an_entry_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = importlib.metadata.EntryPoint("zero", "own_module:Zero", "runner.potentials")
    for module in (config_module, foreign):
        monkeypatch.setattr(module, "installed_potentials", lambda: {"zero": point})
    assert _built("zero", width=2).architecture.kept == (5.0, 2, "a")


def test_the_worked_example_conforms_and_trains_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    settings = ["features=8", "radial_basis=6", "cutoff=4 angstrom"]
    checks = check_potential(OWN, settings, ["H", "C", "O"], Terminal())["checks"]
    assert all(check["passed"] is not False for check in checks)
    example = load_config(ROOT / "experiments" / "own_potential" / "config.toml")
    assert example.train is not None
    assert example.train.potential.name == OWN
    config_file = write_experiment(tmp_path)
    text = config_file.read_text().replace("[train.loss.dipole]\n", "")
    start, end = text.index("[train.potential]"), text.index("[train.loss.energy]")
    table = f'[train.potential]\nname = "{OWN}"\nradial_basis = 8\n'
    config_file.write_text(text[:start] + table + text[end:])
    config = load_config(config_file)
    prepare(config, tmp_path / "prepared", Terminal())
    result = train(config, config_file, tmp_path / "prepared", Terminal(), [])
    assert type(Predictor.load(Path(result["run"])).potential.architecture).__name__ == (
        "PairPotential"
    )


def test_the_worked_example_of_the_reference_is_the_file() -> None:
    code = (ROOT / "experiments" / "own_potential" / "potential.py").read_text()
    body = code[code.index("class PairPotential") :].strip()
    assert body in (ROOT / "experiments" / "README.md").read_text()

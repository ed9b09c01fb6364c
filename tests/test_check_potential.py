"""The verb `check-potential`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runner.check_potential import check_potential
from runner.cli import app
from runner.errors import ConfigError, RunError
from runner.terminal import Terminal

BAD = """
import torch

class Blind(torch.nn.Module):
    def __init__(self, cutoff: float, power: int = 2) -> None:
        super().__init__()
        self.cutoff, self.power = cutoff, power
        self.depth = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        i, j = batch.pairs
        r = (batch.positions[j] - batch.positions[i]).norm(dim=-1)
        pairs = self.depth * (1 - r / self.cutoff) ** self.power
        return {"energies": torch.zeros_like(batch.positions[:, 0]).index_add(0, i, pairs)}
"""
SETTINGS = ["features=8", "radial_basis=4", "cutoff=4 angstrom"]


def test_it_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SETTINGS, "charges.equalise=true"]
    result = check_potential("painn", settings, ["H", "O"], Terminal())
    output = capsys.readouterr().out
    for check in result["checks"]:
        word = {True: "passed", None: "–"}[check["passed"]]
        assert re.search(
            rf"{word} +{re.escape(check['check'])} +{re.escape(check['detail'])}", output
        )
    assert f"{result['weights']} weights, elements H O" in output


def test_the_command_prints_json_and_ends_well() -> None:
    arguments = ["check-potential", "schnet", "--element", "Si", "--json"]
    done = CliRunner().invoke(app, [*arguments, *(f"--set={s}" for s in SETTINGS)])
    assert done.exit_code == 0, done.output
    checks = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["elements of neighbours"]["detail"] == "it is built for one element"
    assert checks["forces"]["passed"] is True


def test_a_class_of_the_users_own_is_refused_by_what_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "blind_potential.py").write_text(BAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        RunError, match=r"fails 2 of 15 checks: elements of neighbours: (.|\n)*images"
    ):
        check_potential("blind_potential:Blind", [], ["H", "O"], Terminal())
    output = capsys.readouterr().out
    assert "FAILED  elements of neighbours" in output
    assert "passed  extensivity" in output


@pytest.mark.parametrize(
    ("name", "setting", "text"),
    [
        ("pain", "features=8", r"found 'pain' \(string\); did you mean \"painn\"\?"),
        ("painn", "feature=8", r"--set train.potential.feature=8 (.|\n)*mean \"features\"\?"),
        ("painn", "features=0", r"train.potential.features\n +found 0 \(integer\)"),
        ("painn", "nonsense", r'"train.potential.nonsense" is not a setting'),
        ("nowhere.at.all:Class", "features=8", "cannot be imported: No module named 'nowhere'"),
    ],
)
def test_mistakes_of_the_user(name: str, setting: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_potential(name, [setting], ["H"], Terminal())


def test_an_element_that_is_none() -> None:
    found = CliRunner().invoke(app, ["check-potential", "painn", "--element", "Xx"])
    assert isinstance(found.exception, ConfigError)
    assert "there is no element Xx" in str(found.exception)
    assert "allowed: symbols such as H, C, Cl" in str(found.exception)

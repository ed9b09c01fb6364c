"""The rules of the house: floors, where torch starts, where float64 becomes float32."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import runner
from runner import sources
from runner.config import SUFFIXES, LossConfig, MetricsConfig, SourceConfig
from runner.fields import FIELDS, LABELS

PACKAGE = Path(runner.__file__).parent
ROOT = PACKAGE.parent

FLOORS: dict[str, int] = {
    "runner": 0,
    "runner.fields": 0,
    "runner.units": 0,
    "runner.errors": 0,
    "runner.config": 1,
    "runner.config.values": 1,
    "runner.config.prepare": 1,
    "runner.config.potentials": 1,
    "runner.config.losses": 1,
    "runner.config.optimization": 1,
    "runner.config.train": 1,
    "runner.config.file": 1,
    "runner.structures": 1,
    "runner.sources": 1,
    "runner.sources.labels": 1,
    "runner.sources.raw": 1,
    "runner.sources.extxyz": 1,
    "runner.sources.ase_db": 1,
    "runner.sources.ase_io": 1,
    "runner.sources.deepmd": 1,
    "runner.sources.hdf5": 1,
    "runner.sources.npz": 1,
    "runner.sources.prepared": 1,
    "runner.self_energies": 1,
    "runner.splits": 1,
    "runner.filters": 1,
    "runner.certificate": 1,
    "runner.reference": 1,
    "runner.store": 1,
    "runner.plots": 1,
    "runner.runs": 1,
    "runner.terminal": 1,
    "runner.batches": 2,
    "runner.neighbors": 2,
    "runner.epochs": 2,
    "runner.loader": 2,
    "runner.losses": 2,
    "runner.compiled": 2,
    "runner.foreign": 1,
    "runner.optimization": 2,
    "runner.checkpoints": 3,
    "runner.processes": 3,
    "runner.metrics": 2,
    "runner.conformance": 2,
    "runner.potentials": 2,
    "runner.potentials.components": 2,
    "runner.potentials.painn": 2,
    "runner.potentials.schnet": 2,
    "runner.potentials.tensornet": 2,
    "runner.potentials.physics": 2,
    "runner.potentials.foreign": 2,
    "runner.potentials.mace": 2,
    "runner.datamodule": 3,
    "runner.training": 3,
    "runner.experiment": 3,
    "runner.trackers": 3,
    "runner.progress": 3,
    "runner.resume": 3,
    "runner.predictor": 3,
    "runner.calculator": 3,
    "runner.prepare": 4,
    "runner.train": 4,
    "runner.check_potential": 4,
    "runner.reproduce": 4,
    "runner.watch": 4,
    "runner.cli": 5,
    "runner.__main__": 5,
}
FLOAT32_ALLOWED = {
    "runner.batches": "the one place that casts",
    "runner.prepare": "np.spacing, which tells what float32 would lose",
}


def _modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["runner", *path.relative_to(PACKAGE).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


MODULES = _modules()


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def test_every_module_has_a_floor() -> None:
    assert set(MODULES) == set(FLOORS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_its_floor_and_below(name: str) -> None:
    ours = [imported for imported in _imports(MODULES[name]) if imported.split(".")[0] == "runner"]
    above = {imported for imported in ours if FLOORS[imported] > FLOORS[name]}
    assert not above


def test_there_are_no_import_cycles() -> None:
    waiting = {
        name: {i for i in _imports(tree) if i in MODULES and i != name and i != "runner"}
        for name, tree in MODULES.items()
    }
    while waiting:
        free = {name for name, needed in waiting.items() if not needed & waiting.keys()}
        assert free, f"these import each other: {sorted(waiting)}"
        waiting = {name: needed for name, needed in waiting.items() if name not in free}


@pytest.mark.parametrize("name", sorted(n for n, floor in FLOORS.items() if floor <= 1))
def test_torch_starts_on_the_second_floor_and_lightning_on_the_third(name: str) -> None:
    tops = {imported.split(".")[0] for imported in _imports(MODULES[name])}
    assert not tops & {"torch", "lightning", "torchmetrics"}


@pytest.mark.parametrize("name", sorted(n for n, floor in FLOORS.items() if floor == 2))
def test_lightning_starts_on_the_third_floor(name: str) -> None:
    assert "lightning" not in {imported.split(".")[0] for imported in _imports(MODULES[name])}


def test_float64_becomes_float32_in_one_place() -> None:
    for name, tree in MODULES.items():
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        casts = attributes & {"float32", "float", "half", "bfloat16", "float16", "single"}
        casts |= strings & {"float32", "f4", "<f4", "float16"}
        assert not casts or name in FLOAT32_ALLOWED, f"{name} mentions {casts}"


def test_the_sections_of_the_config_name_exactly_the_labels() -> None:
    assert set(LossConfig.model_fields) - {"own"} == set(LABELS)
    assert set(MetricsConfig.model_fields) - {"by"} == set(LABELS)
    others = {"path", "format", "positions", "level_of_theory", "split"}
    assert set(SourceConfig.model_fields) == {*LABELS, *others}


def test_the_changelog_tells_of_this_version() -> None:
    (latest, *_) = re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest == runner.__version__


def test_the_top_level_holds_what_the_design_names() -> None:
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    expected = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    expected |= {"runner", "experiments", "tests", "data"}
    made_by_tools = {name for name in visible if name.endswith(".egg-info")} | {"build"}
    assert visible - made_by_tools == expected


def test_the_vocabulary_is_the_design_s() -> None:
    assert {name: (f.per, f.shape, f.unit) for name, f in FIELDS.items()} == {
        "atomic_numbers": ("atom", (), ""),
        "positions": ("atom", (3,), "angstrom"),
        "cell": ("structure", (3, 3), "angstrom"),
        "pbc": ("structure", (3,), ""),
        "stress": ("structure", (3, 3), "eV/angstrom**3"),
        "spin_multiplicity": ("structure", (), ""),
        "quadrupole": ("structure", (3, 3), "e*angstrom**2"),
        "energy": ("structure", (), "eV"),
        "forces": ("atom", (3,), "eV/angstrom"),
        "total_charge": ("structure", (), "e"),
        "dipole": ("structure", (3,), "e*angstrom"),
        "charges": ("atom", (), "e"),
    }
    assert all(name == field.name and field.meaning for name, field in FIELDS.items())


def test_the_formats_of_the_config_are_those_of_the_readers() -> None:
    (allowed, _) = get_args(SourceConfig.model_fields["format"].annotation)
    assert set(get_args(allowed)) == set(sources.READERS)
    assert {*SUFFIXES.values(), "deepmd", "ase"} == set(sources.READERS)


def test_files_are_nouns_and_none_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not drawers & {part for name in MODULES for part in name.split(".")}


def test_the_users_mistakes_are_raised_not_asserted() -> None:
    for name, tree in MODULES.items():
        with_message = [n for n in ast.walk(tree) if isinstance(n, ast.Assert) and n.msg]
        assert not with_message, f"{name} asserts with a message: raise an InputError instead"


def test_units_are_converted_where_files_are_read_and_settings_are_checked() -> None:
    converters = {
        name for name, tree in MODULES.items() for i in _imports(tree) if i == "runner.units"
    }
    checkers = {"runner.config.values", "runner.config.prepare"}
    assert converters == {*checkers, "runner.sources.labels"}


def test_pickles_are_neither_written_nor_trusted() -> None:
    for name, tree in MODULES.items():
        picklers = {"pickle", "dill", "cloudpickle", "joblib"}
        if name == "runner.compiled":  # hashes one, and speaks with a process of its own
            picklers.remove("pickle")
        assert not picklers & set(_imports(tree)), name
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            text = ast.unparse(call)
            if ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in text, f"{name}: {text}"

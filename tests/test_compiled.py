"""The compiled step gives what the eager one gives, on batches of any size."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from molecules import random_structures, without, write_experiment

from runner import compiled as compiled_module
from runner import training
from runner.batches import Batch, Block
from runner.compiled import CompiledStep, Step
from runner.config import LossConfig, load_config, potential_config
from runner.errors import RunError
from runner.losses import Loss
from runner.potentials import build_potential
from runner.prepare import prepare
from runner.structures import Structures
from runner.terminal import Terminal
from runner.train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # importing Inductor
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
]

CUTOFF = 4.0


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs are kept: nowhere, when a test begins."""
    monkeypatch.setattr(compiled_module, "_programs", lambda: tmp_path / "programs")
    return tmp_path / "programs"


def _step(name: str, loss: dict[str, dict[str, object]]) -> Step:
    torch.manual_seed(0)
    config = potential_config({"name": name, "cutoff": "4 angstrom", "features": 8})
    potential = build_potential(config, list(loss), {"energy_per_atom_std": 0.7}).train()
    derivatives = {key: key in loss for key in ("forces", "stress")}
    return Step(potential, Loss(LossConfig.model_validate(loss)), derivatives)


def _compare(step: Step, compiled: CompiledStep, block: Block, weights: dict[str, float]) -> None:
    """Losses, predictions and gradients of several batches, to the accuracy of float32."""
    parameters = list(step.potential.parameters())
    for rows in ([0, 1, 2, 3, 4], [5, 2], list(range(12)), [3, 9, 7]):
        batch = block.take(np.array(rows)).batch()
        assert compiled.fits(batch)
        found, expected = compiled(batch, weights), step(batch, weights)
        assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-4)
        for name, s in expected.sums.items():
            assert found.sums[name].total.item() == pytest.approx(s.total.item(), rel=1e-4)
            assert found.sums[name].count.item() == s.count.item()
        for name, value in expected.prediction.items():
            assert torch.allclose(found.prediction[name], value, rtol=1e-3, atol=1e-4)
        gradients = []
        for result in (found, expected):
            step.potential.zero_grad()
            (2 * result.total).backward()
            gradients.append([torch.zeros(()) if p.grad is None else p.grad for p in parameters])
        largest = max(g.abs().max() for g in gradients[1])
        for one, other in zip(*gradients, strict=True):
            assert (one - other).abs().max() < 1e-4 * largest


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a dozen small structures are computed in parts, those of two as they are."""
    monkeypatch.setattr(compiled_module, "PAIRS_IN_PART", 20)


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", ["painn", "schnet", "tensornet"])
def test_molecules_some_without_a_label(name: str) -> None:
    loss = {"energy": {"per_atom": True}, "forces": {"error": "huber"}, "dipole": {}}
    step = _step(name, loss)
    structures = random_structures([3, 5, 4, 6, 2, 3, 4, 5, 3, 2, 6, 4])
    block = Block.of(without(structures, "forces", [1, 9]), CUTOFF)
    compiled = CompiledStep(step, ["forces"])
    _compare(step, compiled, block, {"energy": 1.0, "forces": 3.0, "dipole": 0.5})
    _compare(step, compiled, block, {"energy": 0.1, "forces": 7.0, "dipole": 2.0})
    large = Block.of(
        without(random_structures([9, 12, 8, 11, 10, 9, 8, 11, 9, 10, 8, 9]), "forces", [1]), CUTOFF
    )
    assert [part.n_structures for part in compiled._parts(large.batch())] == [1] * 12
    _compare(step, compiled, large, {"energy": 0.1, "forces": 7.0, "dipole": 2.0})
    for rows in ([4], []):  # left to the eager step
        assert not compiled.fits(block.take(np.array(rows, np.int64)).batch())


def _crystals() -> Structures:
    rng = np.random.default_rng(0)
    structures = random_structures([2, 3, 2, 4, 2, 3, 3, 2, 4, 2, 3, 2])
    cells = np.eye(3) * 4 + rng.uniform(-0.5, 0.5, (12, 3, 3))
    arrays = structures.structures | {
        "cell": cells,
        "pbc": np.ones((12, 3), bool),
        "stress": rng.normal(size=(12, 3, 3)),
    }
    return Structures(structures.first_atom, structures.atoms, arrays)


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_crystals_with_stress() -> None:
    step = _step("painn", {"energy": {}, "forces": {}, "stress": {}})
    weights = {"energy": 1.0, "forces": 3.0, "stress": 0.5}
    _compare(step, CompiledStep(step), Block.of(_crystals(), CUTOFF), weights)


@pytest.mark.slow
@pytest.mark.parametrize("average", [[], ['train.average.name="ema"']])
def test_a_compiled_training_ends_where_an_eager_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: list[str]
) -> None:
    monkeypatch.setattr(training, "STEPS_MEANWHILE", 4)
    monkeypatch.setattr(compiled_module, "_compiled", lambda *_: pytest.fail("compiled here too"))
    results = []
    for compiled in ("true", "false"):
        config_file = write_experiment(tmp_path / compiled)
        settings = [f"train.compile={compiled}", "train.batch.structures=6", *average]
        config = load_config(config_file, settings)
        prepare(config, tmp_path / "prepared", Terminal())
        results.append(train(config, config_file, tmp_path / "prepared", Terminal(), []))
    assert results[0]["steps"] == results[1]["steps"]
    assert results[0]["best"] == pytest.approx(results[1]["best"], rel=1e-2)
    assert results[0]["best"] != results[1]["best"]  # it was another program


def _two() -> Batch:
    return Block.of(random_structures([3, 4]), CUTOFF).batch()


def test_the_gradient_is_given_once_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "_compiled", lambda graph, *_: graph)
    compiled = CompiledStep(_step("painn", {"energy": {}}))
    result = compiled(_two(), {"energy": 1.0})
    assert not any(value.requires_grad for value in result.prediction.values())
    weight = next(compiled.step.potential.parameters())
    (one,) = torch.autograd.grad(result.total, weight, retain_graph=True)
    (three,) = torch.autograd.grad(3 * result.total, weight)
    assert one.abs().max() > 0
    assert torch.allclose(three, 3 * one)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("reduction", ["structure", "atom"])
def test_parts_give_what_the_whole_batch_does(
    monkeypatch: pytest.MonkeyPatch, reduction: str
) -> None:
    monkeypatch.setattr(compiled_module, "_compiled", lambda graph, *_: graph)
    step = _step("schnet", {"energy": {}, "forces": {"reduction": reduction}, "dipole": {}})
    structures = random_structures([3, 5, 4, 6, 2, 3, 4, 5, 3, 2, 6, 4])
    block = Block.of(without(structures, "forces", [0, 1, 2, 3]), CUTOFF)  # a part has no label
    compiled = CompiledStep(step, ["forces"])
    parts = compiled._parts(block.batch())
    assert len(parts) > 2
    assert not parts[0].labelled["forces"].any()
    _compare(step, compiled, block, {"energy": 1.0, "forces": 3.0, "dipole": 0.5})


@pytest.mark.usefixtures("small_parts")
def test_large_structures_are_parts_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "_compiled", lambda graph, *_: graph)
    step = _step("tensornet", {"energy": {}, "forces": {}})
    compiled, weights = CompiledStep(step), {"energy": 1.0, "forces": 3.0}
    _compare(
        step,
        compiled,
        Block.of(random_structures([3, 5, 4, 6, 2, 3, 4, 5, 3, 2, 6, 4]), CUTOFF),
        weights,
    )
    large = Block.of(random_structures([9, 12, 8, 11, 10, 9, 8, 11, 9, 10, 8, 9]), CUTOFF)
    assert [part.n_structures for part in compiled._parts(large.batch())] == [1] * 12
    _compare(step, compiled, large, weights)


@pytest.mark.usefixtures("small_parts")
def test_parts_of_crystals_give_what_the_whole_batch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "_compiled", lambda graph, *_: graph)
    step = _step("schnet", {"energy": {}, "forces": {}, "stress": {}})
    compiled, block = CompiledStep(step), Block.of(_crystals(), CUTOFF)
    assert len(compiled._parts(block.batch())) > 2
    _compare(step, compiled, block, {"energy": 1.0, "forces": 3.0, "stress": 0.5})


@pytest.mark.usefixtures("small_parts")
def test_the_numbers_are_the_same_to_the_bit_for_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled_module, "_compiled", lambda graph, *_: graph)
    batch = Block.of(random_structures([3, 5, 4, 6, 2, 3, 4, 5]), CUTOFF).batch()
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        compiled = CompiledStep(_step("schnet", {"energy": {}, "forces": {}}))
        result = compiled(batch, {"energy": 1.0, "forces": 3.0})
        weights = list(compiled.step.potential.parameters())
        gradients = torch.autograd.grad(result.total, weights, allow_unused=True)
        found.append([result.total, *result.prediction.values(), *gradients])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_a_wrong_compilation_is_noticed_and_another_one_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[Any] = []

    def wrong(graph: Callable[..., list[torch.Tensor]], _: Any, options: Any) -> Callable[..., Any]:
        tried.append(options)
        return lambda *given: [1.01 * out for out in graph(*given)]

    monkeypatch.setattr(compiled_module, "_compiled", wrong)
    text = r"does not give what the step itself does(.|\n)*train.compile(.|\n)*to false"
    with pytest.raises(RunError, match=text):
        CompiledStep(_step("painn", {"energy": {}}))(_two(), {"energy": 1.0})
    expected = [liberties | compiled_module.ON_CPU for liberties in compiled_module.LIBERTIES]
    assert tried == expected


def test_where_rounding_makes_the_loss_a_compilation_is_as_right_as_the_step_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A potential that has learnt its data: its errors are the last digits of its numbers."""
    step, batch = _step("painn", {"energy": {}, "forces": {}}), _two()
    weights = {"energy": 1.0, "forces": 1.0}
    exact = step.double().potential(batch.double(), forces=True)
    learnt = {name: exact[name].detach().float() for name in ("energy", "forces")}
    batch = replace(batch, labels=batch.labels | learnt)
    assert 0 < step(batch, weights).total.item() < 1e-10

    def other(by: float) -> None:
        def off(graph: Callable[..., list[torch.Tensor]], *_: Any) -> Callable[..., Any]:
            def program(*given: torch.Tensor) -> list[torch.Tensor]:
                first, *rest = given
                return graph(first * (1 + by), *rest)

            return program

        monkeypatch.setattr(compiled_module, "_compiled", off)
        CompiledStep(step)(batch, weights)

    other(by=2e-7)  # a digit that rounding may make another
    with pytest.raises(RunError, match="the compiled step does not give"):
        other(by=1e-4)
    monkeypatch.setattr(compiled_module, "ROUNDING", 0)
    with pytest.raises(RunError, match="the compiled step does not give"):
        other(by=2e-7)


def test_a_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no g++ here\nlong story")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)
    with pytest.raises(RunError, match=r"cannot be compiled: no g\+\+ here(.|\n)*C\+\+ compiler"):
        CompiledStep(_step("painn", {"energy": {}}))(_two(), {"energy": 1.0})


def test_options_are_those_of_the_version_of_torch() -> None:
    options = {name: value for free in compiled_module.LIBERTIES for name, value in free.items()}
    options |= compiled_module.ON_CPU
    assert compiled_module._known(options | {"cpp.of_the_future": 1, "future": 2}) == options


def _result(step: Step) -> list[torch.Tensor]:
    """The loss and its gradients by a compiled step that is new."""
    result = CompiledStep(step)(_two(), {"energy": 2.0})
    weights = [p for p in step.potential.parameters() if p.requires_grad]
    return [result.total, *torch.autograd.grad(result.total, weights, allow_unused=True)]


def test_a_program_is_kept_for_other_weights_and_gives_the_same_to_the_bit(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, other = (_step("painn", {"energy": {}}) for _ in range(2))
    with torch.no_grad():
        for parameter in other.potential.parameters():
            parameter.mul_(1.5)
    expected = [_result(step), _result(other)]
    assert not torch.equal(expected[0][0], expected[1][0])
    (kept,) = programs.iterdir()
    made: list[Any] = []
    make = compiled_module._compiled
    monkeypatch.setattr(compiled_module, "_compiled", lambda *given: made.append(1) or make(*given))
    for one, numbers in zip((step, other), expected, strict=True):
        found = _result(one)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, numbers, strict=True))
    assert not made
    program = kept / "program"
    for damaged in (program.read_bytes()[:-100], b"", b"no program"):
        program.write_bytes(damaged)
        assert torch.equal(_result(step)[0], expected[0][0])
        assert made.pop()
    (kept / "layout.json").unlink()
    _result(step)
    assert made.pop()
    assert list(programs.iterdir()) == [kept]


def test_a_program_is_made_by_another_process(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, batch, weights = _step("schnet", {"energy": {}}), _two(), {"energy": 1.0}
    step.potential.eval()
    compiled = CompiledStep(step, learns=False)
    compiled.compile_aside(batch, weights)
    assert compiled.begun
    first = compiled._aside
    compiled.compile_aside(batch, weights)
    assert compiled._aside is first
    monkeypatch.setattr(compiled_module, "_compiled", lambda *_: pytest.fail("compiled here too"))
    found, expected = compiled(batch, weights), step(batch, weights)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    assert len(list(programs.iterdir())) == 1
    another = CompiledStep(step, learns=False)
    another.compile_aside(batch, weights)  # it is there
    assert not another.begun


def test_a_process_that_fails_to_compile_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "COMPILE", "raise SystemExit(1)")
    monkeypatch.setattr(compiled_module, "_compiled", lambda graph, *_: graph)
    step, batch, weights = _step("schnet", {"energy": {}}), _two(), {"energy": 1.0}
    compiled = CompiledStep(step, learns=False)
    compiled.compile_aside(batch, weights)
    assert compiled.begun
    assert compiled(batch, weights).total.item() == pytest.approx(step(batch, weights).total.item())


def test_a_process_that_compiles_ends_with_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "COMPILE", "import time; time.sleep(600)")
    compiled = CompiledStep(_step("schnet", {"energy": {}}), learns=False)
    compiled.close()  # there is none yet
    compiled.compile_aside(_two(), {"energy": 1.0})
    assert compiled._aside is not None
    process = compiled._aside._process
    assert process is not None
    assert process.poll() is None
    assert compiled.is_waited_for
    compiled.close()
    assert not compiled.is_waited_for
    assert process.poll() == -signal.SIGTERM


def test_what_is_not_kept_is_not_made_by_another_process() -> None:
    step = _step("schnet", {"energy": {}})
    step.potential.readouts = OfOnesOwn()
    compiled = CompiledStep(step, learns=False)
    compiled.compile_aside(_two(), {"energy": 1.0})
    assert not compiled.begun


class OfOnesOwn(torch.nn.Module):
    """A class outside the package, whose code may change."""


def test_a_program_is_known_by_all_that_it_is_made_of() -> None:
    def place(step: Step, batch: Batch, incomplete: tuple[str, ...] = (), **more: Any) -> Any:
        return CompiledStep(step, incomplete, **more)._place(batch, {"cpp.threads": 1})

    batch = _two()
    step = _step("painn", {"energy": {}, "forces": {}})
    known = place(step, batch)
    torch.manual_seed(1)
    again = _step("painn", {"energy": {}, "forces": {}})
    for parameter in again.potential.parameters():
        torch.nn.init.normal_(parameter.data)
    larger = Block.of(random_structures([5, 4, 6]), CUTOFF).batch()
    assert place(again, larger) == known  # neither weights nor sizes of batches matter
    for changed in (
        place(_step("schnet", {"energy": {}, "forces": {}}), batch),
        place(_step("painn", {"energy": {}, "forces": {"error": "huber"}}), batch),
        place(step, batch, ("forces",)),
        place(step, batch, learns=False),
        place(step, replace(batch, cell=torch.eye(3).repeat(2, 1, 1))),
        place(Step(again.potential.double(), again.loss, again.derivatives), batch),
    ):
        assert changed not in (known, None)
    step.potential.readouts = OfOnesOwn()
    assert place(step, batch) is None


def test_a_constant_of_a_potential_is_part_of_what_a_program_is_known_by() -> None:
    places = set()
    for constant in (1.0, 2.0, torch.tensor([1.0]), torch.tensor([2.0])):
        step = _step("painn", {"energy": {}})
        step.potential.of_this_test = constant  # type: ignore[assignment]
        places.add(CompiledStep(step)._place(_two(), {}))
    assert len(places) == 4


def test_a_program_is_known_by_the_same_name_in_every_process() -> None:
    code = (
        "import test_compiled as t; from runner.compiled import CompiledStep;"
        "print(CompiledStep(t._step('painn', {'energy': {}}))._place(t._two(), {}).name)"
    )
    names = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(names) == 1


def test_masks_that_are_alike_in_the_first_batch_are_kept_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled_module, "_compiled", lambda graph, *_: graph)
    step = _step("painn", {"energy": {}, "forces": {}, "dipole": {}})
    structures = random_structures([3, 5, 4, 6, 2, 3, 4, 5])
    block = Block.of(without(without(structures, "forces", [4]), "dipole", [5, 6]), CUTOFF)
    compiled = CompiledStep(step, ["dipole", "forces"])
    weights = {"energy": 1.0, "forces": 3.0, "dipole": 5.0}
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
        batch = block.take(np.array(rows)).batch()
        found, expected = compiled(batch, weights), step(batch, weights)
        assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
        for name, s in expected.sums.items():
            assert found.sums[name].count.item() == s.count.item()


def test_a_program_is_tried_with_every_term_also_those_that_weigh_nothing_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[dict[str, float]] = []

    def compare(_: CompiledStep, __: Batch, weights: dict[str, float]) -> str:
        tried.append(dict(weights))
        return ""

    monkeypatch.setattr(compiled_module, "_compiled", lambda graph, *_: graph)
    monkeypatch.setattr(CompiledStep, "_compare", compare)
    compiled = CompiledStep(_step("painn", {"energy": {}, "forces": {}}))
    compiled(_two(), {"energy": 2.0, "forces": 0.0})
    assert tried[0] == {"energy": 2.0, "forces": 1.0}

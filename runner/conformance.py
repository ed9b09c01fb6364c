"""What physics, and the training, demand of any potential: asked in float64, with random weights.

Each check is a function of a `Subject`. It returns what it found, raises `Fails` where the
potential does not do what it has to, and `NotApplicable` where the question has no meaning for it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase.data import atomic_numbers
from torch import Tensor

from runner.batches import Batch, make_batch
from runner.potentials import Potential
from runner.structures import Structures, concatenate

STEP = 1e-5  # Å, or strain, of finite differences
EXACT = 1e-9  # relative to the largest number, where only rounding differs
BY_DIFFERENCES = 1e-6  # the same, where a slope is found by finite differences
LOW_PRECISION = 1e-3  # the same, between single and double precision


class Fails(Exception):
    """The potential does not do what it has to."""


class NotApplicable(Exception):
    """The question has no meaning for this potential."""


@dataclass(frozen=True)
class Finding:
    """What came out of a check.

    Attributes:
        check: its name.
        passed: None where it does not apply.
        detail: figures, or what is wrong.
    """

    check: str
    passed: bool | None
    detail: str


class Subject:
    """A potential under examination, and structures to try it on."""

    def __init__(self, potential: Potential, elements: Sequence[str]) -> None:
        """Examine a potential.

        Args:
            potential: is turned to float64.
            elements: symbols of those that it is built for.
        """
        self.potential = potential.double().eval()
        self.numbers = [int(atomic_numbers[symbol]) for symbol in elements]
        self.sight = potential.near or potential.cutoff  # Å, how far the architecture sees

    def batch(self, structures: Structures) -> Batch:
        """Structures with the pairs that the potential needs."""
        potential = self.potential
        return make_batch(structures, potential.cutoff, potential.dtype, potential.near)

    def predict(self, structures: Structures) -> dict[str, np.ndarray]:
        """All quantities; of periodic structures the stress too."""
        found = self.potential(self.batch(structures), stress=True)
        return {name: value.detach().numpy() for name, value in found.items()}

    def molecules(self, *sizes: int, seed: int = 0) -> Structures:
        """Random atoms at least 0.9 Å apart, neutral singlets."""
        rng = np.random.default_rng(seed)
        return concatenate([self.structure(_spread_out(rng, n), rng) for n in sizes])

    def structure(
        self, positions: np.ndarray, chosen: np.random.Generator | Sequence[int]
    ) -> Structures:
        """One structure, of random elements or of those that are numbered."""
        if isinstance(chosen, np.random.Generator):
            numbers = chosen.choice(self.numbers, len(positions))
        else:
            numbers = np.array([self.numbers[index % len(self.numbers)] for index in chosen])
        return Structures(
            np.array([0, len(positions)]),
            {
                "atomic_numbers": numbers.astype(np.uint8),
                "positions": np.array(positions, np.float64),
            },
            {"total_charge": np.zeros(1), "spin_multiplicity": np.ones(1)},
        )

    def crystal(self, pbc: tuple[bool, bool, bool] = (True, True, True)) -> Structures:
        """Three atoms in a triclinic cell smaller than most cutoffs."""
        positions = [[0.1, 0, 0], [1.2, 0.3, 0.2], [0.2, 1.6, 3.9]]
        cell = np.array([[[3.1, 0, 0], [0.6, 3.3, 0], [-0.4, 0.5, 3.6]]])
        return _with(self.structure(np.array(positions), [0, 1, 2]), cell, np.array([pbc]))

    def periodic(self) -> Structures:
        """A crystal, if the potential can have one.

        Raises:
            NotApplicable: its charges act at any distance.
        """
        if np.isinf(self.potential.cutoff):
            raise NotApplicable("charges act at any distance, so there are only molecules")
        return self.crystal()


def _spread_out(rng: np.random.Generator, n: int) -> np.ndarray:
    positions: list[np.ndarray] = []
    width = 1.6 * n ** (1 / 3) + 0.5
    while len(positions) < n:
        candidate = rng.uniform(0, width, size=3)
        if all(np.linalg.norm(candidate - other) > 0.9 for other in positions):
            positions.append(candidate)
    return np.array(positions)


def _with(structures: Structures, cell: np.ndarray, pbc: np.ndarray) -> Structures:
    return replace(structures, structures=structures.structures | {"cell": cell, "pbc": pbc})


def _moved(structures: Structures, positions: np.ndarray) -> Structures:
    return replace(structures, atoms=structures.atoms | {"positions": positions})


def _deformed(structures: Structures, matrix: np.ndarray) -> Structures:
    moved = _moved(structures, structures.atoms["positions"] @ matrix)
    cell = structures.structures["cell"] @ matrix
    return replace(moved, structures=structures.structures | {"cell": cell})


def _same(
    found: np.ndarray | float,
    expected: np.ndarray | float,
    what: str,
    tolerance: float = EXACT,
    least: float = 1.0,
) -> float:
    """The largest deviation.

    Args:
        found: what the potential says.
        expected: what it should say.
        what: names it.
        tolerance: relative to the largest expected number.
        least: what counts as the largest if all are smaller.

    Raises:
        Fails: it is too large, or not a number.
    """
    deviation = float(np.abs(np.subtract(found, expected)).max(initial=0.0))
    largest = max(float(np.abs(expected).max(initial=0.0)), least)
    if not deviation <= tolerance * largest:
        raise Fails(f"{what} by {deviation:.2g}, where {tolerance * largest:.1g} would be rounding")
    return deviation


def check_forces(subject: Subject) -> str:
    """Forces are minus the slope of the energy, by finite differences."""
    structures = subject.molecules(5, 3)
    forces = subject.predict(structures)["forces"]
    owner = np.repeat(np.arange(2), [5, 3])
    displaced = []
    for atom, axis, sign in np.ndindex(8, 3, 2):
        one = structures.take(owner[[atom]])
        positions = one.atoms["positions"].copy()
        positions[atom - structures.first_atom[owner[atom]], axis] += STEP * (1 - 2 * sign)
        displaced.append(_moved(one, positions))
    energies = subject.predict(concatenate(displaced))["energy"].reshape(8, 3, 2)
    slopes = -(energies[..., 0] - energies[..., 1]) / (2 * STEP)
    if not np.abs(slopes).max() > 0:
        raise Fails("the energy does not depend on the positions at all")
    off = _same(forces, slopes, "forces differ from the slope of the energy", BY_DIFFERENCES, 0.1)
    return f"off by {off:.1g} of {np.abs(slopes).max():.2g} eV/Å"


def check_stress(subject: Subject) -> str:
    """The stress is the slope of the energy with strain, over the volume, by finite differences."""
    subject.periodic()
    worst = 0.0
    for pbc in ((True, True, True), (True, False, True)):
        crystal = subject.crystal(pbc)
        stress = subject.predict(crystal)["stress"][0]
        volume = abs(np.linalg.det(crystal.structures["cell"][0]))
        strained = []
        for a, b, sign in np.ndindex(3, 3, 2):
            strain = np.zeros((3, 3))
            strain[a, b] = STEP * (1 - 2 * sign)
            strained.append(_deformed(crystal, np.eye(3) + 0.5 * (strain + strain.T)))
        energies = subject.predict(concatenate(strained))["energy"].reshape(3, 3, 2)
        slopes = (energies[..., 0] - energies[..., 1]) / (2 * STEP * volume)
        what = f"the stress differs from the slope of the energy (pbc {pbc})"
        worst = max(worst, _same(stress, slopes, what, BY_DIFFERENCES, 0.01))
    return f"off by {worst:.1g} eV/Å³"


def check_rotation(subject: Subject) -> str:
    """Rotated and reflected, a structure has the same energy, and vectors turn with it."""
    structures = subject.molecules(7, 4)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    before, worst = subject.predict(structures), 0.0
    for word, turn in (
        ("rotated", q * np.sign(np.linalg.det(q))),
        ("reflected", -q * np.sign(np.linalg.det(q))),
    ):
        after = subject.predict(_moved(structures, structures.atoms["positions"] @ turn.T))
        for name, value in after.items():
            expected = before[name]
            if name in ("forces", "dipole"):
                expected = expected @ turn.T
            elif name == "quadrupole":
                expected = turn @ expected @ turn.T
            worst = max(worst, _same(value, expected, f"{word}, a structure's {name} differs"))
    return f"off by {worst:.1g}"


def check_translation(subject: Subject) -> str:
    """Moved as a whole, a structure has the same energy, forces and charges."""
    structures, shift = subject.molecules(5), np.array([10.0, -3.0, 2.0])
    before = subject.predict(structures)
    after = subject.predict(_moved(structures, structures.atoms["positions"] + shift))
    expected = dict(before)
    if "dipole" in before:
        expected["dipole"] = before["dipole"] + before["total_charge"][:, None] * shift
    names = [name for name in before if name != "quadrupole"]  # moves in its own way
    off = [_same(after[n], expected[n], f"moved, a structure's {n} differs") for n in names]
    return f"off by {max(off):.1g}"


def check_permutation(subject: Subject) -> str:
    """Energies do not depend on the order of the atoms, nor on that of the elements."""
    structures = subject.molecules(8)
    order = np.random.default_rng(1).permutation(8)
    by_element = np.argsort(structures.atoms["atomic_numbers"], kind="stable")[::-1]
    before, worst = subject.predict(structures), 0.0
    for chosen in (order, by_element):
        atoms = {name: array[chosen] for name, array in structures.atoms.items()}
        after = subject.predict(replace(structures, atoms=atoms))
        for name, value in after.items():
            expected = before[name][chosen] if name in ("forces", "charges") else before[name]
            what = f"in another order of the atoms the {name} differs"
            worst = max(worst, _same(value, expected, what))
    return f"off by {worst:.1g}"


def check_elements(subject: Subject) -> str:
    """Exchange the elements of two neighbours, and the energy changes; so does what an atom feels.

    The latter is asked of two atoms: if each had an energy by its own element and its distance from
    the other alone, those of XX and YY together would be twice that of XY.
    """
    if len(subject.numbers) < 2:
        raise NotApplicable("it is built for one element")
    sight = min(subject.sight, 4.0)
    least = np.inf
    for first in range(len(subject.numbers) - 1):
        # the centre is of one element, its neighbours at two distances are exchanged
        positions = np.array([[0.0, 0, 0], [0.3 * sight, 0, 0], [0, 0.45 * sight, 0]])
        energies = [
            subject.predict(subject.structure(positions, [0, *pair]))["energy"][0]
            for pair in ((first, first + 1), (first + 1, first))
        ]
        least = min(least, abs(energies[0] - energies[1]))
        if not least > 1e-7:
            raise Fails(
                "two neighbours of an atom can exchange their elements, and the energy stays"
            )
        x, y, mixed = (
            subject.predict(subject.structure(positions[:2], pair))["energy"][0]
            for pair in ((first, first), (first + 1, first + 1), (first, first + 1))
        )
        if not abs(x + y - 2 * mixed) > 1e-7:
            raise Fails("what an atom feels of a neighbour does not depend on that one's element")
    return f"the energy changes by {least:.1g} eV at least"


def check_extensivity(subject: Subject) -> str:
    """Two molecules far from each other have the sum of their energies."""
    potential = subject.potential
    if "coulomb" in potential.terms and (np.isinf(potential.cutoff) or potential.equalise):
        raise NotApplicable("charges act at any distance, or are shared by the whole structure")
    one, other = subject.molecules(5, seed=1), subject.molecules(3, seed=2)
    far = other.atoms["positions"] + potential.cutoff + 20.0
    both = {
        "positions": np.concatenate([one.atoms["positions"], far]),
        "atomic_numbers": np.concatenate(
            [one.atoms["atomic_numbers"], other.atoms["atomic_numbers"]]
        ),
    }
    joint = Structures(np.array([0, 8]), both, one.structures)
    separate = subject.predict(concatenate([one, other]))["energy"].sum()
    together = subject.predict(joint)["energy"][0]
    off = _same(together, separate, "the energy of two distant molecules differs from their sum")
    return f"off by {off:.1g} eV"


def check_batches(subject: Subject) -> str:
    """A batch, also of molecules and crystals, gives what its structures give alone."""
    mixed = [subject.molecules(n, seed=n) for n in (4, 1, 9, 2)]
    if np.isfinite(subject.potential.cutoff):
        mixed.insert(2, subject.crystal())
    together, worst, atom = subject.predict(concatenate(mixed)), 0.0, 0
    for index, structure in enumerate(mixed):
        alone = subject.predict(structure)
        rows = slice(atom, atom + structure.n_atoms)
        atom = rows.stop
        for name, value in alone.items():
            chosen = rows if name in ("forces", "charges") else slice(index, index + 1)
            what = f"in a batch, a structure's {name} differs from what it is alone"
            worst = max(worst, _same(together[name][chosen], value, what))
    return f"off by {worst:.1g}"


def check_cutoff(subject: Subject) -> str:
    """Energy and forces have no step where an atom crosses a cutoff."""
    potential, worst = subject.potential, 0.0
    for cutoff in {subject.sight, potential.cutoff}:
        if np.isinf(cutoff):
            continue

        def at(distance: float) -> tuple[float, float]:
            positions = np.array([[0, 0, 0], [0.9, 0.3, 0], [distance, 0, 0]])
            found = subject.predict(subject.structure(positions, [0, 1, 2]))
            return float(found["energy"][0]), float(found["forces"][2, 0])

        inside, outside = at(cutoff - 1e-4), at(cutoff + 1e-4)
        work = 1e-4 * (inside[1] + outside[1])
        what = f"at the cutoff of {cutoff:g} Å the {{}} has a step"
        worst = max(
            _same(
                inside[0] - outside[0],
                work,
                what.format("energy"),
                1e-7,
            ),
            # what a slope does within 1e-4 Å of where it vanishes
            _same(inside[1], outside[1], what.format("force"), 1e-3),
            worst,
        )
        if abs(at(0.6 * subject.sight)[1]) == 0:
            raise Fails(f"an atom at {0.6 * subject.sight:g} Å, within the cutoff, feels nothing")
    return f"steps of {worst:.1g}"


def check_isolated(subject: Subject) -> str:
    """Atoms without neighbours have an energy, no force, and nothing that is not a number."""
    lone = subject.structure(np.array([[1.0, 2.0, 3.0]]), [0])
    distance = 5 * subject.sight
    pair = subject.structure(np.array([[0.0, 0, 0], [distance, 0, 0]]), [0, 0])
    charged = "coulomb" in subject.potential.terms
    for word, structures in (("one atom", lone), ("two distant atoms", pair)):
        found = subject.predict(structures)
        wrong = [name for name, value in found.items() if not np.isfinite(value).all()]
        if wrong:
            raise Fails(f"of {word} the {wrong[0]} is not a number")
        if (not charged or structures is lone) and np.abs(found["forces"]).max() > EXACT:
            raise Fails(f"{word} has forces")
    if charged:
        return "finite"
    energies = [subject.predict(one)["energy"][0] for one in (lone, pair)]
    _same(energies[1], 2 * energies[0], "two distant atoms differ from twice one atom")
    return f"an atom has {energies[0]:.3g} eV"


def check_images(subject: Subject) -> str:
    """A crystal is the same in a larger cell, and with atoms in another image of the cell."""
    crystal = subject.periodic()
    before = subject.predict(crystal)
    cell = crystal.structures["cell"][0]
    positions, numbers = crystal.atoms["positions"], crystal.atoms["atomic_numbers"]
    wrapped = _moved(crystal, positions + np.array([[1, 0, 0], [0, -2, 0], [1, 1, 3]]) @ cell)
    after, worst = subject.predict(wrapped), 0.0
    for name in ("energy", "forces", "stress"):
        what = f"with atoms in other images of the cell the {name} differs"
        worst = max(worst, _same(after[name], before[name], what))
    atoms = {
        "positions": np.concatenate([positions, positions + cell[1]]),
        "atomic_numbers": np.tile(numbers, 2),
    }
    larger = Structures(np.array([0, 6]), atoms, dict(crystal.structures))
    larger = _with(larger, (cell * np.array([[1], [2], [1]]))[None], np.ones((1, 3), bool))
    after = subject.predict(larger)
    for name, expected in (
        ("energy", 2 * before["energy"]),
        ("forces", np.tile(before["forces"], (2, 1))),
        ("stress", before["stress"]),
    ):
        what = f"in a cell twice as large the {name} differs"
        worst = max(worst, _same(after[name], expected, what))
    return f"off by {worst:.1g}"


def check_inputs(subject: Subject) -> str:
    """What a structure is told beside its atoms changes what is predicted; charges sum to it."""
    potential, structures = subject.potential, subject.molecules(4)
    if not potential.inputs:
        raise NotApplicable("it has no inputs beside atoms")
    before, changes = subject.predict(structures), []
    for name in sorted(potential.inputs):
        more = structures.structures | {name: structures.structures[name] + 1}
        after = subject.predict(replace(structures, structures=more))
        changes.append(max(float(np.abs(after[n] - before[n]).max()) for n in before))
        if not changes[-1] > 1e-7:
            raise Fails(f"another {name} changes nothing")
        if potential.equalise:
            _same(after["total_charge"], more["total_charge"], "charges sum to another charge")
    return f"one more changes {min(changes):.1g} at least"


def _force_loss(subject: Subject, batch: Batch) -> Tensor:
    found = subject.potential(batch)
    loss: Tensor = found["forces"].square().mean() + found["energy"].square().mean()
    return loss


def check_training(subject: Subject) -> str:
    """A loss on forces has slopes by the weights, which are those of finite differences."""
    potential = subject.potential
    potential.train()
    try:
        batch = subject.batch(subject.molecules(5, 3))
        weights = [p for p in potential.parameters() if p.requires_grad]
        if not weights:
            raise NotApplicable("it has no weights")
        slopes = torch.autograd.grad(_force_loss(subject, batch), weights, allow_unused=True)
        if all(slope is None for slope in slopes):
            raise Fails("no weight has any influence on energies and forces")
        generator = torch.Generator().manual_seed(0)
        along = [
            torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().abs().mean()
            for p in weights
        ]
        pairs = zip(slopes, along, strict=True)
        slope = sum(float((s * d).sum()) for s, d in pairs if s is not None)
        before = [p.detach().clone() for p in weights]
        losses = []
        for step in (STEP, -STEP, 0.0):
            with torch.no_grad():
                for p, start, d in zip(weights, before, along, strict=True):
                    p.copy_(start + step * d)
            losses.append(float(_force_loss(subject, batch).detach()))
    finally:
        potential.eval()
    expected = (losses[0] - losses[1]) / (2 * STEP)
    what = "the slope of a loss on forces along the weights is off"
    off = _same(slope, expected, what, 1e-5, max(abs(losses[0]), 1e-9))
    unused = sum(slope is None for slope in slopes)
    note = f"; {unused} of {len(weights)} weights have no part in it" if unused else ""
    return f"off by {off:.1g} of {abs(expected):.2g}{note}"


def check_reload(subject: Subject) -> str:
    """Weights go into a file as tensors alone, come back, and give the same numbers to the bit."""
    structures, file = subject.molecules(5, 3), io.BytesIO()
    before, again = subject.predict(structures), subject.predict(structures)
    if any((before[name] != again[name]).any() for name in before):
        raise Fails("asked twice, it says two things")
    torch.save(subject.potential.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with torch.no_grad():
        for parameter in subject.potential.parameters():
            parameter.add_(1.0)
    subject.potential.load_state_dict(state)
    after = subject.predict(structures)
    wrong = [name for name in before if (before[name] != after[name]).any()]
    if wrong:
        raise Fails(f"with its weights read back from a file the {wrong[0]} differs")
    return "the same to the bit"


def check_precision(subject: Subject) -> str:
    """In single precision it gives the same to a few digits."""
    structures = subject.molecules(7, 4)
    exact = subject.predict(structures)
    state = {name: tensor.clone() for name, tensor in subject.potential.state_dict().items()}
    try:
        subject.potential.to(torch.get_default_dtype())
        single = subject.predict(structures)
    finally:
        subject.potential.double().load_state_dict(state)
    off = [
        _same(single[name], exact[name], f"in single precision the {name} differs", LOW_PRECISION)
        for name in ("energy", "forces")
    ]
    return f"off by {max(off):.1g}"


CHECKS: dict[str, Callable[[Subject], str]] = {
    "forces": check_forces,
    "stress": check_stress,
    "rotation, reflection": check_rotation,
    "translation": check_translation,
    "permutation": check_permutation,
    "elements of neighbours": check_elements,
    "extensivity": check_extensivity,
    "batch against single": check_batches,
    "smooth at the cutoff": check_cutoff,
    "isolated atoms": check_isolated,
    "periodic images": check_images,
    "inputs": check_inputs,
    "gradients of a training": check_training,
    "saved and loaded": check_reload,
    "single precision": check_precision,
}


def examine(potential: Potential, elements: Sequence[str]) -> list[Finding]:
    """All checks.

    Args:
        potential: with random weights; it is in float64 afterwards.
        elements: symbols of those that it is built for.
    """
    subject = Subject(potential, elements)
    return [_find(name, check, subject) for name, check in CHECKS.items()]


def _find(name: str, check: Callable[[Subject], str], subject: Subject) -> Finding:
    try:
        return Finding(name, True, check(subject))
    except Fails as failure:
        return Finding(name, False, str(failure))
    except NotApplicable as reason:
        return Finding(name, None, str(reason))
    except Exception as error:  # a class of the user's may do anything
        (line, *_) = [*str(error).splitlines(), ""]
        return Finding(name, False, f"{type(error).__name__}: {line}")

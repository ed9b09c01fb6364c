"""The experiment file: its classes, how it is read, and what is said when it is wrong.

`[prepare]` alone decides the prepared dataset; `[train]` never does. Only the recipes (`prepare`,
`train`) see a whole `Config`; everything else is handed its own section or plain values.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import string
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tomli
import tomli_w
from ase.data import chemical_symbols
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from runner.errors import ConfigError, UnitError, did_you_mean
from runner.fields import FROM_CHARGES, LABELS, POSITIONS
from runner.fields import Field as Quantity
from runner.units import conversion_factor, parse_quantity

# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------


def _reject(message: str) -> PydanticCustomError:
    """An error of ours that pydantic collects with all the others."""
    return PydanticCustomError("runner", "{message}", {"message": message})


def _quantity(unit: str) -> Any:
    """The type of a number that is written with its unit, and kept in `unit`."""

    def parse(value: object) -> object:
        if not isinstance(value, str):
            raise _reject(f'{value!r} has no unit; write a string such as "{value} {unit}"')
        try:
            quantity = parse_quantity(value, unit)
        except UnitError as error:
            raise _reject("; ".join(filter(None, (error.what, error.allowed)))) from None
        if not math.isfinite(quantity):
            raise _reject(f"found {_shown(value)}; it should be finite")
        return quantity

    return Annotated[
        float,
        BeforeValidator(parse),
        PlainSerializer(lambda value: f"{value!r} {unit}"),
        WithJsonSchema({"type": "string", "examples": [f"5 {unit}"]}),
    ]


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _share(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise _reject(
            f"found {_shown(value)}; it is a fraction such as 0.8, or a count such as 1000"
        )
    return value


Share = Annotated[int | float, BeforeValidator(_share)]


class Section(BaseModel):
    """A table of the config: unknown keys and wrong types are mistakes; nothing can be changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


# --------------------------------------------------------------------------------------------------
# [prepare]
# --------------------------------------------------------------------------------------------------


SUFFIXES: dict[str, str] = {
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".db": "ase_db",
    ".hdf5": "hdf5",
    ".hdf": "hdf5",
    ".h5": "hdf5",
    ".npz": "npz",
    ".lmdb": "aselmdb",
    ".aselmdb": "aselmdb",
    ".zarr": "prepared",
}
COMPRESSED = (".gz", ".xz")  # extended XYZ only


def format_of(path: str, declared: str | None) -> str:
    """The format of a data file: the one declared, or the one of its suffix.

    A name without one of the `SUFFIXES` is left to `ase.io`, a folder to DeePMD.
    """
    if declared is not None:
        return declared
    name = Path(path)
    suffix = (Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix).lower()
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    return "deepmd" if name.is_dir() else "ase"


class LabelConfig(Section):
    """Where a source keeps one label: `{ key = "…", unit = "…" }` or `{ value = 0 }`."""

    key: str | None = None
    """Name of the label in the file."""
    value: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """One value for all structures, instead of a key."""
    unit: str | None = None
    """Unit in the file; may be left out where the file states it."""
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor on top of the unit; −1 turns a gradient into forces."""
    missing: Literal["nan"] | None = None
    """`"nan"`: a NaN in the file means that there is no label, rather than a mistake."""

    @model_validator(mode="after")
    def _one_origin(self) -> LabelConfig:
        if (self.key is None) == (self.value is None):
            raise _reject('exactly one of "key" and "value" is needed')
        return self

    def stored_shape(self, quantity: Quantity) -> tuple[int, ...]:
        """Shape of one value as the file keeps it."""
        return quantity.shape

    def unit_in_file(self, quantity: Quantity) -> str:
        """A unit of the dimension that the file's numbers have."""
        return quantity.unit


class TensorConfig(LabelConfig):
    """Where a source keeps a symmetric tensor."""

    order: str | None = None
    """`"xx yy zz yz xz xy"`, in the file's order, where it keeps six numbers instead of nine."""

    @model_validator(mode="after")
    def _six_components(self) -> TensorConfig:
        if self.order is not None and sorted(self.components) != sorted(TENSOR_COMPONENTS):
            raise _reject(
                f'order = "{self.order}" is not {", ".join(TENSOR_COMPONENTS)}, each once'
            )
        return self

    @property
    def components(self) -> list[str]:
        """The six components in the file's order; `yx` is `xy`."""
        return ["".join(sorted(pair)) for pair in (self.order or "").split()]

    def stored_shape(self, quantity: Quantity) -> tuple[int, ...]:
        """Shape of one value as the file keeps it."""
        return (6,) if self.order is not None else quantity.shape


TENSOR_COMPONENTS = ("xx", "yy", "zz", "yz", "xz", "xy")


class StressConfig(TensorConfig):
    """Where a source keeps the stress, or the virial −V·stress."""

    virial: bool = False
    """The key holds the virial, an energy; the stress is −virial/V."""

    def unit_in_file(self, quantity: Quantity) -> str:
        """A unit of the dimension that the file's numbers have."""
        return "eV" if self.virial else quantity.unit


class QuadrupoleConfig(TensorConfig):
    """Where a source keeps the quadrupole, and what it means by it."""

    convention: Literal["traced", "traceless"]
    """`traced`: Σ q r r; `traceless`: made traceless by whatever made the file."""


class PositionsConfig(Section):
    """The unit of the positions, where it is not the format's own."""

    unit: str | None = None
    """Unit in the file: angstrom, unless the file or its format says otherwise."""


def _check_unit(quantity: Quantity) -> Callable[[Any, Any], Any]:
    def check(
        label: LabelConfig | PositionsConfig,
        others: Any,  # pydantic.ValidationInfo
    ) -> LabelConfig | PositionsConfig:
        meant = label.unit_in_file(quantity) if isinstance(label, LabelConfig) else quantity.unit
        if label.unit is None and not quantity.assumed_unit and not _may_state_units(others.data):
            raise _reject(f'{quantity.name} needs a unit; write for example unit = "{meant}"')
        try:
            conversion_factor(label.unit or meant, meant)
        except UnitError as error:
            raise _reject("; ".join(filter(None, (error.what, error.allowed)))) from None
        return label

    return check


def _may_state_units(source: Mapping[str, Any]) -> bool:
    """Whether the files of a source may say by themselves in which units they are."""
    path = source.get("path", "")
    paths = [path] if isinstance(path, str) else path
    return any(format_of(name, source.get("format")) != "extxyz" for name in paths)


def _label(name: str, kind: type[LabelConfig] = LabelConfig) -> Any:
    return Annotated[kind, AfterValidator(_check_unit(LABELS[name]))]


class SourceConfig(Section):
    """One set of files that share their keys and units."""

    path: str | list[str]
    """A file, a list of files, or a glob; relative to the file this stands in. `$NAME` is an
    environment variable."""
    format: (
        Literal["extxyz", "ase_db", "ase", "hdf5", "npz", "deepmd", "aselmdb", "prepared"] | None
    ) = None
    """Told from the suffix where it is not given."""
    level_of_theory: str | None = None
    """Name of the method that made the labels; each level gets self-energies of its own."""
    split: Literal["train", "val", "test"] | None = None
    """Puts all structures of these files into one split; the other sources are divided."""
    positions: Annotated[PositionsConfig, AfterValidator(_check_unit(POSITIONS))] = (
        PositionsConfig()
    )
    """Unit of the positions."""
    energy: _label("energy") | None = None  # type: ignore[valid-type]
    """Total energy."""
    forces: _label("forces") | None = None  # type: ignore[valid-type]
    """Forces, −∂E/∂R."""
    stress: _label("stress", StressConfig) | None = None  # type: ignore[valid-type]
    """Stress (1/V) ∂E/∂ε, in ASE's sign; `virial = true` takes it from the virial."""
    total_charge: _label("total_charge") | None = None  # type: ignore[valid-type]
    """Charge of the structure; in e unless a unit is given."""
    spin_multiplicity: _label("spin_multiplicity") | None = None  # type: ignore[valid-type]
    """2S + 1."""
    dipole: _label("dipole") | None = None  # type: ignore[valid-type]
    """Dipole about the origin of the positions."""
    quadrupole: _label("quadrupole", QuadrupoleConfig) | None = None  # type: ignore[valid-type]
    """Quadrupole about the origin of the positions; its convention is declared."""
    charges: _label("charges") | None = None  # type: ignore[valid-type]
    """Partial charges; in e unless a unit is given."""

    @property
    def labels(self) -> dict[str, LabelConfig]:
        """The labels that this source maps, by the names of `runner.fields`."""
        mapped = {name: getattr(self, name) for name in LABELS}
        return {name: label for name, label in mapped.items() if label is not None}


_Energy = _quantity("eV")


class SelfEnergiesConfig(Section):
    """How the energies of the elements are found."""

    method: Literal["fit", "given", "isolated_atoms", "none"] = "fit"
    """`fit`: least squares over the training split; `given`: `values`; `isolated_atoms`: energies
    of the structures of one atom, which then leave the splits; `none`: all zero."""
    values: dict[str, _Energy | dict[str, _Energy]] = {}  # type: ignore[valid-type]
    """Given self-energies by element, or by level of theory and element; with `fit` these stay and
    the rest are fitted, with `isolated_atoms` they stand in for atoms that are not there."""
    fit_method: Literal["least_squares", "huber"] = "least_squares"
    """`huber`: a residual pulls the fit no harder than `huber_epsilon` scales do, the scale being
    fitted with it; outliers, five scales off, are listed."""
    huber_epsilon: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.35
    """Residual, in units of the fitted scale, from which Huber's function is linear."""
    if_underdetermined: Literal["minimum_norm", "error"] = "minimum_norm"
    """What to do where compositions cannot tell the elements apart."""

    @model_validator(mode="after")
    def _values_fit_the_method(self) -> SelfEnergiesConfig:
        if self.method == "given" and not self.values:
            raise _reject('method = "given" needs values = { H = "-13.6 eV", … }')
        if self.method == "none" and self.values:
            raise _reject('method = "none" takes no values; write method = "given"')
        if len({isinstance(value, dict) for value in self.values.values()}) > 1:
            raise _reject("values are all by element, or all by level of theory and element")
        return self

    @property
    def values_by_level(self) -> dict[str, dict[str, float]]:
        """Given self-energies by level of theory; one level without a name is ""."""
        by_level = {k: dict(v) for k, v in self.values.items() if isinstance(v, dict)}
        flat = {k: v for k, v in self.values.items() if not isinstance(v, dict)}
        return by_level or ({"": flat} if flat else {})


class SplitConfig(Section):
    """Which structures train, validate and test."""

    method: Literal["random", "group", "file"] = "random"
    """`random`: structure by structure; `group`: no group is in two splits; `file`: as written in
    `file`, or as each source says."""
    train: Share | None = None
    """Fraction, or number, of the structures (of `group`: aimed at); 0.8 unless given."""
    val: Share | None = None
    """The same for validation; 0.1 unless given."""
    test: Share | None = None
    """The same for the test; 0.1 unless given."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the shuffle and of the split."""
    test_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the test split alone, which then stays when `seed` changes."""
    group_by: str | None = None
    """With `group`: `"formula"`, `"molecule"`, `"source"`, or a key of the file that names the
    group."""
    file: str | dict[str, str] | None = None
    """With `file`: a file of indices for all splits, or one for each split."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Number of parts for cross-validation."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Which of them is the test split, counted from 0."""
    train_size: Count | None = None
    """Only so many of the training split; a smaller one is part of a larger one."""

    @model_validator(mode="before")
    @classmethod
    def _usual_shares(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("method") == "file":
            return given
        if "folds" in given:
            return {"val": 0.1} | given
        return {"train": 0.8, "val": 0.1, "test": 0.1} | given

    @model_validator(mode="after")
    def _consistent(self) -> SplitConfig:
        if (self.method == "group") != (self.group_by is not None):
            raise _reject('method = "group" and group_by belong together')
        if self.file is not None and self.method != "file":
            raise _reject('method = "file" and file belong together')
        if (self.folds is None) != (self.fold is None):
            raise _reject("folds and fold belong together, such as folds = 5 and fold = 0")
        unknown = set(self.file if isinstance(self.file, dict) else ()) - {"train", "val", "test"}
        if unknown:
            raise _reject(f'file has a "{sorted(unknown)[0]}"; the splits are train, val and test')
        of_shares = (self.train, self.val, self.test, self.test_seed, self.folds)
        if self.method == "file" and any(value is not None for value in of_shares):
            raise _reject(
                'method = "file" takes the splits as they are written: no shares or folds'
            )
        if self.method == "file":
            return self
        return self._check_shares() if self.folds is None else self._check_folds(self.folds)

    def _check_shares(self) -> SplitConfig:
        shares = [share for share in (self.train, self.val, self.test) if share is not None]
        if len({type(share) for share in shares if share != 0}) > 1:
            raise _reject("train, val and test must be all fractions or all counts")
        if self.train == 0:
            raise _reject("train must be more than 0")
        if isinstance(self.train, float) and not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
            raise _reject(f"the fractions train + val + test must sum to 1, not {sum(shares):g}")
        return self

    def _check_folds(self, folds: int) -> SplitConfig:
        if self.fold is not None and self.fold >= folds:
            raise _reject(f"fold is counted from 0, so it is at most {folds - 1}")
        if any(value is not None for value in (self.train, self.test, self.test_seed)):
            raise _reject("with folds, test is one fold and train what val leaves: give only val")
        if isinstance(self.val, float) and self.val + 1 / folds >= 1:
            raise _reject("val and one fold leave nothing to train on")
        return self


class FilterConfig(Section):
    """`[prepare.filter]`: which structures are dropped, before they are split."""

    elements: Annotated[list[str], Field(min_length=1)] | None = None
    """Keep only structures of these elements."""
    min_atoms: Count | None = None
    """Keep only structures of at least so many atoms."""
    max_atoms: Count | None = None
    """Keep only structures of at most so many atoms."""
    max_force: Annotated[_quantity("eV/angstrom"), Field(gt=0)] | None = None  # type: ignore[valid-type]
    """Drop a structure with a longer force on an atom."""
    min_energy_per_atom: _quantity("eV") | None = None  # type: ignore[valid-type]
    """Drop a structure with a lower total energy an atom, self-energies included."""
    max_energy_per_atom: _quantity("eV") | None = None  # type: ignore[valid-type]
    """Drop a structure with a higher total energy an atom, self-energies included."""
    total_charge: Annotated[list[float], Field(min_length=1)] | None = None
    """Keep only structures of these charges."""
    duplicates: Literal["keep", "drop"] = "keep"
    """`drop`: of structures with the same composition, distances and energy keep the first."""

    @model_validator(mode="after")
    def _known_elements(self) -> FilterConfig:
        _require_elements(self.elements or [])
        return self


def _require_elements(symbols: Iterable[str]) -> None:
    for symbol in symbols:
        if symbol not in chemical_symbols[1:]:
            hint = did_you_mean(symbol, chemical_symbols[1:])
            raise _reject("; ".join(filter(None, [f'"{symbol}" is not an element', hint])))


class PrepareConfig(Section):
    """`[prepare]`: what the prepared dataset is made of."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Readable prefix of the dataset's folder."""
    source: Annotated[list[SourceConfig], Field(min_length=1)]
    """One or several `[[prepare.source]]`."""
    self_energies: SelfEnergiesConfig = SelfEnergiesConfig()
    split: SplitConfig = SplitConfig()
    filter: FilterConfig = FilterConfig()

    @property
    def levels(self) -> list[str]:
        """Levels of theory of the energies, in the order of the sources; [""] without names."""
        named = [source.level_of_theory or "" for source in self.source if source.energy]
        return list(dict.fromkeys(named)) or [""]

    @model_validator(mode="after")
    def _energies_to_fit(self) -> PrepareConfig:
        if self.self_energies.method != "none" and not any(s.energy for s in self.source):
            raise _reject(
                "no source maps an energy, so there is nothing to fit; add "
                'energy = { key = "…", unit = "…" } to a source, or write '
                '[prepare.self_energies] method = "none"'
            )
        return self

    @model_validator(mode="after")
    def _levels_have_their_own_values(self) -> PrepareConfig:
        levels, given = self.levels, self.self_energies.values_by_level
        if len(levels) > 1 and "" in levels:
            raise _reject(
                "some sources name their level_of_theory and some do not: energies of different "
                "levels cannot share self-energies; name the level of every source"
            )
        if len(levels) > 1 and "" in given:
            raise _reject(
                f"one set of self-energies cannot serve the levels {', '.join(levels)}: write "
                f'values by level, such as values."{levels[0]}".H = "-13.6 eV"'
            )
        unknown = set(given) - {"", *levels}
        if unknown:
            hint = did_you_mean(sorted(unknown)[0], levels)
            raise _reject(
                f"values are given for {sorted(unknown)[0]}, which no source has as its "
                f"level_of_theory" + (f"; {hint}" if hint else "")
            )
        return self

    @model_validator(mode="after")
    def _one_convention(self) -> PrepareConfig:
        found = {s.quadrupole.convention for s in self.source if s.quadrupole}
        if len(found) > 1:
            raise _reject("the sources have quadrupoles of both conventions, traced and traceless")
        return self

    @model_validator(mode="after")
    def _splits_are_said(self) -> PrepareConfig:
        pinned = [source.split is not None for source in self.source]
        if self.split.method == "file" and not (self.split.file or all(pinned)):
            raise _reject(
                'method = "file" needs a file of indices, or a split in every source '
                '(split = "train")'
            )
        if self.split.file and any(pinned):
            raise _reject("a file of indices and a split in a source contradict each other")
        return self


# --------------------------------------------------------------------------------------------------
# [train]
# --------------------------------------------------------------------------------------------------


class BatchConfig(Section):
    """The size of a batch of one device: one of these, never above it; 32 structures unless
    given."""

    structures: Count | None = None
    """Structures in a batch."""
    atoms: Count | None = None
    """Atoms in a batch, of structures that are packed to fill it."""
    pairs: Count | None = None
    """Pairs (i, j) within the cutoff in a batch, packed likewise; an atom without any counts as
    one."""

    @model_validator(mode="before")
    @classmethod
    def _usual_size(cls, given: Any) -> Any:
        return given or {"structures": 32} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _one_size(self) -> BatchConfig:
        named = [f"{name} = {value}" for name, value in self if value is not None]
        if len(named) != 1:
            raise _reject(
                f"found {' and '.join(named) or 'none'}; the size of a batch is given in "
                "structures, in atoms or in pairs. Replace the table by one with a single key; "
                "on the command line --set 'train.batch={atoms = 2048}'"
            )
        return self

    @property
    def unit(self) -> Literal["structures", "atoms", "pairs"]:
        """What is counted."""
        if self.atoms is not None:
            return "atoms"
        return "structures" if self.structures is not None else "pairs"

    @property
    def limit(self) -> int:
        """How many of them are in a batch at most."""
        return self.structures or self.atoms or self.pairs or 0


class WeightsConfig(Section):
    """How often the structures of each source, or group, come in an epoch.

    An epoch stays as long as without weights.
    """

    by: Literal["source", "group"]
    """`source`: the file; `group`: as `prepare.split.group_by` has it."""
    values: dict[str, NonNegative] | None = None
    """How often a structure comes, by the name of its source or group, relative to those not named,
    which have 1. Unless given, all sources, or groups, come equally often."""


class DataConfig(Section):
    """`[train.data]`: where batches come from."""

    residence: Literal["auto", "memory", "stream", "device"] = "auto"
    """`memory`: all in RAM, with the neighbour lists; `stream`: read from disk every epoch, for
    what is larger; `device`: all on the GPU, where the batches are made. `auto`: the GPU if all
    fits in half of what is free there, else RAM likewise, else the disk. The batches are the
    same."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Threads that make batches ahead; 0: each when it is needed. One for a GPU or a stream, else
    none, unless given."""
    train_size: Count | None = None
    """Only so many structures of the training split, for learning curves; a smaller set is part of
    a larger one. The self-energies are those of the whole split."""
    weights: WeightsConfig | None = None
    """Every structure once an epoch, unless given."""
    rotate: bool = False
    """Whether training structures are turned at random each time, with every label that is a vector
    or a tensor; for potentials that are not equivariant by construction."""


if TYPE_CHECKING:
    _Distance = float
else:
    _Distance = Annotated[_quantity("angstrom"), Field(gt=0)]


class EnergyConfig(Section):
    """`[train.potential.energy]`: how the energy of an atom, in eV, is made of what the
    architecture puts out: times the scale, plus the shift."""

    scale: Literal["none", "one", "per_element"] = "one"
    """`one`: the spread of the energy per atom; `per_element`: the same, in proportion to the root
    mean square force on atoms of an element; `none`: 1 eV."""
    shift: Literal["none", "one", "per_element"] = "none"
    """`one`: the mean energy per atom; `per_element`: what least squares finds for an element in
    the offset-corrected energies (zero, if the self-energies were fitted so). Of the training
    split, as the scale is."""
    learnt: bool = False
    """Whether scale and shift are trained, from there on."""


class ChargesConfig(Section):
    """`[train.potential.charges]`: partial charges. They are also there, without this table, if a
    term of the loss or of the physics needs them."""

    equalise: bool = False
    """Add the same to all atoms of a structure, so that its charges sum to its `total_charge`."""


class CoulombConfig(Section):
    """`[train.potential.coulomb]`: the Coulomb energy of the partial charges, damped where atoms
    meet, see `runner.potentials.physics`."""

    cutoff: _Distance | None = None
    """Where it ends smoothly; not before the architecture's own cutoff. Unless given, all atoms of
    a molecule interact; periodic structures need one."""


class ZBLConfig(Section):
    """`[train.potential.zbl]`: the screened repulsion of nuclei of Ziegler, Biersack, Littmark."""

    cutoff: _Distance | None = None
    """Where it ends smoothly; the architecture's cutoff unless given, and not beyond it."""


class ArchitectureConfig(Section):
    """What every architecture has around it."""

    name: str
    cutoff: _Distance = 5.0
    """Distance up to which atoms see each other."""
    inputs: list[Literal["total_charge", "spin_multiplicity"]] = []
    """What the architecture is told of a structure beside its atoms; every structure has to have
    it."""
    energy: EnergyConfig = EnergyConfig()
    """Scale and shift of the energies of atoms."""
    charges: ChargesConfig | None = None
    """Partial charges."""
    coulomb: CoulombConfig | None = None
    """Their Coulomb energy; none unless the table is there."""
    zbl: ZBLConfig | None = None
    """Repulsion of the nuclei; none unless the table is there."""

    @property
    def needed_inputs(self) -> frozenset[str]:
        """What every structure has to have, for the architecture or for its charges."""
        equalise = self.charges is not None and self.charges.equalise
        return frozenset(self.inputs) | ({"total_charge"} if equalise else frozenset())

    @model_validator(mode="after")
    def _ranges(self) -> ArchitectureConfig:
        near, coulomb, zbl = self.cutoff, self.coulomb, self.zbl
        if coulomb is not None and coulomb.cutoff is not None and coulomb.cutoff < near:
            raise _reject(
                f"the cutoff of coulomb, {coulomb.cutoff:g} Å, is below the architecture's, "
                f"{near:g} Å; make it at least that"
            )
        if zbl is not None and zbl.cutoff is not None and zbl.cutoff > near:
            raise _reject(
                f"the cutoff of zbl, {zbl.cutoff:g} Å, is beyond the architecture's, {near:g} Å; "
                "make it at most that"
            )
        return self


class PaiNNConfig(ArchitectureConfig):
    """Hyperparameters of PaiNN, see `runner.potentials.painn`."""

    name: Literal["painn"]
    features: Count = 128
    """Scalar features, and vector features, of an atom."""
    interactions: Count = 3
    """Rounds of message passing."""
    radial_basis: Count = 20
    """Radial basis functions."""


class SchNetConfig(ArchitectureConfig):
    """Hyperparameters of SchNet, see `runner.potentials.schnet`."""

    name: Literal["schnet"]
    features: Count = 64
    """Features of an atom, and of a filter: 64 as published (arXiv:1706.08566)."""
    interactions: Count = 3
    """Rounds of message passing: 3 as published (arXiv:1706.08566); 6 is the default of the
    authors' program."""
    radial_basis: Count = 50
    """Gaussian radial basis functions, evenly up to the cutoff: at the default cutoff, 50 are one
    about every 0.1 Å, as published."""


class TensorNetConfig(ArchitectureConfig):
    """Hyperparameters of TensorNet, see `runner.potentials.tensornet`."""

    name: Literal["tensornet"]
    features: Count = 128
    """3 × 3 matrices of an atom (channels): 128 as its authors have it for rMD17, 256 for QM9
    (examples of torchmd-net)."""
    interactions: Count = 2
    """Interaction layers: 2 for rMD17, 3 for QM9."""
    radial_basis: Count = 32
    """Exponential-normal radial basis functions: 32 for rMD17, 64 for QM9."""


class ForeignConfig(ArchitectureConfig):
    """An architecture that comes from elsewhere, see `runner.potentials.foreign`: a class of yours,
    or one that an installed package offers. All further keys go to its constructor, which checks
    them."""

    model_config = ConfigDict(extra="allow")

    name: str
    """`"package.module:Class"`, or the name of an entry point of the group `runner.potentials`."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What goes to the constructor beside the cutoff."""
        return dict(self.model_extra or {})


ENTRY_POINTS = "runner.potentials"
FOREIGN = "foreign"
ARCHITECTURES: tuple[type[ArchitectureConfig], ...] = (PaiNNConfig, SchNetConfig, TensorNetConfig)


def installed_potentials() -> dict[str, importlib.metadata.EntryPoint]:
    """Potentials that installed packages offer, by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _kind_of_potential(value: Any) -> str | None:
    """Which class a `[train.potential]` table is of, as its `name` tells."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    if not isinstance(name, str) or name in NAMES_OF_ARCHITECTURES:
        return name if isinstance(name, str) else str(name or "")
    return FOREIGN if ":" in name or name in installed_potentials() else name


PotentialConfig = Annotated[
    Annotated[PaiNNConfig, Tag("painn")]
    | Annotated[SchNetConfig, Tag("schnet")]
    | Annotated[TensorNetConfig, Tag("tensornet")]
    | Annotated[ForeignConfig, Tag(FOREIGN)],
    Discriminator(_kind_of_potential),
]
NAMES_OF_ARCHITECTURES = ("painn", "schnet", "tensornet")


def potential_config(table: Mapping[str, Any]) -> ArchitectureConfig:
    """The `[train.potential]` table of a checkpoint, as its class."""
    adapter: TypeAdapter[ArchitectureConfig] = TypeAdapter(PotentialConfig)
    return adapter.validate_python(dict(table))


class WeightSchedule(Section):
    """A weight that goes from `start` to `end` over the first epochs, or steps."""

    start: NonNegative
    """Weight at the beginning."""
    end: NonNegative
    """Weight from the end of the change on."""
    epochs: Count | None = None
    """How long it changes,"""
    steps: Count | None = None
    """or how long in steps of the optimiser."""
    shape: Literal["linear", "cosine"] = "linear"
    """Along a straight line, or along half a cosine."""

    @model_validator(mode="after")
    def _one_length(self) -> WeightSchedule:
        if (self.epochs is None) == (self.steps is None):
            raise _reject(
                "a weight changes over so many epochs, or over so many steps: one of them"
            )
        return self

    @property
    def highest(self) -> float:
        """The highest weight on the way."""
        return max(self.start, self.end)

    def at(self, epoch: int, step: float = 0.0) -> float:
        """The weight in an epoch, at a step, both counted from 0."""
        done = epoch / self.epochs if self.epochs is not None else step / (self.steps or 1)
        done = min(done, 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


class PiecewiseWeight(Section):
    """A weight that has each of `values` from an epoch, or a step, on; the first from 0."""

    values: Annotated[list[NonNegative], Field(min_length=2)]
    """One after the other."""
    epochs: list[Count] | None = None
    """Epochs from which on there is another value, counted from 0,"""
    steps: list[Count] | None = None
    """or steps."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> PiecewiseWeight:
        bounds = self.epochs if self.steps is None else self.steps
        both = self.epochs is not None and self.steps is not None
        fits = bounds is not None and len(bounds) == len(self.values) - 1
        if both or not fits or bounds != sorted(set(bounds or [])):
            raise _reject(
                "a weight in pieces has the epochs, or the steps, at which it changes, one less "
                "than values: { values = [1.0, 10.0, 100.0], epochs = [20, 50] }"
            )
        return self

    @property
    def highest(self) -> float:
        """The highest weight on the way."""
        return max(self.values)

    def at(self, epoch: int, step: float = 0.0) -> float:
        """The weight in an epoch, at a step, both counted from 0."""
        bounds, now = (self.epochs, epoch) if self.epochs is not None else (self.steps or [], step)
        return self.values[sum(now >= bound for bound in bounds)]


def _weight(value: object) -> object:
    if isinstance(value, Mapping):
        kind = PiecewiseWeight if "values" in value else WeightSchedule
        return kind.model_validate(value)
    if isinstance(value, bool) or not isinstance(
        value, int | float | WeightSchedule | PiecewiseWeight
    ):
        raise _reject(
            "a weight is a number, { start = 1.0, end = 10.0, epochs = 50 } or "
            "{ values = [1.0, 10.0], epochs = [20] }"
        )
    if isinstance(value, int | float) and not 0 <= value < math.inf:
        raise _reject("a weight is finite and not negative")
    return value


class TermConfig(Section):
    """What every term of the loss has."""

    weight: Annotated[float | WeightSchedule | PiecewiseWeight, BeforeValidator(_weight)] = 1.0
    """A number, or a schedule over epochs or steps."""
    by_source: dict[str, NonNegative] = {}
    """What structures of a source count, by the name of its file; those not named count 1. The mean
    stays one over all structures that have the label."""

    def weight_at(self, epoch: int, step: float = 0.0) -> float:
        """The weight in an epoch, at a step, both counted from 0."""
        weight = self.weight
        return weight if isinstance(weight, int | float) else weight.at(epoch, step)

    @property
    def highest_weight(self) -> float:
        """The highest weight on the way."""
        return self.weight if isinstance(self.weight, int | float) else self.weight.highest


class LossTermConfig(TermConfig):
    """A term of the loss that compares a quantity with its label."""

    error: Literal["squared", "absolute", "huber"] = "squared"
    """Function of a component's deviation."""
    huber_delta: Positive = 1.0
    """Where the Huber error turns from squared to linear, in the label's unit."""


class EnergyLossConfig(LossTermConfig):
    """The energy's term of the loss."""

    per_atom: bool = False
    """Divide the deviation by the number of atoms, before it is squared."""


class AtomLossConfig(LossTermConfig):
    """A term of the loss over a quantity of the atoms."""

    reduction: Literal["structure", "atom"] = "structure"
    """`structure`: structures count alike; `atom`: all atoms of the batch count alike."""
    by_element: dict[str, NonNegative] = {}
    """What atoms of an element count, by its symbol; those not named count 1."""

    @model_validator(mode="after")
    def _known_elements(self) -> AtomLossConfig:
        _require_elements(self.by_element)
        return self


class OwnLossConfig(TermConfig):
    """A term of the loss that is a class of yours, derived from `runner.losses.Term`. All further
    keys go to its constructor."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`"package.module:Class"`."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What goes to the constructor."""
        return dict(self.model_extra or {})


class LossConfig(Section):
    """`[train.loss]`: the terms, by the quantity that they compare."""

    energy: EnergyLossConfig | None = None
    forces: AtomLossConfig | None = None
    stress: LossTermConfig | None = None
    total_charge: LossTermConfig | None = None
    dipole: LossTermConfig | None = None
    quadrupole: LossTermConfig | None = None
    charges: AtomLossConfig | None = None
    spin_multiplicity: LossTermConfig | None = None
    own: dict[str, OwnLossConfig] = {}
    """Terms of your own, by what they are called in the logs: `[train.loss.own.angle]`."""

    @model_validator(mode="after")
    def _own_names(self) -> LossConfig:
        for name in self.own:
            if name in LABELS or name == "total_loss" or not name.isidentifier():
                raise _reject(
                    f"a term of your own cannot be called {name}: it needs a name of letters, "
                    "digits and underscores that is no quantity's"
                )
        return self

    @model_validator(mode="after")
    def _some_term(self) -> LossConfig:
        if not self.terms:
            raise _reject("the loss has no term; add for example [train.loss.energy]")
        return self

    @property
    def terms(self) -> dict[str, TermConfig]:
        """The terms that are there, by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "own"}
        return {name: term for name, term in named.items() if term is not None} | self.own


METRIC_NAMES = ("mae", "rmse", "max_error", "r2", "cosine")


def _metric(name: object) -> object:
    if not isinstance(name, str) or not (name in METRIC_NAMES or ":" in name):
        hint = did_you_mean(str(name), METRIC_NAMES)
        allowed = f'it is one of {", ".join(METRIC_NAMES)}, or "package.module:Class"'
        raise _reject("; ".join(filter(None, [f"found {_shown(name)}", hint, allowed])))
    return name


_METRIC_SCHEMA: dict[str, Any] = {
    "anyOf": [{"enum": list(METRIC_NAMES)}, {"type": "string", "pattern": ":"}]
}
MetricName = Annotated[str, BeforeValidator(_metric), WithJsonSchema(_METRIC_SCHEMA)]
MetricNames = Annotated[list[MetricName], Field(min_length=1)]


class MetricsConfig(Section):
    """`[train.metrics]`: which errors are measured of which quantity: `mae`, `rmse`, `max_error`,
    `r2` of its components, `cosine` of the angle between vectors, on average, or
    `"package.module:Class"`: a class of torchmetrics, or yours derived from `torchmetrics.Metric`,
    made without arguments and updated with predicted and reference components, both flat."""

    by: list[Literal["element", "source", "size", "charge"]] = []
    """Validation and test errors also apart: of the atoms of each element, and of the structures
    of each source, of similar numbers of atoms (1, 2, 3–4, 5–8, …), or of each total charge."""
    energy: MetricNames | None = None
    """Offset-corrected; the same of the energy per atom comes with it."""
    forces: MetricNames | None = None
    """Components of the forces on all atoms."""
    stress: MetricNames | None = None
    """Nine components a structure."""
    total_charge: MetricNames | None = None
    """Sums of the predicted charges."""
    dipole: MetricNames | None = None
    """Three components a structure."""
    quadrupole: MetricNames | None = None
    """Nine components a structure."""
    charges: MetricNames | None = None
    """Charges of all atoms."""
    spin_multiplicity: MetricNames | None = None
    """2S + 1 of the structures."""

    @model_validator(mode="after")
    def _cosines_of_vectors(self) -> MetricsConfig:
        for name, metrics in self.properties.items():
            if "cosine" in metrics and LABELS[name].shape != (3,):
                raise _reject(f"{name} has no direction, so there is no cosine of it")
        return self

    @property
    def properties(self) -> dict[str, list[str]]:
        """The metrics of every quantity that has some."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "by"}
        return {name: list(metrics) for name, metrics in named.items() if metrics is not None}


class OptimizerConfig(Section):
    """What every optimiser has. Weight decay is for matrices of weights alone: biases, the weights
    of norms, and scale and shift of the energies have none."""

    name: str
    lr: Positive = 1e-3
    """Learning rate."""
    weight_decay: NonNegative = 0.01
    """How strongly matrices of weights are drawn to zero."""


_Share = Annotated[float, Field(ge=0, lt=1)]
_Betas = Annotated[list[_Share], Field(min_length=2, max_length=2)]


class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101)."""

    name: Literal["adamw"] = "adamw"
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    betas: _Betas = [0.9, 0.999]
    """Decay of the averages of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the root of the latter."""
    amsgrad: bool = False
    """Divide by the largest such root so far."""


class AdamConfig(AdamWConfig):
    """Adam (Kingma and Ba, ICLR 2015, arXiv:1412.6980); the other keys are those of `adamw`."""

    name: Literal["adam"]  # type: ignore[assignment]
    weight_decay: NonNegative = 0.0
    """Added to the gradient as weights times this."""


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent."""

    name: Literal["sgd"]
    weight_decay: NonNegative = 0.0
    """Added to the gradient as weights times this."""
    momentum: _Share = 0.9
    """Share of the last step in a step."""
    nesterov: bool = True
    """Whether the momentum looks ahead."""

    @model_validator(mode="after")
    def _momentum_to_look_with(self) -> SGDConfig:
        if self.nesterov and not self.momentum:
            raise _reject("nesterov needs a momentum; set one, or nesterov = false")
        return self


class MuonConfig(OptimizerConfig):
    """Muon for the matrices of weights, whose momentum it makes orthogonal; AdamW for the others,
    and for embeddings of elements (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Rates
    are matched to those of AdamW, so both have the same (Liu et al. 2025, arXiv:2502.16982)."""

    name: Literal["muon"]
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, of both."""
    momentum: _Share = 0.95
    """Of Muon."""
    betas: _Betas = [0.9, 0.999]
    """Of AdamW."""


class ScheduleFreeConfig(OptimizerConfig):
    """AdamW whose weights are averaged on the way, instead of a schedule of the learning rate
    (Defazio et al., NeurIPS 2024, arXiv:2405.15682); the extra `schedule-free` installs it."""

    name: Literal["schedule_free"]
    lr: Positive = 2.5e-3
    """Learning rate; somewhat above that of AdamW."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    betas: _Betas = [0.9, 0.999]
    """Between average and fast weights, and decay of the average of the gradient's square."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the rate rises to `lr`."""


class ForeignOptimizerConfig(OptimizerConfig):
    """A class of `torch.optim`, or of yours. All further keys go to its constructor, which checks
    them; weight decay only if it is given."""

    model_config = ConfigDict(extra="allow")

    name: str
    """`"torch.optim:NAdam"`, `"package.module:Class"`."""
    weight_decay: NonNegative | None = None  # type: ignore[assignment]
    """Goes to the class for matrices of weights, and 0 for the others; unless given, it has its
    own."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What goes to the constructor beside rate and weight decay."""
        return dict(self.model_extra or {})


def _kind_of_optimizer(value: Any) -> str:
    """Which class a `[train.optimizer]` table is of, as its `name` tells."""
    given = isinstance(value, Mapping)
    name = value.get("name", "adamw") if given else getattr(value, "name", "")
    return FOREIGN if ":" in str(name) else str(name)


AnyOptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[AdamConfig, Tag("adam")]
    | Annotated[SGDConfig, Tag("sgd")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[ScheduleFreeConfig, Tag("schedule_free")]
    | Annotated[ForeignOptimizerConfig, Tag(FOREIGN)],
    Discriminator(_kind_of_optimizer),
]


class ScheduleConfig(Section):
    """How the learning rate changes, in epochs, of which parts count."""

    name: str
    warmup: NonNegative = 0.0
    """Epochs in which the rate rises in a straight line from zero."""

    def relative_rate(self, epoch: float, epochs: int) -> float:
        """What the rate of the optimiser is multiplied by.

        Args:
            epoch: that are done, with the part of the one that is under way.
            epochs: of the whole training.
        """
        if epoch < self.warmup:
            return epoch / self.warmup
        return self.after_warmup(epoch - self.warmup, max(epochs - self.warmup, 1e-9))

    def after_warmup(self, epoch: float, epochs: float) -> float:  # noqa: ARG002
        """The same with the warm-up taken off."""
        return 1.0


class ConstantConfig(ScheduleConfig):
    """The rate stays as it is."""

    name: Literal["constant"]


class PlateauConfig(ScheduleConfig):
    """The rate is lowered when the validation loss no longer improves."""

    name: Literal["reduce_on_plateau"] = "reduce_on_plateau"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What the rate is multiplied by on a plateau of the validation loss."""
    patience: Count = 10
    """Epochs in a row without improvement, of one part in 10,000 at least, that are let pass; after
    one more the rate is lowered."""
    min_lr: NonNegative = 1e-6
    """The rate does not go below this."""


class CosineConfig(ScheduleConfig):
    """Down half a cosine (Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983, eq. 5)."""

    name: Literal["cosine"]
    end: _Share = 0.0
    """Rate at the end, in units of the optimiser's."""

    def after_warmup(self, epoch: float, epochs: float) -> float:
        """Half a cosine from 1 to `end`."""
        done = min(epoch / epochs, 1.0)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * done)) / 2


class CosineRestartsConfig(ScheduleConfig):
    """Down half a cosine, again and again (Loshchilov and Hutter, arXiv:1608.03983)."""

    name: Literal["cosine_restarts"]
    period: Positive
    """Epochs of the first cosine."""
    growth: Annotated[float, Field(ge=1)] = 1.0
    """Each period is this many times as long as the one before."""
    end: _Share = 0.0
    """Rate at the end of each, in units of the optimiser's."""

    def after_warmup(self, epoch: float, epochs: float) -> float:  # noqa: ARG002
        """Half a cosine from 1 to `end`, of the period that it is in."""
        if self.growth == 1:
            periods = epoch / self.period
            done = max(periods - math.floor(periods + 1e-12), 0.0)
        else:  # the n-th period starts after period · (growthⁿ − 1)/(growth − 1)
            relative = epoch / self.period
            n = math.floor(math.log(relative * (self.growth - 1) + 1, self.growth) + 1e-12)
            started = (self.growth**n - 1) / (self.growth - 1)
            done = (relative - started) / self.growth**n
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * done)) / 2


class OneCycleConfig(ScheduleConfig):
    """Up to the optimiser's rate and down again, along cosines (Smith and Topin 2018,
    arXiv:1708.07120, with the shape of `torch.optim.lr_scheduler.OneCycleLR`; the momentum stays
    as it is)."""

    name: Literal["one_cycle"]
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Part of the training in which the rate goes up."""
    start: _Share = 0.04
    """Rate at the beginning, in units of the optimiser's."""
    end: _Share = 4e-6
    """Rate at the end."""

    def after_warmup(self, epoch: float, epochs: float) -> float:
        """From `start` to 1 to `end`."""
        done = min(epoch / epochs, 1.0)
        if done < self.rise:
            return 1 - (1 - self.start) * (1 + math.cos(math.pi * done / self.rise)) / 2
        down = (done - self.rise) / (1 - self.rise)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * down)) / 2


class ExponentialConfig(ScheduleConfig):
    """Multiplied by the same every epoch."""

    name: Literal["exponential"]
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """By this."""

    def after_warmup(self, epoch: float, epochs: float) -> float:  # noqa: ARG002
        """γ to the power of the epoch."""
        return float(self.gamma**epoch)


class LinearConfig(ScheduleConfig):
    """Down a straight line."""

    name: Literal["linear"]
    end: _Share = 0.0
    """Rate at the end, in units of the optimiser's."""

    def after_warmup(self, epoch: float, epochs: float) -> float:
        """From 1 to `end`."""
        return 1 + (self.end - 1) * min(epoch / epochs, 1.0)


def _kind_of_schedule(value: Any) -> str:
    """Which class a `[train.schedule]` table is of, as its `name` tells."""
    given = isinstance(value, Mapping)
    return str(value.get("name", "reduce_on_plateau") if given else getattr(value, "name", ""))


AnyScheduleConfig = Annotated[
    Annotated[PlateauConfig, Tag("reduce_on_plateau")]
    | Annotated[ConstantConfig, Tag("constant")]
    | Annotated[CosineConfig, Tag("cosine")]
    | Annotated[CosineRestartsConfig, Tag("cosine_restarts")]
    | Annotated[OneCycleConfig, Tag("one_cycle")]
    | Annotated[ExponentialConfig, Tag("exponential")]
    | Annotated[LinearConfig, Tag("linear")],
    Discriminator(_kind_of_schedule),
]


class EMAConfig(Section):
    """The exponential moving average of the weights over all steps."""

    name: Literal["ema"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """What remains of the average at a step."""


class SWAConfig(Section):
    """The mean of the weights at the ends of the last epochs (Izmailov et al., UAI 2018,
    arXiv:1803.05407)."""

    name: Literal["swa"]
    start: Count
    """The first epoch, counted from 1, at whose end they are taken."""


AnyAverageConfig = Annotated[EMAConfig | SWAConfig, Field(discriminator="name")]


class StageConfig(Section):
    """`[[train.stage]]`: from an epoch on, other weights of the loss, or another learning rate."""

    start: Count
    """The first epoch of the stage, counted from 0."""
    lr: Positive | None = None
    """Learning rate, which the schedule no longer changes, unless it waits for plateaus."""
    weights: dict[str, NonNegative] = {}
    """Weights of the loss's terms by name; the others stay as they are."""

    @model_validator(mode="after")
    def _changes_something(self) -> StageConfig:
        if self.lr is None and not self.weights:
            raise _reject(
                "the stage changes nothing; give it lr = 1e-4, or weights = { energy = 10.0 }"
            )
        return self


class EarlyStoppingConfig(Section):
    """`[train.early_stopping]`: end when the validation loss no longer improves."""

    patience: Count = 50
    """Epochs without improvement after which training ends."""
    min_delta: NonNegative = 0.0
    """Smallest change of the validation loss that counts as improvement."""


class CheckpointsConfig(Section):
    """`[train.checkpoints]`: what a run goes on from (`runner train --resume`)."""

    minutes: Positive = 10.0
    """After so many minutes of training the last checkpoint is written anew, within an epoch too;
    it is also written after every epoch, and when the run is asked to stop."""


class WandbConfig(Section):
    """`[train.logger.wandb]`: Weights & Biases too (`pip install 'nnp-runner[wandb]'`)."""

    project: str | None = None
    """Project there; `WANDB_PROJECT`, or else nnp-runner, unless given."""
    entity: str | None = None
    """User or team; `WANDB_ENTITY`, or else your own, unless given."""
    name: str | None = None
    """What the run is called; as its run directory, unless given."""
    group: str | None = None
    """What it is shown with; the runs of its experiment, unless given."""
    tags: list[str] = []
    """Words to find it by."""
    mode: Literal["online", "offline"] | None = None
    """`"offline"`: into the run directory alone, for `wandb sync`; `WANDB_MODE`, or else online,
    unless given."""


class MLflowConfig(Section):
    """`[train.logger.mlflow]`: MLflow too (`pip install 'nnp-runner[mlflow]'`)."""

    tracking_uri: str | None = None
    """Where it is kept, such as `"http://host:5000"`; `MLFLOW_TRACKING_URI`, or else a database
    beside the runs, `runs/mlflow.db`, unless given."""
    experiment: str | None = None
    """Experiment there; `MLFLOW_EXPERIMENT_NAME`, or else as the folder of the experiment, unless
    given."""
    name: str | None = None
    """What the run is called; as its run directory, unless given."""
    tags: dict[str, str] = {}
    """Names and values to find it by."""


class LoggerConfig(Section):
    """`[train.logger]`: where a training is logged besides `metrics.csv` and TensorBoard."""

    wandb: WandbConfig | None = None
    """Weights & Biases, if the table is there; it may be empty."""
    mlflow: MLflowConfig | None = None
    """MLflow, if the table is there; it may be empty."""


def _devices(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str | list):
        raise _reject(f'found {_shown(value)}; it is a number, a list of numbers, or "auto"')
    if value in (0, "0", "", []):
        raise _reject(f"found {_shown(value)}; a training needs one device at least")
    return value


class TrainerConfig(Section):
    """`[train.trainer]`: handed to `lightning.Trainer`, which documents the keys."""

    accelerator: str = "auto"
    """`"auto"`: a CUDA GPU if there is one, else the CPU."""
    devices: Annotated[int | str | list[int], BeforeValidator(_devices)] = "auto"
    """How many of each machine, or which GPUs; -1: all GPUs. A process trains on each, with a
    batch of its own. `"auto"`: one, or as many as torchrun or SLURM have started."""
    num_nodes: Count = 1
    """Machines; torchrun or SLURM tell it too."""
    strategy: str = "auto"
    """How several devices train: `"auto"` and `"ddp"` average their gradients."""
    accumulate_grad_batches: Count = 1
    """Batches whose gradients are averaged for a step of the optimiser, each counting the same; at
    the end of an epoch they may be fewer."""
    gradient_clip_val: NonNegative = 10.0
    """Largest norm of the gradient; a longer one is scaled down to it. 0: no limit."""
    deterministic: bool = True
    """Same seed, same machine: the same numbers."""


class TrainConfig(Section):
    """`[train]`: what is trained, on what, how."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights and of the order of the batches."""
    epochs: Count = 100
    """Passes over the training split, at most."""
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"
    """Floating-point numbers of the training: single or double precision, or matrix products in
    bfloat16 and the rest in single, for GPUs; look at what it costs in accuracy."""
    tf32: bool = False
    """Whether matrix products of single precision may be done with TF32, on GPUs that have it."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the training step: three to five times as fast on a CPU, the same numbers to
    rounding. Compiling takes 10 to 90 s; the program is kept in TORCHINDUCTOR_CACHE_DIR for the
    next training with the same potential, losses and kind of data. It needs a C++ compiler. `auto`:
    where a training is long enough to gain by it, as its pairs and epochs tell; if it fails, the
    step stays as it is."""
    batch: BatchConfig = BatchConfig()
    data: DataConfig = DataConfig()
    potential: PotentialConfig
    """The architecture, by its `name`, with its hyperparameters."""
    loss: LossConfig
    metrics: MetricsConfig | None = None
    """Those of the loss's quantities, mae and rmse, unless given."""
    optimizer: AnyOptimizerConfig = AdamWConfig()
    """The optimiser, by its `name`."""
    schedule: AnyScheduleConfig = PlateauConfig()
    """How the learning rate changes, by its `name`."""
    average: AnyAverageConfig | None = None
    """An average of the weights, which is then measured and kept; the last step's unless given."""
    stage: list[StageConfig] = []
    """What changes on the way."""
    early_stopping: EarlyStoppingConfig | None = None
    """All epochs are trained, unless given."""
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    logger: LoggerConfig = LoggerConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="before")
    @classmethod
    def _free_of_schedule(cls, given: Any) -> Any:
        """Without a schedule, an optimiser that needs none has none."""
        optimizer = given.get("optimizer") if isinstance(given, dict) else None
        free = isinstance(optimizer, dict) and optimizer.get("name") == "schedule_free"
        if not free or not isinstance(given, dict):
            return given
        schedule = given.setdefault("schedule", {"name": "constant"})
        if not isinstance(schedule, dict) or schedule.get("name") != "constant":
            raise _reject(
                'train.optimizer.name = "schedule_free" goes without a schedule; take '
                "train.schedule out (its warm-up is train.optimizer.warmup_steps)"
            )
        if "average" in given:
            raise _reject("schedule_free averages the weights by itself; take train.average out")
        return given

    @model_validator(mode="after")
    def _compiled_precision(self) -> TrainConfig:
        if self.precision == "bf16-mixed" and self.compile is True:
            raise _reject(
                'train.precision = "bf16-mixed" is not compiled; take train.compile out, or set it '
                "to false"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> TrainConfig:
        starts = [stage.start for stage in self.stage]
        if starts != sorted(set(starts)) or any(start >= self.epochs for start in starts):
            raise _reject(
                f"the stages start at epochs {', '.join(map(str, starts))}; each has to start "
                f"after the one before and before {self.epochs}, the number of epochs; they count "
                "from 0"
            )
        for stage in self.stage:
            unknown = sorted(set(stage.weights) - set(self.loss.terms))
            if unknown:
                raise _reject(
                    f"a stage gives {unknown[0]} a weight, which is no term of the loss: "
                    f"{', '.join(self.loss.terms)}"
                )
        weights = [term.highest_weight for term in self.loss.terms.values()]
        if not any([*weights, *(w for stage in self.stage for w in stage.weights.values())]):
            raise _reject(
                f"every weight of the loss is 0, so that nothing is trained: "
                f"{', '.join(self.loss.terms)}; give one of them a weight"
            )
        if isinstance(self.average, SWAConfig) and self.average.start > self.epochs:
            raise _reject(f"train.average starts in epoch {self.average.start} of {self.epochs}")
        return self

    @model_validator(mode="after")
    def _charges_are_learnt(self) -> TrainConfig:
        """Charges that nothing trains, or that nothing can train, are mistakes."""
        potential, trained = self.potential, FROM_CHARGES & set(self.loss.terms)
        asked = sorted(f"train.metrics.{name}" for name in FROM_CHARGES & set(self.measured))
        asked = ["train.potential.charges"] if potential.charges is not None else asked
        terms = ", ".join(f"train.loss.{name}" for name in sorted(FROM_CHARGES))
        spin = "spin_multiplicity"
        if spin in self.measured and spin not in self.loss.terms and not self.loss.own:
            raise _reject(
                f"train.metrics.{spin} asks for spins, and nothing trains them; add "
                f"train.loss.{spin}"
            )
        if asked and not trained and potential.coulomb is None and not self.loss.own:
            raise _reject(
                f"{asked[0]} asks for partial charges, and nothing trains them; add one of "
                f"{terms}, or train.potential.coulomb"
            )
        equalised = potential.charges is not None and potential.charges.equalise
        if equalised and "total_charge" in trained:
            raise _reject(
                "train.loss.total_charge is always zero, because train.potential.charges.equalise "
                "makes the charges sum to it; take one of them out"
            )
        return self

    @property
    def measured(self) -> dict[str, list[str]]:
        """The metrics of every measured quantity."""
        if self.metrics is not None and self.metrics.properties:
            return self.metrics.properties
        return {name: ["mae", "rmse"] for name in self.loss.terms if name not in self.loss.own}


class Config(Section):
    """A whole experiment file."""

    prepare: PrepareConfig
    train: TrainConfig | None = None


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------

Location = tuple[str | int, ...]


@dataclass
class Document:
    """A config as tables, and where each of its keys stands."""

    tables: dict[str, Any]
    places: dict[Location, str] = field(default_factory=dict)

    def place(self, location: Location) -> str:
        """`file:line` of a key, or of the nearest table around it that stands somewhere.

        With the `--set` that have changed a table.
        """
        around = (location[:length] for length in range(len(location), -1, -1))
        nearest = next((self.places[one] for one in around if one in self.places), "")
        below = [loc for loc in self.places if len(loc) > len(location) and _is_in(loc, location)]
        settings = [self.places[loc] for loc in below if self.places[loc].startswith("--set ")]
        return " with ".join(filter(None, [nearest, ", ".join(settings)]))


def _is_in(location: Location, table: Location) -> bool:
    return location[: len(table)] == table


def config_path(experiment: Path) -> Path:
    """The config of an experiment, which is named by its directory or by the file itself."""
    path = experiment / "config.toml" if experiment.is_dir() else experiment
    if not path.is_file():
        raise ConfigError(
            f"there is no experiment at {experiment}",
            where=str(path),
            allowed="a directory with a config.toml in it, or a TOML file",
        )
    return path


def load_config(path: Path, settings: Sequence[str] = ()) -> Config:
    """Read and check an experiment file, with `extends` and `--set` applied.

    Args:
        path: the TOML file.
        settings: `KEY=VALUE` strings; a later one wins.

    Raises:
        ConfigError: with every mistake that there is, each with file, line and key.
    """
    document = _read_document(path, ())
    for setting in settings:
        _apply_setting(document, setting)
    _resolve_paths(document.tables, Path.cwd())  # those that came by --set
    try:
        return Config.model_validate(document.tables)
    except ValidationError as error:
        raise ConfigError(_describe(error.errors(), document)) from None


def potential_of_settings(name: str, settings: Sequence[str]) -> ArchitectureConfig:
    """A `[train.potential]` table without a file.

    Args:
        name: of the potential.
        settings: `KEY=VALUE` strings, with keys of the table.

    Raises:
        ConfigError: with every mistake that there is.
    """
    document = Document({"train": {"potential": {"name": name}}})
    for setting in settings:
        _apply_setting(document, f"train.potential.{setting}")
    try:
        return potential_config(document.tables["train"]["potential"])
    except ValidationError as error:
        inside = [{**one, "loc": ("train", "potential", *one["loc"])} for one in error.errors()]
        raise ConfigError(_describe(typing.cast(list[ErrorDetails], inside), document)) from None


def resolved_toml(config: Config) -> str:
    """The whole config with every default written out: a file that runs by itself."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def differences(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """By dotted key, what it was before and what it is now; None where it is not there.

    The name of the dataset does not count, and neither does where its sources lie.
    """
    tables = [config.model_dump(mode="json", exclude_none=True) for config in (before, now)]
    for table in tables:
        table["prepare"].pop("name", None)
        for source in table["prepare"]["source"]:
            source.pop("path", None)
    then, after = tables
    return dict(_differences(then, after, ""))


def _differences(before: Any, now: Any, key: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            dotted = f"{key}.{name}" if key else name
            yield from _differences(before.get(name), now.get(name), dotted)
    elif before != now:
        yield key, (before, now)


def json_schema() -> dict[str, Any]:
    """The JSON schema of an experiment file."""
    properties = Config.model_json_schema()
    properties["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties["properties"]["extends"] = {
        "type": "string",
        "description": "A TOML file that this one is laid over; relative to this one.",
    }
    return properties


def _read_document(path: Path, extended_by: tuple[Path, ...]) -> Document:
    """One file under the files that it extends; its paths made absolute."""
    path = path.resolve()
    if path in extended_by:
        raise ConfigError("`extends` goes round in a circle", where=str(path))
    try:
        text = path.read_bytes()
        tables = tomli.loads(text.decode())
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", where=_origin(extended_by)
        ) from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not valid TOML: {error}", where=str(path)) from None
    base = tables.pop("extends", None)
    document = Document(tables, {(): str(path)})
    for location, line in _lines(text):
        for length in range(1, len(location) + 1):  # [a.b] makes a table a as well
            document.places.setdefault(location[:length], f"{path}:{line}")
    _resolve_paths(tables, path.parent)
    if base is None:
        return document
    if not isinstance(base, str):
        raise ConfigError(
            "`extends` is the path of one TOML file", where=document.place(("extends",))
        )
    below = _read_document(path.parent / base, (*extended_by, path))
    kept = {loc: place for loc, place in below.places.items() if not _replaced(loc, tables)}
    return Document(_merged(below.tables, tables), kept | document.places)


def _origin(extended_by: tuple[Path, ...]) -> str:
    return f"extends of {extended_by[-1]}" if extended_by else ""


def _resolve_paths(tables: dict[str, Any], folder: Path) -> None:
    """Paths are relative to the file they stand in; `$NAME` is an environment variable."""

    def here(path: str) -> str:
        file = folder / _with_variables(path, folder)
        return str(file.parent.resolve() / file.name)  # without the "..", whose folders may go

    prepare = tables.get("prepare")
    sources = prepare.get("source") if isinstance(prepare, dict) else None
    for source in sources if isinstance(sources, list) else []:
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source["path"] = here(source["path"])
        elif isinstance(source, dict) and isinstance(source.get("path"), list):
            source["path"] = [here(p) if isinstance(p, str) else p for p in source["path"]]
    split = prepare.get("split") if isinstance(prepare, dict) else None
    if isinstance(split, dict) and isinstance(split.get("file"), str):
        split["file"] = here(split["file"])
    elif isinstance(split, dict) and isinstance(split.get("file"), dict):
        named = split["file"].items()
        split["file"] = {k: here(v) if isinstance(v, str) else v for k, v in named}


def _with_variables(path: str, folder: Path) -> str:
    """A path with the values of the environment variables that it names.

    Raises:
        ConfigError: one is not set.
    """
    try:
        return string.Template(path).substitute(os.environ)
    except KeyError as error:
        name = error.args[0]
        raise ConfigError(
            f"the path {path} needs the environment variable {name}, which is not set",
            where=f"the config in {folder}",
            remedy=f"export {name}=/where/the/data/is",
        ) from None
    except ValueError:  # a dollar that begins no name
        return path


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, table by table; lists are replaced whole."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        result[key] = _merged(below[key], value) if both else value
    return result


def _replaced(location: Location, above: Any) -> bool:
    """Whether a key of the file below is inside something that the file above replaces whole."""
    for part in location:
        if not isinstance(above, dict):
            return True
        if part not in above:
            return False
        above = above[part]
    return False


def _apply_setting(document: Document, setting: str) -> None:
    """Lay one `KEY=VALUE` over the document; VALUE is TOML, or else a plain string."""
    dotted, equals, text = setting.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise ConfigError(
            f'--set "{setting}" is not a setting',
            allowed="KEY=VALUE with a dotted key, such as train.optimizer.lr=1e-4",
        )
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        value = text.strip()
    table: Any = document.tables
    location: Location = ()
    for key in keys[:-1]:
        table, location = _step(table, key, location, setting)
    last: str | int = int(keys[-1]) if isinstance(table, list) and keys[-1].isdigit() else keys[-1]
    if not isinstance(table, dict) and not (isinstance(last, int) and last < len(table)):
        raise ConfigError(f'--set "{setting}": {".".join(map(str, location))} is not a table')
    table[last] = value
    location = (*location, last)
    for inside in [one for one in document.places if _is_in(one, location)]:
        del document.places[inside]
    document.places[location] = f"--set {setting}"


def _step(table: Any, key: str, location: Location, setting: str) -> tuple[Any, Location]:
    """One table further down, made where it is not there yet."""
    if isinstance(table, list) and key.isdigit() and int(key) < len(table):
        return table[int(key)], (*location, int(key))
    if isinstance(table, dict):
        below = table.setdefault(key, {})
        if isinstance(below, dict | list):
            return below, (*location, key)
    raise ConfigError(
        f'--set "{setting}": there is no table {".".join(map(str, (*location, key)))}'
    )


def _lines(text: bytes) -> Iterator[tuple[Location, int]]:
    """Where each key and table of a TOML file stands: (location, line)."""
    import tree_sitter
    import tree_sitter_toml

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_toml.language()))
    seen: dict[Location, int] = {}  # how often a [[table]] has come, so far

    def key_of(node: tree_sitter.Node) -> Location:
        if node.type == "dotted_key":
            return tuple(part for child in node.named_children for part in key_of(child))
        return ((node.text or b"").decode().strip("\"'"),)

    def indexed(location: Location) -> Location:
        """A location with the number of the latest [[table]] put in, wherever it is in one."""
        result: Location = ()
        for part in location:
            result = (*result, part)
            if result in seen:
                result = (*result, seen[result])
        return result

    def walk(node: tree_sitter.Node, location: Location) -> Iterator[tuple[Location, int]]:
        elements = 0
        for child in node.named_children:
            if child.type in ("table", "table_array_element"):
                key = key_of(child.named_children[0])
                here = (*indexed(key[:-1]), key[-1])
                if child.type == "table_array_element":
                    seen[here] = seen.get(here, -1) + 1
                    here = (*here, seen[here])
                yield here, child.start_point.row + 1
                yield from walk(child, here)
            elif child.type == "pair":
                here = (*location, *key_of(child.named_children[0]))
                yield here, child.start_point.row + 1
                yield from walk_value(child.named_children[-1], here)
            elif node.type == "array" and child.type != "comment":
                yield (*location, elements), child.start_point.row + 1
                yield from walk_value(child, (*location, elements))
                elements += 1

    def walk_value(node: tree_sitter.Node, location: Location) -> Iterator[tuple[Location, int]]:
        if node.type in ("inline_table", "array"):
            yield from walk(node, location)

    return walk(parser.parse(text).root_node, ())


# --------------------------------------------------------------------------------------------------
# What is wrong
# --------------------------------------------------------------------------------------------------


def _describe(errors: Iterable[ErrorDetails], document: Document) -> str:
    """Every mistake of a config, in the order of the file."""
    found = [one for details in errors for one in _spelt_out(details, document.tables)]
    mistakes = [_describe_one(details, document) for details in found]
    head = (
        "the config has a mistake"
        if len(mistakes) == 1
        else f"{len(mistakes)} mistakes in the config"
    )
    return "\n".join([head + ":", *mistakes])


def _spelt_out(details: ErrorDetails, tables: dict[str, Any]) -> Iterator[ErrorDetails]:
    """One error as it is; but of a table whose `name` tells its keys and is wrong, all of them.

    pydantic stops at such a name. What else is wrong with the table is wrong by each of the names
    that may be meant: those similar to the one found, or else all.
    """
    if details["type"] not in ("union_tag_invalid", "union_tag_not_found"):
        yield details
        return
    loc, table = details["loc"], details["input"]
    if not isinstance(table, Mapping):
        yield ErrorDetails(type="dict_type", loc=loc, msg="", input=table)
        return
    location, section = _locate(loc, tables)
    variants = _variants(_annotation_below(section, location[-1]))
    others = {
        "potential": [*installed_potentials(), "package.module:Class"],
        "optimizer": ["torch.optim:Class", "package.module:Class"],
    }.get(str(location[-1]), [])
    expected = " or ".join(f"'{name}'" for name in [*variants, *others])
    kind = "literal_error" if "name" in table else "missing"
    input_, context = table.get("name", table), {"expected": expected}
    yield ErrorDetails(type=kind, loc=(*loc, "name"), msg="", input=input_, ctx=context)
    similar = [name for name in variants if did_you_mean(str(input_), [name])]
    by_name = [_errors_of(variants[name], name, details) for name in similar or variants]
    first, *more = by_name or [{}]
    yield from (e for key, e in first.items() if all(key in errors for errors in more))


def _errors_of(
    variant: type[BaseModel], name: str, details: ErrorDetails
) -> dict[tuple[str | int, ...], ErrorDetails]:
    """What is wrong in a table if its `name` is meant to be this one, by key and kind."""
    try:
        variant.model_validate(details["input"] | {"name": name})
    except ValidationError as error:
        errors = {(*one["loc"], one["type"]): one for one in error.errors()}
        for one in errors.values():
            one["loc"] = (*details["loc"], name, *one["loc"])
        return errors
    return {}


def _describe_one(details: ErrorDetails, document: Document) -> str:
    location, section = _locate(details["loc"], document.tables)
    problem, allowed = _explain(details, section)
    dotted = ".".join(str(part) for part in location) or "(top level)"
    place = document.place(location)
    lines = [f"  {place + '  ' if place else ''}{dotted}", f"    {problem}"]
    return "\n".join([*lines, *([f"    allowed: {allowed}"] if allowed else [])])


def _locate(
    loc: tuple[str | int, ...], tables: dict[str, Any]
) -> tuple[Location, type[BaseModel] | None]:
    """The key that pydantic means, without its own tags, and the section that the key is in."""
    location: Location = ()
    section: type[BaseModel] | None = Config
    value: Any = tables
    annotation: Any = Config
    for number, part in enumerate(loc):
        variants = _variants(annotation)
        if variants and part == FOREIGN:
            annotation = ForeignConfig
            continue
        if isinstance(part, str) and part in variants:
            annotation = variants[part]
            continue
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if not inside and number < len(loc) - 1:
            continue
        if not inside and not isinstance(value, dict):
            continue
        section = _section_of(annotation)
        location = (*location, part)
        value = value[part] if inside else None
        annotation = _annotation_below(annotation, part)
    return location, section


def _annotation_below(annotation: Any, part: str | int) -> Any:
    section = _section_of(annotation)
    if section is not None and not isinstance(part, int):
        found = section.model_fields.get(part)
        return found.annotation if found else None
    return annotation if isinstance(part, int) else None


def _variants(annotation: Any) -> dict[str, type[BaseModel]]:
    """The sections that a table may be, by the `name` that it has to have for each."""
    sections, left = [], list(typing.get_args(annotation))
    while left:
        argument = left.pop(0)
        if typing.get_origin(argument) is Annotated:
            argument = typing.get_args(argument)[0]
        left = [*typing.get_args(argument), *left]
        if isinstance(argument, type) and issubclass(argument, Section):
            sections.append(argument)
    if len(sections) < 2 or not all("name" in section.model_fields for section in sections):
        return {}
    return {
        name: section
        for section in sections
        for name in typing.get_args(section.model_fields["name"].annotation)
    }


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as `list[Section]` or `Section | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_args(annotation):
        for argument in typing.get_args(annotation):
            found = _section_of(argument)
            if found is not None:
                return found
    return None


def _explain(details: ErrorDetails, section: type[BaseModel] | None) -> tuple[str, str]:
    """(what is wrong, what is allowed) of one mistake."""
    kind, found = details["type"], details["input"]
    context = details.get("ctx", {})
    keys = sorted(section.model_fields) if section is not None else []
    if kind == "extra_forbidden":
        hint = did_you_mean(str(details["loc"][-1]), keys)
        return "; ".join(filter(None, ["unknown key", hint])), ", ".join(keys)
    if kind == "missing":
        return "this key is missing", str(context.get("expected", ""))
    if kind == "literal_error":
        expected = str(context.get("expected", ""))
        words = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
        hint = did_you_mean(str(found), words)
        return "; ".join(filter(None, [f"found {_shown(found)}", hint])), expected
    if kind == "runner":
        return str(context["message"]), ""
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"found {_shown(found)}; it should be of type table", ""
    message = details["msg"].replace("Input should be a valid", "it should be of type")
    message = message.replace("Input", "it")
    return f"found {_shown(found)}; {message}", ""


def _shown(value: object) -> str:
    """A value as the user wrote it, with its type."""
    names = {str: "string", bool: "boolean", int: "integer", float: "float", list: "array"}
    kind = names.get(type(value), "table" if isinstance(value, dict) else type(value).__name__)
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "…"
    return f"{text} ({kind})"

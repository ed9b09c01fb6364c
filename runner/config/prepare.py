"""`[prepare]`: all that decides a prepared dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from runner.config.values import Count, Section, Share, quantity_in, reject, require_elements
from runner.errors import UnitError, did_you_mean
from runner.fields import LABELS, POSITIONS
from runner.fields import Field as Quantity
from runner.units import conversion_factor

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
            raise reject('exactly one of "key" and "value" is needed')
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
            raise reject(f'order = "{self.order}" is not {", ".join(TENSOR_COMPONENTS)}, each once')
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
            raise reject(f'{quantity.name} needs a unit; write for example unit = "{meant}"')
        try:
            conversion_factor(label.unit or meant, meant)
        except UnitError as error:
            raise reject("; ".join(filter(None, (error.what, error.allowed)))) from None
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


_Energy = quantity_in("eV")


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
            raise reject('method = "given" needs values = { H = "-13.6 eV", … }')
        if self.method == "none" and self.values:
            raise reject('method = "none" takes no values; write method = "given"')
        if len({isinstance(value, dict) for value in self.values.values()}) > 1:
            raise reject("values are all by element, or all by level of theory and element")
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
            raise reject('method = "group" and group_by belong together')
        if self.file is not None and self.method != "file":
            raise reject('method = "file" and file belong together')
        if (self.folds is None) != (self.fold is None):
            raise reject("folds and fold belong together, such as folds = 5 and fold = 0")
        unknown = set(self.file if isinstance(self.file, dict) else ()) - {"train", "val", "test"}
        if unknown:
            raise reject(f'file has a "{sorted(unknown)[0]}"; the splits are train, val and test')
        of_shares = (self.train, self.val, self.test, self.test_seed, self.folds)
        if self.method == "file" and any(value is not None for value in of_shares):
            raise reject('method = "file" takes the splits as they are written: no shares or folds')
        if self.method == "file":
            return self
        return self._check_shares() if self.folds is None else self._check_folds(self.folds)

    def _check_shares(self) -> SplitConfig:
        shares = [share for share in (self.train, self.val, self.test) if share is not None]
        if len({type(share) for share in shares if share != 0}) > 1:
            raise reject("train, val and test must be all fractions or all counts")
        if self.train == 0:
            raise reject("train must be more than 0")
        if isinstance(self.train, float) and not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
            raise reject(f"the fractions train + val + test must sum to 1, not {sum(shares):g}")
        return self

    def _check_folds(self, folds: int) -> SplitConfig:
        if self.fold is not None and self.fold >= folds:
            raise reject(f"fold is counted from 0, so it is at most {folds - 1}")
        if any(value is not None for value in (self.train, self.test, self.test_seed)):
            raise reject("with folds, test is one fold and train what val leaves: give only val")
        if isinstance(self.val, float) and self.val + 1 / folds >= 1:
            raise reject("val and one fold leave nothing to train on")
        return self


class FilterConfig(Section):
    """`[prepare.filter]`: which structures are dropped, before they are split."""

    elements: Annotated[list[str], Field(min_length=1)] | None = None
    """Keep only structures of these elements."""
    min_atoms: Count | None = None
    """Keep only structures of at least so many atoms."""
    max_atoms: Count | None = None
    """Keep only structures of at most so many atoms."""
    max_force: Annotated[quantity_in("eV/angstrom"), Field(gt=0)] | None = None  # type: ignore[valid-type]
    """Drop a structure with a longer force on an atom."""
    min_energy_per_atom: quantity_in("eV") | None = None  # type: ignore[valid-type]
    """Drop a structure with a lower total energy an atom, self-energies included."""
    max_energy_per_atom: quantity_in("eV") | None = None  # type: ignore[valid-type]
    """Drop a structure with a higher total energy an atom, self-energies included."""
    total_charge: Annotated[list[float], Field(min_length=1)] | None = None
    """Keep only structures of these charges."""
    duplicates: Literal["keep", "drop"] = "keep"
    """`drop`: of structures with the same composition, distances and energy keep the first."""

    @model_validator(mode="after")
    def _known_elements(self) -> FilterConfig:
        require_elements(self.elements or [])
        return self


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
            raise reject(
                "no source maps an energy, so there is nothing to fit; add "
                'energy = { key = "…", unit = "…" } to a source, or write '
                '[prepare.self_energies] method = "none"'
            )
        return self

    @model_validator(mode="after")
    def _levels_have_their_own_values(self) -> PrepareConfig:
        levels, given = self.levels, self.self_energies.values_by_level
        if len(levels) > 1 and "" in levels:
            raise reject(
                "some sources name their level_of_theory and some do not: energies of different "
                "levels cannot share self-energies; name the level of every source"
            )
        if len(levels) > 1 and "" in given:
            raise reject(
                f"one set of self-energies cannot serve the levels {', '.join(levels)}: write "
                f'values by level, such as values."{levels[0]}".H = "-13.6 eV"'
            )
        unknown = set(given) - {"", *levels}
        if unknown:
            hint = did_you_mean(sorted(unknown)[0], levels)
            raise reject(
                f"values are given for {sorted(unknown)[0]}, which no source has as its "
                f"level_of_theory" + (f"; {hint}" if hint else "")
            )
        return self

    @model_validator(mode="after")
    def _one_convention(self) -> PrepareConfig:
        found = {s.quadrupole.convention for s in self.source if s.quadrupole}
        if len(found) > 1:
            raise reject("the sources have quadrupoles of both conventions, traced and traceless")
        return self

    @model_validator(mode="after")
    def _splits_are_said(self) -> PrepareConfig:
        pinned = [source.split is not None for source in self.source]
        if self.split.method == "file" and not (self.split.file or all(pinned)):
            raise reject(
                'method = "file" needs a file of indices, or a split in every source '
                '(split = "train")'
            )
        if self.split.file and any(pinned):
            raise reject("a file of indices and a split in a source contradict each other")
        return self

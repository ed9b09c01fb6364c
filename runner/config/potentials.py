"""`[train.potential]`: an architecture, and what is around it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, model_validator

from runner.config.values import Count, Section, quantity_in, reject

if TYPE_CHECKING:
    _Distance = float
else:
    _Distance = Annotated[quantity_in("angstrom"), Field(gt=0)]


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
            raise reject(
                f"the cutoff of coulomb, {coulomb.cutoff:g} Å, is below the architecture's, "
                f"{near:g} Å; make it at least that"
            )
        if zbl is not None and zbl.cutoff is not None and zbl.cutoff > near:
            raise reject(
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

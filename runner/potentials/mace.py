"""MACE, as mace-torch has it: an architecture that was not written for this program.

It comes by the entry point `mace`, as any package's potential does, and needs the extra `mace`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor, nn

from runner.batches import Batch
from runner.errors import InputError
from runner.potentials.components import N_ELEMENTS, exactly

UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class MACE(nn.Module):
    """Higher-order equivariant message passing, on mace-torch.

    Its own energies of atoms are zero, its scale one and its shift zero: self-energies are taken
    out of the data, and scale and shift come on top, as for every architecture.

    Source:
        Batatia et al., NeurIPS 2022, arXiv:2206.07697. Unless given, two layers, correlation order
        3 (messages of body order 4), spherical harmonics up to l = 3 and 8 Bessel functions, as
        published; 128 channels of invariant messages (`max_l = 0`).
    """

    def __init__(
        self,
        cutoff: float,
        elements: Sequence[str],
        features: int = 128,
        max_l: int = 0,
        interactions: int = 2,
        correlation: int = 3,
        max_ell: int = 3,
        radial_basis: int = 8,
        cutoff_p: int = 5,
        mean_neighbors: float = 12.0,
    ) -> None:
        """Build with random weights.

        Args:
            cutoff: Å.
            elements: symbols of those that it is built for.
            features: channels of a message, for each l.
            max_l: largest l of the messages.
            interactions: layers.
            correlation: order of the products of an atom's neighbours.
            max_ell: largest l of the spherical harmonics.
            radial_basis: Bessel functions.
            cutoff_p: p of the polynomial that ends them at the cutoff.
            mean_neighbors: that sums over neighbours are divided by; of the order of the data's.

        Raises:
            ImportError: mace-torch is not installed.
        """
        super().__init__()
        with _torchscript_unmentioned():
            try:
                with _side_effects_kept_out():
                    from e3nn import o3
                    from mace import modules
            except ImportError as error:
                raise ImportError(
                    f"{error}; it needs mace-torch: pip install 'nnp-runner[mace]'"
                ) from error
            numbers = sorted(int(atomic_numbers[symbol]) for symbol in elements)
            residual = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
            irreps = " + ".join(f"{features}x{l}{'oe'[l % 2 == 0]}" for l in range(max_l + 1))  # noqa: E741
            self.network = modules.ScaleShiftMACE(
                r_max=cutoff,
                num_bessel=radial_basis,
                num_polynomial_cutoff=cutoff_p,
                max_ell=max_ell,
                interaction_cls=residual,
                interaction_cls_first=residual,
                num_interactions=interactions,
                num_elements=len(numbers),
                hidden_irreps=o3.Irreps(irreps),
                MLP_irreps=o3.Irreps("16x0e"),
                gate=nn.functional.silu,
                atomic_energies=torch.zeros(len(numbers)).numpy(),
                avg_num_neighbors=mean_neighbors,
                atomic_numbers=numbers,
                correlation=correlation,
                atomic_inter_scale=1.0,
                atomic_inter_shift=0.0,
            )
        self.symbols = [chemical_symbols[z] for z in numbers]
        columns = torch.full((N_ELEMENTS,), -1)
        columns[numbers] = torch.arange(len(numbers))
        self.columns: Tensor
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Per-atom `energies`.

        Raises:
            InputError: an element that it was not built for.
        """
        found = self.network(self._graph(batch), compute_force=False)
        return {"energies": found["node_energy"].to(batch.positions.dtype)}

    def _graph(self, batch: Batch) -> dict[str, Any]:
        """A batch in mace-torch's words: vectors go from the sender j to the receiver i."""
        columns = self.columns[batch.atomic_numbers]
        if (columns < 0).any():
            unknown = sorted(set(batch.atomic_numbers[columns < 0].tolist()))
            raise InputError(
                f"it was not built for {', '.join(chemical_symbols[z] for z in unknown)}",
                where="mace",
                allowed=" ".join(self.symbols),
            )
        i, j = batch.pairs
        dtype = batch.positions.dtype
        cell = batch.positions.new_zeros((len(batch.n_atoms), 3, 3))
        unit_shifts = batch.positions.new_zeros((len(i), 3))
        shifts = unit_shifts
        if batch.cell is not None and batch.shifts is not None:
            cell, unit_shifts = batch.cell, -batch.shifts.to(dtype)
            with exactly(cell):
                shifts = (unit_shifts.unsqueeze(1) @ cell[batch.structure[i]]).squeeze(1)
        ends = batch.n_atoms.cumsum(0)
        return {
            "positions": batch.positions,
            "node_attrs": nn.functional.one_hot(columns, len(self.symbols)).to(dtype),
            "edge_index": torch.stack([j, i]),
            "unit_shifts": unit_shifts,
            "shifts": shifts,
            "cell": cell.reshape(-1, 3),
            "batch": batch.structure,
            "ptr": torch.cat([ends.new_zeros(1), ends]),
        }


@contextmanager
def _side_effects_kept_out() -> Iterator[None]:
    """Import e3nn and mace.

    e3nn 0.4.4 loads slices, which torch has to be told are harmless; mace lets `torch.load` of the
    whole process run whatever code a file has, which is taken back.
    """
    before = os.environ.get(UNSAFE)
    try:
        with torch.serialization.safe_globals([slice]), redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.pop(UNSAFE, None)
        if before is not None:
            os.environ[UNSAFE] = before


@contextmanager
def _torchscript_unmentioned() -> Iterator[None]:
    """e3nn and mace compile pieces of theirs with TorchScript, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", "The TorchScript type system", UserWarning)
        yield

"""Whatever else `ase.io` reads: trajectories of ASE and outputs of many programs, file by file."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runner.config import SourceConfig
from runner.errors import SourceError
from runner.sources.ase_db import RESULTS, USUAL, Asked, Places, frame_of
from runner.sources.raw import Frame, Raw, from_frames, refusing_damage

__all__ = ["USUAL", "keys", "read", "units"]

OURS = (
    "extended XYZ (.xyz, .extxyz), an ASE database (.db), HDF5 (.hdf5, .h5), npz, a DeePMD folder, "
    "aselmdb (.lmdb, .aselmdb), a prepared dataset (.zarr), or any format of ase.io, by "
    'format = "ase"'
)
REFUSED = {
    "db": 'ASE databases are read by the program itself: write format = "ase_db"',
    "postgresql": "a database server is no file",
    "mysql": "a database server is no file",
    "bundletrajectory": "a folder is no file: convert it, for example to a .traj",
    "py": "a Python file is a program, not data",
}


def read(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Raw]:
    """The structures of a file, in its order, some thousands at a time.

    Args:
        path: the file; ASE tells its format from its name and its first bytes.
        config: keys of the labels.
        group_key: key of `atoms.info` that names each structure's group, if any.

    Raises:
        SourceError: a format that ASE does not read, a damaged file, values that contradict.
    """
    asked = Asked.of(config, {}, group_key)
    frames = (_frame(path, index, atoms, asked) for index, atoms in enumerate(_images(path)))
    yield from from_frames(frames, config, group_key)


def keys(path: Path) -> list[str]:
    """What the first structure has besides its atoms."""
    with contextlib.closing(_images(path)) as images:
        first = next(images)
    return sorted({str(key) for place in _places(first).values() for key in place})


def units(path: Path) -> dict[str, str]:  # noqa: ARG001 (what every reader takes)
    """Nothing: `ase.io` converts the units of each format to its own."""
    return {}


def _frame(path: Path, index: int, atoms: Any, asked: Asked) -> Frame:
    where = _where(path, index)
    box = (np.array(atoms.cell), np.array(atoms.pbc))
    return frame_of(where, atoms.numbers, atoms.positions, *box, _places(atoms), asked)


def _where(path: Path, index: int) -> str:
    return f"{path}, structure {index} (counted from 0)"


def _places(atoms: Any) -> Places:
    """The values of a structure, by the place where ASE keeps them."""
    results = {} if atoms.calc is None else atoms.calc.results
    arrays = {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    return {RESULTS: results, "atoms.info": atoms.info, "atoms.arrays": arrays}


def _images(path: Path) -> Generator[Any]:
    """`ase.Atoms`, one after another; at least one, or an error."""
    import ase.io  # late: half a second

    images = ase.io.iread(
        str(path), slice(None), format=_format(path), do_not_split_by_at_sign=True
    )
    index = 0
    with contextlib.closing(images):
        while True:
            # ASE warns of much that matters to no label, and prints nothing of what does
            with (
                refusing_damage(_where(path, index), "ASE cannot read the structure"),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                atoms = next(images, None)
            if atoms is None:
                break
            index += 1
            yield atoms
    if index == 0:
        raise SourceError("ASE finds no structures in the file", where=str(path))


def _format(path: Path) -> str:
    """ASE's name of the format of a file.

    Raises:
        SourceError: there is none, or it is not read through ASE.
    """
    from ase.io.formats import UnknownFileTypeError, filetype, get_ioformat

    try:
        name = str(filetype(str(path)))
        readable = get_ioformat(name).can_read
    except UnknownFileTypeError:
        name, readable = "", False
    except Exception as error:  # modules of some formats fail to be imported, files to be unpacked
        raise SourceError(
            f"the file cannot be read: {type(error).__name__}: {error}", where=str(path)
        ) from None
    if name in REFUSED:
        raise SourceError(
            f"ASE takes the file to be of its format {name}, which is not read from here",
            where=str(path),
            remedy=REFUSED[name],
        )
    if not readable:
        raise SourceError(
            "the file is of no format that is known here", where=str(path), allowed=OURS
        )
    return name

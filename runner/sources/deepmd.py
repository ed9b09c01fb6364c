"""DeePMD-kit's system folder: `type.raw`, `type_map.raw`, and `set.*` with a `.npy` file a key.

All frames have as many atoms; in the layout "mixed type" each has elements of its own, and may have
places without an atom. The folder is periodic unless there is a file `nopbc` in it, as in DeePMD.

Source:
    The documentation of DeePMD-kit, "System" and "Mixed type".
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers as ATOMIC_NUMBER_OF

from runner.config import LabelConfig, SourceConfig
from runner.errors import SourceError
from runner.fields import LABELS, Field
from runner.sources import raw
from runner.sources.raw import Conformers, Raw, as_numbers, from_conformers, refusal

USUAL = {"positions": "angstrom", "energy": "eV", "force": "eV/angstrom", "virial": "eV"}
"""The units that DeePMD-kit prescribes."""

NOT_LABELS = ("coord", "box", "real_atom_types")


def read(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Raw]:
    """The frames of a system, set by set, some thousands at a time.

    Args:
        path: the folder.
        config: keys of the labels: the names of the `.npy` files without the suffix.
        group_key: refused, for the format has no groups.

    Raises:
        SourceError: a file that is missing or damaged, or has not as many rows as there are frames.
    """
    if group_key is not None:
        raise SourceError(
            f'a DeePMD folder has no key "{group_key}" to group by',
            where=str(path),
            remedy='write group_by = "formula" or "source" in prepare.split',
        )
    yield from from_conformers(_blocks(_System.of(path), config), config)


def keys(path: Path) -> list[str]:
    """The `.npy` files of the first set that may be labels."""
    names = sorted(file.stem for file in _sets(path)[0].glob("*.npy"))
    return [name for name in names if name not in NOT_LABELS]


def units(path: Path) -> dict[str, str]:  # noqa: ARG001 (what every reader takes)
    """Nothing: the format prescribes its units."""
    return {}


@dataclass(frozen=True)
class _System:
    """What holds for all frames of a folder.

    Attributes:
        path: the folder.
        sets: its `set.*`, in the order of their names.
        names: (n_types + 1,) chemical symbols by type, and "" last: type −1 is no atom.
        types: (n_places,) type of each atom; of no meaning if mixed.
        mixed: whether each frame has types of its own.
        periodic: whether there is no file `nopbc`.
    """

    path: Path
    sets: list[Path]
    names: np.ndarray
    types: np.ndarray
    mixed: bool
    periodic: bool

    @classmethod
    def of(cls, path: Path) -> _System:
        """What the files beside the sets say."""
        sets, names = _sets(path), _type_map(path)
        mixed = [(folder / "real_atom_types.npy").is_file() for folder in sets]
        if any(mixed) and not all(mixed):
            raise SourceError(
                "some sets have a real_atom_types.npy, and others have none",
                where=str(sets[mixed.index(False)]),
                remedy="put them into folders of their own",
            )
        types = _types(path)
        if not mixed[0]:
            _check_types(types, 0, len(names) - 1, str(path / "type.raw"))
        return cls(path, sets, names, types, mixed[0], not (path / "nopbc").is_file())


def _sets(path: Path) -> list[Path]:
    sets = sorted(folder for folder in path.glob("set.*") if folder.is_dir())
    if not sets:
        raise SourceError(
            "the folder has no set.* in it, so it is not a DeePMD system",
            where=str(path),
            remedy='name the systems, for example path = "data/*" for all folders in data',
        )
    return sets


def _words(file: Path, what: str, remedy: str) -> list[str]:
    """The words of a text."""
    if not file.is_file():
        raise SourceError(f"there is no {file.name} with the {what}", where=str(file.parent),
                          remedy=remedy)  # fmt: skip
    words = [word.decode("utf-8", "replace") for word in file.read_bytes().split()]
    if not words:
        raise SourceError(f"{file.name} is empty", where=str(file), remedy=remedy)
    return words


def _type_map(path: Path) -> np.ndarray:
    """(n_types + 1,) chemical symbols, "" last."""
    remedy = 'write the chemical symbols of types 0, 1, … into it, for example "O H"'
    symbols = _words(path / "type_map.raw", "names of the types", remedy)
    for symbol in symbols:
        if symbol not in ATOMIC_NUMBER_OF or symbol == "X":
            raise SourceError(
                f"{symbol[:40]!r} is not an element",
                where=str(path / "type_map.raw"),
                allowed="chemical symbols such as H, C, Cl",
            )
    return np.array([*symbols, ""])


def _types(path: Path) -> np.ndarray:
    file = path / "type.raw"
    words = _words(file, "type of each atom", "write the types, for example 0 1 1")
    for word in words:
        if not re.fullmatch("[0-9]{1,9}", word):
            raise SourceError(f'found "{word[:40]}" where a type should stand', where=str(file),
                              allowed="whole numbers from 0")  # fmt: skip
    return np.array([int(word) for word in words], np.int64)


def _check_types(types: np.ndarray, least: int, n_types: int, where: str) -> None:
    bad = (types < least) | (types >= n_types)
    if bad.any():
        raise SourceError(
            f"the type {types[bad][0]} is not in type_map.raw, which names {n_types}",
            where=where,
            allowed=f"whole numbers from {least} to {n_types - 1}",
        )


# --------------------------------------------------------------------------------------------------
# Sets
# --------------------------------------------------------------------------------------------------


def _blocks(system: _System, config: SourceConfig) -> Iterator[Conformers]:
    """The frames of all sets, some thousands at a time."""
    wanted = [
        (LABELS[name], label, label.key)
        for name, label in config.labels.items()
        if label.key is not None
    ]
    for folder in system.sets:
        frames = _Frames.of(folder, len(system.types))
        box = frames.array("box") if system.periodic else None
        if system.periodic and box is None:
            raise SourceError(
                "the set has no box.npy, though the system is periodic",
                where=str(folder),
                remedy=f"if it is not periodic, make an empty file {system.path / 'nopbc'}",
            )
        real = frames.array("real_atom_types") if system.mixed else None
        arrays = {key: frames.array(key) for _, _, key in wanted}
        for start in range(0, frames.n, raw.CHUNK):
            rows = slice(start, min(start + raw.CHUNK, frames.n))
            shape = (len(system.types), 3)
            positions = frames.numbers("coord", frames.coord[rows], shape)
            values = {
                key: frames.label(quantity, label, array[rows], start)
                for quantity, label, key in wanted
                if (array := arrays[key]) is not None
            }
            yield Conformers(
                where=frames.namer(start),
                species=_species(system, frames, real, rows),
                positions=positions,
                values=values,
                cell=None if box is None else frames.numbers("box", box[rows], (3, 3)),
                pbc=None if box is None else np.ones((rows.stop - start, 3), bool),
            )


def _species(system: _System, frames: _Frames, real: np.ndarray | None, rows: slice) -> np.ndarray:
    """(n_rows, n_places) chemical symbols, "" where there is no atom."""
    if real is None:
        return np.tile(system.names[system.types], (rows.stop - rows.start, 1))
    types = np.asarray(real[rows])
    where = str(frames.folder / "real_atom_types.npy")
    if types.dtype.kind not in "iu" or types.shape[1:] != system.types.shape:
        raise SourceError(
            f"the types of the atoms are {types.dtype} of shape {types.shape}",
            where=where,
            allowed=f"whole numbers, {len(system.types)} a frame",
        )
    _check_types(types, -1, len(system.names) - 1, where)
    symbols: np.ndarray = system.names[types.astype(np.int64)]
    return symbols


@dataclass(frozen=True)
class _Frames:
    """The arrays of one set; they stay on disk until rows of them are asked for.

    Attributes:
        folder: the set.
        coord: the positions of its frames, a row a frame.
        n_places: places for atoms in each.
    """

    folder: Path
    coord: np.ndarray
    n_places: int

    @classmethod
    def of(cls, folder: Path, n_places: int) -> _Frames:
        """The set in a folder, whose frames have so many places for atoms."""
        coord = _load(folder / "coord.npy")
        if coord is None:
            raise SourceError("the set has no coord.npy", where=str(folder))
        if coord.ndim == 1 and coord.size == 3 * n_places:  # DeePMD takes it as a single frame
            coord = coord.reshape(1, -1)
        if coord.ndim < 2:
            raise SourceError(
                f"the positions have shape {coord.shape}",
                where=str(folder / "coord.npy"),
                allowed=f"(frames, {3 * n_places}), for the {n_places} atoms of type.raw",
            )
        return cls(folder, coord, n_places)

    @property
    def n(self) -> int:
        """Frames."""
        return len(self.coord)

    def array(self, key: str) -> np.ndarray | None:
        """What a key has, a row a frame; None where there is no file."""
        array = _load(self.folder / f"{key}.npy")
        if array is None:
            return None
        if self.n == 1 and array.shape[:1] != (1,):
            return array.reshape(1, -1)
        if array.shape[:1] != (self.n,):
            raise SourceError(
                f"the array has shape {array.shape}, but coord.npy has {self.n} frames",
                where=str(self.folder / f"{key}.npy"),
            )
        return array

    def numbers(self, key: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Some rows as float64, each of the given shape."""
        found = as_numbers(rows)
        if found is None or found[0].size != np.prod(shape):
            raise SourceError(
                f"the array is of {rows.dtype}, {rows[0].size} a frame",
                where=str(self.folder / f"{key}.npy"),
                allowed=f"{np.prod(shape)} numbers a frame",
            )
        return found.reshape(len(rows), *shape)

    def label(
        self, quantity: Field, label: LabelConfig, rows: np.ndarray, start: int
    ) -> np.ndarray:
        """Some rows of a label, in its shape rather than flat as they are stored."""
        inner = label.stored_shape(quantity)
        shape = (self.n_places, *inner) if quantity.per == "atom" else inner
        found = as_numbers(rows)
        if found is None or found[0].size != np.prod(shape):
            what = f"an array of {rows.dtype}, {rows[0].size} a frame"
            raise refusal(quantity, str(label.key), what, self.namer(start)(0))
        return found.reshape(len(rows), *shape)

    def namer(self, start: int) -> raw.Where:
        """Names the frames from `start` on."""
        return lambda index: f"{self.folder}, frame {start + index} (counted from 0)"


def _load(file: Path) -> np.ndarray | None:
    """An array, mapped from its file; None where there is no file."""
    if not file.is_file():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that Python 2 wrote
            found: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise SourceError(
            f"the array cannot be read: {type(error).__name__}: {error}",
            where=str(file),
            remedy="the file may be damaged or cut off: get it again",
        ) from None
    if not isinstance(found, np.ndarray):
        raise SourceError("the file holds several arrays", where=str(file))
    return found

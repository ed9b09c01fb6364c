"""ASE databases: SQLite (`.db`), and LMDB (`.lmdb`, `.aselmdb`) of the package `ase-db-backends`.

Both are opened so that nothing is written into or beside them, and read row by row, in the order of
their ids. Which of the two a file is, its first bytes say.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.config import SourceConfig, TensorConfig
from runner.errors import SourceError
from runner.fields import LABELS
from runner.sources.raw import Frame, Raw, as_numbers, from_frames, refusing_damage

USUAL = {
    "positions": "angstrom",
    "energy": "eV",
    "free_energy": "eV",
    "forces": "eV/angstrom",
    "stress": "eV/angstrom**3",
    "dipole": "e*angstrom",
    "charges": "e",
}
"""ASE's units, in which its calculators give their results."""

RESULTS = "calculator results"
VOIGT = ["xx", "yy", "zz", "yz", "xz", "xy"]  # ASE's order of the stress
VERSIONS = range(6, 10)  # of ASE's tables in SQLite; 6 made magmom a number

_SCALARS = ("energy", "free_energy", "magmom")
_ARRAYS = ("forces", "stress", "dipole", "magmoms", "charges")
_TABLE = [  # all columns of ASE's table `systems`
    "id", "unique_id", "ctime", "mtime", "username", "numbers", "positions", "cell", "pbc",
    "initial_magmoms", "initial_charges", "masses", "tags", "momenta", "constraints", "calculator",
    "calculator_parameters", "energy", "free_energy", "forces", "stress", "dipole", "magmoms",
    "magmom", "charges", "key_value_pairs", "data", "natoms", "fmax", "smax", "volume", "mass",
    "charge",
]  # fmt: skip
_COLUMNS = ("id", "numbers", "positions", "cell", "pbc", "key_value_pairs", "data")


def read(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Raw]:
    """The structures of a database by their ids, some thousands at a time.

    Args:
        path: the file.
        config: keys of the labels.
        group_key: key in `key_value_pairs` or `data` that names each structure's group, if any.

    Raises:
        SourceError: no ASE database, a damaged one, values that contradict each other.
    """
    asked = Asked.of(config, units(path), group_key)
    frames = (_frame(path, row, asked) for row in _rows(path))
    yield from from_frames(frames, config, group_key)


def keys(path: Path) -> list[str]:
    """What the first row has besides its atoms."""
    with contextlib.closing(_rows(path)) as rows:
        first = next(rows)
    return sorted({key for place in first.places.values() for key in place})


def units(path: Path) -> dict[str, str]:
    """Units in the metadata, as schnetpack writes them: `_property_unit_dict`, `_distance_unit`.

    A number there, such as 1.0, states nothing.
    """
    with refusing_damage(str(path), "the metadata of the database cannot be read"):
        metadata = _lmdb_metadata(path) if _is_lmdb(path) else _sqlite_metadata(path)
        stated = dict(metadata.get("_property_unit_dict") or {})
    stated["positions"] = metadata.get("_distance_unit")
    return {key: unit for key, unit in stated.items() if isinstance(unit, str) and unit.strip()}


# --------------------------------------------------------------------------------------------------
# A structure of ASE as a frame
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a config asks of structures of ASE.

    Attributes:
        keys: of the labels, and of the group.
        without_unit: those of them for which neither config nor file gives a unit: only what a
            calculator gave is in ASE's units.
        six: whether the stress is asked for as six numbers.
    """

    keys: Set[str]
    without_unit: Set[str]
    six: bool

    @classmethod
    def of(cls, config: SourceConfig, stated: Mapping[str, str], group_key: str | None) -> Asked:
        """What a source and the grouping ask for, where a file states some units.

        Raises:
            SourceError: an order of the stress that is not ASE's.
        """
        wanted = {label.key for label in config.labels.values() if label.key is not None}
        without = {
            str(label.key)
            for name, label in config.labels.items()
            if label.unit is None and not LABELS[name].assumed_unit and label.key not in stated
        }
        orders = [
            label.components
            for label in config.labels.values()
            if isinstance(label, TensorConfig) and label.order and label.key == "stress"
        ]
        if any(order != VOIGT for order in orders):
            raise SourceError(
                "the stress of ASE has another order than the config says",
                where="prepare.source.stress.order",
                allowed=f'"{" ".join(VOIGT)}", or no order at all',
            )
        return cls(wanted | ({group_key} if group_key else set()), without, bool(orders))


Places = dict[str, Mapping[str, Any]]
"""Values by key, by the place where a structure has them; the results of its calculator first."""


def frame_of(
    where: str,
    numbers: np.ndarray,
    positions: np.ndarray,
    cell: np.ndarray,
    pbc: np.ndarray,
    places: Places,
    asked: Asked,
) -> Frame:
    """One structure, its values gathered from the places where ASE keeps them.

    Args:
        where: its name in an error.
        numbers: (n_atoms,) atomic numbers.
        positions: (n_atoms, 3).
        cell: (3, 3), lattice vectors as rows.
        pbc: (3,) bool.
        places: the values that it has.
        asked: which of them matter.

    Raises:
        SourceError: arrays that do not fit together, values that contradict each other.
    """
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise SourceError("the atomic numbers are not a list of whole numbers", where=where)
    if positions.shape != (len(numbers), 3):
        raise SourceError(
            f"the positions have shape {positions.shape}, for {len(numbers)} atoms", where=where
        )
    if cell.shape != (3, 3) or pbc.shape != (3,) or pbc.dtype.kind != "b":
        raise SourceError("the cell is not 3 × 3 numbers, or pbc not three booleans", where=where)
    values: dict[str, Any] = {}
    for place in reversed(places.values()):
        values |= {str(key): value for key, value in place.items() if value is not None}
    for key in asked.keys & values.keys():
        values[key] = _settled(key, places, asked, where)
    return Frame(
        where=where,
        species=numbers,
        positions=positions.astype(np.float64),
        per_structure=values,
        # whether it is a value an atom or a structure, its shape says where a label is made of it
        per_atom={key: _array(values[key]) for key in asked.keys & values.keys()},
        cell=cell.astype(np.float64),
        pbc=pbc,
    )


def _settled(key: str, places: Places, asked: Asked, where: str) -> Any:
    """The one value of a key, wherever it stands."""
    found = {name: place[key] for name, place in places.items() if place.get(key) is not None}
    place, value = next(iter(found.items()))
    for other, its in found.items():
        if not _same(value, its):
            raise SourceError(
                f'the key "{key}" has one value in the {place} and another in {other}',
                where=where,
                remedy="correct the file, or rename one of them",
            )
    if place != RESULTS and key in asked.without_unit:
        raise SourceError(
            f'the key "{key}" needs a unit: it stands in {place}, for which ASE has no units',
            where=where,
            remedy="give its unit in the source",
        )
    if place == RESULTS and key == "stress" and np.size(value) == 6 and not asked.six:
        return _full(np.ravel(value))
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 else value


def _same(one: Any, other: Any) -> bool:
    a, b = as_numbers(one), as_numbers(other)
    if a is None or b is None:
        return str(one) == str(other)
    return np.array_equal(a.ravel(), b.ravel(), equal_nan=True)


def _full(stress: np.ndarray) -> np.ndarray:
    """(3, 3) of ASE's six numbers."""
    xx, yy, zz, yz, xz, xy = stress
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def _array(value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError:  # lists of different lengths; a text, which no label can be
        return np.asarray(repr(value)[:60])


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One row as the database has it; arrays not checked yet."""

    id: int
    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    places: Places


def _frame(path: Path, row: _Row, asked: Asked) -> Frame:
    atoms = (row.numbers, row.positions, row.cell, row.pbc)
    return frame_of(_where(path, row.id), *atoms, row.places, asked)


def _where(path: Path, row_id: object) -> str:
    return f"{path}, row id {row_id}"


def _rows(path: Path) -> Generator[_Row]:
    """All rows by their ids; at least one, or an error."""
    found = False
    with contextlib.closing(_lmdb_rows(path) if _is_lmdb(path) else _sqlite_rows(path)) as rows:
        for row in rows:
            found = True
            yield row
    if not found:
        raise SourceError("the database has no rows", where=str(path))


def _is_lmdb(path: Path) -> bool:
    """Whether a file is LMDB rather than SQLite.

    Raises:
        SourceError: it is neither.
    """
    with path.open("rb") as file:
        head = file.read(24)
    if head[:16] == b"SQLite format 3\0":
        return False
    if head[16:20] == b"\xde\xc0\xef\xbe":  # LMDB's magic number, after the header of the page
        return True
    raise SourceError(
        "the file is not an ASE database: it is neither SQLite nor LMDB",
        where=str(path),
        remedy="state its format in the source, or get the file again if it is damaged",
    )


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is not a table of names and values")
    return {str(key): entry for key, entry in value.items()}


# --------------------------------------------------------------------------------------------------
# SQLite
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _sqlite(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write, to a database that is whole.

    Raises:
        SourceError: it is not, or another program is writing it.
    """
    for suffix in ("-wal", "-journal"):
        beside = path.with_name(path.name + suffix)
        if beside.exists() and beside.stat().st_size:
            raise SourceError(
                f"{beside.name} lies beside the database: it is being written, or was left so",
                where=str(path),
                remedy="close what writes it, or open and close it with the program that wrote it",
            )
    # immutable: SQLite leaves no files of its own beside a database in WAL mode
    location = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    with contextlib.closing(sqlite3.connect(location, uri=True)) as connection:
        yield connection


def _sqlite_metadata(path: Path) -> dict[str, Any]:
    with _sqlite(path) as connection:
        _check_version(path, connection)
        query = "SELECT value FROM information WHERE name='metadata'"
        found = connection.execute(query).fetchone()
    return _mapping(json.loads(found[0]), "it") if found else {}


def _check_version(path: Path, connection: sqlite3.Connection) -> None:
    """Refuse SQLite databases that are not ASE's, or of another version of its tables."""
    try:
        query = "SELECT value FROM information WHERE name='version'"
        version = int(connection.execute(query).fetchone()[0])
        table = connection.execute("SELECT * FROM systems LIMIT 0").description
        if version in VERSIONS and [column[0] for column in table] != _TABLE:
            raise ValueError("its table has other columns")  # a name may stand for another column
    except (sqlite3.Error, TypeError, ValueError) as error:
        raise SourceError(
            f"the file is not an ASE database, or it is damaged: {error}",
            where=str(path),
            remedy="get the file again, or state its format in the source",
        ) from None
    if version not in VERSIONS:
        raise SourceError(
            f"the ASE database is of version {version} of its format",
            where=str(path),
            allowed=f"versions {VERSIONS[0]} to {VERSIONS[-1]}",
            remedy="an old one is converted by `python -m ase.db.convert`",
        )


def _sqlite_rows(path: Path) -> Generator[_Row]:
    columns = (*_COLUMNS, *_SCALARS, *_ARRAYS)
    last: Any = None
    with contextlib.ExitStack() as stack:
        with refusing_damage(str(path), "the database cannot be read"):
            connection = stack.enter_context(_sqlite(path))
            _check_version(path, connection)
            # without it SQLite passes over rows in silence where its tree is damaged
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError(state)
            query = f"SELECT {', '.join(columns)} FROM systems ORDER BY id"
            cursor = connection.execute(query)
        while True:
            before = str(path) if last is None else f"{_where(path, last)}, the row after it"
            with refusing_damage(before, "the row cannot be read"):
                values = next(cursor, None)
            if values is None:
                return
            last = values[0]
            with refusing_damage(_where(path, last), "the row cannot be read"):
                row = _sqlite_row(dict(zip(columns, values, strict=True)))
            yield row


def _sqlite_row(values: Mapping[str, Any]) -> _Row:
    """One row of the table `systems`."""
    cell = _blob(values["cell"])
    pbc = values["pbc"] or 0
    if pbc not in range(8):
        raise ValueError(f"pbc is {pbc!r}")
    results: dict[str, Any] = {name: _number(values[name]) for name in _SCALARS}
    results |= {name: _blob(values[name]) for name in _ARRAYS}
    if results["forces"] is not None:
        results["forces"] = results["forces"].reshape(-1, 3)
    pairs = _decoded(values["key_value_pairs"])
    data = _decoded(values["data"])
    return _Row(
        id=values["id"],
        numbers=_blob(values["numbers"], np.dtype("<i4")),
        positions=_blob(values["positions"]).reshape(-1, 3),
        cell=np.zeros((3, 3)) if cell is None else cell.reshape(3, 3),
        pbc=(pbc & np.array([1, 2, 4])).astype(bool),
        places=_places(results, pairs, data),
    )


def _places(results: Mapping[str, Any], pairs: Any, data: Any) -> Places:
    return {
        RESULTS: {key: value for key, value in results.items() if value is not None},
        "key_value_pairs": _mapping(pairs, "key_value_pairs"),
        "data": _mapping(data, "data"),
    }


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, float):
        return value
    raise TypeError(f"a number is {value!r:.40}")


def _blob(value: Any, dtype: np.dtype[Any] = np.dtype("<f8")) -> Any:  # noqa: B008 (immutable)
    """The numbers of a blob; ASE writes them in little-endian order on every machine."""
    if value is None:
        return None
    if not isinstance(value, bytes):
        raise TypeError(f"an array is {value!r:.40}")
    return np.frombuffer(value, dtype)


def _decoded(value: Any) -> Any:
    """`key_value_pairs` and `data`: text, or since version 9 ASE's own bytes."""
    from ase.db.core import bytes_to_object  # late: half a second
    from ase.io.jsonio import decode

    if value is None:
        return {}
    found = bytes_to_object(value) if isinstance(value, bytes) else decode(value)
    return {} if found is None else found


# --------------------------------------------------------------------------------------------------
# LMDB
# --------------------------------------------------------------------------------------------------

_WALK = """
import sys, lmdb
options = dict(subdir=False, readonly=True, lock=False)
with lmdb.open(sys.argv[1], **options) as env, env.begin(buffers=True) as txn:
    for key, value in txn.cursor():
        value[:1], value[-1:], txn.get(bytes(key))
"""


@contextlib.contextmanager
def _lmdb(path: Path) -> Iterator[Callable[[str], Any]]:
    """Looks up what an LMDB has under a key; None where it has nothing.

    Raises:
        SourceError: the package is not installed; the file is damaged.
    """
    try:
        import lmdb
    except ImportError:
        raise SourceError(
            "a database in LMDB needs a package that is not installed",
            where=str(path),
            remedy="pip install 'nnp-runner[aselmdb]'",
        ) from None
    from ase.io.jsonio import decode  # late: half a second

    state = path.stat()
    why = _why_unreadable(path, state.st_size, state.st_mtime_ns)
    if why:
        raise SourceError(
            f"the database is damaged or cut off: {why}",
            where=str(path),
            remedy="get the file again",
        )
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):

        def look_up(key: str) -> Any:
            stored = transaction.get(key.encode())
            return None if stored is None else decode(zlib.decompress(stored).decode())

        yield look_up


@functools.lru_cache(maxsize=64)
def _why_unreadable(path: Path, size: int, changed: int) -> str:  # noqa: ARG001 (of the cache)
    """What is wrong with an LMDB, if anything.

    Its C code may end the process on a damaged file, so another process walks through all of it.
    """
    walk = subprocess.run(
        [sys.executable, "-c", _WALK, str(path)], capture_output=True, text=True, check=False
    )
    if walk.returncode == 0:
        return ""
    said = walk.stderr.strip().splitlines() if walk.returncode > 0 else []
    return said[-1] if said else "LMDB crashes on it"


def _lmdb_metadata(path: Path) -> dict[str, Any]:
    with _lmdb(path) as look_up:
        return _mapping(look_up("metadata") or {}, "it")


def _lmdb_rows(path: Path) -> Generator[_Row]:
    with contextlib.ExitStack() as stack:
        with refusing_damage(str(path), "the database cannot be read"):
            look_up = stack.enter_context(_lmdb(path))
            following = look_up("nextid")
            if type(following) is not int:
                raise TypeError("it has no ids of ASE's rows")
            gone = look_up("deleted_ids")
            deleted = set() if gone is None else set(np.asarray(gone).tolist())
        for row_id in range(1, following):
            if row_id in deleted:
                continue
            with refusing_damage(_where(path, row_id), "the row cannot be read"):
                found = look_up(str(row_id))
                if found is None:
                    raise KeyError("it is missing from the database")
                row = _lmdb_row(row_id, _mapping(found, "it"))
            yield row


def _lmdb_row(row_id: int, values: dict[str, Any]) -> _Row:
    """One row of the JSON in an LMDB."""
    pairs, data = values.get("key_value_pairs") or {}, values.get("data") or {}
    results = {key: values[key] for key in (*_SCALARS, *_ARRAYS) if key in values}
    cell, pbc = values.get("cell"), values.get("pbc")
    return _Row(
        id=row_id,
        numbers=np.asarray(values["numbers"]),
        positions=_numbers(values["positions"]),
        cell=np.zeros((3, 3)) if cell is None else _numbers(cell),
        pbc=np.zeros(3, bool) if pbc is None else np.asarray(pbc),
        places=_places(results, pairs, data),
    )


def _numbers(value: Any) -> np.ndarray:
    found = as_numbers(value)
    if found is None:
        raise TypeError(f"an array of numbers is {value!r:.40}")
    return found

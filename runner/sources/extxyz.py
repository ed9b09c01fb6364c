"""Extended XYZ, by the C parser of the `extxyz` package.

The parser stops in silence at a structure that is cut off, does not survive a structure without
atoms, and says neither file nor structure in its errors. So the file's frame (the atom counts and
the lines between them) is read here first, in step with the parser.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from extxyz import cextxyz

from runner.config import SourceConfig
from runner.errors import SourceError, did_you_mean
from runner.fields import LABELS, POSITIONS, Field
from runner.sources.labels import check_positions, converted, elements_of
from runner.structures import Structures
from runner.units import conversion_factor

CHUNK = 4096  # structures
_PARSER = threading.Lock()  # it is not made for several threads


@dataclass(frozen=True)
class _Frame:
    """One structure as it stands in the file."""

    path: Path
    index: int
    line: int
    n_atoms: int
    comment: str
    info: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def where(self) -> str:
        return f"{self.path}, structure {self.index} (counted from 0), line {self.line}"


def read(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Structures]:
    """The structures of a file, in its order, some thousands at a time.

    Args:
        path: the file.
        config: keys and units of the labels.
        group_key: key of the comment line that names each structure's group, if any.

    Raises:
        SourceError: a file that is damaged or cut off, an unknown element, a periodic structure,
            a value that is no finite number.
    """
    frames = _frames(path)
    while chunk := list(islice(frames, CHUNK)):
        yield _structures(chunk, config, group_key)


def keys(path: Path) -> list[str]:
    """The keys that the first structure of a file has."""
    first = next(_frames(path))
    known = {"Properties", "Lattice", "pbc", "species", "pos"}
    return [key for key in (*first.info, *first.arrays) if key not in known]


def _frames(path: Path) -> Iterator[_Frame]:
    """Parse a file; every structure that the file announces comes out, or an error."""
    file = cextxyz.cfopen(str(path), "r")
    try:
        for index, (line, n_atoms, comment) in enumerate(_outline(path)):
            where = f"{path}, structure {index} (counted from 0), line {line}"
            start = cextxyz.cftell(file)
            # integers are kept in 32 bits and wrap round, reals are not
            instead = _retyped(comment, "I", "R") if ":I:" in comment else None
            try:
                info, arrays = _parse(file, instead)
            except (cextxyz.ExtXYZError, EOFError, ValueError) as error:
                cextxyz.cfseek(file, start, 0)
                info, arrays = _with_not_a_number(file, comment, where, error)
            yield _Frame(path, index, line, n_atoms, comment, info, arrays)
    finally:
        cextxyz.cfclose(file)


def _parse(file: Any, comment: str | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The next structure's comment line and columns; `comment` stands in for the line."""
    with _PARSER:
        _, info, arrays = cextxyz.read_frame_dicts(file, comment=comment, use_cleri=False)
    return info, arrays


def _outline(path: Path) -> Iterator[tuple[int, int, str]]:
    """(line, number of atoms, comment line) of every structure that a file announces."""
    line = 0
    with path.open("rb") as file:
        for index, head in enumerate(file):
            where = f"{path}, structure {index} (counted from 0), line {line + 1}"
            if not head.strip():
                if any(rest.strip() for rest in file):
                    raise SourceError("a blank line stands between structures", where=where)
                return
            if not re.fullmatch(rb"\s*0*[1-9][0-9]{0,17}\s*", head):
                raise SourceError(
                    f'found "{_text(head)[:40]}" where a number of atoms should stand',
                    where=where,
                    allowed="a whole number of at least 1",
                    remedy="look at the structure before it too: its atoms may be miscounted",
                )
            n_atoms = int(head)
            comment = next(file, b"")
            found = sum(1 for row in islice(file, n_atoms) if row.strip())
            if found < n_atoms:
                raise SourceError(
                    f"the structure announces {n_atoms} atoms, and {found} lines of atoms follow",
                    where=where,
                    remedy="the file is cut off, or the number of atoms is wrong",
                )
            yield line + 1, n_atoms, _text(comment)
            line += n_atoms + 2


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").strip()


def _with_not_a_number(
    file: Any, comment: str, where: str, error: Exception
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read one structure again with its real columns as text: the parser refuses "nan" and "inf".

    Whether a NaN is allowed there is decided where all labels are checked.
    """
    as_reals = _retyped(comment, "I", "R")
    as_text = _retyped(as_reals, "R", "S")
    try:
        if as_text == as_reals or "invalid field" not in str(error):
            raise error
        info, arrays = _parse(file, as_text)
        reals = re.findall(r"(\w+):R:\d+", _properties(as_reals))
        return info, arrays | {name: arrays[name].astype(np.float64) for name in reals}
    except (cextxyz.ExtXYZError, EOFError, ValueError):
        message = str(error).replace("ERROR: ", "") or "the file ends inside the structure"
        raise SourceError(f"the structure cannot be read: {message}", where=where) from None


def _properties(comment: str) -> str:
    """The description of the columns in a comment line."""
    found = re.search(r'Properties="?([^\s"]+)', comment)
    return found[1] if found else ""


def _retyped(comment: str, old: str, new: str) -> str:
    """The comment line with all columns of one type declared to be of another."""
    properties = _properties(comment)
    if not properties:
        return comment
    return comment.replace(properties, properties.replace(f":{old}:", f":{new}:"))


def _structures(frames: list[_Frame], config: SourceConfig, group_key: str | None) -> Structures:
    """Many parsed structures as flat arrays in eV, Å and e."""
    counts = np.array([frame.n_atoms for frame in frames], np.int64)

    def where(index: int) -> str:
        return frames[index].where

    for frame in frames:
        _check_frame(frame)
    positions = np.concatenate([frame.arrays["pos"] for frame in frames]).astype(np.float64)
    check_positions(positions, counts, where)
    atoms: dict[str, np.ndarray] = {
        "atomic_numbers": elements_of(
            np.concatenate([frame.arrays["species"] for frame in frames]), counts, where
        ),
        "positions": positions * conversion_factor(config.positions.unit, POSITIONS.unit),
    }
    structures: dict[str, np.ndarray] = {}
    for name, label in config.labels.items():
        quantity = LABELS[name]
        found = [_value(frame, quantity, label.key, label.value) for frame in frames]
        present = np.array([value is not None for value in found])
        shapes = [
            (n, *quantity.shape) if quantity.per == "atom" else (1, *quantity.shape) for n in counts
        ]
        values = np.concatenate(
            [
                np.full(shape, np.nan) if value is None else value.reshape(shape)
                for value, shape in zip(found, shapes, strict=True)
            ]
        )
        table = atoms if quantity.per == "atom" else structures
        table[name] = converted(quantity, label, values, present, counts, where)
    group = [_group(frame, group_key) for frame in frames] if group_key else None
    first_atom = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Structures(first_atom, atoms, structures, group)


def _check_frame(frame: _Frame) -> None:
    """Refuse what this reader does not understand."""
    for name, what in (("species", "chemical symbols"), ("pos", "positions")):
        if name not in frame.arrays:
            raise SourceError(
                f'there is no column "{name}" with the {what}',
                where=frame.where,
                allowed=f"the columns {', '.join(frame.arrays)} are there",
            )
    if len(frame.arrays["pos"]) != frame.n_atoms or frame.arrays["pos"].shape[1:] != (3,):
        raise SourceError('the column "pos" is not three numbers an atom', where=frame.where)
    periodic = np.any(frame.info.get("pbc", "Lattice" in frame.info))
    if periodic:
        raise SourceError(
            "the structure is periodic, and periodic structures cannot be prepared yet",
            where=frame.where,
            remedy='for a molecule in a box write pbc="F F F" in the comment line',
        )


def _value(
    frame: _Frame, quantity: Field, key: str | None, constant: float | None
) -> np.ndarray | None:
    """One label of one structure as float64, or None where the structure lacks it."""
    per_atom = quantity.per == "atom"
    shape = (frame.n_atoms, *quantity.shape) if per_atom else quantity.shape
    if constant is not None:
        return np.full(shape, constant)
    assert key is not None
    raw = (frame.arrays if per_atom else frame.info).get(key)
    if raw is None:
        return None
    if isinstance(raw, str) and "_" in raw:
        _refuse(frame, quantity, key, repr(raw))  # Python would read 1_000 as a number
    if isinstance(raw, str) and " " in raw:
        raw = raw.split()  # the parser leaves an array with a "nan" in it as text
    try:
        value = np.asarray(raw)
        if value.dtype.kind == "i":
            _check_integers(value, frame, key)
        if value.dtype.kind == "b":
            raise ValueError
        value = value.astype(np.float64)
    except ValueError:
        _refuse(frame, quantity, key, f"{raw!r}")
    if value.shape != shape and value.size != np.prod(shape, dtype=int):
        _refuse(frame, quantity, key, f"an array of shape {value.shape}")
    return value


def _check_integers(value: np.ndarray, frame: _Frame, key: str) -> None:
    """The parser keeps integers in 32 bits and wraps larger ones round: compare with the text."""
    pattern = rf"""(?:^|\s)["']?{re.escape(key)}["']?\s*=\s*("[^"]*"|\[[^=]*\]|{{[^}}]*}}|\S+)"""
    texts = re.findall(pattern, frame.comment)
    written = [float(number) for number in re.findall(r"[-+]?\d+", texts[-1])] if texts else []
    if written != value.ravel().tolist():
        raise ValueError


def _refuse(frame: _Frame, quantity: Field, key: str, found: str) -> NoReturn:
    size = f"an array of shape {quantity.shape}" if quantity.shape else "one number"
    raise SourceError(
        f'the key "{key}" holds {found}, which cannot be the label {quantity.name}',
        where=frame.where,
        allowed=f"{size} {'an atom' if quantity.per == 'atom' else 'a structure'}",
    )


def _group(frame: _Frame, key: str) -> str:
    if key not in frame.info:
        hint = did_you_mean(key, frame.info)
        raise SourceError(
            f'the structure has no key "{key}" to group by' + (f"; {hint}" if hint else ""),
            where=frame.where,
            remedy="correct prepare.split.group_by",
        )
    return str(frame.info[key])

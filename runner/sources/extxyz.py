"""Extended XYZ, by the C parser of the `extxyz` package.

The parser stops in silence at a structure that is cut off, does not survive a structure without
atoms, and says neither file nor structure in its errors. So the file's frame (the atom counts and
the lines between them) is read here first, in step with the parser.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from extxyz import cextxyz

from runner.config import COMPRESSED, SourceConfig
from runner.errors import SourceError
from runner.sources.raw import Frame, Raw, as_numbers, from_frames

COLUMNS = r"(\w+:[SIRL]:\d+(:|$))*"
STRANGE = re.compile(rb"\b0[xX]|\0")  # the parser, being C, would make something of them
_PARSER = threading.Lock()  # it is not made for several threads


def read(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Raw]:
    """The structures of a file, in its order, some thousands at a time.

    Args:
        path: the file; gzip and xz are told from the suffix.
        config: keys of the labels.
        group_key: key of the comment line that names each structure's group, if any.

    Raises:
        SourceError: a file that is damaged or cut off.
    """
    wanted = {str(label.key) for label in config.labels.values()}
    with _uncompressed(path) as plain:
        frames = (_frame(parsed, wanted) for parsed in _parsed(path, plain))
        yield from from_frames(frames, config, group_key)


def keys(path: Path) -> list[str]:
    """The keys that the first structure of a file has."""
    with _uncompressed(path) as plain:
        first = next(_parsed(path, plain))
    known = {"Properties", "Lattice", "pbc", "species", "pos"}
    return [key for key in (*first.info, *first.arrays) if key not in known]


@contextlib.contextmanager
def _uncompressed(path: Path) -> Iterator[Path]:
    """A file that the parser can open: a compressed one is unpacked for the while."""
    if path.suffix not in COMPRESSED:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="runner-") as folder:
        plain = Path(folder) / path.stem
        try:
            with _opened(path) as packed, plain.open("wb") as file:
                shutil.copyfileobj(packed, file)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise SourceError(
                f"the compressed file is damaged or cut off: {error}", where=str(path)
            ) from None
        yield plain


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else lzma.open(path, "rb")


@dataclass(frozen=True)
class _Parsed:
    """One structure as the parser gives it."""

    where: str
    n_atoms: int
    comment: str
    info: dict[str, Any]
    arrays: dict[str, np.ndarray]


def _parsed(path: Path, plain: Path) -> Iterator[_Parsed]:
    """Parse a file; every structure that the file announces comes out, or an error."""
    file = cextxyz.cfopen(str(plain), "r")
    try:
        for index, (line, n_atoms, comment) in enumerate(_outline(path, plain)):
            where = f"{path}, structure {index} (counted from 0), line {line}"
            if not re.fullmatch(COLUMNS, _properties(comment)):  # the parser reads on regardless
                raise SourceError(
                    f'the columns "{_properties(comment)}" cannot be understood',
                    where=where,
                    allowed="Properties=species:S:1:pos:R:3 and more of name:type:number, a space "
                    "after it",
                )
            start = cextxyz.cftell(file)
            # integers are kept in 32 bits and wrap round, reals are not
            instead = _retyped(comment, "I", "R") if ":I:" in comment else None
            try:
                info, arrays = _parse(file, instead)
            except (cextxyz.ExtXYZError, EOFError, ValueError) as error:
                cextxyz.cfseek(file, start, 0)
                info, arrays = _with_not_a_number(file, comment, where, error)
            yield _Parsed(where, n_atoms, comment, info, arrays)
    finally:
        cextxyz.cfclose(file)


def _parse(file: Any, comment: str | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The next structure's comment line and columns; `comment` stands in for the line."""
    with _PARSER:
        _, info, arrays = cextxyz.read_frame_dicts(file, comment=comment, use_cleri=False)
    return info, arrays


def _outline(path: Path, plain: Path) -> Iterator[tuple[int, int, str]]:
    """(line, number of atoms, comment line) of every structure that a file announces."""
    line = 0
    with plain.open("rb") as file:
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
            rows = [row for row in islice(file, n_atoms) if row.strip()]
            found = len(rows)
            if found < n_atoms:
                raise SourceError(
                    f"the structure announces {n_atoms} atoms, and {found} lines of atoms follow",
                    where=where,
                    remedy="the file is cut off, or the number of atoms is wrong",
                )
            strange = next(filter(STRANGE.search, [comment, *rows]), None)
            if strange is not None:
                raise SourceError(
                    "a line has a hexadecimal number or a NUL character: "
                    + repr(_text(strange))[:80],
                    where=where,
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
    found = re.search(r'Properties="?([^\s"]+)', comment, re.IGNORECASE)
    return found[1] if found else ""


def _retyped(comment: str, old: str, new: str) -> str:
    """The comment line with all columns of one type declared to be of another."""
    properties = _properties(comment)
    if not properties:
        return comment
    return comment.replace(properties, properties.replace(f":{old}:", f":{new}:"))


def _frame(parsed: _Parsed, wanted: Collection[str]) -> Frame:
    """One structure, what is wanted of it free of the parser's peculiarities."""
    for name, what in (("species", "chemical symbols"), ("pos", "positions")):
        if name not in parsed.arrays:
            raise SourceError(
                f'there is no column "{name}" with the {what}',
                where=parsed.where,
                allowed=f"the columns {', '.join(parsed.arrays)} are there",
            )
    positions = parsed.arrays["pos"]
    if positions.shape != (parsed.n_atoms, 3):
        raise SourceError('the column "pos" is not three numbers an atom', where=parsed.where)
    cell, pbc = _box(parsed)
    present = {key: _unfolded(parsed, key) for key in parsed.info if key in wanted}
    return Frame(
        where=parsed.where,
        species=parsed.arrays["species"],
        positions=positions.astype(np.float64),
        per_structure=parsed.info | present,
        per_atom=parsed.arrays,
        cell=cell,
        pbc=pbc,
    )


def _box(parsed: _Parsed) -> tuple[np.ndarray, np.ndarray]:
    """Lattice vectors as rows, and along which of them the structure is periodic."""
    has_lattice = "Lattice" in parsed.info
    lattice = as_numbers(_unfolded(parsed, "Lattice")) if has_lattice else np.zeros((3, 3))
    if lattice is None or lattice.shape != (3, 3):
        raise SourceError("the Lattice is not nine numbers", where=parsed.where)
    pbc: Any = parsed.info.get("pbc", np.full(3, has_lattice))
    if isinstance(pbc, str) and re.fullmatch("[TF]{3}", pbc):
        pbc = np.array([letter == "T" for letter in pbc])
    pbc = np.asarray(pbc)
    if pbc.dtype.kind != "b" or pbc.shape != (3,):
        raise SourceError(
            f"pbc is {parsed.info['pbc']!r}", where=parsed.where, allowed='for example "T T F"'
        )
    return lattice, pbc


def _unfolded(parsed: _Parsed, key: str) -> Any:
    """A value of the comment line as it was meant.

    The parser gives a matrix by columns, keeps integers in 32 bits and wraps larger ones round, and
    leaves an array with a "nan" in it as text.
    """
    raw = parsed.info[key]
    if isinstance(raw, str) and " " in raw:
        raw = raw.split()
        return np.reshape(raw, (3, 3)) if len(raw) == 9 else raw
    value = np.asarray(raw)
    if value.dtype.kind == "i" and not _as_written(value, parsed.comment, key):
        return "an integer of more than 32 bits"  # a text, which no label can be
    return value.T if value.shape == (3, 3) else raw


def _as_written(value: np.ndarray, comment: str, key: str) -> bool:
    pattern = rf"""(?:^|\s)["']?{re.escape(key)}["']?\s*=\s*("[^"]*"|\[[^=]*\]|{{[^}}]*}}|\S+)"""
    texts = re.findall(pattern, comment)
    written = [float(number) for number in re.findall(r"[-+]?\d+", texts[-1])] if texts else []
    return bool(written == value.T.ravel().tolist())

"""The prepared dataset on disk: whole or not at all, checked, named by what it was made from."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from molecules import random_structures, without

from runner import store
from runner.errors import DatasetError
from runner.store import PreparedDataset, fingerprint, why_not_reused, write_dataset
from runner.structures import Structures

ATTRIBUTES: dict[str, Any] = {
    "schema_version": store.SCHEMA_VERSION,
    "splits": {"train": [0, 3], "val": [3, 4], "test": [4, 6]},
    "statistics": {"coverage": {"energy": 6}},
}


@pytest.fixture
def structures() -> Structures:
    sizes = without(random_structures([3, 1, 5, 2, 4, 6], seed=8), "forces", [1])
    return without(sizes, "dipole", list(range(6)))


def _write(path: Path, structures: Structures) -> PreparedDataset:
    write_dataset(path, structures, ATTRIBUTES, lambda picture: picture.write_bytes(b"png"))
    return PreparedDataset(path)


def test_what_was_written_comes_back_split_by_split(tmp_path: Path, structures: Structures) -> None:
    dataset = _write(tmp_path / "x.zarr", structures)
    for split, (start, stop) in ATTRIBUTES["splits"].items():
        found, expected = dataset.read(split), structures.take(np.arange(start, stop))
        assert np.array_equal(found.first_atom, expected.first_atom)
        for name, array in (expected.atoms | expected.structures).items():
            back = (found.atoms | found.structures)[name]
            assert back.dtype == array.dtype
            assert np.array_equal(back, array, equal_nan=array.dtype.kind == "f")
    assert (tmp_path / "x.png").read_bytes() == b"png"
    assert dataset.n_atoms == 21


def test_arrays_longer_than_a_chunk_and_a_shard(
    tmp_path: Path, structures: Structures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK_ROWS", 4)
    monkeypatch.setattr(store, "SHARD_ROWS", 8)
    dataset = _write(tmp_path / "x.zarr", structures)
    assert len(list((tmp_path / "x.zarr/atoms/positions/c").iterdir())) == 3
    found = np.concatenate([dataset.read(split).atoms["positions"] for split in dataset_splits()])
    assert np.array_equal(found, structures.atoms["positions"])


def dataset_splits() -> list[str]:
    return list(ATTRIBUTES["splits"])


def test_every_array_is_checksummed_float64_with_nan_for_what_is_missing(
    tmp_path: Path, structures: Structures
) -> None:
    _write(tmp_path / "x.zarr", structures)
    files = sorted((tmp_path / "x.zarr").glob("*/*/zarr.json"))
    assert len(files) == 10
    for file in files:
        array = json.loads(file.read_text())
        (sharding,) = array["codecs"]
        assert sharding["configuration"]["codecs"][-1]["name"] == "crc32c"
        assert sharding["configuration"]["index_codecs"][-1]["name"] == "crc32c"
        if array["data_type"] == "float64":
            assert array["fill_value"] == "NaN"
        else:
            assert array["data_type"] in ("uint8", "int16", "int64")


def test_an_array_without_any_label_is_stored_too(tmp_path: Path, structures: Structures) -> None:
    dataset = _write(tmp_path / "x.zarr", structures)
    assert (tmp_path / "x.zarr/structures/dipole/c/0/0").is_file()
    assert np.isnan(dataset.read("train").structures["dipole"]).all()


@pytest.mark.parametrize("name", ["structures/energy/c/0", "atoms/positions/c/0/0"])
def test_a_missing_chunk_is_an_error_that_names_the_array(
    tmp_path: Path, structures: Structures, name: str
) -> None:
    _write(tmp_path / "x.zarr", structures)
    (tmp_path / "x.zarr" / name).unlink()
    array = name.partition("/c/")[0]
    with pytest.raises(DatasetError, match=f"chunk 0 of the array {array} is missing(.|\n)*remedy"):
        PreparedDataset(tmp_path / "x.zarr")


@pytest.mark.parametrize("position", [3, -20, -2])
def test_a_changed_byte_is_an_error_that_names_the_array(
    tmp_path: Path, structures: Structures, position: int
) -> None:
    dataset = _write(tmp_path / "x.zarr", structures)
    chunk = tmp_path / "x.zarr" / "atoms" / "positions" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[position] ^= 0x10
    chunk.write_bytes(content)
    with pytest.raises(DatasetError, match="the array atoms/positions cannot be read"):
        dataset.read("train")


def test_a_missing_array_is_an_error(tmp_path: Path, structures: Structures) -> None:
    _write(tmp_path / "x.zarr", structures)
    (tmp_path / "x.zarr" / "structures" / "first_atom" / "zarr.json").unlink()
    with pytest.raises(DatasetError, match=r"(first_atom is missing|damaged)"):
        PreparedDataset(tmp_path / "x.zarr").read("train")


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no prepared dataset at"):
        PreparedDataset(tmp_path / "x.zarr")
    (tmp_path / "x.zarr").mkdir()
    with pytest.raises(DatasetError, match="damaged"):
        PreparedDataset(tmp_path / "x.zarr")


def test_another_schema_version_is_refused(tmp_path: Path, structures: Structures) -> None:
    attributes = ATTRIBUTES | {"schema_version": 99}
    with pytest.raises(DatasetError, match="its schema version is 99"):
        write_dataset(tmp_path / "x.zarr", structures, attributes, lambda p: p.touch())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_writing_that_failed(tmp_path: Path, structures: Structures) -> None:
    def fail(_: Path) -> None:
        assert not (tmp_path / "x.zarr").exists()
        raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        write_dataset(tmp_path / "x.zarr", structures, ATTRIBUTES, fail)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed_and_what_running_ones_write_is_not(
    tmp_path: Path, structures: Structures
) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    host = socket.gethostname()
    (tmp_path / f".x.zarr.{host}.{gone}.abc").mkdir()
    (tmp_path / f".x.zarr.{host}.{gone}.abc.png").touch()
    running = tmp_path / f".y.zarr.{host}.{os.getpid()}.abc"
    running.mkdir()
    elsewhere = tmp_path / ".z.zarr.elsewhere.1.abc"
    elsewhere.mkdir()
    _write(tmp_path / "x.zarr", structures)
    hidden = {path for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {running, elsewhere}


def test_the_second_of_two_writers_leaves_the_first_one_s(
    tmp_path: Path, structures: Structures
) -> None:
    _write(tmp_path / "x.zarr", structures)
    marker = tmp_path / "x.zarr" / "zarr.json"
    before = marker.stat().st_mtime_ns, marker.stat().st_ino
    _write(tmp_path / "x.zarr", structures)
    assert (marker.stat().st_mtime_ns, marker.stat().st_ino) == before
    assert {path.name for path in tmp_path.iterdir()} == {"x.zarr", "x.png"}


PREPARE: dict[str, Any] = {
    "name": "a",
    "source": [{"path": "/x/a.xyz", "energy": {"key": "E", "unit": "eV", "scale": 1.0}}],
    "split": {"seed": 0},
}


def test_the_fingerprint_follows_every_key_and_byte_but_no_name_or_place() -> None:
    first = fingerprint(PREPARE, [["aa"]])
    assert len(first) == 64
    assert fingerprint(PREPARE | {"name": "b"}, [["aa"]]) == first
    moved = [{**PREPARE["source"][0], "path": "/y/b.xyz"}]
    assert fingerprint(PREPARE | {"source": moved}, [["aa"]]) == first
    others = [
        fingerprint(PREPARE, [["ab"]]),
        fingerprint(PREPARE, [["aa", "aa"]]),
        fingerprint(PREPARE | {"split": {"seed": 1}}, [["aa"]]),
        fingerprint(PREPARE | {"source": PREPARE["source"] * 2}, [["aa"], []]),
    ]
    assert len({first, *others}) == 5


def test_it_can_say_why_a_dataset_does_not_serve(tmp_path: Path, structures: Structures) -> None:
    assert why_not_reused(tmp_path, "a", PREPARE, [["aa"]]) == []
    attributes = ATTRIBUTES | {"prepare": PREPARE, "files": [["aa"]]}
    write_dataset(tmp_path / "a-1.zarr", structures, attributes, lambda picture: picture.touch())
    other = PREPARE | {"split": {"seed": 1}}
    assert why_not_reused(tmp_path, "a", other, [["aa"]]) == ["split.seed: 0 → 1"]
    assert why_not_reused(tmp_path, "a", PREPARE, [["bb"]]) == ["the content of the source files"]
    version = ["the version of the program's transformation"]
    assert why_not_reused(tmp_path, "a", PREPARE, [["aa"]]) == version
    assert why_not_reused(tmp_path, "b", other, [["aa"]]) == []


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("name", ["structures/energy", "atoms/atomic_numbers"])
def test_a_changed_byte_anywhere_is_an_error_whichever_split_is_read(
    tmp_path: Path, structures: Structures, name: str, split: str
) -> None:
    _write(tmp_path / "x.zarr", structures)
    chunk = tmp_path / "x.zarr" / name / "c" / "0"
    content = chunk.read_bytes()
    undetected = []
    for position in range(0, len(content), 2):
        changed = bytearray(content)
        changed[position] ^= 1
        chunk.write_bytes(changed)
        try:
            PreparedDataset(tmp_path / "x.zarr").read(split)
        except DatasetError:
            continue
        undetected.append(position)
    assert undetected == []


def test_a_chunk_that_is_cut_off_is_an_error(tmp_path: Path, structures: Structures) -> None:
    _write(tmp_path / "x.zarr", structures)
    chunk = tmp_path / "x.zarr" / "structures" / "energy" / "c" / "0"
    content = chunk.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        chunk.write_bytes(content[:length])
        with pytest.raises(DatasetError, match="the array structures/energy cannot be read"):
            PreparedDataset(tmp_path / "x.zarr").read("train")


def test_a_changed_byte_in_the_last_shard_of_several_is_an_error(
    tmp_path: Path, structures: Structures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK_ROWS", 4)
    monkeypatch.setattr(store, "SHARD_ROWS", 8)
    _write(tmp_path / "x.zarr", structures)  # 21 atoms: the last shard is not full
    chunk = tmp_path / "x.zarr" / "atoms" / "positions" / "c" / "2" / "0"
    content = bytearray(chunk.read_bytes())
    content[20] ^= 1  # in the numbers themselves
    chunk.write_bytes(content)
    with pytest.raises(DatasetError, match="the array atoms/positions cannot be read"):
        PreparedDataset(tmp_path / "x.zarr").read("test")


@pytest.mark.parametrize("damage", ["", "{", "{}", "[]"])
def test_a_damaged_description_is_an_error(
    tmp_path: Path, structures: Structures, damage: str
) -> None:
    _write(tmp_path / "x.zarr", structures)
    (tmp_path / "x.zarr" / "zarr.json").write_text(damage)
    with pytest.raises(DatasetError, match=r"damaged(.|\n)*remedy: *delete this folder"):
        PreparedDataset(tmp_path / "x.zarr")


def test_a_killed_writer_leaves_nothing_visible_and_the_next_one_clears_up(
    tmp_path: Path, structures: Structures
) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from molecules import random_structures\nfrom runner.store import write_dataset\n"
        "def die(picture):\n"
        "    picture.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"path = Path({str(tmp_path / 'x.zarr')!r})\n"
        f"write_dataset(path, random_structures([2] * 6), {{}}, die)\n"
    ).replace("{}", repr(ATTRIBUTES))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 2
    assert all(name.startswith(".") for name in left)
    with pytest.raises(DatasetError, match="there is no prepared dataset"):
        PreparedDataset(tmp_path / "x.zarr")
    _write(tmp_path / "x.zarr", structures)
    assert {path.name for path in tmp_path.iterdir()} == {"x.zarr", "x.png"}


def test_two_writers_of_one_process_do_not_disturb_each_other(
    tmp_path: Path, structures: Structures
) -> None:
    def slow(picture: Path) -> None:
        picture.write_bytes(b"png")
        _write(tmp_path / "x.zarr", structures)  # another thread, at the worst moment

    write_dataset(tmp_path / "x.zarr", structures, ATTRIBUTES, slow)
    assert {path.name for path in tmp_path.iterdir()} == {"x.zarr", "x.png"}
    PreparedDataset(tmp_path / "x.zarr").read("train")


@pytest.mark.parametrize(
    "change",
    [
        {"split": {"seed": 0, "val": 0.1}},
        {"self_energies": {"method": "none"}},
        {"source": [{"path": "/x/a.xyz", "energy": {"key": "e", "unit": "eV", "scale": 1.0}}]},
        {"source": [{"path": "/x/a.xyz", "energy": {"key": "E", "unit": "meV", "scale": 1.0}}]},
        {"source": [{"path": "/x/a.xyz", "energy": {"key": "E", "unit": "eV", "scale": -1.0}}]},
        {"source": [{"path": "/x/a.xyz", "format": "extxyz", **PREPARE["source"][0]}]},
    ],
)
def test_each_key_makes_another_fingerprint(change: dict[str, Any]) -> None:
    assert fingerprint(PREPARE | change, [["aa"]]) != fingerprint(PREPARE, [["aa"]])
    assert fingerprint(PREPARE | change, [["aa"]]) == fingerprint(
        change | PREPARE | change, [["aa"]]
    )


def test_the_version_of_the_transformation_makes_another_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = fingerprint(PREPARE, [["aa"]])
    monkeypatch.setattr(store, "TRANSFORMATION_VERSION", 10**6)
    assert fingerprint(PREPARE, [["aa"]]) != before


@pytest.mark.parametrize("splits", [{"train": [0, 3]}, {"train": [0, 9]}, {}])
def test_splits_that_do_not_fit_the_arrays_are_refused(
    tmp_path: Path, structures: Structures, splits: dict[str, Any]
) -> None:
    attributes = ATTRIBUTES | {"splits": splits}
    with pytest.raises(DatasetError, match="its splits do not cover its 6 structures"):
        write_dataset(tmp_path / "x.zarr", structures, attributes, lambda picture: picture.touch())


def test_arrays_of_different_length_are_refused(tmp_path: Path, structures: Structures) -> None:
    _write(tmp_path / "x.zarr", structures)
    group = zarr.open_group(tmp_path / "x.zarr", mode="r+")
    group["atoms/forces"].resize((20, 3))
    group.attrs["checksum"] = store._checksum(tmp_path / "x.zarr")
    with pytest.raises(DatasetError, match="the array atoms/forces has 20 rows instead of 21"):
        PreparedDataset(tmp_path / "x.zarr")


def test_structures_are_stored_in_the_order_that_is_asked_for(
    tmp_path: Path, structures: Structures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK_ROWS", 2)
    monkeypatch.setattr(store, "SHARD_ROWS", 4)
    order = np.array([4, 0, 5, 1])
    attributes = ATTRIBUTES | {"splits": {"train": [0, 3], "val": [3, 4], "test": [4, 4]}}
    write_dataset(tmp_path / "x.zarr", structures, attributes, lambda p: p.touch(), order)
    dataset = PreparedDataset(tmp_path / "x.zarr")
    for split, rows in (("train", order[:3]), ("val", order[3:])):
        found, expected = dataset.read(split), structures.take(rows)
        for name in ("positions", "forces", "atomic_numbers"):
            assert np.array_equal(found.atoms[name], expected.atoms[name], equal_nan=True)
        assert np.array_equal(found.structures["energy"], expected.structures["energy"])
        assert dataset.origins(split)[:, 1].tolist() == rows.tolist()


def test_a_description_that_was_changed_is_noticed(tmp_path: Path, structures: Structures) -> None:
    _write(tmp_path / "x.zarr", structures)
    for name, old, new in (
        ("zarr.json", "[\n        0,", "[\n        1,"),
        ("atoms/positions/zarr.json", '"float64"', '"int64"'),
    ):
        file = tmp_path / "x.zarr" / name
        before = file.read_text()
        assert old in before, before
        file.write_text(before.replace(old, new, 1))
        with pytest.raises(DatasetError, match=r"damaged(.|\n)*delete this folder"):
            PreparedDataset(tmp_path / "x.zarr")
        file.write_text(before)
    PreparedDataset(tmp_path / "x.zarr")


def test_a_page_lies_in_the_folder(tmp_path: Path, structures: Structures) -> None:
    path = tmp_path / "x.zarr"
    write_dataset(path, structures, ATTRIBUTES, lambda p: p.touch(), pages={"a.html": "é"})
    assert (path / "a.html").read_text(encoding="utf-8") == "é"
    assert len(PreparedDataset(path).read("train")) > 0


def test_scratch_is_gone_afterwards_and_after_a_crash(tmp_path: Path) -> None:
    def fail() -> None:
        with store.scratch(tmp_path) as folder:
            (folder / "large").write_bytes(b"1")
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert not list(tmp_path.iterdir())

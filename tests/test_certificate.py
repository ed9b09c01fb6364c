"""The page of the self-energies says what the attributes say, by itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from molecules import springs, write_experiment

from runner.certificate import self_energies_html
from runner.config import load_config
from runner.prepare import prepare
from runner.store import PreparedDataset
from runner.terminal import Terminal


class _Page(HTMLParser):
    """Cells of the tables by their id, and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self._rows: list[list[str]] | None = None
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.add(tag)
        self.loads += [str(named[key]) for key in ("src", "href") if key in named]
        if tag == "table":
            self._rows = self.tables[str(named["id"])] = []
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._rows = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data.strip()


def _dataset(folder: Path, *settings: str, n: int = 60) -> PreparedDataset:
    config_file = write_experiment(folder, springs(n=n))
    config = load_config(config_file, settings)
    return PreparedDataset(Path(prepare(config, folder / "prepared", Terminal())["dataset"]))


def _page_of(dataset: PreparedDataset) -> _Page:
    return _Page((dataset.path / "self_energies.html").read_text(encoding="utf-8"))


def test_every_number_of_the_tables_is_the_dataset_s(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    fit, values = dataset.attributes["fit"], dataset.attributes["self_energies"]
    page = _page_of(dataset)
    assert page.tables["self-energies"][1:] == [
        [s, f"{e:.6f}", f"± {fit['standard_errors'][s]:.6f}", str(fit["counts"][s])]
        for s, e in values.items()
    ]
    spans = dataset.attributes["energy_range"]
    for row, (name, span) in zip(page.tables["energy-range"][1:], spans.items(), strict=True):
        assert row[0] == name
        assert float(row[1]) == pytest.approx(span["min"], abs=1e-6)
        assert float(row[2]) == pytest.approx(span["max"], abs=1e-6)
        assert float(row[3]) == pytest.approx(span["width"], abs=1e-9)
    worst = fit["worst_compositions"]
    assert [row[0] for row in page.tables["worst"][1:]] == [w["formula"] for w in worst]
    assert [float(row[2]) for row in page.tables["worst"][1:]] == pytest.approx(
        [w["mean_residual"] for w in worst], abs=1e-4
    )
    (source,) = dataset.attributes["sources"]
    row = [source["name"], str(source["bytes"]), source["sha256"]]
    assert page.tables["sources"][1] == row
    assert "rank 4 of 4" in page.text
    assert f"{fit['leave_one_composition_out']['rmse']:.4f} eV for a composition" in page.text
    assert "determines all 4 self-energies" in page.text
    settings = dataset.attributes["prepare"]["self_energies"]
    assert [row[0] for row in page.tables["settings"][1:]] == list(settings)
    assert ["fit_method", settings["fit_method"]] in page.tables["settings"]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = _page_of(_dataset(tmp_path))
    assert page.loads
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.loads)
    assert not page.tags & {"script", "link", "iframe", "object"}


def test_what_is_not_determined_is_said(tmp_path: Path) -> None:
    one = springs(n=1)
    same = write_experiment(tmp_path, one.take(np.zeros(12, np.int64)))
    result = prepare(load_config(same), tmp_path / "prepared", Terminal())
    page = _page_of(PreparedDataset(Path(result["dataset"])))
    assert "the data fixes" in page.text
    assert "nothing is known of a composition that was not seen" in page.text
    assert any(row[2] == "undetermined" for row in page.tables["self-energies"])


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        (["prepare.self_energies.method=none"], "No self-energies were subtracted"),
        (
            [
                "prepare.self_energies.method=given",
                'prepare.self_energies.values={H="-13 eV",C="-1 eV",N="-2 eV",O="-3 eV"}',
            ],
            "were given in the config",
        ),
        (["prepare.self_energies.fit_method=huber"], "more than five scales"),
    ],
)
def test_other_methods(tmp_path: Path, settings: list[str], verdict: str) -> None:
    page = _page_of(_dataset(tmp_path, *settings))
    assert verdict in page.text
    assert len(page.tables["self-energies"]) == 5
    fitted = "standard error, eV" in page.tables["self-energies"][0]
    assert fitted == ("fit_method" in settings[0])


def _again(attributes: dict[str, Any], n: int = 60) -> str:
    energies = np.linspace(-1, 1, n)
    return self_energies_html(attributes, energies - 100, energies, ["H2O", "CH4", "C2"] * (n // 3))


def test_texts_of_users_are_escaped_and_bytes_repeat(tmp_path: Path) -> None:
    attributes = dict(_dataset(tmp_path).attributes)
    attributes["sources"] = [attributes["sources"][0] | {"name": "<script>alert(1)</script>"}]
    attributes["warnings"] = ["a <b> & c"]
    text = _again(attributes)
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "a &lt;b&gt; &amp; c" in text
    assert text == _again(attributes)


def test_a_large_dataset_makes_a_page_that_opens(tmp_path: Path) -> None:
    assert len(_again(dict(_dataset(tmp_path).attributes), 99_999)) < 1_500_000


def test_what_was_dropped_is_listed(tmp_path: Path) -> None:
    text = _page_of(_dataset(tmp_path, "prepare.filter.max_atoms=4")).text
    assert re.search(r"20: more than 4 atoms \(\s*data.extxyz 2, data.extxyz 5", text)


def test_what_the_attributes_leave_out_the_page_leaves_out(tmp_path: Path) -> None:
    attributes = dict(_dataset(tmp_path).attributes)
    for name in ("levels", "dropped", "warnings", "energy_range"):
        attributes.pop(name, None)
    text = _again(attributes | {"fit": {"method": "fit", "rank": 4, "n_elements": 4}})
    assert "the rank is 4 of 4" in text
    assert set(_Page(text).tables) == {"self-energies", "sources", "settings"}


def test_several_levels_of_theory_are_told_apart(tmp_path: Path) -> None:
    attributes = dict(_dataset(tmp_path).attributes)
    by_level = {"PBE": {"H": -13.0, "C": -1035.0}, "xTB": {"H": -11.0}}
    errors = {"H (PBE)": 0.1, "C (PBE)": None, "H (xTB)": 0.2}
    fit = attributes["fit"] | {"n_elements": 3, "rank": 3, "standard_errors": errors}
    fit["counts"] = {"H (PBE)": 7, "C (PBE)": 5, "H (xTB)": 3}
    spans = attributes["energy_range"]
    other = {"before": spans["before"] | {"width": 100.0}, "after": spans["after"]}
    attributes |= {"levels": ["PBE", "xTB"], "self_energies_by_level": by_level, "fit": fit}
    page = _Page(_again(attributes | {"energy_range": other}))
    assert page.tables["self-energies"][1:] == [
        ["H (PBE)", "-13.000000", "± 0.100000", "7"],
        ["C (PBE)", "-1035.000000", "undetermined", "5"],
        ["H (xTB)", "-11.000000", "± 0.200000", "3"],
    ]
    assert "all 3 self-energies of the 2 levels of theory" in page.text
    assert re.search(r"the width\s+does not stay", page.text)
    assert "the width\nstays" not in page.text


def test_outliers_and_files_are_named_and_cuts_are_said(tmp_path: Path) -> None:
    attributes = dict(_dataset(tmp_path).attributes)
    (source,) = attributes["sources"]
    attributes["sources"] = [source | {"name": f"{number}.xyz"} for number in range(60)]
    attributes["fit"] = attributes["fit"] | {
        "fit_method": "huber",
        "n_outliers": 1,
        "outliers": [{"source": 3, "source_index": 17, "residual": -2.5}],
    }
    page = _Page(_again(attributes))
    assert page.tables["outliers"][1:] == [["3.xyz", "17", "-2.5000"]]
    assert len(page.tables["sources"]) == 51
    assert "and 10 files more" in page.text

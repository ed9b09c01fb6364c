"""The config: every mistake at once, with line, key, what is allowed and a did-you-mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.config import (
    Config,
    LossTermConfig,
    SchNetConfig,
    WeightSchedule,
    config_path,
    load_config,
    potential_config,
    resolved_toml,
)
from runner.errors import ConfigError

GOOD = """
[prepare]
name = "x"
[[prepare.source]]
path = "a.extxyz"
energy = { key = "energy", unit = "hartree" }
forces = { key = "gradient", unit = "hartree/bohr", scale = -1 }
[[prepare.source]]
path = ["b.extxyz", "sub/*.xyz"]
energy = { key = "E", unit = "eV", missing = "nan" }
total_charge = { value = 0 }
[prepare.split]
train = 0.7
val = 0.2
test = 0.1
[train]
[train.potential]
name = "painn"
cutoff = "0.5 nm"
[train.loss.energy]
[train.loss.forces]
weight = { start = 10.0, end = 100.0, epochs = 50 }
"""


def _load(folder: Path, text: str, *settings: str) -> Config:
    path = folder / "config.toml"
    path.write_text(text)
    return load_config(path, settings)


def _mistakes(folder: Path, text: str, *settings: str) -> str:
    with pytest.raises(ConfigError) as error:
        _load(folder, text, *settings)
    return str(error.value)


def test_a_good_config_is_read_with_its_units_and_defaults(tmp_path: Path) -> None:
    config = _load(tmp_path, GOOD)
    first, second = config.prepare.source
    assert first.path == str(tmp_path / "a.extxyz")  # relative to the file it stands in
    assert second.path == [str(tmp_path / "b.extxyz"), str(tmp_path / "sub/*.xyz")]
    assert set(first.labels) == {"energy", "forces"}
    assert config.train is not None
    assert config.train.potential.cutoff == pytest.approx(5.0)
    assert config.train.measured == {"energy": ["mae", "rmse"], "forces": ["mae", "rmse"]}
    assert config.train.batch.structures == 32


def test_a_path_may_name_environment_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = GOOD.replace('"a.extxyz"', '"$NNP_DATA/${NNP_KIND}/a$.extxyz"')
    monkeypatch.setenv("NNP_KIND", "small")
    assert "needs the environment variable NNP_DATA, which is not set" in _mistakes(tmp_path, text)
    monkeypatch.setenv("NNP_DATA", "/data")
    text = text.replace("a$.extxyz", "a.extxyz")
    assert _load(tmp_path, text).prepare.source[0].path == "/data/small/a.extxyz"
    text = GOOD.replace('"a.extxyz"', '"a$.extxyz"')
    assert _load(tmp_path, text).prepare.source[0].path == str(tmp_path / "a$.extxyz")


def test_the_resolved_config_is_the_same_config(tmp_path: Path) -> None:
    config = _load(tmp_path, GOOD)
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert _load(other, resolved_toml(config)) == config


def test_all_mistakes_come_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = _mistakes(
        tmp_path,
        """[prepare]
nmae = "x"
name = 3
[[prepare.source]]
path = "a.xyz"
energy = { key = "e", unit = "eV" }
[[prepare.source]]
path = "b.xyz"
energy = { key = "e", unit = "eV" }
forces = { key = "f",
  unit = "eV" }
dipole = { key = "d" }
[train]
epochs = "many"
[train.potential]
name = "pain"
cutoff = "5 bohrr"
[train.loss.forcs]
weight = 1
[train.loss.energy]
per_atom = 1
error = "squred"
""",
    )
    file = tmp_path / "config.toml"
    for line, key, message in (
        (3, "prepare.name", "found 3 (integer); it should be of type string"),
        (2, "prepare.nmae", 'unknown key; did you mean "name"?'),
        (10, "prepare.source.1.forces", 'the unit "eV" has the wrong dimension'),
        (12, "prepare.source.1.dipole", "dipole needs a unit; write for example"),
        (14, "train.epochs", "found 'many' (string); it should be of type integer"),
        (16, "train.potential.name", "found 'pain' (string); did you mean \"painn\"?"),
        (17, "train.potential.cutoff", '"bohrr" is not a unit'),
        (18, "train.loss.forcs", 'unknown key; did you mean "forces"?'),
        (21, "train.loss.energy.per_atom", "found 1 (integer); it should be of type boolean"),
        (22, "train.loss.energy.error", "found 'squred' (string); did you mean \"squared\"?"),
    ):
        assert f"{file}:{line}  {key}\n    {message}" in text
    assert "10 mistakes in the config" in text
    assert "allowed: charges, dipole, energy, forces, own, quadrupole, spin_multipli" in text
    assert "allowed: 'squared', 'absolute' or 'huber'" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "x"', "", "prepare.name\n    this key is missing"),
        ('name = "x"', 'name = "a b"', "prepare.name\n    found 'a b' (string)"),
        ("test = 0.1", "test = 0.2", "must sum to 1, not 1.1"),
        ("test = 0.1", "test = 100", "all fractions or all counts"),
        ("test = 0.1", "test = -0.1", "found -0.1 (float); it is a fraction"),
        ("test = 0.1", 'method = "group"', 'method = "group" and group_by belong together'),
        ('key = "energy", unit', "value = 1, key = 'e', unit", 'one of "key" and "value"'),
        ('unit = "hartree" }', "}", "energy needs a unit"),
        ("[train]", "[train]\nepochs = 0", "greater than or equal to 1"),
        ("[train]", '[train.batch]\nstructures = "2"', "of type integer"),
        ("[train]", "[train.trainer]\ndevices = 1.5", "it is a number, a list of numbers"),
        ("[train]", "[train.metrics]\nenergy = []", "train.metrics.energy"),
        ('"0.5 nm"', "5", '5 has no unit; write a string such as "5 angstrom"'),
        ('"0.5 nm"', '"0 nm"', "greater than 0"),
        ('"0.5 nm"', '"5 eV"', "wrong dimension"),
        ("start = 10.0, ", "", "train.loss.forces.weight.start\n    this key is missing"),
        ("start = 10.0", "start = -1.0", "greater than or equal to 0"),
        ("weight = {", 'error = "huber"\nweight = -1 #', "finite and not negative"),
        ("weight = {", 'weight = "1" #', "a weight is a number, {"),
        ("[train.loss.energy]\n", "[train.losss]\n", 'did you mean "loss"?'),
        ("[prepare.split]", '[prepare.self_energies]\nmethod = "given"\n[prepare.split]', "needs"),
        (
            "[prepare.split]",
            '[prepare.self_energies]\nmethod = "none"\nvalues = { H = "-1 eV" }\n[prepare.split]',
            "takes no values",
        ),
    ],
)
def test_each_impossible_value_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert message in _mistakes(tmp_path, GOOD.replace(old, new, 1))


def test_a_loss_without_terms_is_refused(tmp_path: Path) -> None:
    text = GOOD.partition("[train.loss.energy]")[0] + "[train.loss]\n"
    assert "the loss has no term" in _mistakes(tmp_path, text)


def test_a_fit_without_energies_is_refused(tmp_path: Path) -> None:
    text = "[prepare]\nname = 'x'\n[[prepare.source]]\npath = 'a.xyz'\n"
    assert "no source maps an energy" in _mistakes(tmp_path, text)


def test_a_base_file_is_merged_under(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "base.toml").write_text(GOOD)
    text = 'extends = "base/base.toml"\n[train]\nepochs = 7\n[train.loss.energy]\nper_atom = true\n'
    config = _load(tmp_path, text)
    assert config.train is not None
    assert config.train.epochs == 7
    assert config.train.loss.forces is not None
    assert config.train.loss.energy is not None
    assert config.train.loss.energy.per_atom
    assert config.prepare.source[0].path == str(tmp_path / "base" / "a.extxyz")
    wrong = _mistakes(tmp_path, text + "[train.loss.energi]\n")
    assert f"{tmp_path / 'config.toml'}:6  train.loss.energi" in wrong
    broken = GOOD.replace("val = 0.2", "val = 'x'")
    (tmp_path / "base" / "base.toml").write_text(broken)
    assert f"{tmp_path / 'base' / 'base.toml'}:14  prepare.split.val" in _mistakes(tmp_path, text)


def test_extends_in_a_circle_and_to_nowhere(tmp_path: Path) -> None:
    assert "goes round in a circle" in _mistakes(tmp_path, 'extends = "config.toml"')
    assert "cannot read" in _mistakes(tmp_path, 'extends = "nowhere.toml"')
    assert "the path of one TOML file" in _mistakes(tmp_path, "extends = 3")


def test_settings_lie_on_top(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        GOOD,
        "train.optimizer.lr=1e-4",
        "prepare.source.1.total_charge.value=1",
        "prepare.name=other",
        "train.loss.forces.weight=3",
        "train.metrics.energy=['mae']",
    )
    assert config.train is not None
    assert config.train.optimizer.lr == 1e-4
    assert config.prepare.source[1].labels["total_charge"].value == 1
    assert config.prepare.name == "other"
    assert config.train.loss.terms["forces"].weight == 3
    assert config.train.measured == {"energy": ["mae"]}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epochs", "is not a setting(.|\n)*allowed: *KEY=VALUE"),
        ("=3", "is not a setting"),
        ("train.epochs.x=3", "train.epochs"),
        ("prepare.source.7.path=x", "there is no table prepare.source.7"),
        ("prepare.source.7=x", "is not a table"),
        ("train.epoch=3", r'--set train.epoch=3  train.epoch(.|\n)*did you mean "epochs"'),
        (
            "prepare.split={train=0.7, val=0.3, seed='x'}",
            r"  --set prepare.split=\S+ val=0.3, seed='x'\}  prepare.split.seed\n +found 'x'",
        ),
        (
            "train.stage=[{start=1}]",
            r"  --set train.stage=\S+  train.stage.0\n +the stage changes nothing; give it lr",
        ),
        (
            "train.stage=[{start=100, lr=1e-3}]",
            r"config.toml:\d+ with --set train.stage=.*  train\n +the stages start at epochs 100",
        ),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, GOOD + "\n[train.optimizer]\n".replace("optimizer", "batch"), setting)


def test_what_is_no_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    assert "not valid TOML" in _mistakes(tmp_path, "[prepare]\nname = \n")
    assert "line 2" in _mistakes(tmp_path, "[prepare]\nname = \n")
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "config.toml")


def test_an_experiment_is_a_directory_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no experiment at(.|\n)*config.toml"):
        config_path(tmp_path)
    (tmp_path / "config.toml").write_text(GOOD)
    assert config_path(tmp_path) == config_path(tmp_path / "config.toml")


@pytest.mark.parametrize("text", ["", "# nothing yet"])
def test_an_empty_config_names_its_file(tmp_path: Path, text: str) -> None:
    found = _mistakes(tmp_path, text)
    assert f"{tmp_path / 'config.toml'}  prepare\n    this key is missing" in found


ZERO = ["train.loss.energy.weight=0", "train.loss.forces.weight={start=0, end=0, epochs=9}"]


def test_a_loss_that_weighs_nothing_is_refused(tmp_path: Path) -> None:
    found = _mistakes(tmp_path, GOOD, *ZERO)
    assert "every weight of the loss is 0, so that nothing is trained: energy, forces" in found
    later = {
        "train.stage": "[{start=3, weights={forces=1}}]",
        "train.loss.energy.weight": "{values=[0, 1], epochs=[5]}",
        "train.loss.forces.weight": "{start=0, end=1, epochs=9}",
    }
    for key, value in later.items():
        assert _load(tmp_path, GOOD, *ZERO, f"{key}={value}").train is not None


def test_a_schedule_is_a_pure_function_of_the_epoch() -> None:
    term = LossTermConfig(weight=WeightSchedule(start=10.0, end=100.0, epochs=50))
    assert [term.weight_at(epoch) for epoch in (0, 10, 50, 1000)] == [10.0, 28.0, 100.0, 100.0]
    assert LossTermConfig(weight=2).weight_at(17) == 2


def test_lines_inside_inline_tables_dotted_keys_and_sub_tables(tmp_path: Path) -> None:
    text = _mistakes(
        tmp_path,
        """prepare.name = "x"
prepare.source = [
  { path = "a.xyz", energy = { key = "e", unit = "eV" } },
  # a comment counts as no element
  { path = "b.xyz",
    energy.unit = "eV",
    energy.kye = "e" },
]
[train.potential]
name = "painn"
[train.loss.energy]
[train.metrics]
energy = [
  "mae",
  "rsme",
]
[prepare.split]
"sed" = 1
""",
    )
    file = tmp_path / "config.toml"
    for line, key, message in (
        (7, "prepare.source.1.energy.kye", 'unknown key; did you mean "key"?'),
        (15, "train.metrics.energy.1", "found 'rsme' (string); did you mean \"rmse\"?"),
        (18, "prepare.split.sed", 'unknown key; did you mean "seed"?'),
    ):
        assert f"{file}:{line}  {key}\n    {message}" in text


def test_a_sub_table_belongs_to_the_latest_source(tmp_path: Path) -> None:
    source = '[[prepare.source]]\npath = "a.xyz"\n[prepare.source.energy]\nkey = "e"\nunit = "eV"\n'
    text = _mistakes(
        tmp_path, '[prepare]\nname = "x"\n' + source + source + "[prepare.source.forces]\nk = 1\n"
    )
    assert f"{tmp_path / 'config.toml'}:14  prepare.source.1.forces.k\n    unknown key" in text


def test_extends_in_a_circle_of_two(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('extends = "config.toml"')
    text = _mistakes(tmp_path, 'extends = "base.toml"')
    assert "goes round in a circle" in text
    assert str(tmp_path) in text


def test_a_list_over_a_base_file_is_replaced_whole_and_its_mistakes_are_not_the_base_s(
    tmp_path: Path,
) -> None:
    (tmp_path / "base.toml").write_text(GOOD)
    own = 'extends = "base.toml"\n[[prepare.source]]\nenergy = { key = "e", unit = "eV" }\n'
    config = _load(tmp_path, own.replace("energy", 'path = "c.xyz"\nenergy', 1))
    assert [source.path for source in config.prepare.source] == [str(tmp_path / "c.xyz")]
    text = _mistakes(tmp_path, own)
    assert "prepare.source.0.path\n    this key is missing" in text
    assert f"{tmp_path / 'config.toml'}:2  prepare.source.0.path" in text


@pytest.mark.parametrize("path", ["d.extxyz", '["d.extxyz", "e.xyz"]'])
def test_a_path_from_the_command_line_stays_the_same_file_in_the_resolved_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = _load(tmp_path, GOOD, f"prepare.source.0.path={path}")
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert _load(other, resolved_toml(config)) == config


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"0.5 nm"', '"inf nm"', "train.potential.cutoff"),
        ('"0.5 nm"', '"nan nm"', "train.potential.cutoff"),
        ("{ value = 0 }", "{ value = inf }", "prepare.source.1.total_charge"),
        ("{ value = 0 }", "{ value = nan }", "prepare.source.1.total_charge"),
        (
            "[train]",
            '[prepare.self_energies]\nvalues = { H = "nan eV" }\n[train]',
            "prepare.self_energies.values.H",
        ),
        ("[train]", "[train.optimizer]\nlr = inf\n[train]", "train.optimizer.lr"),
        ("start = 10.0", "start = nan", "train.loss.forces.weight.start"),
        ("scale = -1", "scale = nan", "prepare.source.0.forces.scale"),
    ],
)
def test_what_is_not_finite_is_refused(tmp_path: Path, old: str, new: str, key: str) -> None:
    assert old in GOOD
    assert f"  {key}" in _mistakes(tmp_path, GOOD.replace(old, new, 1))


@pytest.mark.parametrize(
    "text",
    [
        "prepare = 3",
        "[[prepare]]\nname = 'x'",
        GOOD.replace('{ key = "energy", unit = "hartree" }', '"energy"'),
    ],
)
def test_a_value_in_place_of_a_table_is_refused_in_the_words_of_toml(
    tmp_path: Path, text: str
) -> None:
    message = _mistakes(tmp_path, text)
    assert "it should be of type" in message
    assert "Config" not in message.replace("config", "")  # no name of a Python class
    assert "dictionary" not in message


@pytest.mark.parametrize(
    ("table", "mistakes"),
    [
        (
            "[train.potential]\nname = 'shnet'\nfeatures = 'many'\nradial = 3",
            [
                "8  train.potential.name\n    found 'shnet' (string); did you mean \"schnet\"?\n"
                "    allowed: 'painn' or 'schnet'",
                "9  train.potential.features\n    found 'many' (string); it should be of type int",
                '10  train.potential.radial\n    unknown key; did you mean "radial_basis"?\n'
                "    allowed: charges, coulomb, cutoff, energy, features, inputs, interactions, "
                "name, radial_basis, zbl",
            ],
        ),
        (
            "[train.potential]\ncutoff = '5 eV'",
            [
                "7  train.potential.name\n    this key is missing\n    allowed: 'painn' or 'schn",
                '8  train.potential.cutoff\n    the unit "eV" has the wrong dimension',
            ],
        ),
        (
            "[train.potential]\nname = 3\ncutoff = '5 angstrom'",
            ["8  train.potential.name\n    found 3 (integer)\n    allowed: 'painn' or 'schnet'"],
        ),
        (
            "[train.potential]\nname = 'something'\nfeatures = 0",
            [
                "8  train.potential.name\n    found 'something' (string)\n    allowed: 'painn' or",
                "9  train.potential.features\n    found 0 (integer); it should be greater than or",
            ],
        ),
        (
            "[train.potential]\nname = 'schnet'\nfeature = 3",
            ['9  train.potential.feature\n    unknown key; did you mean "features"?'],
        ),
        (
            "[train.potential]\nname = 'schnet'\nschnet = { x = 1 }",
            ["9  train.potential.schnet\n    unknown key"],
        ),
        (
            "[train]\npotential = 'schnet'",
            ["8  train.potential\n    found 'schnet' (string); it should be of type table"],
        ),
        ("[train]", ["6  train.potential\n    this key is missing"]),
    ],
)
def test_mistakes_in_a_table_whose_keys_depend_on_its_name(
    tmp_path: Path, table: str, mistakes: list[str]
) -> None:
    before = """[prepare]
name = "x"
[[prepare.source]]
path = "a.xyz"
energy = { key = "e", unit = "eV" }
[train.loss.energy]
"""
    text = _mistakes(tmp_path, before + table)
    for mistake in mistakes:
        assert f"  {tmp_path / 'config.toml'}:{mistake}" in text
    assert text.count("config.toml:") == len(mistakes)


def test_a_potential_is_read_as_the_class_that_its_name_says(tmp_path: Path) -> None:
    config = _load(tmp_path, GOOD.replace('"painn"', '"schnet"\nfeatures = 32'))
    assert config.train is not None
    potential = config.train.potential
    assert isinstance(potential, SchNetConfig)
    assert (potential.features, potential.interactions, potential.radial_basis) == (32, 3, 50)
    assert potential_config(potential.model_dump(mode="json")) == potential
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert _load(other, resolved_toml(config)) == config


def test_fractions_in_any_order_sum_to_one(tmp_path: Path) -> None:
    for train, val, test in ((0.7, 0.2, 0.1), (0.1, 0.7, 0.2), (0.6, 0.3, 0.1), (1.0, 0, 0)):
        text = GOOD.replace("train = 0.7", f"train = {train}").replace("val = 0.2", f"val = {val}")
        split = _load(tmp_path, text.replace("test = 0.1", f"test = {test}")).prepare.split
        assert (split.train, split.val, split.test) == (train, val, test)


def test_a_weight_goes_in_a_straight_line_and_then_stays() -> None:
    down = WeightSchedule(start=4.0, end=1.0, epochs=3)
    assert [down.at(epoch) for epoch in range(6)] == pytest.approx([4, 3, 2, 1, 1, 1])


def test_a_table_that_only_its_sub_table_makes_has_a_line(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(GOOD)
    text = _mistakes(tmp_path, 'extends = "base.toml"\n[train.los.energy]\nweight = 1\n')
    assert f"{tmp_path / 'config.toml'}:2  train.los\n    unknown key" in text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            ["train.potential.charges={}"],
            r"train.potential.charges asks for partial charges, and nothing trains them; add one "
            r"of train.loss.charges, train.loss.dipole(.|\n)*or train.potential.coulomb",
        ),
        (['train.metrics.dipole=["mae"]'], r"train.metrics.dipole asks for partial charges"),
        (
            ["train.potential.charges.equalise=true", "train.loss.total_charge={}"],
            r"train.loss.total_charge is always zero, because(.|\n)*take one of them out",
        ),
        (
            ['train.potential.coulomb.cutoff="3 angstrom"'],
            r"the cutoff of coulomb, 3 Å, is below the architecture's, 5 Å; make it at least that",
        ),
        (
            ['train.potential.zbl.cutoff="6 angstrom"'],
            r"the cutoff of zbl, 6 Å, is beyond the architecture's, 5 Å; make it at most that",
        ),
        (
            ['train.potential.inputs=["charge"]'],
            r"train.potential.inputs.0\n +found 'charge' \(string\); did you mean \"total_charge\"",
        ),
    ],
)
def test_heads_without_loss_and_losses_without_head(
    tmp_path: Path, settings: list[str], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        _load(tmp_path, GOOD, *settings)


@pytest.mark.parametrize("setting", ["train.potential.coulomb={}", "train.loss.dipole={}"])
def test_charges_may_be_trained_by_the_energy_or_a_moment(tmp_path: Path, setting: str) -> None:
    settings = ["train.potential.charges.equalise=true", setting]
    potential = _load(tmp_path, GOOD, *settings).train.potential  # type: ignore[union-attr]
    assert potential.needed_inputs == {"total_charge"}

"""The command line: help without torch, exit codes, JSON."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from molecules import write_experiment

from runner import __version__
from runner.cli import main

ROOT = Path(__file__).parents[1]


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["runner", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    return code if isinstance(code, int) else 0


@pytest.mark.parametrize("command", [[], ["prepare"], ["train"], ["run"], ["watch"], ["reproduce"]])
def test_help_answers_without_torch(command: list[str]) -> None:
    script = (
        "import sys\nfrom runner.cli import main\n"
        f"sys.argv = ['runner', *{command!r}, '--help']\n"
        "try:\n    main()\n"
        "finally:\n"
        "    slow = {'torch', 'lightning', 'zarr', 'sklearn', 'matplotlib', 'pint'}\n"
        "    print('imported:', sorted(slow & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "Usage: runner" in done.stdout
    assert "imported: []" in done.stdout
    words = {"watch": ["--once", "--json"], "reproduce": ["--data-dir", "--json"]}
    usual = ["--set", "--json", "--data-dir"] if command else ["prepare", "train", "run", *words]
    for word in words.get("".join(command), usual):
        assert word in done.stdout


def test_a_training_starts_without_scipy_signal_which_is_there_for_who_wants_it() -> None:
    script = (
        "import sys\nfrom runner import cli\n"
        "cli._import_torchmetrics()\n"
        "assert 'torchmetrics' in sys.modules\n"
        "assert 'scipy.signal' not in sys.modules, 'it is imported all the same'\n"
        "from scipy.signal import firwin\n"
        "import torchmetrics.audio\n"
        "print(len(firwin(5, 0.5)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr


def test_prepare_prints_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file = write_experiment(tmp_path)
    arguments = ["prepare", str(tmp_path), "--data-dir", str(tmp_path / "p"), "--json"]
    assert _main(monkeypatch, *arguments, "--set", "prepare.split.seed=2") == 0
    first = capsys.readouterr()
    result = json.loads(first.out)
    assert result["structures"] == 60
    assert "Self-energies" in first.err
    assert (
        _main(
            monkeypatch,
            "prepare",
            str(config_file),
            *arguments[2:],
            "--set",
            "prepare.split.seed=2",
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["reused"] is True


def test_run_prepares_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experiment(tmp_path)
    monkeypatch.setenv("RUNNER_DATA_DIR", str(tmp_path / "prepared"))
    assert _main(monkeypatch, "run", str(tmp_path), "--json", "--set", "train.epochs=1") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["train"]["dataset"] == result["prepare"]["dataset"]
    assert result["train"]["test"]["energy_mae"] > 0
    assert _main(monkeypatch, "train", str(tmp_path), "--json", "--set", "train.epochs=1") == 0
    assert json.loads(capsys.readouterr().out)["test"] == result["train"]["test"]
    manifest = json.loads((tmp_path / "runs" / "latest" / "manifest.json").read_text())
    assert manifest["command"][1] == "train"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "nowhere"], "error: there is no experiment at nowhere"),
        (["prepare", "."], 'unknown key; did you mean "name"?'),
        (["train", "."], 'unknown key; did you mean "name"?'),
        (["prepare"], "Missing argument"),
        (["prepair", "."], "No such command"),
        (["prepare", ".", "--jason"], "No such option"),
    ],
)
def test_wrong_input_ends_with_2_one_message_and_no_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text("[prepare]\nnmae = 'x'\n")
    assert _main(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert output.out == ""


def test_a_bug_ends_with_1_and_a_traceback_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("runner.prepare.prepare", broken)
    write_experiment(tmp_path)
    assert _main(monkeypatch, "prepare", str(tmp_path)) == 1
    text = capsys.readouterr().err
    assert "This is a bug in runner, not a mistake of yours: ZeroDivisionError: oh" in text
    assert "Traceback (" not in text
    file = Path(text.partition("The traceback is in ")[2].partition(";")[0])
    assert "ZeroDivisionError: oh" in file.read_text()
    file.unlink()


def test_a_full_disk_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.ckpt")

    monkeypatch.setattr("runner.train.train", full)
    write_experiment(tmp_path)
    assert _main(monkeypatch, "train", str(tmp_path)) == 2
    assert capsys.readouterr().err == (
        "error: No space left on device\n  where:   last.ckpt\n"
        "  remedy:  make room; a run that has a checkpoint goes on from it with --resume\n"
    )


def test_a_reader_that_goes_away_does_not_end_a_training(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    command = [sys.executable, "-m", "runner", "run", str(tmp_path), "--data-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 0
    manifest = json.loads((tmp_path / "runs" / "latest" / "manifest.json").read_text())
    assert manifest["status"] == "finished"


def test_an_interrupt_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runner.prepare.prepare", interrupted)
    write_experiment(tmp_path)
    assert _main(monkeypatch, "prepare", str(tmp_path)) == 130


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("setting", "old", "new", "message"),
    [
        ("prepare.source.0.path=gone.xyz", "", "", "no data file at"),
        ("", "*", "", "the file is empty"),
        ("", "*", "3\nhalf a stru", "announces 3 atoms, and 0 lines of atoms follow"),
        ("", "*", "damaged\n", 'found "damaged" where a number of atoms should stand'),
        ("", " energy=", " energy=inf other=", "energy is infinite"),
        ("", " energy=", " energy=nan other=", 'add missing = "nan"'),
        ("prepare.source.0.energy.key=enrgy", "", "", 'did you mean "energy"?'),
        ("prepare.source.0.forces.unit=eV", "", "", 'the unit "eV" has the wrong dimension'),
        ("prepare.source.0.forces={ key = 'forces' }", "", "", "forces needs a unit"),
        ("prepare.split.train=0.9", "", "", "must sum to 1"),
        ("prepare.split.trian=0.9", "", "", 'did you mean "train"?'),
        ("prepare.split", "", "", "is not a setting"),
        ("prepare.self_energies.values={ Q = '-1 eV' }", "", "", '"Q" is not an element'),
        (
            "prepare.split={ train = 90, val = 5, test = 5 }",
            "",
            "",
            "ask for 100 structures of 60",
        ),
    ],
)
def test_bad_input_to_prepare_ends_with_2_and_leaves_no_dataset(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    old: str,
    new: str,
    message: str,
) -> None:
    write_experiment(tmp_path)
    data = tmp_path / "data.extxyz"
    if old:
        data.write_text(new if old == "*" else data.read_text().replace(old, new, 1))
    settings = ["--set", setting] if setting else []
    folder = tmp_path / "prepared"
    arguments = ["prepare", str(tmp_path), "--data-dir", str(folder), *settings]
    assert _main(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err
    assert output.out == ""
    assert not list(tmp_path.rglob("*.zarr*"))


def test_training_before_preparing_ends_with_2_and_the_command_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experiment(tmp_path)
    assert _main(monkeypatch, "train", str(tmp_path), "--data-dir", str(tmp_path / "p")) == 2
    error = capsys.readouterr().err
    assert "the dataset of this experiment is not prepared yet" in error
    assert f"runner prepare {tmp_path}" in error
    assert not (tmp_path / "runs").exists()


def test_processes_at_once_make_one_dataset_and_each_prints_one_object(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    command = [sys.executable, "-m", "runner", "prepare", str(tmp_path), "--json"]
    environment = os.environ | {"RUNNER_DATA_DIR": str(tmp_path / "prepared")}
    running = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    ended = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    results = [json.loads(out) for out, _ in ended]
    assert all(out.count("\n") == 1 for out, _ in ended)
    assert results[0]["dataset"] == results[1]["dataset"]
    assert {path.suffix for path in (tmp_path / "prepared").iterdir()} == {".zarr", ".png"}
    for _, err in ended:
        assert "Warning" not in err
        assert "Self-energies" in err


def test_the_account_of_a_person_is_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experiment(tmp_path)
    assert _main(monkeypatch, "prepare", str(tmp_path), "--data-dir", str(tmp_path / "p")) == 0
    output = capsys.readouterr()
    assert "Self-energies" in output.out
    assert output.err == ""


def test_an_interrupt_says_so_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runner.prepare.prepare", interrupted)
    write_experiment(tmp_path)
    assert _main(monkeypatch, "prepare", str(tmp_path)) == 130
    error = capsys.readouterr().err
    assert "nterrupted" in error or "Aborted" in error
    assert "Traceback" not in error


def test_an_interrupted_training_goes_on_in_the_same_run(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    environment = os.environ | {"RUNNER_DATA_DIR": str(tmp_path / "prepared")}
    command = [sys.executable, "-m", "runner", "run", str(tmp_path), "--set", "train.epochs=1000"]
    said = ""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if line.startswith("epoch 1/1000"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    run = (tmp_path / "runs" / "latest").resolve()
    again = f"runner train {run} --resume {run}"
    assert f"stopped early; to go on: {again}" in said
    done = json.loads((run / "manifest.json").read_text())
    assert done["status"] == "interrupted"
    epochs = len((run / "metrics.csv").read_text().splitlines()) - 1
    command = [sys.executable, "-m", "runner", "train", str(tmp_path), "--json"]
    command += ["--resume", "--set", f"train.epochs={epochs + 2}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(ended.stdout)
    assert result["run"] == str(run)
    assert result["epochs"] == epochs + 2
    assert "goes on after" in ended.stderr

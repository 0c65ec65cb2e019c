"""The program itself: quick to help, exact in its exit codes."""

import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

import rpo
from rpo.cli import COMMANDS, main
from rpo.cli.options import TrainOptions, parse
from rpo.training.config import TrainConfig
from rpo.training.objectives.preference import DiffusionDPO
from rpo.training.objectives.safeguards import WithSFT


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"rpo {name}" in told for name in COMMANDS) and "shapes" in told


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.needs_argument])
def test_each_command_teaches_without_a_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert COMMANDS[name].teach[:30] in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rpo 0.")


def test_help_of_a_recipe_shows_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "sd15_dpo", "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "--train.lr" in told and "--pairs" in told and "--resume" in told


def test_a_wrong_value_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "sd15_dpo", "--train.steps", "0"])
    assert stopped.value.code == 2
    assert "steps must be at least 1" in "".join(capsys.readouterr())


def test_a_recipe_without_curation_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", "sd15_dpo", "--out", str(tmp_path / "run")]) == 2
    assert "--pairs" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_curation_with_their_code(number: int, code: int, tmp_path: Path) -> None:
    from tiny_diffusion import save_pipeline

    model = save_pipeline(tmp_path / "tiny")
    recipe = f"{Path(__file__).parent / 'fake_recipe.py'}:fake"
    out = tmp_path / "run"
    command = [sys.executable, "-c", "from rpo.cli import entry; entry()", "curate", recipe, "--out", str(out)]
    command += ["--curate.prompts.count", "300"]
    environment = os.environ | {"FAKE_MODEL": str(model), "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(out.glob("1_source-*/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    told = process.communicate(timeout=30)[1].decode()
    assert process.returncode == code, told
    assert "--resume" in told
    if number == signal.SIGTERM:  # the one that leaves no time to tidy up
        assert subprocess.run([*command, "--resume"], env=environment, capture_output=True, check=False).returncode == 0


def test_a_bug_shows_its_traceback_and_wrong_input_does_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    monkeypatch.setitem(COMMANDS, "doctor", replace(COMMANDS["doctor"], call=lambda *_: json.loads("{")))
    with pytest.raises(json.JSONDecodeError):
        main(["doctor"])
    assert main(["run", "no_such_recipe"]) == 2
    assert "no_such_recipe" in capsys.readouterr().err


def test_a_warning_of_ours_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of other packages it stays as Python formats it."""
    main(["--version"])
    ours = warnings.formatwarning("a \x1b[31mfile\nis left out", UserWarning, str(Path(rpo.__file__).parent / "data" / "x.py"), 3)
    assert ours.startswith("warning: a ") and ours.count("\n") == 1 and "\x1b" not in ours and "UserWarning" not in ours
    assert "UserWarning" in warnings.formatwarning("b", UserWarning, str(tmp_path / "x.py"), 3)


@pytest.mark.parametrize(
    ("recipe", "options", "objective"),
    [
        ("sd15_dpo", ["--train.objective.k", "123"], DiffusionDPO(k=123.0)),
        ("shapes", ["--train.objective.weight", "7", "--train.objective.of.k", "99"], WithSFT(of=DiffusionDPO(k=99.0), weight=7.0)),
    ],
)
def test_every_number_of_an_objective_is_an_option(recipe: str, options: list[str], objective: object) -> None:
    _, resolved = parse("train", recipe, TrainOptions, ("train",), options)
    assert resolved.train.objective == objective


def test_an_objective_of_the_version_before_is_explained() -> None:
    class Old(DiffusionDPO):
        paired = referenced = True  # pyright: ignore[reportAssignmentType]

    with pytest.raises(ValueError, match="objective Old: paired must be a method"):
        TrainConfig(model="x", objective=Old())

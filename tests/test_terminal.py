"""Text of others on the terminal: printed as it is, without markup and without control characters."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from rpo.cli import main
from rpo.core.terminal import Terminal, printable
from rpo.engine.stage import error_status
from rpo.errors import RowError

HOSTILE = "HTTP 400: \x1b]0;owned\x07\x1b[2J\x9b31m \u202edrow\u2066 [/x] [red]no[/red] :smile: \ud83d"


def test_printable_replaces_what_controls_a_terminal() -> None:
    shown = printable(HOSTILE)
    assert not any(character in shown for character in "\x1b\x07\x9b\u202e\u2066\ud83d")
    assert "[/x] [red]no[/red] :smile:" in shown
    assert printable("a\r\nb\tc") == "a\nb\tc"
    assert printable("\rover") != "\rover"
    for kept in ("می\u200cخواهم", "\N{MAN}\u200d\N{WOMAN}", "größer 大"):
        assert printable(kept) == kept


@pytest.mark.parametrize("where", ["print", "cell", "header", "title"])
def test_every_string_is_literal(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(soft_wrap=True)
    if where == "print":
        terminal.print(HOSTILE)
    else:
        table = Table(title=HOSTILE if where == "title" else None)
        table.add_column(HOSTILE if where == "header" else "what", no_wrap=True)
        table.add_row(HOSTILE if where == "cell" else "x")
        terminal.print(table)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
    assert "HTTP 400" in out


def test_markup_of_others_survives_and_ours_is_styled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    terminal = Terminal()
    terminal.print(Text("error", "red"), "[bold]", "br[/x]")
    out = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[31merror" in out and "[bold] br[/x]" in out


def test_a_status_holds_no_control_characters() -> None:
    status = error_status("critique", RowError(HOSTILE))
    assert status.startswith("error:critique:HTTP 400") and status.isprintable()


def test_a_folder_named_like_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "br[" / "x]"
    folder.mkdir(parents=True)
    assert main(["report", str(folder)]) == 1
    assert "br[/x]" in capsys.readouterr().err


def test_an_ascii_stream_gets_replacements() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "rpo", "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_warning_of_a_run_controls_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    words = "'last: %s', '\\x1b[2J\\u202e [red]'"
    program = f"import logging\nfrom rpo.cli import main\nmain(['--version'])\nlogging.getLogger('rpo.x').warning({words})"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert "last: \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER} [red]" in capfd.readouterr().err

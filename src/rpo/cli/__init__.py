"""The command line: `rpo COMMAND RECIPE [options]`.

Only this room looks into `rpo.recipes`; nothing heavy is imported before a recipe is asked for.
"""

import difflib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rpo import __version__
from rpo.cli.commands import COMMANDS, RecipeCommand
from rpo.cli.options import parse
from rpo.core.terminal import PrintableFormatter, Terminal, printable
from rpo.errors import Interrupted, RpoError, disk_error


def _help(console: Console) -> None:
    console.print("usage: rpo COMMAND ...\n\nMake a text-to-image model better without annotators (Rich Preference Optimization).\n")
    for name, command in COMMANDS.items():
        console.print(f"  rpo {name + ' ' + command.usage:<36} {command.summary}")
    console.print("\nrecipes: " + ", ".join(_recipe_names()) + ", or your own as module:function or file.py:function")
    console.print("rpo COMMAND RECIPE --help shows every setting. Start with: rpo run shapes")


def _recipe_names() -> list[str]:
    from rpo.recipes import BUILT_IN

    return list(BUILT_IN)


def _dispatch(arguments: Sequence[str], console: Console) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        return _help(Terminal())
    if arguments[0] == "--version":
        return Terminal().print(f"rpo {__version__}")
    name, rest = arguments[0], list(arguments[1:])
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        raise ValueError(
            f"there is no command {name!r}." + (f" Did you mean {close[0]!r}?" if close else "") + f" Known are {', '.join(COMMANDS)}."
        )
    command = COMMANDS[name]
    wants_help = not rest or rest[0] in ("-h", "--help")
    if wants_help and (command.needs_argument or rest):
        Terminal().print(f"usage: rpo {name} {command.usage} [options]\n\n{command.teach}")
        if isinstance(command, RecipeCommand):
            Terminal().print(f"\nrecipes: {', '.join(_recipe_names())}. All settings: rpo {name} {_recipe_names()[0]} --help")
        if not rest:
            raise SystemExit(2)
        return None
    if isinstance(command, RecipeCommand):
        options, recipe = parse(name, rest[0], command.options, command.sections, rest[1:], teach=command.teach)
        return command.call(options, recipe, console)
    return command.call(rest[0] if rest else "", rest[1:], console)


def _terminated(signum: int, frame: object) -> None:
    raise Interrupted(signum)


def _said_by_us(error: BaseException) -> bool:
    """Whether this package raised it on purpose; a ValueError out of a library is a bug of ours, and its traceback is wanted."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).split(".")[0] == "rpo"


def _warning_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """One line for a warning of this package; others as Python formats them."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {' '.join(printable(str(message)).split())}\n"
    return _formatted(message, category, filename, lineno, line)


_formatted = warnings.formatwarning


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code is 0, 1 (the run cannot go on), 2 (wrong input), 130 or 143 (stopped)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a stream that knows ASCII only
    console = Terminal(stderr=True, soft_wrap=True)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableFormatter())
    signal.signal(signal.SIGTERM, _terminated)
    warnings.formatwarning = _warning_line
    try:
        _dispatch(sys.argv[1:] if arguments is None else list(arguments), console)
    except Interrupted as stop:
        console.print(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        console.print("stopped; what is done is kept: the same command goes on, with --resume if it has that")
        return 130
    except Exception as error:
        ours = isinstance(error, RpoError | ValueError) and _said_by_us(error)
        line = str(error) if ours else disk_error(error)
        if line is None:
            raise
        console.print(Text("error", "red"), end="")
        console.print(f": {line}")
        return 2 if ours and isinstance(error, ValueError) else 1
    return 0


def entry() -> None:
    """The `rpo` program. After a stop it leaves at once: a thread that is deep in a model's batch would hold the interpreter."""
    code = main()
    if code >= 128:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

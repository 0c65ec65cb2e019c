"""The console of every command: text of others is printed as it is, never as markup, and cannot control the terminal."""

import logging
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

_JOINERS = "\u200c\u200d"
"""Zero-width (non-)joiners, which Persian and emoji need and which control nothing."""


def printable(text: str) -> str:
    """The text with control, format, surrogate and private characters replaced by U+FFFD; line feeds and tabs stay."""
    return "".join(map(_shown, text.replace("\r\n", "\n")))


def _shown(character: str) -> str:
    harmless = character in "\n\t" or character in _JOINERS or unicodedata.category(character)[0] != "C"
    return character if harmless else "\N{REPLACEMENT CHARACTER}"


class PrintableFormatter(logging.Formatter):
    """Log messages that cannot control the terminal: they may hold words of a server."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class Terminal(Console):
    """A rich console that prints strings literally: no markup, no emoji codes, no highlighting, no control characters.

    Styled output of our own is passed as `rich.text.Text`.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, quiet=quiet, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Literal text; rich calls this for every string that is printed, table cells and titles among them."""
        options.update(markup=False, emoji=False, highlight=False)
        return super().render_str(printable(text), **options)

"""Regular files of a stranger's data set, each read within a limit. No link is followed; no pipe or device is opened."""

import codecs
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rpo.errors import RpoError

MAX_TEXT_BYTES = 1_000_000
"""Of a caption file or a JSON member of a tar."""
MAX_LINE_BYTES = 90_000_000
"""Of one row of JSON: two images of the largest size in base64."""
MAX_JSON_PARTS = 200_000
"""Brackets and commas of one row of JSON, which bound the objects that it becomes."""

_CHUNK_BYTES = 1 << 20
_JUNK = ("thumbs.db", "desktop.ini", "__macosx")


def is_junk(name: str) -> bool:
    """Whether a name is one that file managers leave behind: it begins with a dot (`.DS_Store`, `._x.png`), or is `Thumbs.db`."""
    return name.startswith(".") or name.lower() in _JUNK


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened to be read. Raises `RpoError` for a link, a folder, a pipe or a device, `OSError` for what the disk says."""
    if path.is_symlink():
        raise RpoError(f"{path} is a link, and links in a data set are not followed; copy the file that it points to (cp -L)")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RpoError(f"{path} is no regular file (a folder, pipe or device); write its content to a file")
    return open(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes | None:
    """The bytes of a regular file within `limit`; `None` for a link, a device, or one that is larger or cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(limit) if os.fstat(file.fileno()).st_size <= limit else None
    except (OSError, RpoError):
        return None


def text_of(encoded: bytes) -> str:
    """UTF-8 text without a byte order mark. Raises `UnicodeDecodeError`."""
    return encoded.decode("utf-8-sig")


def lines_of(file: BinaryIO, limit: int = MAX_LINE_BYTES) -> Iterator[bytes | None]:
    """Lines without their line feed, a carriage return before it and the file's byte order mark; `None` for a line over `limit` bytes.

    Raises `ValueError` for a line of more than twice the limit: the file is no text.
    """
    first = True
    while line := file.readline(limit + 1):
        if len(line) > limit and not line.endswith(b"\n"):
            yield None
            skipped = 0
            while (rest := file.readline(_CHUNK_BYTES)) and not rest.endswith(b"\n"):
                skipped += len(rest)
                if skipped > limit:
                    raise ValueError(f"a line of over {2 * limit:,} bytes")
        else:
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            yield line.removeprefix(codecs.BOM_UTF8) if first else line
        first = False


def json_value(text: bytes | str) -> object:
    """One JSON value. Raises `ValueError` for anything else, for one of too many parts, and for one that is nested too deep."""
    marks = ("[", "{", ",") if isinstance(text, str) else (b"[", b"{", b",")
    if sum(text.count(mark) for mark in marks) > MAX_JSON_PARTS:  # type: ignore[arg-type]
        raise ValueError(f"more than {MAX_JSON_PARTS:,} parts in one JSON value")
    try:
        return json.loads(text if isinstance(text, str) else text_of(text))
    except (RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"JSON that is nested too deep ({type(error).__name__})") from error


def is_array(file: BinaryIO) -> bool:
    """Whether the first character that is not blank opens a JSON array. The file is left at its beginning."""
    start = file.read(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def array_values(file: BinaryIO) -> Iterator[object]:
    """The elements of a JSON array, one at a time in memory. Raises `ValueError` where the text is no array."""
    decoder, scan = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, place, ended = "", 0, False

    def more() -> None:
        nonlocal text, place, ended
        size = max(_CHUNK_BYTES, len(text) - place)
        chunk = file.read(size)
        ended = len(chunk) < size
        text, place = text[place:] + decoder.decode(chunk, ended), 0
        if len(text) > 2 * MAX_LINE_BYTES or sum(map(text.count, "[{,")) > 10 * MAX_JSON_PARTS:
            raise ValueError("one element is too large")

    def following() -> str:
        """The next character that is not blank, which stays; empty at the end."""
        nonlocal place
        while True:
            while place < len(text) and text[place] in " \t\r\n":
                place += 1
            if place < len(text) or ended:
                return text[place : place + 1]
            more()

    if following() != "[":
        raise ValueError("it does not begin with [")
    place += 1
    while (mark := following()) != "]":
        if not mark:
            raise ValueError("it ends inside the array")
        while True:
            try:
                value, end = scan.raw_decode(text, place)
                if end < len(text) or ended:  # a number at the end of the text may go on
                    break
            except (RecursionError, OverflowError) as error:
                raise ValueError("an element is nested too deep") from error
            except ValueError:
                if ended:
                    raise
            more()
        place = end
        yield value
        if following() == ",":
            place += 1
        elif following() != "]":
            raise ValueError("no comma between two elements")
    place += 1
    if following():
        raise ValueError("text after the array")

"""One row of a stranger's data set: two images for a prompt, one image with a caption, or the reason why it is neither."""

import base64
import binascii
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import cast

from rpo.data.formats.files import is_junk, read_regular
from rpo.data.images import MAX_ENCODED_BYTES, ImageRefused, decode_image

MAX_PROMPT_CHARACTERS = 2000
MAX_RANKED = 100
MIN_SIDE = 16
"""Pixels; a smaller image shows nothing, and no model takes it."""
HELD_OUT_SHARE = 0.05
"""Of the prompts of a foreign set, which tuning only measures."""
PROMPT_KEYS = ("prompt", "caption", "text")
CRITIQUE_KEYS = ("critique", "reflection", "reflexion", "feedback")
CHOSEN_KEYS = ("chosen", "refined", "good_image", "good", "enhanced", "after")
REJECTED_KEYS = ("rejected", "flawed", "bad_image", "bad", "before")
IMAGE_KEYS = ("image", "file_name", "image_path", "file_path")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".jp2", ".jxl")
"""Of files that are taken for images; those of a format that is not read are dropped with that reason."""
FIRST_LINE = "first line of a caption with several"

_BLANKS = re.compile(r"[ \t\r\n]+")
_CHECKED_CHARACTERS = 4 * MAX_ENCODED_BYTES // 3 + 8


class Unusable(ValueError):
    """A row that is no pair; the message is the reason it is counted under."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two images for one prompt as a row brought them: nothing is decoded yet."""

    prompt: str
    chosen: bytes
    rejected: bytes
    critique: str = ""
    """What somebody found wrong with the rejected image, if the set says so."""
    note: str = ""
    """What was left out of the row, if anything."""

    @property
    def images(self) -> tuple[bytes, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """One image with its caption, as a row brought it: a source of a curation, and no pair."""

    prompt: str
    image: bytes
    note: str = ""
    """What was left out of the row, if anything."""

    @property
    def images(self) -> tuple[bytes, ...]:
        return (self.image,)


Row = Comparison | Captioned | Unusable
"""What a row is, or why it is nothing that can be used."""


def row_of(read: Callable[[], Row]) -> Row:
    """What a row is. Whatever it does to its reader is its own reason; nothing of it stays in memory behind that."""
    try:
        return read()
    except Unusable as why:
        return Unusable(str(why))  # a new one: the old one's traceback holds the row
    except UnicodeDecodeError:
        return Unusable("text that is not UTF-8")
    except (RecursionError, OverflowError, MemoryError) as error:
        return Unusable(f"row that cannot be read ({type(error).__name__})")


def prompt_of(value: object) -> str:
    """A prompt of an untrusted row. Raises `Unusable`."""
    if not isinstance(value, str) or not value.strip():
        raise Unusable("no prompt")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise Unusable(f"prompt over {MAX_PROMPT_CHARACTERS} characters")
    if not value.isprintable() and any(ord(letter) < 32 and letter not in "\t\n\r" for letter in value):
        raise Unusable("prompt with control characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable("prompt that is no text") from None
    return value


def first_line(caption: str) -> tuple[str, str]:
    """(the first line of a caption file that is not blank, a note if there are more)."""
    written = [line.strip() for line in caption.split("\n") if line.strip()]
    return (written[0] if written else ""), (FIRST_LINE if len(written) > 1 else "")


def first_text(row: Mapping[str, object], keys: Sequence[str] = PROMPT_KEYS) -> object:
    """The first of the keys' values that is a text with a letter; else the first that is there."""
    values = [row[key] for key in keys if row.get(key) is not None]
    return next((value for value in values if isinstance(value, str) and value.strip()), values[0] if values else None)


def number_of(value: object) -> float | None:
    """A finite number of an untrusted cell; `None` for anything else."""
    if not isinstance(value, int | float | Decimal):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def bytes_of(value: object) -> bytes:
    """The encoded image of a cell: bytes, or `{"bytes": ..., "path": ...}`, whose path is never opened. Raises `Unusable`."""
    encoded = cast("Mapping[str, object]", value).get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(encoded, bytes) or not encoded:
        raise Unusable("no image")
    return encoded


def key_of(row: Comparison | Captioned) -> tuple[bytes, bool]:
    """What tells a prompt and its images from others, whichever is chosen; and in which of both orders the images are."""
    hashes = [hashlib.sha256(image).digest() for image in row.images]
    return hashlib.sha256(b"".join([*sorted(hashes), row.prompt.encode()])).digest(), hashes == sorted(hashes)


def check_images(row: Comparison | Captioned) -> None:
    """Decodes every image within the limits of `rpo.data.images`. Raises `Unusable` with the decoder's reason."""
    for encoded in row.images:
        try:
            height, width = decode_image(encoded).shape[:2]
        except ImageRefused as why:
            raise Unusable(f"unreadable image: {why.kind}") from None
        if min(height, width) < MIN_SIDE:
            raise Unusable(f"image with a side under {MIN_SIDE} pixels")


def comparison(
    prompt: object, first: object, second: object, preference: float | None, *, critique: object = "", note: str = ""
) -> Comparison:
    """`preference` is 1 where the first image is better, 0 where the second is, 0.5 for a tie. Raises `Unusable`."""
    text = prompt_of(prompt)
    if preference == 0.5:
        raise Unusable("tie")
    if preference not in (0, 1):
        raise Unusable("no label")
    sides = [bytes_of(first), bytes_of(second)]
    chosen, rejected = sides if preference == 1 else sides[::-1]
    if chosen == rejected:
        raise Unusable("both images are the same")
    words = critique[:MAX_PROMPT_CHARACTERS].encode(errors="replace").decode() if isinstance(critique, str) else ""
    return Comparison(prompt=text, chosen=chosen, rejected=rejected, critique=words, note=note)


def ranking(prompt: object, images: object, row: Mapping[str, object]) -> Comparison:
    """The best of a ranking against the worst. `rank` counts from the best; `human_preference` is larger for the better."""
    ranks, votes = _numbers(row.get("rank")), _numbers(row.get("human_preference"))
    places = ranks or [-vote for vote in votes]
    if not isinstance(images, Sequence) or len(places) != len(images) or not 2 <= len(images) <= MAX_RANKED:
        raise Unusable("no ranking")
    best, worst = (pick(range(len(places)), key=lambda i: places[i]) for pick in (min, max))
    return comparison(prompt, images[best], images[worst], 0.5 if places[best] == places[worst] else 1)


def _numbers(values: object) -> list[float]:
    """The values of a list of numbers; none if it is anything else."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) > MAX_RANKED:
        return []
    numbers = [number for number in map(number_of, values) if number is not None]
    return numbers if len(numbers) == len(values) else []


def scored(row: Mapping[str, object], first: object, second: object) -> Comparison:
    """`prefer_0` and `prefer_1` are truths, votes or scores: the larger wins, equal ones are a tie."""
    left, right = number_of(row.get("prefer_0")), number_of(row.get("prefer_1"))
    label = None if left is None or right is None else 0.5 if left == right else float(left > right)
    return comparison(first_text(row), first, second, label)


class ListedImages:
    """The regular files below some folders of a set, by name: what a row may name, and nothing else. Links do not occur."""

    def __init__(self, root: Path, *further: str) -> None:
        self._root = root
        self._folders: dict[PurePosixPath, tuple[dict[str, Path], set[str]]] = {}
        self._near = (PurePosixPath(), *map(PurePosixPath, further))
        self._named: set[Path] = set()

    def _listing(self, folder: PurePosixPath) -> tuple[dict[str, Path], set[str]]:
        """(files, folders) in a folder of the set, read once; none where it is not there or is reached through a link."""
        if folder not in self._folders:
            there = not folder.parts or folder.name in self._listing(folder.parent)[1]
            files, folders = dict[str, Path](), set[str]()
            for entry in os.scandir(self._root / folder) if there else ():
                if entry.is_dir(follow_symlinks=False):
                    folders.add(entry.name)
                elif entry.is_file(follow_symlinks=False) and not is_junk(entry.name):
                    files[entry.name] = self._root / folder / entry.name
            self._folders[folder] = files, folders
        return self._folders[folder]

    def path(self, name: str) -> Path | None:
        """The file that a row names; `None` for an absolute name, one with `..`, and one that is not there."""
        parts = PurePosixPath(name.replace("\\", "/"))
        if not name or len(name) > 1000 or parts.is_absolute() or not parts.parts or len(parts.parts) > 8 or {"..", "~"} & {*parts.parts}:
            return None
        found = next((path for near in self._near if (path := self._listing(near / parts.parent)[0].get(parts.name))), None)
        self._named |= {found} if found else set()
        return found

    def unnamed(self) -> Iterator[Unusable]:
        """A reason for every image in the folder itself that no row has named."""
        for path in sorted(self._listing(PurePosixPath())[0].values()):
            if path.suffix.lower() in IMAGE_SUFFIXES and path not in self._named:
                yield Unusable("image that no row names")

    def image(self, value: object) -> bytes | None:
        """The bytes that a JSON value stands for, a name or base64; `None` when it stands for none that may be read."""
        if not isinstance(value, str) or len(value) > 2 * _CHECKED_CHARACTERS:
            return None
        if path := self.path(value):
            return read_regular(path, MAX_ENCODED_BYTES)
        head, comma, data = value.partition(",")
        encoded = data if comma and head.startswith("data:image/") and head.endswith(";base64") else value
        encoded = _BLANKS.sub("", encoded)
        try:
            return base64.b64decode(encoded, validate=True) if len(encoded) <= _CHECKED_CHARACTERS else None
        except (binascii.Error, ValueError):
            return None

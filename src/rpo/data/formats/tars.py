"""WebDataset tars of triplets: members that share a name up to the first dot are one row. Nothing is unpacked to the disk.

The headers are read here rather than by `tarfile`, which takes a damaged header for the end, and lets a header move it backwards.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from rpo.data.formats.files import MAX_TEXT_BYTES, is_junk, json_value, open_regular, text_of
from rpo.data.formats.rows import (
    CHOSEN_KEYS,
    CRITIQUE_KEYS,
    REJECTED_KEYS,
    Comparison,
    Row,
    Unusable,
    comparison,
    first_line,
    first_text,
    row_of,
)
from rpo.data.images import MAX_ENCODED_BYTES

IMAGE_FIELDS = ("png", "jpg", "jpeg", "jfif", "webp", "avif", "bmp", "gif", "tif", "tiff", "heic")
_BLOCK = 512
_CHUNK_BYTES = 1 << 20


class DamagedTar(ValueError):
    """A file that is no whole tar."""


@dataclass(frozen=True)
class _Member:
    name: str
    place: int
    size: int
    regular: bool


def _number(field: bytes) -> int:
    """A size: octal digits, or binary where its first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:])
    digits = field.strip(b" \0")
    if digits and not all(digit in b"01234567" for digit in digits):
        raise DamagedTar("a size is no number")
    return int(digits or b"0", 8)


def _extended(records: bytes) -> dict[str, str]:
    """Records of a PAX header: `LENGTH KEY=VALUE` and a line feed each."""
    found: dict[str, str] = {}
    while records:
        digits, _, _ = records.partition(b" ")
        if not digits.isdigit() or len(digits) > 9 or not len(digits) < int(digits) <= len(records):
            raise DamagedTar("an extended header is no list of records")
        key, _, value = records[len(digits) + 1 : int(digits)].removesuffix(b"\n").partition(b"=")
        found[key.decode(errors="replace")] = value.decode(errors="replace")
        records = records[int(digits) :]
    return found


def _members(file: BinaryIO) -> Iterator[_Member]:
    """Every member. Raises `DamagedTar` for a header that is none, a member beyond the end, and a file without an end mark."""
    total, place = os.fstat(file.fileno()).st_size, 0
    further: dict[str, str] = {}
    while True:
        file.seek(place)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise DamagedTar("it ends without an end mark")
        if not any(header):
            while rest := file.read(_CHUNK_BYTES):
                if any(rest):
                    raise DamagedTar("there is data behind its end mark")
            return
        if _number(header[148:156]) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise DamagedTar(f"the header at byte {place} is none")
        kind, size = header[156:157], _number(header[124:136])
        if "size" in further and kind not in b"xgLK":
            if not further["size"].isdecimal() or len(further["size"]) > 15:
                raise DamagedTar("a size is no number")
            size = int(further["size"])
        data = place + _BLOCK
        place = data + -(-size // _BLOCK) * _BLOCK
        if data + size > total:
            raise DamagedTar("a member goes beyond its end")
        if kind and kind in b"xgLK":
            if size > MAX_TEXT_BYTES:
                raise DamagedTar(f"an extended header has {size:,} bytes")
            content = file.read(size)
            if kind == b"x":
                further |= _extended(content)
            elif kind == b"L":
                further["path"] = content.rstrip(b"\0").decode(errors="replace")
            continue
        ends = [part.partition(b"\0")[0].decode(errors="replace") for part in (header[345:500], header[:100])]
        name = "/".join(part for part in ends if part) if header[257:263] == b"ustar\0" else ends[1]
        yield _Member(further.get("path", name), data, size, kind in (b"0", b"\0", b"7"))
        further = {}
        if kind == b"5":
            continue


@dataclass
class _Group:
    key: tuple[str, str]
    members: dict[str, _Member] = field(default_factory=dict)
    flaw: str = ""

    def add(self, name: str, member: _Member) -> None:
        if name in self.members:
            self.flaw = "repeated member of one name"
        elif member.regular:
            self.members[name] = member
        else:
            self.flaw = self.flaw or "link or device in the tar"


def _groups(file: BinaryIO) -> Iterator[_Group]:
    group: _Group | None = None
    for member in _members(file):
        folder, _, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        if not name or is_junk(name):  # folders, and what file managers leave behind
            continue
        if group is None or group.key != (folder, stem):
            if group is not None:
                yield group
            group = _Group((folder, stem))
        group.add(kind.lower(), member)
    if group is not None:
        yield group


def tar_rows(path: Path, start: int) -> Iterator[Row]:
    """A row for every group of members, `KEY.refined.png`, `KEY.flawed.png`, `KEY.json`, and what they may be called besides."""
    with open_regular(path) as file:
        for number, group in enumerate(_groups(file)):
            if number >= start:
                yield row_of(lambda group=group: _triplet(file, group))


def _triplet(file: BinaryIO, group: _Group) -> Comparison:
    members = group.members
    if group.flaw:
        raise Unusable(group.flaw)

    def content(name: str, limit: int) -> bytes | None:
        member = members[name]
        if member.size > limit:
            return None
        file.seek(member.place)
        return file.read(member.size)

    def image(names: Sequence[str]) -> bytes | None:
        there = [name for name in (f"{side}.{suffix}" for side in names for suffix in IMAGE_FIELDS) if name in members]
        return content(there[0], MAX_ENCODED_BYTES) if there else None

    texts: dict[str, Any] = {}
    note = ""
    for name in (name for name in members if name == "json" or name.endswith(".json")):
        try:
            value = json_value(content(name, MAX_TEXT_BYTES) or b"")
        except ValueError:
            raise Unusable("no JSON") from None
        texts |= cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    for name in (name for name in members if name == "txt" or name.endswith(".txt")):
        try:
            text = text_of(content(name, MAX_TEXT_BYTES) or b"").strip()
        except UnicodeDecodeError:
            raise Unusable("caption is not UTF-8") from None
        kind = name.removesuffix("txt").rstrip(".") or "prompt"
        if kind == "prompt":
            text, note = first_line(text)
        texts[kind] = text
    return comparison(first_text(texts), image(CHOSEN_KEYS), image(REJECTED_KEYS), 1, critique=first_text(texts, CRITIQUE_KEYS), note=note)

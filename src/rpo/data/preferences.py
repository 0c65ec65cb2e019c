"""Preference sets that others have made, in the layouts they are found in. Their rows are hostile until read.

A set is read row by row: `comparisons(set, start)` begins at any row without decoding those before it. Images are the bytes that the
set itself holds. A path in a row is never opened and an address never fetched; a plain file name chooses among the regular files
that lie in the set's own folder.
"""

import base64
import binascii
import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow.parquet as pq

from rpo.data.images import MAX_ENCODED_BYTES, decode_image
from rpo.data.shards import CORRUPT
from rpo.errors import RpoError

Layout = Literal["pickapic", "ranking", "scored", "json", "folders", "triplets", "pairs"]

MAX_PROMPT_CHARACTERS = 2000
MAX_TEXT_BYTES = 1_000_000
"""Of a caption file, a line of JSON or a JSON member of a tar."""
MAX_RANKED = 100
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROMPT_KEYS = ("prompt", "caption", "text")
CRITIQUE_KEYS = ("critique", "reflection", "reflexion", "feedback")
CHOSEN_KEYS = ("chosen", "refined", "good_image", "good", "enhanced", "after")
REJECTED_KEYS = ("rejected", "flawed", "bad_image", "bad", "before")

_BATCH_ROWS = 64
_BROKEN = (*CORRUPT, EOFError, tarfile.TarError)


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


Row = Comparison | Unusable
"""What a row is, or why it is no pair."""


@dataclass(frozen=True)
class PreferenceSet:
    """Files of one layout, and how their rows are read."""

    layout: Layout
    files: tuple[Path, ...]
    rows: Callable[[Path, int], Iterator[Row]]
    """(file, first row) -> the rows from there on."""


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


def bytes_of(value: object) -> bytes:
    """The encoded image of a cell: bytes, or `{"bytes": ..., "path": ...}`, whose path is never opened. Raises `Unusable`."""
    encoded = cast("Mapping[str, object]", value).get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(encoded, bytes) or not encoded:
        raise Unusable("no image")
    return encoded


def key_of(comparison: Comparison) -> tuple[bytes, bool]:
    """What tells a prompt and its two images from others, whichever is chosen; and in which of both orders the images are."""
    hashes = [hashlib.sha256(image).digest() for image in (comparison.chosen, comparison.rejected)]
    return hashlib.sha256(b"".join([*sorted(hashes), comparison.prompt.encode()])).digest(), hashes == sorted(hashes)


def check_images(comparison: Comparison) -> None:
    """Decodes both sides within the limits of `rpo.data.images`. Raises `Unusable`."""
    for encoded in (comparison.chosen, comparison.rejected):
        try:
            decode_image(encoded)
        except ValueError:
            raise Unusable("unreadable image") from None


def _ordered(prompt: object, first: object, second: object, preference: object, *, critique: str = "") -> Comparison:
    """`preference` is 1 where the first image is better, 0 where the second is, 0.5 for a tie."""
    text = prompt_of(prompt)
    if preference == 0.5:
        raise Unusable("tie")
    if preference not in (0, 1):
        raise Unusable("no label")
    sides = [bytes_of(first), bytes_of(second)]
    chosen, rejected = sides if preference == 1 else sides[::-1]
    if chosen == rejected:
        raise Unusable("both images are the same")
    return Comparison(prompt=text, chosen=chosen, rejected=rejected, critique=critique)


def _row(read: Callable[[], Comparison]) -> Row:
    try:
        return read()
    except Unusable as why:
        return why


# --- rows of each layout -------------------------------------------------------------------------------------------------------------


def _pickapic(row: Mapping[str, Any]) -> Comparison:
    return _ordered(row["caption"], row["jpg_0"], row["jpg_1"], row["label_0"])


def _pairs(row: Mapping[str, Any]) -> Comparison:
    critique = row.get("critique")
    return _ordered(row["prompt"], row["chosen"], row["rejected"], 1, critique=critique if isinstance(critique, str) else "")


def _scored(row: Mapping[str, Any]) -> Comparison:
    """`prefer_0` and `prefer_1` are truths, votes or scores: the larger wins, equal ones are a tie."""
    first, second = row.get("prefer_0"), row.get("prefer_1")
    numbers = [float(value) for value in (first, second) if isinstance(value, int | float) and value == value]
    prompt = next((row[key] for key in PROMPT_KEYS if key in row), None)
    label = None if len(numbers) < 2 else 0.5 if numbers[0] == numbers[1] else float(numbers[0] > numbers[1])
    return _ordered(prompt, row.get("image_0"), row.get("image_1"), label)


def _ranking(row: Mapping[str, Any]) -> Comparison:
    """The best of a ranking against the worst. `rank` counts from the best; `human_preference` is larger for the better."""
    images = next((row[key] for key in ("images", "image") if row.get(key) is not None), None)
    ranks, votes = _numbers(row.get("rank")), _numbers(row.get("human_preference"))
    places = ranks or [-vote for vote in votes]
    if not isinstance(images, Sequence) or len(places) != len(images) or not 2 <= len(images) <= MAX_RANKED:
        raise Unusable("no ranking")
    best, worst = (pick(range(len(places)), key=lambda i: places[i]) for pick in (min, max))
    label = 0.5 if places[best] == places[worst] else 1
    prompt = next((row[key] for key in PROMPT_KEYS if key in row), None)
    return _ordered(prompt, images[best], images[worst], label)


def _numbers(values: object) -> list[float]:
    """The values of a list of numbers; none if it is anything else."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and v == v] if isinstance(values, Sequence) else []
    return numbers if isinstance(values, Sequence) and len(numbers) == len(values) else []


_PARQUET: tuple[tuple[Layout, frozenset[str], Callable[[Mapping[str, Any]], Comparison]], ...] = (
    ("pickapic", frozenset({"caption", "jpg_0", "jpg_1", "label_0"}), _pickapic),
    ("pairs", frozenset({"prompt", "chosen", "rejected"}), _pairs),
    ("scored", frozenset({"image_0", "image_1", "prefer_0", "prefer_1"}), _scored),
    ("ranking", frozenset({"images", "rank"}), _ranking),
    ("ranking", frozenset({"images", "human_preference"}), _ranking),
    ("ranking", frozenset({"image", "rank"}), _ranking),
    ("ranking", frozenset({"image", "human_preference"}), _ranking),
)
_READ = frozenset().union(*(columns for _, columns, _ in _PARQUET), PROMPT_KEYS, ("critique",))


def _parquet_rows(read: Callable[[Mapping[str, Any]], Comparison]) -> Callable[[Path, int], Iterator[Row]]:
    def rows(path: Path, start: int) -> Iterator[Row]:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            columns = [name for name in file.schema_arrow.names if name in _READ]
            before = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                before += count
                if before <= start:
                    continue
                place = before - count
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=columns):
                    skipped = min(max(start - place, 0), batch.num_rows)
                    place += batch.num_rows
                    for row in batch.slice(skipped).to_pylist():
                        yield _row(lambda row=row: read(row))

    return rows


def _json_rows(path: Path, start: int) -> Iterator[Row]:
    """JSON lines, or one JSON array as HPDv2 has them; images are base64, data URLs, or names of files beside or in `images/`."""
    listed = _Listed(path.parent, path.parent / "images", path.parent / "test", path.parent / "train")
    for number, row in enumerate(_json_values(path)):
        if number >= start:
            yield _row(lambda row=row: _json_comparison(row, listed))


def _json_values(path: Path) -> Iterator[object]:
    with path.open("rb") as file:
        if file.read(1) == b"[":
            yield from json.loads(path.read_bytes())
            return
        file.seek(0)
        for line in file:
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def _json_comparison(row: object, listed: "_Listed") -> Comparison:
    if not isinstance(row, dict):
        raise Unusable("no JSON object")
    cells = {key: listed.image(row[key]) for key in ("image_0", "image_1") if key in row}
    many = next((row[key] for key in ("images", "image", "image_path", "file_path") if isinstance(row.get(key), list)), None)
    if many is not None and len(many) <= MAX_RANKED:
        return _ranking(row | {"images": [listed.image(value) for value in many]})
    return _scored(row | cells)


class _Listed:
    """The regular image files of some folders, by name: what a row may name, and nothing else."""

    def __init__(self, *folders: Path) -> None:
        self.files: dict[str, Path] = {}
        for folder in folders:
            for entry in os.scandir(folder) if folder.is_dir() and not folder.is_symlink() else ():
                if entry.is_file(follow_symlinks=False) and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                    self.files.setdefault(entry.name, folder / entry.name)

    def image(self, value: object) -> bytes | None:
        """The bytes that a JSON value stands for; `None` when it stands for none that may be read."""
        if not isinstance(value, str):
            return None
        if value in self.files:
            return read_regular(self.files[value], MAX_ENCODED_BYTES)
        head, comma, data = value.partition(",")
        encoded = data if comma and head.startswith("data:image/") and head.endswith(";base64") else value
        try:
            return base64.b64decode(encoded, validate=True) if len(encoded) <= MAX_ENCODED_BYTES * 4 // 3 + 4 else None
        except (binascii.Error, ValueError):
            return None


def read_regular(path: Path, limit: int) -> bytes | None:
    """The bytes of a regular file within `limit`; `None` for a link, a device, or one that is larger. No link is followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        return file.read(limit) if stat.S_ISREG(found.st_mode) and found.st_size <= limit else None


def _folder_rows(path: Path, start: int) -> Iterator[Row]:
    """`chosen/` and `rejected/` with files of the same name, and a caption beside either (kohya)."""
    chosen, rejected = _Listed(path / "chosen").files, _Listed(path / "rejected").files
    others = {Path(name).stem: file for name, file in rejected.items()}
    for name in sorted(chosen)[start:]:
        yield _row(lambda file=chosen[name]: _folder_comparison(file, others.get(file.stem)))


def _folder_comparison(chosen: Path, rejected: Path | None) -> Comparison:
    captions = [file.with_suffix(suffix) for file in (chosen, rejected) if file for suffix in (".txt", ".caption")]
    read = (read_regular(caption, MAX_TEXT_BYTES) for caption in captions)
    caption = next((text for text in read if text), b"")
    better, worse = (file and read_regular(file, MAX_ENCODED_BYTES) for file in (chosen, rejected))
    return _ordered(caption.decode(errors="replace").strip(), better, worse, 1)


def _tar_rows(path: Path, start: int) -> Iterator[Row]:
    """WebDataset: members that share a name up to the first dot are one row. Nothing is unpacked to the disk."""
    with tarfile.open(path, "r:") as tar:
        number, key, members = -1, None, {}
        for member in tar:
            if not member.isreg():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, field = name.partition(".")
            if (folder, stem) != key:
                if members and number >= start:
                    yield _row(lambda members=members: _triplet(tar, members))
                number, key, members = number + 1, (folder, stem), {}
            members[field.lower()] = member
        if members and number >= start:
            yield _row(lambda members=members: _triplet(tar, members))


def _triplet(tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo]) -> Comparison:
    def content(field: str, limit: int) -> bytes | None:
        member = members[field]
        file = tar.extractfile(member) if member.size <= limit else None
        return file.read() if file else None

    def image(names: Sequence[str]) -> bytes | None:
        fields = [f"{name}{suffix}" for name in names for suffix in IMAGE_SUFFIXES]
        return next((content(field, MAX_ENCODED_BYTES) for field in fields if field in members), None)

    texts: dict[str, Any] = {}
    for field in (field for field in members if field == "json" or field.endswith(".json")):
        try:
            value = json.loads(content(field, MAX_TEXT_BYTES) or b"")
        except (ValueError, RecursionError):
            raise Unusable("no JSON") from None
        texts |= value if isinstance(value, dict) else {}
    for field in (field for field in members if field == "txt" or field.endswith(".txt")):
        name = field.removesuffix("txt").rstrip(".") or "prompt"
        texts[name] = (content(field, MAX_TEXT_BYTES) or b"").decode(errors="replace").strip()
    prompt = next((texts[key] for key in PROMPT_KEYS if key in texts), None)
    critique = next((texts[key] for key in CRITIQUE_KEYS if isinstance(texts.get(key), str)), "")
    return _ordered(prompt, image(CHOSEN_KEYS), image(REJECTED_KEYS), 1, critique=critique[:MAX_PROMPT_CHARACTERS])


# --- which layout a set has ----------------------------------------------------------------------------------------------------------


def open_set(path: Path) -> PreferenceSet:
    """The preference set at `path`: a file, or a folder of Parquet or tar shards, or of `chosen/` and `rejected/`.

    Raises `RpoError` when it is missing, damaged, or of no layout that is known.
    """
    if not path.exists():
        raise RpoError(f"there are no pairs at {path}")
    if path.is_dir():
        if (path / "chosen").is_dir() and (path / "rejected").is_dir():
            return PreferenceSet("folders", (path,), _folder_rows)
        found = [sorted(path.glob(pattern)) for pattern in ("data/*.parquet", "*.parquet", "*.tar", "*.jsonl")]
        files = next((tuple(files) for files in found if files), ())
        if not files:
            raise RpoError(f"{path} holds no preference set: no Parquet, tar or JSONL files, and no chosen/ and rejected/")
        return _by_kind(files)
    return _by_kind((path,))


def _by_kind(files: tuple[Path, ...]) -> PreferenceSet:
    """The set whose kind shows in its first file."""
    first = files[0]
    if first.suffix == ".tar":
        return PreferenceSet("triplets", files, _tar_rows)
    if first.suffix in (".jsonl", ".json"):
        return PreferenceSet("json", files, _json_rows)
    try:
        columns = set(pq.read_schema(first).names)
    except CORRUPT as error:
        raise RpoError(f"{first} is damaged ({error}); download it again") from error
    for layout, wanted, read in _PARQUET:
        if columns >= wanted:
            return PreferenceSet(layout, files, _parquet_rows(read))
    raise RpoError(
        f"{first} has no columns of a preference set that is known; it has {', '.join(sorted(columns))[:300]}. See docs/data.md."
    )


def comparisons(found: PreferenceSet, file: int = 0, start: int = 0) -> Iterator[tuple[int, int, Row]]:
    """(file, row in it, what the row is) from row `start` of file number `file` on. Raises `RpoError` for a damaged file."""
    for number in range(file, len(found.files)):
        try:
            for row, value in enumerate(found.rows(found.files[number], start), start=start):
                yield number, row, value
        except _BROKEN as error:
            raise RpoError(f"{found.files[number]} is damaged ({error}); download it again") from error
        start = 0

"""Data sets as folders of image files: `chosen/` and `rejected/` (kohya), or single images with captions."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from rpo.data.formats.files import MAX_TEXT_BYTES, is_junk, lines_of, open_regular, read_regular, text_of
from rpo.data.formats.rows import (
    IMAGE_SUFFIXES,
    Captioned,
    Comparison,
    ListedImages,
    Row,
    Unusable,
    bytes_of,
    comparison,
    first_line,
    first_text,
    prompt_of,
    row_of,
)
from rpo.data.images import MAX_ENCODED_BYTES

CAPTIONS = (".txt", ".caption")
_NO_IMAGE = (*CAPTIONS, ".json", ".jsonl", ".csv", ".npz", ".md")


@dataclass
class _Stem:
    """Files of one name but for the ending."""

    images: list[Path] = field(default_factory=list)
    links: int = 0
    devices: int = 0
    captions: dict[str, Path] = field(default_factory=dict)


def _stems(folder: Path) -> dict[str, _Stem]:
    """Every file of a folder by its stem, junk left out; links are counted and never followed."""
    found: dict[str, _Stem] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_junk(entry.name) or entry.is_dir(follow_symlinks=False):
            continue
        path = folder / entry.name
        suffix = path.suffix.lower()
        stem = found.setdefault(path.stem, _Stem())
        if not entry.is_file(follow_symlinks=False):
            stem.links += suffix not in _NO_IMAGE and entry.is_symlink()
            stem.devices += suffix not in _NO_IMAGE and not entry.is_symlink()
        elif suffix in CAPTIONS:
            stem.captions[suffix] = path
        elif suffix not in _NO_IMAGE:
            stem.images.append(path)
    return {name: stem for name, stem in found.items() if stem.images or stem.links or stem.devices or stem.captions}


def _caption(*stems: _Stem) -> tuple[str, str]:
    """The first line of the first caption file, and a note if it has more. Raises `Unusable`."""
    for path in (stem.captions[suffix] for stem in stems for suffix in CAPTIONS if suffix in stem.captions):
        if (encoded := read_regular(path, MAX_TEXT_BYTES)) is None:
            raise Unusable("caption file that is too large or cannot be read")
        try:
            caption, note = first_line(text_of(encoded))
        except UnicodeDecodeError:
            raise Unusable("caption is not UTF-8") from None
        if caption:
            return caption, note
    raise Unusable("no prompt")


def _image(stem: _Stem) -> bytes:
    if len(stem.images) > 1:
        raise Unusable("several images of one name")
    if not stem.images:
        odd = "image is a link, which is not followed" if stem.links else "image is a pipe or a device, which is not opened"
        raise Unusable(odd if stem.links or stem.devices else "no image")
    encoded = read_regular(stem.images[0], MAX_ENCODED_BYTES)
    if encoded is None:
        raise Unusable("image file that is too large or cannot be read")
    if not encoded:
        raise Unusable("image file is empty")
    return bytes_of(encoded)


def pair_rows(path: Path, start: int) -> Iterator[Row]:
    """`chosen/` and `rejected/` with files of the same name, and a caption beside either (kohya); a row for every name in either."""
    chosen, rejected = _stems(path / "chosen"), _stems(path / "rejected")
    for name in sorted(chosen.keys() | rejected.keys())[start:]:
        yield row_of(lambda name=name: _pair(chosen.get(name, _Stem()), rejected.get(name, _Stem())))


def _pair(chosen: _Stem, rejected: _Stem) -> Comparison:
    prompt, note = _caption(chosen, rejected)
    return comparison(prompt, _image(chosen), _image(rejected), 1, note=note)


@lru_cache(maxsize=4)
def row_names(path: Path, pairs: bool) -> tuple[str, ...]:
    """Names of the rows of `pair_rows` or `captioned_rows`, in their order."""
    if pairs:
        return tuple(sorted(_stems(path / "chosen").keys() | _stems(path / "rejected").keys()))
    return tuple(sorted(_images(path)))


def holds_images(folder: Path) -> bool:
    """Whether images lie in the folder itself."""
    return any(Path(name).suffix.lower() in IMAGE_SUFFIXES and not is_junk(name) for name in os.listdir(folder))


def _images(path: Path) -> dict[str, _Stem]:
    return {name: stem for name, stem in _stems(path).items() if stem.images or stem.links or stem.devices}


def beside_images(path: Path) -> list[str]:
    """What lies in a folder of captioned images and makes no row: captions without an image, and folders."""
    lonely = [name for name, stem in _stems(path).items() if not (stem.images or stem.links or stem.devices)]
    inside = sorted(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False) and not is_junk(entry.name))
    found: list[str] = []
    for names, what in ((lonely, "captions without an image"), (inside, "folders inside, which are not looked into")):
        if names:
            found.append(f"{what}: {len(names)}, such as {names[0]!r}")
    return found


def captioned_rows(path: Path, start: int) -> Iterator[Row]:
    """Images with a caption of the same name beside each; a row for every name. Captions of several lines give their first."""
    stems = _images(path)
    for name in sorted(stems)[start:]:
        yield row_of(lambda name=name: _captioned(stems[name]))


def _captioned(stem: _Stem) -> Captioned:
    prompt, note = _caption(stem)
    return Captioned(prompt=prompt_of(prompt), image=_image(stem), note=note)


def metadata_csv_rows(path: Path, start: int) -> Iterator[Row]:
    """`metadata.csv` of a `datasets` image folder, and images that it does not name."""
    listed = ListedImages(path.parent)
    with open_regular(path) as file:
        lines = (text_of(line or b"") + "\n" for line in lines_of(file, MAX_TEXT_BYTES))
        for number, row in enumerate(csv.DictReader(lines)):
            if number >= start:
                yield row_of(lambda row=row: _named(row, listed))
    if start == 0:
        yield from listed.unnamed()


def _named(row: dict[str, str], listed: ListedImages) -> Captioned:
    path = listed.path(str(row.get("file_name") or ""))
    return Captioned(prompt=prompt_of(first_text(row)), image=bytes_of(path and read_regular(path, MAX_ENCODED_BYTES)))

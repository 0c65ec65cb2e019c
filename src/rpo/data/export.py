"""Pairs in the layouts of other people's trainers. Images are the bytes of the pairs, never encoded again."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa

from rpo.core.parquet import create
from rpo.data.hub import write_tables
from rpo.data.images import image_suffix
from rpo.data.pairs import Pair

Format = Literal["rpo", "pickapic", "diffusers", "jsonl", "folders", "webdataset"]

PICKAPIC = pa.schema(
    [
        ("caption", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
        ("best_image_uid", pa.string()),
        ("are_different", pa.bool_()),
        ("has_label", pa.bool_()),
    ]
)
_TABLE_PAIRS = 64
TAR_PAIRS = 1000
"""Pairs in one tar."""


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with create(path) as file:
        file.write(data)


def _first_is_chosen(pair: Pair) -> bool:
    """Which side comes first is drawn by a hash of the whole id, so that no trainer can learn the place."""
    return hashlib.sha256(f"first side:{pair.id}".encode()).digest()[0] % 2 == 0


def _pickapic(folder: Path, split: str, pairs: Iterable[Pair]) -> None:
    """Pick-a-Pic v2's columns, images as plain bytes: what the Diffusion-DPO scripts read."""

    def tables() -> Iterator[pa.Table]:
        rest = iter(pairs)
        while part := list(islice(rest, _TABLE_PAIRS)):
            yield pa.Table.from_pylist([_pickapic_row(pair) for pair in part], schema=PICKAPIC)

    write_tables(folder / "data", split, PICKAPIC, tables())


def _pickapic_row(pair: Pair) -> dict[str, object]:
    first = _first_is_chosen(pair)
    sides = [("chosen", pair.chosen), ("rejected", pair.rejected)]
    (name_0, image_0), (name_1, image_1) = sides if first else sides[::-1]
    uids = f"{pair.id}-{name_0}", f"{pair.id}-{name_1}"
    return {
        "caption": pair.prompt,
        "jpg_0": image_0.read(),
        "jpg_1": image_1.read(),
        "label_0": float(first),
        "label_1": float(not first),
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "best_image_uid": uids[0 if first else 1],
        "are_different": True,
        "has_label": True,
    }


def _image_folder(folder: Path, split: str, pairs: Iterable[Pair]) -> None:
    """diffusers' and datasets' ImageFolder: pictures, and metadata.jsonl that names them."""
    with _lines(folder / split / "metadata.jsonl") as lines:
        for pair in pairs:
            sides = {"chosen": pair.chosen.read(), "rejected": pair.rejected.read()}
            names = {side: f"{pair.id}-{side}.{image_suffix(image)}" for side, image in sides.items()}
            for side, name in names.items():
                _write(folder / split / name, sides[side])
            row = {"chosen_file_name": names["chosen"], "rejected_file_name": names["rejected"], "text": pair.prompt}
            _line(lines, row | {"edit_prompt": pair.instruction})


def _jsonl(folder: Path, split: str, pairs: Iterable[Pair]) -> None:
    """One line a pair (image_0, image_1, prompt, prefer_0, prefer_1); the images lie in images/."""
    with _lines(folder / f"{split}.jsonl") as lines:
        for pair in pairs:
            first = _first_is_chosen(pair)
            sides = [image.read() for image in ((pair.chosen, pair.rejected) if first else (pair.rejected, pair.chosen))]
            names = [f"{pair.id}-{number}.{image_suffix(image)}" for number, image in enumerate(sides)]
            for name, image in zip(names, sides, strict=True):
                _write(folder / "images" / name, image)
            row = {"image_0": names[0], "image_1": names[1], "prompt": pair.prompt}
            _line(lines, row | {"prefer_0": int(first), "prefer_1": int(not first)})


def _folders(folder: Path, split: str, pairs: Iterable[Pair]) -> None:
    """chosen/ and rejected/ with files of one name and a caption beside each (kohya); held-out pairs in held_out/."""
    home = folder if split == "train" else folder / split
    for pair in pairs:
        for side, image in (("chosen", pair.chosen.read()), ("rejected", pair.rejected.read())):
            _write(home / side / f"{pair.id}.{image_suffix(image)}", image)
            _write(home / side / f"{pair.id}.txt", pair.prompt.encode())


def _webdataset(folder: Path, split: str, pairs: Iterable[Pair]) -> None:
    """Tar shards of (critique, flawed, refined) triplets: KEY.flawed.png, KEY.refined.png, KEY.json."""
    rest, number = iter(pairs), 0
    while part := list(islice(rest, TAR_PAIRS)):
        folder.mkdir(parents=True, exist_ok=True)
        with create(folder / f"{split}-{number:05d}.tar") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for pair in part:
                said = {"prompt": pair.prompt, "critique": pair.critique, "instruction": pair.instruction}
                sides = {"flawed": pair.rejected.read(), "refined": pair.chosen.read()}
                members = {f"{side}.{image_suffix(image)}": image for side, image in sides.items()}
                for name, data in (members | {"json": json.dumps(said).encode()}).items():
                    member = tarfile.TarInfo(f"{pair.id}.{name}")  # no owner, no time: equal pairs make equal tars
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        number += 1


def _lines(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return create(path)


def _line(lines: BinaryIO, row: Mapping[str, object]) -> None:
    lines.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


EXPORTS: Mapping[Format, Callable[[Path, str, Iterable[Pair]], None]] = {
    "pickapic": _pickapic,
    "diffusers": _image_folder,
    "jsonl": _jsonl,
    "folders": _folders,
    "webdataset": _webdataset,
}
"""By format: writes the pairs of one split into a folder."""

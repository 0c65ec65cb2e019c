"""What never changes during training is computed before it, once, and kept: latents, prompt embeddings, reference errors.

Each file holds up to 64 rows and is named by a hash of everything its content depends on (images, models, settings), so a
rerun finds what a killed one had finished, and a sweep over objectives or learning rates finds all of it. At the start only its header
and size are looked at; its content is held against its own hash when the first of its rows is read.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rpo.core.parquet import atomic_path
from rpo.data.images import EncodedImage, decode_image, fit_square
from rpo.errors import RpoError, disk_errors
from rpo.models.denoiser import Denoiser, Posterior
from rpo.training.runtime.distributed import Processes

SHARD_ROWS = 64
PIXELS = "pixels 2"
"""Version of the way from an image's bytes to its latents, part of every key: 2 follows ICC profiles, and encodes with channels last."""
_MAPPED = 4096
"""Files that stay mapped: a process may map some 65,000 in all."""
_HEADER_BYTES_MAX = 2**20
_Row = TypeVar("_Row")
Framing = tuple[float, float, float, float]
"""An image's own height and width, and how far below and right of the corner the square begins that is kept of it, once it is resized."""

Tick = Callable[[], None]
"""Called after each file: moves a progress bar, and may raise to stop."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The folder of the files, and who computes which of those that are missing."""

    folder: Path
    group: Processes
    tick: Tick = lambda: None

    def all(self, files: Sequence[tuple[str, Callable[[], Mapping[str, Tensor]]]]) -> "Shards":
        """The files of every (name, computation); each process computes its share of those that are missing or cut."""
        for name, compute in self.group.share(files):
            keep(self.folder / name, compute)
            self.tick()
        self.group.wait()
        return Shards([self.folder / name for name, _ in files])


class Shards:
    """Files of tensors by name, mapped when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._proven: set[int] = set()

    def __getitem__(self, number: int) -> Mapping[str, Tensor]:
        """Raises `RpoError` for a file that is damaged: it is removed then, so that `--resume` computes it again."""
        if number not in self._mapped:
            if len(self._mapped) >= _MAPPED:
                del self._mapped[next(iter(self._mapped))]
            self._mapped[number] = self._read(number)
        return self._mapped[number]

    def _read(self, number: int) -> dict[str, Tensor]:
        try:
            tensors = _read(self._paths[number], check=number not in self._proven)
        except ValueError as error:
            damaged = [path for path in self._paths if path == self._paths[number] or _damaged(path)]
            for path in damaged:
                with suppress(OSError):
                    path.unlink()
            more = f", and so are {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise RpoError(
                f"{self._paths[number]} is damaged ({error}){more}; it was not trained on and is removed. "
                "Go on with --resume, which computes it again"
            ) from error
        self._proven.add(number)
        return tensors


class Rows:
    """Equally shaped tensors by name, row by row, over files of `SHARD_ROWS` rows."""

    def __init__(self, shards: Shards, mirrored_at: int = 0) -> None:
        self._shards = shards
        self.mirrored_at = mirrored_at
        """How many rows on an image's mirror image is, if there are any."""

    def row(self, name: str, row: int) -> Tensor:
        """One row as it is stored."""
        return self._shards[row // SHARD_ROWS][name][row % SHARD_ROWS]

    def take(self, name: str, rows: Sequence[int]) -> Tensor:
        """Rows in the order asked for, float32, on the CPU."""
        return torch.stack([self.row(name, row) for row in rows]).float()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shards[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one row."""
        return tuple(self._shards[0][name].shape[1:])


def sha256(*parts: str) -> str:
    """Of the parts' own hashes, so that no two lists of parts run into each other."""
    digests = [hashlib.sha256(part.encode()).digest() for part in parts]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def chunks(rows: Sequence[_Row], size: int) -> Iterator[Sequence[_Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def keep(path: Path, compute: Callable[[], Mapping[str, Tensor]]) -> None:
    """Computes and writes the tensors in `path` unless they are there, as far as its header and size tell."""
    try:
        if _looks_whole(path):
            return
    except ValueError as error:
        warnings.warn(f"{path} is damaged ({error}) and is computed again", stacklevel=2)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={"sha256": _content(tensors)})


def _looks_whole(path: Path) -> bool:
    """Whether there is a file. Raises `ValueError` when its size is not what its header says, `RpoError` when it cannot be read."""
    if not path.exists():
        return False
    with disk_errors(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_BYTES_MAX:
            raise ValueError(f"a header of {length} bytes")
        text, size = file.read(length), os.fstat(file.fileno()).st_size
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        end = max(entry["data_offsets"][1] for entry in header.values())
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"no header: {type(error).__name__}") from error
    if "sha256" not in metadata or end + length + 8 != size:
        raise ValueError(f"{size} bytes where its header says {end + length + 8}")
    return True


def _damaged(path: Path) -> bool:
    try:
        _read(path, check=True)
    except ValueError:
        return True
    except RpoError:
        return False  # the system refuses to read it, which proves nothing
    return False


def encode_all_images(
    denoiser: Denoiser,
    images: Sequence[EncodedImage],
    cache: Cache,
    *,
    resolution: int | None,
    dtype: torch.dtype,
    batch: int,
    flip: bool = False,
) -> tuple[Rows, dict[EncodedImage, int]]:
    """Posterior `mean` and `std` of every distinct image, its `framing`, and the row of each; with `flip` of the mirror images as well."""
    distinct = list(dict.fromkeys(images))
    size = _pixels(distinct[0].read(), resolution)[0].shape

    def compute(shard: Sequence[EncodedImage], mirrored: bool) -> dict[str, Tensor]:
        parts: list[Posterior] = []
        framings: list[Framing] = []
        with ThreadPoolExecutor() as decoders:  # Pillow decodes and resizes outside the interpreter's lock
            decoded = decoders.map(lambda image: _pixels(image, resolution), [image.read() for image in shard])
            for encoded in chunks(shard, batch):
                pixels, framed = zip(*(next(decoded) for _ in encoded), strict=True)
                if any(image.shape != size for image in pixels):
                    raise ValueError("the images are not all of one size; set a resolution, to which all are cropped and resized")
                stacked = np.stack(pixels)
                parts.append(denoiser.encode_images(np.ascontiguousarray(stacked[:, :, ::-1]) if mirrored else stacked))
                framings.extend(framed)
        latents = {name: torch.cat([getattr(part, name) for part in parts]).to(dtype) for name in ("mean", "std")}
        return {**latents, "framing": torch.tensor(framings, dtype=torch.float32)}

    files = []
    for mirrored in (False, True)[: 1 + flip]:
        for shard in chunks(distinct, SHARD_ROWS):
            settings = (PIXELS, *["mirrored"] * mirrored, str(resolution), str(dtype), str(batch), denoiser.device.type)
            key = sha256(denoiser.digests["images"], *settings, *(image.sha256 for image in shard))
            files.append((f"latents-{key[:20]}.safetensors", partial(compute, shard, mirrored)))
    mirrored_at = SHARD_ROWS * -(-len(distinct) // SHARD_ROWS)
    return Rows(cache.all(files), mirrored_at), {image: row for row, image in enumerate(distinct)}


def encode_all_prompts(denoiser: Denoiser, prompts: Sequence[str], cache: Cache, *, dtype: torch.dtype) -> tuple[Rows, dict[str, int]]:
    """What the network reads of every distinct prompt, and the row of each."""
    distinct = list(dict.fromkeys(prompts))

    def compute(shard: Sequence[str]) -> dict[str, Tensor]:
        return {name: _stored(rows, dtype) for name, rows in denoiser.encode_prompts(shard).items()}

    files = []
    for shard in chunks(distinct, SHARD_ROWS):
        key = sha256(denoiser.digests["prompts"], str(dtype), denoiser.device.type, *shard)
        files.append((f"prompts-{key[:20]}.safetensors", partial(compute, shard)))
    return Rows(cache.all(files)), {prompt: row for row, prompt in enumerate(distinct)}


def _stored(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, unless some number is too large for it, as a language model's hidden states may be."""
    stored = rows.to(dtype)
    return stored if stored.isfinite().all() else rows


def _pixels(encoded: bytes, resolution: int | None) -> tuple[np.ndarray, Framing]:
    image = decode_image(encoded)
    height, width = image.shape[:2]
    if resolution is None:
        return image, (height, width, 0, 0)
    square = min(height, width)
    top, left = ((side - square) // 2 * resolution / square for side in (height, width))
    return fit_square(image, resolution), (height, width, top, left)


def _content(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        total.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read(path: Path, *, check: bool) -> dict[str, Tensor]:
    """The mapped tensors. Raises `ValueError` when the bytes are not what was written, `RpoError` when the system refuses to read them."""
    with disk_errors(path):
        path.open("rb").close()  # what safetensors says of a refusal names neither file nor reason
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                whole = not check or (file.metadata() or {}).get("sha256") == _content(tensors)
        except SafetensorError as error:
            if "os error" in str(error):
                raise
            raise ValueError(str(error)) from error
    if not whole:
        raise ValueError("its content is not what was written")
    return tensors

"""From a run folder to what other people read."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors.torch import save_file

from rpo.api.folder import PAIRS, read_recipe, read_summary, read_weights
from rpo.core.parquet import IMAGE, atomic_path, write_text
from rpo.core.run_folder import STAGE_FOLDER, RunFolder, reading_run
from rpo.data.card import EXAMPLES, Facts, card, write_examples
from rpo.data.export import EXPORTS, Format
from rpo.data.hub import CARD, MANIFEST, configs, new_folder, push_folder, write_tables
from rpo.data.pairs import SCHEMA, Pair, Split, iterate_pairs, pair_tables
from rpo.engine.funnel import drops
from rpo.engine.layers import read_shards, stored_layers
from rpo.errors import RpoError, disk_errors
from rpo.models.lora import LoraLayout
from rpo.training.runtime.checkpoint import read_config

SPLITS: tuple[Split, ...] = ("train", "held_out")
PUBLISHED = "published"
ROWS = pa.schema([(name, pa.string()) for name in ("id", "prompt", "status", "fell_at", "values")])
"""`values` is JSON: every column of the run that is no image."""


def published_folder(run: Path, layout: Format) -> Path:
    return run / PUBLISHED / layout


def export(
    run: Path, layout: Format, to: Path | None = None, *, licence: str = "unknown", name: str | None = None, overwrite: bool = False
) -> Path:
    """Writes the pairs of a run in a folder of their own, with card and manifest; in our own format, dropped rows as well."""
    target = to or published_folder(run, layout)
    path = run / PAIRS
    with reading_run(run), new_folder(target, overwrite=overwrite) as folder:
        examples = list(islice(iterate_pairs(path), EXAMPLES))
        pairs = {split: _write(folder, layout, split, path) for split in SPLITS}
        rows = dropped = 0
        if any(STAGE_FOLDER.fullmatch(entry.name) for entry in run.iterdir()):
            rows = sum(len(shard) for shard in drops(run))
            dropped = sum(status is not None for shard in drops(run) for _, status in shard)
            if layout == "rpo":
                _write_rows(folder, run)
        facts = Facts(
            name=name or run.resolve().name,
            layout=layout,
            licence=licence,
            pairs=pairs,
            rows=rows,
            dropped=dropped,
            summary=read_summary(run),
            record=read_recipe(run),
            configs=configs(folder, layout),
        )
        write_text(folder / CARD, card(facts, write_examples(folder, examples)))
    return target


def _write(folder: Path, layout: Format, split: Split, path: Path) -> int:
    """Writes the pairs of a split, and returns how many."""
    count = 0

    def pairs() -> Iterator[Pair]:
        nonlocal count
        for pair in iterate_pairs(path):
            if pair.split == split:
                count += 1
                yield pair

    if layout == "rpo":
        write_tables(folder / "data", split, SCHEMA, pair_tables(pairs()))
    else:
        EXPORTS[layout](folder, split, pairs())
    return count


def _write_rows(folder: Path, run: Path) -> None:
    """Every row without images, and dropped ones with the images of source and edits."""
    layers = stored_layers(run)
    columns = list(dict.fromkeys(column for layer in layers for column in layer.columns))
    kinds = next(read_shards(run, columns)).schema
    images = [name for name in columns if kinds.field(name).type.equals(IMAGE)]
    plain = [name for name in columns if name not in images]
    shown = [name for name in images if name.split("_")[0] in ("source", "other", "edited")]

    def tables(images: list[str], *, all_rows: bool) -> Iterator[pa.Table]:
        for table, ends in zip(read_shards(run, [*plain, *images]), drops(run), strict=True):
            told = zip(table.to_pylist(), ends, strict=True)
            rows = [_row(row, layers[at].name if status else None, images) for row, (at, status) in told if status or all_rows]
            if rows:
                yield pa.Table.from_pylist(rows, schema=_with_images(images))

    write_tables(folder / "rows", "rows", ROWS, tables([], all_rows=True))
    write_tables(folder / "rejected", "rejected", _with_images(shown), tables(shown, all_rows=False))


def _with_images(images: list[str]) -> pa.Schema:
    return pa.schema([*ROWS, *((name, IMAGE) for name in images)])


def _row(row: dict[str, Any], fell_at: str | None, images: list[str]) -> dict[str, Any]:
    values = {name: value for name, value in row.items() if name not in ("id", "prompt", "status", *images)}
    told = {"id": row["id"], "prompt": row["prompt"], "status": row["status"], "fell_at": fell_at, "values": json.dumps(values)}
    return told | {name: row[name] for name in images}


def export_lora(run: Path, layout: LoraLayout, to: Path | None = None, *, overwrite: bool = False) -> Path:
    """Writes the LoRA that was tuned in `run` as one safetensors file that the tools of `layout` load.

    Raises `RpoError` where no LoRA was tuned, or the tools do not know its model.
    """
    from rpo.models.diffusers_denoiser import empty_network
    from rpo.models.lora_layouts import LORA_FILE, file_weights, read_lora

    target = to or run / f"lora-{layout}.safetensors"
    if target.suffix != ".safetensors":
        raise ValueError(f"a LoRA is written as safetensors; {target} must end in .safetensors")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists; replace it with --overwrite, or name another file with --to")
    file, settings = run / "train" / "weights" / LORA_FILE, run / "train" / "config.json"
    if not (file.is_file() and settings.is_file()):
        raise RpoError(f"{run} holds no tuned LoRA; make one with `rpo train` and --train.lora-rank")
    with reading_run(run):
        network = empty_network(read_config(run / "train")["model"])
        weights = file_weights(read_lora(read_weights(RunFolder(run)) / LORA_FILE, network), network, layout)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    return target


def push(run: Path, repository: str, *, private: bool = True, licence: str = "unknown") -> str:
    """Uploads the published folder of a run, made first if there is none; a folder that `export` wrote is taken as it is.

    Raises `ValueError` for a licence when the folder is there already, with its own on its card.
    """
    folder = run if (run / MANIFEST).is_file() else published_folder(run, "rpo")
    if not (folder / MANIFEST).is_file():
        export(run, "rpo", licence=licence, name=repository.rpartition("/")[2])
    elif licence != "unknown":
        raise ValueError(f"{folder} was exported already; give it the licence by `rpo export RUN_FOLDER --license {licence} --overwrite`")
    return push_folder(folder, repository, private=private)

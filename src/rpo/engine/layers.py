"""Column sidecars: where each stage's columns lie on disk, which are done, and how they are read side by side.

Each stage writes `id`, its own columns and its own `status` into one Parquet file per shard, in a folder that carries its
fingerprint. A shard's footer also holds a chain value over the shards before it, so that one that was made from something
else than what is there now is made again.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rpo.core.atomic import atomic_folder
from rpo.core.hashing import Json, canonical, digest, first_difference, model_identity
from rpo.core.parquet import PARTIAL_SUFFIX, damaged, read_footer, read_shard, shard_path, sweep, write_shard, write_text
from rpo.core.records import read_record, record_text
from rpo.core.run_folder import STAGE_FOLDER, RunFolder, remove_stage
from rpo.engine.stage import NO_PART_OF_RESULTS, PLAN, PLAN_COLUMNS, Stage
from rpo.errors import UNANSWERED, RpoError

SHARD_ROWS = 64
"""Beside a stage's shards, one line per shard made: kept out of the shards, whose bytes depend on the rows alone."""

_WRITE_AGAIN = "Remove that file and run `rpo curate` with --resume, which writes it again."
_ROW_ID = re.compile(r"[0-9a-f]{16}")
_CHECK_ROWS = 16_384
_SYNC_THREADS = 8
"""File systems sync many files at once for the price of one."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The columns of one stage, or of the plan (position 0), on disk."""

    position: int
    name: str
    fingerprint: str
    folder: Path
    columns: tuple[str, ...]
    """Without `id` and `status`, which every layer has."""
    recipe: Json
    """What the fingerprint was taken from, beside the layers before this one."""


def _layer(folder: Path, position: int, name: str, columns: Iterable[str], recipe: Json, upstream: str) -> Layer:
    fingerprint = digest({"name": name, "recipe": recipe, "upstream": upstream})
    path = folder / f"{position}_{name}-{fingerprint[:8]}"
    return Layer(position=position, name=name, fingerprint=fingerprint, folder=path, columns=tuple(columns), recipe=recipe)


def _config(stage: Stage, models: Mapping[str, str]) -> Json:
    """The stage's configuration, without what results do not depend on."""
    config = canonical(stage, models)
    if isinstance(config, dict) and isinstance(config.get("fields"), dict):
        config["fields"] = {name: value for name, value in config["fields"].items() if name not in NO_PART_OF_RESULTS}  # type: ignore[union-attr]
    return config


def _check_columns(rows: pa.Table, stages: Sequence[Stage]) -> None:
    """Every input exists before it is read, and no name is taken twice."""
    names, known = {PLAN}, set(rows.column_names)
    for stage in stages:
        spec = stage.spec
        if spec.name in names:
            raise ValueError(f"two stages are named {spec.name!r}; give one another name")
        if missing := set(spec.inputs) - known:
            raise ValueError(f"stage {spec.name}: inputs {sorted(missing)} are made by no stage before it; known are {sorted(known)}")
        if again := spec.outputs.keys() & known:
            raise ValueError(f"stage {spec.name}: outputs {sorted(again)} exist already; choose other names")
        names.add(spec.name)
        known |= spec.outputs.keys()


def _check_plan(rows: pa.Table) -> str:
    """sha256 over ids and seeds of a table made by `plan`."""
    if rows.column_names[:3] != ["id", *PLAN_COLUMNS] or "status" in rows.column_names or not rows.num_rows:
        raise ValueError(f"the rows of a run come from rpo.engine.stage.plan, got columns {rows.column_names}")
    total = hashlib.sha256()
    for batch in rows.select(["id", "seed"]).to_batches(max_chunksize=_CHECK_ROWS):
        ids: list[str] = batch.column(0).to_pylist()
        assert all(_ROW_ID.fullmatch(row) for row in ids), "row ids are 16 hexadecimal digits"
        total.update(json.dumps([ids, batch.column(1).to_pylist()]).encode())
    return total.hexdigest()


def lay_out(folder: Path, rows: pa.Table, stages: Sequence[Stage], *, shard_rows: int = SHARD_ROWS) -> tuple[Layer, ...]:
    """Where the plan and each stage's columns belong in the run folder `folder`; touches nothing there.

    Reads the stages' local model folders once, for their fingerprints. Raises `ValueError` for stages that do not fit together.
    """
    if shard_rows < 1:
        raise ValueError(f"shard_rows must be at least 1, got {shard_rows}")
    _check_columns(rows, stages)
    types: dict[str, Json] = {field.name: str(field.type) for field in rows.schema}
    recipe: Json = {"rows": rows.num_rows, "shard_rows": shard_rows, "columns": types, "content": _check_plan(rows)}
    layers = [_layer(folder, 0, PLAN, rows.column_names[1:], recipe, "")]
    for position, stage in enumerate(stages, start=1):
        spec = stage.spec
        models = {model: model_identity(model) for model in spec.models}
        recipe = {
            "version": spec.version,
            "inputs": list(spec.inputs),
            "outputs": {name: str(kind) for name, kind in spec.outputs.items()},
            "batch_size": spec.batch_size,
            "models": [models[model] for model in spec.models],
            "config": _config(stage, models),
        }
        layers.append(_layer(folder, position, spec.name, spec.outputs, recipe, layers[-1].fingerprint))
    return tuple(layers)


def _stage_folders(folder: Path) -> list[Path]:
    """Layer folders on disk, by position."""
    found = [path for path in folder.iterdir() if STAGE_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: (int(path.name.split("_")[0]), path.name))


def _has_shards(folder: Path) -> bool:
    return next(folder.glob("*.parquet"), None) is not None


def refuse_changed(folder: Path, layers: Sequence[Layer], *, behind: bool = False) -> None:
    """Raises `RpoError`, naming stage and setting, when the run folder holds results of another recipe than `layers`.

    `behind`: whether what lies behind these layers is left out.
    """
    expected = {layer.folder.name for layer in layers}
    for path in _stage_folders(folder):
        position, name, _ = STAGE_FOLDER.fullmatch(path.name).groups()  # type: ignore[union-attr]
        if path.name in expected or not _has_shards(path) or (behind and int(position) >= len(layers)):
            continue
        stored = path / "stage.json"
        change = "the recipe now has no such stage there"
        if int(position) < len(layers) and layers[int(position)].name == name:
            old = (read_record(stored, _WRITE_AGAIN) or {}).get("recipe")
            change = first_difference(old, layers[int(position)].recipe) or "a stage before it changed"
        raise RpoError(
            f"{folder} was made with another recipe or version of rpo: the fingerprint of stage {name!r} differs ({change}), and with it "
            "all that follows. Go on with the old one, choose a new folder, or begin anew with --overwrite. What is there can still be "
            "shown, reported, exported and trained on."
        )


def _chain(upstream: str, content: str) -> str:
    return hashlib.sha256(f"{upstream}{content}".encode()).hexdigest()


def _write(layer: Layer, index: int, table: pa.Table, upstream: str, content: str) -> str:
    metadata = {"rpo.fingerprint": layer.fingerprint, "rpo.upstream": upstream, "rpo.content": content}
    write_shard(shard_path(layer.folder, index), table, metadata)
    return _chain(upstream, content)


def write_layer_shard(layer: Layer, index: int, table: pa.Table, upstream: str) -> str:
    """Commits one shard of a stage that was made from shards with chain value `upstream`; returns its own chain value."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return _write(layer, index, table, upstream, hashlib.sha256(sink.getvalue()).hexdigest())


def prepare(run: RunFolder, rows: pa.Table, layers: Sequence[Layer], *, shard_rows: int = SHARD_ROWS) -> None:
    """Makes the layers' folders, sweeps what a killed run left half written, and writes the shards of the plan that are missing.

    Raises `RpoError` when the folder holds another recipe's results.
    """
    refuse_changed(run.path, layers)
    expected = {layer.folder.name for layer in layers}
    for path in _stage_folders(run.path):
        if path.name not in expected:
            remove_stage(path)
    for layer in layers:
        layer.folder.mkdir(exist_ok=True)
        sweep(layer.folder)
        described = {"name": layer.name, "fingerprint": layer.fingerprint, "columns": list(layer.columns), "recipe": layer.recipe}
        text, stored = record_text(described, indent=1), layer.folder / "stage.json"
        if not stored.exists() or stored.read_bytes() != text.encode():
            write_text(stored, text)
    existing = {path.name for path in layers[0].folder.iterdir()}

    def write_plan(index: int) -> None:
        part = rows.slice(index * shard_rows, shard_rows)
        ids = json.dumps(part.column("id").to_pylist()).encode()
        status = pa.nulls(part.num_rows, pa.string())
        _write(layers[0], index, part.append_column("status", status), "", hashlib.sha256(ids).hexdigest())

    missing = [i for i in range(-(-rows.num_rows // shard_rows)) if shard_path(layers[0].folder, i).name not in existing]
    with ThreadPoolExecutor(_SYNC_THREADS) as threads:
        for _ in threads.map(write_plan, missing):
            pass


def adopt(layers: Sequence[Layer], other: Path) -> None:
    """Takes over the shards that another run folder made with the same stages on the same rows, by hard links.

    Shards are never written in place, so neither folder can spoil the other's.
    """
    for layer in layers:
        theirs = other / layer.folder.name
        if layer.folder.exists():
            continue
        if not theirs.is_dir():
            return
        with atomic_folder(layer.folder) as partial:
            for file in theirs.iterdir():
                if file.suffix == ".parquet":
                    os.link(file, partial / file.name)
                elif not file.name.startswith(".") and file.suffix != PARTIAL_SUFFIX:
                    shutil.copyfile(file, partial / file.name)


def shard_sizes(layers: Sequence[Layer]) -> list[int]:
    """Rows of each shard, from the plan's recipe."""
    recipe = layers[0].recipe
    assert isinstance(recipe, dict) and isinstance(recipe["rows"], int) and isinstance(recipe["shard_rows"], int)
    rows, size = recipe["rows"], recipe["shard_rows"]
    return [min(size, rows - start) for start in range(0, rows, size)]


def scan_shard(layers: Sequence[Layer], index: int, rows: int) -> list[str]:
    """Chain values of the layers whose shard `index` is there and made from what is there: a prefix of `layers`.

    Reads footers only. Whatever lies beyond the prefix is to be made (again). Raises `RpoError` on a damaged file.
    """
    chain = [""]
    for layer in layers:
        path = shard_path(layer.folder, index)
        try:
            count, metadata = read_footer(path)
        except FileNotFoundError:
            break
        if count != rows or metadata.get("rpo.fingerprint") != layer.fingerprint or "rpo.content" not in metadata:
            raise damaged(path, "its footer does not belong to this stage and shard")
        if metadata.get("rpo.upstream") != chain[-1]:
            break
        chain.append(_chain(chain[-1], metadata["rpo.content"]))
    return chain[1:]


def read_joined(layers: Sequence[Layer], index: int, columns: Sequence[str]) -> pa.Table:
    """One shard of all `layers` side by side: `id`, `columns` in the order asked for, and `status`, the first that is not null.

    Raises `RpoError` when a file is missing or damaged, or holds other rows than the plan.
    """
    ids: pa.ChunkedArray | None = None
    statuses: list[pa.ChunkedArray] = []
    found: dict[str, pa.ChunkedArray] = {}
    for layer in layers:
        path = shard_path(layer.folder, index)
        wanted = [name for name in columns if name in layer.columns]
        try:
            table = read_shard(path, ["id", *wanted, "status"])
        except FileNotFoundError as error:
            raise RpoError(f"{path} is missing: the run is not finished. Run again with --resume to make it.") from error
        if ids is None:
            ids = table.column("id")
        if not table.column("id").equals(ids):
            raise damaged(path, "its rows are not those of the plan")
        statuses.append(table.column("status"))
        found |= {name: table.column(name) for name in wanted}
    assert ids is not None
    status = pc.coalesce(*statuses)  # pyright: ignore[reportAttributeAccessIssue]  (pyarrow makes its functions at import)
    data = {"id": ids, **{name: found[name] for name in columns if name != "id"}, "status": status}
    return pa.table(data)


def is_whole(layers: Sequence[Layer]) -> bool:
    """Whether every shard of `layers` is there and made from what is there."""
    return all(len(scan_shard(layers, index, rows)) == len(layers) for index, rows in enumerate(shard_sizes(layers)))


def forget_unanswered(layers: Sequence[Layer]) -> int:
    """Removes shards with rows to which a remote model gave no answer, so that they are made again; how many such rows there were.

    Answers that were paid for are kept elsewhere, so only those rows are asked again; and what follows a shard that comes out as it
    was stays as it is.
    """
    rows = 0
    for index, size in enumerate(shard_sizes(layers)):
        for layer in layers[1 : len(scan_shard(layers, index, size))]:
            path = shard_path(layer.folder, index)
            statuses: list[str | None] = read_shard(path, ["status"]).column(0).to_pylist()
            unanswered = sum((status or "").startswith(f"error:{layer.name}:{UNANSWERED.rstrip()}") for status in statuses)
            if unanswered:
                rows += unanswered
                path.unlink()
    return rows


def remove_after(folder: Path, layers: Sequence[Layer]) -> None:
    """Removes what lies in the run folder behind `layers`, to be made again."""
    for path in _stage_folders(folder):
        if int(path.name.split("_")[0]) >= len(layers):
            remove_stage(path)


def stored_layers(folder: Path) -> tuple[Layer, ...]:
    """The layers that a run folder holds, as it describes them itself. Raises `RpoError` when it holds none, or cannot say."""
    layers: list[Layer] = []
    for path in _stage_folders(folder) if folder.is_dir() else []:
        try:
            described = read_record(path / "stage.json", _WRITE_AGAIN)
            if described is None:
                raise RpoError(f"{path / 'stage.json'} is missing. {_WRITE_AGAIN}")
            name, fingerprint, recipe = described["name"], described["fingerprint"], described["recipe"]
            columns = tuple(described["columns"])
        except (KeyError, TypeError) as error:
            raise RpoError(f"{path / 'stage.json'} is damaged ({type(error).__name__}: {error}). {_WRITE_AGAIN}") from error
        if path.name != f"{len(layers)}_{name}-{fingerprint[:8]}":
            raise RpoError(f"{path} is not stage {len(layers)} of the run {folder}; remove the folder that does not belong there")
        layer = Layer(position=len(layers), name=name, fingerprint=fingerprint, folder=path, columns=columns, recipe=recipe)
        layers.append(layer)
    if not layers:
        raise RpoError(f"{folder} holds no rows; make them with `rpo curate`")
    return tuple(layers)


def read_shards(folder: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """A finished run shard by shard, as `read_joined` gives it; memory is that of one shard.

    Raises `ValueError` for a column that no stage makes, `RpoError` when a shard is missing, stale or damaged.
    """
    layers = stored_layers(folder)
    known = {"id", "status"}.union(*(layer.columns for layer in layers))
    if unknown := set(columns) - known:
        raise ValueError(f"columns {sorted(unknown)} are made by no stage of {folder}; known are {sorted(known)}")
    wanted = [name for name in columns if name not in ("id", "status")]
    for index, rows in enumerate(shard_sizes(layers)):
        done = len(scan_shard(layers, index, rows))
        if done < len(layers):
            path = shard_path(layers[done].folder, index)
            raise RpoError(f"{path} is missing or out of date: the run is not finished. Run again with --resume to make it.")
        yield read_joined(layers, index, wanted)


def read_run(folder: Path, columns: Sequence[str]) -> pa.Table:
    """All rows of a finished run, live or not: `id`, `columns` in the order asked for, and `status` (null = live).

    Holds every value in memory; for images of many rows take `read_shards`.
    """
    return pa.concat_tables(read_shards(folder, columns)).combine_chunks()

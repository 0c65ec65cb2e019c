"""The rows of one stage of a run folder as a person reads them in a terminal."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rpo.core.terminal import printable
from rpo.data.images import image_size
from rpo.engine.layers import Layer, read_joined, scan_shard, shard_sizes, stored_layers

Kept = Literal["all", "live", "dropped", "errors"]
TEXT_MAX = 2000
"""Characters of one value that are shown."""


def stage_layer(folder: Path, stage: str) -> Layer:
    """The stage's layer. Raises `ValueError` that lists the stages there are."""
    layers = {layer.name: layer for layer in stored_layers(folder)}
    if stage not in layers:
        raise ValueError(f"{folder} has no stage {stage!r}; it has {', '.join(layers)}")
    return layers[stage]


def stage_rows(folder: Path, stage: str, kept: Kept = "all", row_id: str = "") -> Iterator[dict[str, Any]]:
    """Rows of the shards that the stage has made so far: `id`, `prompt`, its own columns and `status`, the row's fate up to it.

    Rows that had fallen before the stage are left out. `row_id` may be the beginning of an id.
    """
    layers = stored_layers(folder)
    position = stage_layer(folder, stage).position
    known = [name for name in ("prompt", "set_name") if name in layers[0].columns]  # the file of a row that was brought
    columns = list(dict.fromkeys([*known, *layers[position].columns]))
    for index, size in enumerate(shard_sizes(layers)):
        if len(scan_shard(layers, index, size)) <= position:
            continue
        before: list[str | None] = [None] * size
        if position:
            before = read_joined(layers[:position], index, []).column("status").to_pylist()
        table = read_joined(layers[: position + 1], index, columns)
        for fate, row in zip(before, table.to_pylist(), strict=True):
            if fate is None and row["id"].startswith(row_id) and _wanted(row["status"], kept):
                yield row


def _wanted(status: str | None, kept: Kept) -> bool:
    if kept == "all":
        return True
    if status is None:
        return kept == "live"
    return kept == ("errors" if status.startswith("error:") else "dropped")


def row_lines(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of everything in a row that holds a value; structured values as indented JSON, images by their size."""
    fate = row["status"] or "live"
    lines = [("id", printable(f"{row['id']}  {fate}"))]
    return lines + [(name, _told(value)) for name, value in row.items() if name not in ("id", "status") and value is not None]


def _told(value: object) -> str:
    if isinstance(value, dict):
        return _image(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if isinstance(value, str) and value[:1] in "{[":
        try:
            text = _readable(json.loads(value))
        except ValueError:  # a text that only looks like JSON
            text = value
    shown = printable(text)
    return shown if len(shown) <= TEXT_MAX else shown[:TEXT_MAX] + "…"


def _image(cell: Mapping[str, object]) -> str:
    encoded = cell.get("bytes")
    if not isinstance(encoded, bytes):
        return "no bytes"
    try:
        width, height = image_size(encoded)
    except ValueError as error:
        return f"{len(encoded):,} bytes, {error}"
    return f"image {width}x{height}, {len(encoded):,} bytes"


def _readable(value: Any, indent: str = "") -> str:
    """Nested values by indentation, one line for each that holds none itself; empty ones are left out."""
    if isinstance(value, dict):
        if all(not isinstance(item, dict | list) for item in value.values()):
            return ", ".join(f"{key}: {item}" for key, item in value.items() if item not in (None, "", []))
        lines = [f"{indent}{key}:{_nested(item, indent)}" for key, item in value.items() if item not in (None, "", [])]
        return "\n".join(lines)
    return str(value)


def _nested(value: Any, indent: str) -> str:
    if isinstance(value, list):
        if all(not isinstance(item, dict | list) for item in value):
            return " " + ", ".join(map(str, value))
        return "".join(f"\n{indent}  - {_flat(item)}" for item in value)
    return f"\n{_readable(value, indent + '  ')}" if isinstance(value, dict) else f" {value}"


def _flat(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    return ", ".join(f"{key}: {value}" for key, value in item.items() if value not in (None, "", []))

"""Pairs of others as sources: the side to edit, the other beside it, and every row that is no pair with its reason."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rpo.curate.brought import BroughtStage, plan_brought
from rpo.curate.funnel import funnel
from rpo.curate.local_engine import run_stages
from rpo.curate.sidecars import read_run
from rpo.data.run_folder import open_run
from rpo.errors import RpoError
from tiny_diffusion import make_pairs

PAIRS = make_pairs(5)
A, B = PAIRS[0].chosen.read(), PAIRS[0].rejected.read()


def pickapic(path: Path, rows: list[tuple[Any, Any, Any, float | None]]) -> Path:
    types = (pa.string(), pa.binary(), pa.binary(), pa.float64())
    names = ("caption", "jpg_0", "jpg_1", "label_0")
    columns = {name: pa.array([row[i] for row in rows], types[i]) for i, name in enumerate(names)}
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def sound(path: Path) -> Path:
    return pickapic(path, [(pair.prompt + str(i), pair.chosen.read(), pair.rejected.read(), 1.0) for i, pair in enumerate(PAIRS)])


def made(folder: Path, brought: Path, side: Any) -> list[dict[str, Any]]:
    rows = plan_brought(brought, side, seed=0)
    with open_run(folder, resume=True) as run:
        run_stages(run, rows, [BroughtStage(brought=brought)], shard_rows=4, console=Console(file=io.StringIO()))
    return read_run(folder, ["prompt", "source", "other", "source_side"]).to_pylist()


@pytest.mark.parametrize("side", ["rejected", "chosen"])
def test_one_side_is_edited_and_the_other_is_beside_it(tmp_path: Path, side: str) -> None:
    rows = made(tmp_path / "run", sound(tmp_path / "set.parquet"), side)
    other = {"rejected": "chosen", "chosen": "rejected"}[side]
    assert [row["source"]["bytes"] for row in rows] == [getattr(pair, side).read() for pair in PAIRS], "as they came, not encoded again"
    assert [row["other"]["bytes"] for row in rows] == [getattr(pair, other).read() for pair in PAIRS]
    assert {row["source_side"] for row in rows} == {side} and {row["status"] for row in rows} == {None}


def test_both_sides(tmp_path: Path) -> None:
    rows = made(tmp_path / "run", sound(tmp_path / "set.parquet"), "both")
    assert [(row["source"]["bytes"], row["other"]["bytes"]) for row in rows] == [
        sides
        for chosen, rejected in ((p.chosen.read(), p.rejected.read()) for p in PAIRS)
        for sides in ((rejected, chosen), (chosen, rejected))
    ]
    assert len({row["id"] for row in rows}) == 10


def test_rows_that_are_no_pairs_stay_with_their_reason(tmp_path: Path) -> None:
    rows = [("a", A, B, 1.0), ("a", A, B, 1.0), ("b", A, B, 0.5), ("c", A, B, None), ("d", A[:50], B, 1.0), ("", A, B, 1.0),
            ("", A, B, 1.0), ("e", A, B, 1.0), ("e", A, B, 0.0), ("f", A, A, 1.0), ("g", None, B, 1.0), ("h", A, B, 0.0)]  # fmt: skip
    found = made(tmp_path / "run", pickapic(tmp_path / "set.parquet", rows), "rejected")
    assert [row["status"] for row in found] == [
        None, "drop:repeated", "drop:tie", "error:source:no label", "error:source:unreadable image", "error:source:no prompt",
        "error:source:no prompt", "drop:contradicted", "drop:contradicted", "drop:both images are the same", "error:source:no image", None,
    ]  # fmt: skip
    assert all((row["source"] is None) == (row["status"] is not None) for row in found)
    assert funnel(tmp_path / "run")[0]["rows_in"] == len(rows) and funnel(tmp_path / "run")[0]["kept"] == 2


def test_a_moved_set_is_the_same_and_a_changed_one_is_not(tmp_path: Path) -> None:
    path = sound(tmp_path / "set.parquet")
    made(tmp_path / "run", path, "rejected")
    moved = path.rename(tmp_path / "moved.parquet")
    shard = next((tmp_path / "run").glob("1_source-*/00001.parquet"))
    before = shard.read_bytes()
    shard.unlink()
    made(tmp_path / "run", moved, "rejected")
    assert shard.read_bytes() == before
    rows = plan_brought(moved, "rejected", seed=0)
    pickapic(moved, [("x", A, B, 1.0)] * 5)
    shard.unlink()
    with open_run(tmp_path / "run", resume=True) as run, pytest.raises(RpoError, match="is not the preference set that this run was begun"):
        run_stages(run, rows, [BroughtStage(brought=moved)], shard_rows=4, console=Console(file=io.StringIO()))


def test_prompts_that_the_models_do_not_understand_fall(tmp_path: Path) -> None:
    def check(prompt: str) -> None:
        if prompt.endswith("2"):
            raise ValueError("no word for that")

    rows = plan_brought(sound(tmp_path / "set.parquet"), "rejected", seed=0, check=check)
    assert rows.column("flaw").to_pylist() == [None, None, "prompt refused: no word for that", None, None]

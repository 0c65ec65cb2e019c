"""Pairs of others as sources: the side to edit, the other beside it, and every row that is no pair with its reason."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rpo.core.run_folder import open_run
from rpo.curation.external_pairs import BroughtStage, plan_brought
from rpo.engine.funnel import funnel
from rpo.engine.inspect import stage_rows
from rpo.engine.layers import lay_out, read_run, refuse_changed
from rpo.engine.local import run_stages
from rpo.engine.stage import StageSpec
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
        None, "drop:repeated", "drop:tie", "error:source:no label", "error:source:unreadable image: damaged or cut off",
        "error:source:no prompt",
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


def test_single_captioned_images_are_sources_without_another_side(tmp_path: Path) -> None:
    home = tmp_path / "stamps"
    home.mkdir()
    for number, pair in enumerate(PAIRS):
        (home / f"{number}.png").write_bytes(pair.chosen.read())
        (home / f"{number}.txt").write_text(f"caption {number}\nand in another language\n" if number else "caption 0")
    (home / "5.gif").write_bytes(b"GIF89a" + A)
    (home / "5.txt").write_text("moving")
    (home / "6.png").write_bytes(A)
    with pytest.warns(UserWarning, match="first line of a caption with several: 4 rows"):
        rows = made(tmp_path / "run", home, "rejected")
    assert [row["prompt"] for row in rows] == [*(f"caption {number}" for number in range(5)), "moving", ""]
    assert [row["source"] and row["source"]["bytes"] for row in rows][:5] == [pair.chosen.read() for pair in PAIRS]
    assert {row["other"] is None for row in rows} == {True} and {row["source_side"] for row in rows[:6]} == {"alone"}
    assert [row["status"] for row in rows] == [None] * 5 + ["error:source:unreadable image: GIF is not read", "error:source:no prompt"]
    with pytest.warns(UserWarning, match="first line"):
        flaws = plan_brought(home, "rejected", seed=0, pairs_only=True).column("flaw").to_pylist()
    assert flaws[:2] == ["one image and no pair"] * 2


@pytest.mark.parametrize("layout", ["captions.jsonl", "metadata.jsonl", "metadata.csv", "rows.jsonl", "set.parquet"])
def test_captioned_images_in_every_layout(tmp_path: Path, layout: str) -> None:
    home = tmp_path / "set"
    home.mkdir()
    names = [f"{number}.png" for number in range(5)]
    if layout != "set.parquet":
        for name, pair in zip(names, PAIRS, strict=True):
            (home / name).write_bytes(pair.chosen.read())
    if layout == "metadata.csv":
        (home / layout).write_text("file_name,text\n" + "".join(f'{name},"a cat, {name}"\n' for name in names))
    elif layout == "set.parquet":
        cells = pa.array(
            [{"bytes": p.chosen.read(), "path": None} for p in PAIRS], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        )
        pq.write_table(pa.table({"image": cells, "text": [f"a cat, {name}" for name in names]}), home / layout)
    else:
        key = "image" if layout == "rows.jsonl" else "file_name"
        (home / layout).write_text("".join(json.dumps({key: name, "text": f"a cat, {name}"}) + "\n" for name in names))
    extra = layout in ("captions.jsonl", "metadata.jsonl", "metadata.csv")
    if extra:
        (home / "unnamed.png").write_bytes(A)
    rows = made(tmp_path / "run", home / layout if layout in ("rows.jsonl", "set.parquet") else home, "rejected")
    assert [row["prompt"] for row in rows][:5] == [f"a cat, {name}" for name in names]
    assert [row["source"]["bytes"] for row in rows[:5]] == [pair.chosen.read() for pair in PAIRS]
    assert [row["status"] for row in rows] == [None] * 5 + ["error:source:image that no row names"] * extra


def test_rows_of_validation_and_test_files_are_no_sources(tmp_path: Path) -> None:
    home = tmp_path / "set"
    home.mkdir()
    for number, part in enumerate(("train", "validation", "test")):
        pickapic(home / f"{part}-00000-of-00001.parquet", [(part, PAIRS[number].chosen.read(), PAIRS[number].rejected.read(), 1.0)])
    assert {row["prompt"]: row["status"] for row in made(tmp_path / "run", home, "rejected")} == {
        "train": None, "validation": "drop:row of a validation split", "": "drop:row of a test split",
    }  # fmt: skip


def test_prompts_that_the_models_do_not_understand_fall(tmp_path: Path) -> None:
    def check(prompt: str) -> None:
        if prompt.endswith("2"):
            raise ValueError("no word for that")

    rows = plan_brought(sound(tmp_path / "set.parquet"), "rejected", seed=0, check=check)
    assert rows.column("flaw").to_pylist() == [None, None, "prompt refused: no word for that", None, None]


def test_a_folder_of_images_says_what_makes_no_row_and_names_the_rest(tmp_path: Path) -> None:
    home = tmp_path / "photos"
    (home / "more").mkdir(parents=True)
    for name in ("a", "b", "lonely"):
        (home / f"{name}.txt").write_text(f"caption {name}")
    (home / "a.png").write_bytes(A)
    (home / "b.png").write_bytes(b"")
    (home / "c.png").symlink_to(home / "a.png")
    os.mkfifo(home / "d.png")
    with pytest.warns(UserWarning, match="photos: ") as told:
        rows = plan_brought(home, "rejected", seed=0)
    assert [str(warning.message).split(": ", 1)[1] for warning in told] == [
        "captions without an image: 1, such as 'lonely'", "folders inside, which are not looked into: 1, such as 'more'",
    ]  # fmt: skip
    assert rows.column("set_name").to_pylist() == [f"photos, {name}" for name in "abcd"]
    assert rows.column("flaw").to_pylist()[1] == "image file is empty"
    (home / "c.txt").write_text("caption c")
    (home / "d.txt").write_text("caption d")
    with pytest.warns(UserWarning, match="photos: "):
        flaws = plan_brought(home, "rejected", seed=0).column("flaw").to_pylist()
    assert flaws[2:] == ["image is a link, which is not followed", "image is a pipe or a device, which is not opened"]
    with pytest.warns(UserWarning, match="photos: "), open_run(tmp_path / "run") as run:
        run_stages(run, plan_brought(home, "rejected", seed=0), [BroughtStage(brought=home)], console=Console(file=io.StringIO()))
    assert [row["set_name"] for row in stage_rows(tmp_path / "run", "source", "errors")] == [f"photos, {name}" for name in "bcd"]


class _Before(BroughtStage):
    """The stage of a version that kept no names of rows."""

    @property
    def spec(self) -> StageSpec:
        return replace(super().spec, inputs=tuple(name for name in super().spec.inputs if name != "set_name"), version="1-brought")


def test_a_run_of_the_version_before_is_shown_and_resumed_only_by_that(tmp_path: Path) -> None:
    home, folder = sound(tmp_path / "set.parquet"), tmp_path / "run"
    rows = plan_brought(home, "rejected", seed=0)
    with open_run(folder) as run:
        run_stages(run, rows.drop_columns(["set_name"]), [_Before(brought=home)], console=Console(file=io.StringIO()))
    told = r"another recipe or version of rpo: .* 'plan' differs \(columns.set_name was 'absent' and is 'string'\)"
    with pytest.raises(RpoError, match=told):
        refuse_changed(folder, lay_out(folder, rows, [BroughtStage(brought=home)]))
    shown = list(stage_rows(folder, "source"))
    assert len(shown) == 5 and all(row["source"] and "set_name" not in row for row in shown)

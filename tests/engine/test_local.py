"""What a run does with rows, wrong stages, changed recipes and damaged files."""

import errno
import io
import itertools
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from toy_pipeline import NAMES, SHARD_ROWS, read_calls, toy_rows, toy_stages

from rpo.api.curation import unanswered_rows
from rpo.core.run_folder import open_run
from rpo.engine.funnel import REASONS_MAX, _summed_up, funnel, funnel_lines, stage_seconds
from rpo.engine.layers import lay_out, read_run, read_shards, refuse_changed
from rpo.engine.local import run_stages
from rpo.engine.run import Engine
from rpo.engine.stage import Batch, Stage, StageCall, StageSpec, error_status, fan_out, plan
from rpo.errors import RowError, RpoError

ROWS = 22  # six shards, the last one short


def quiet() -> Console:
    return Console(file=io.StringIO())


def run_toy(folder: Path, calls: Path, rows: pa.Table | None = None, **changes: Any) -> None:
    with open_run(folder, resume=True) as run:
        run_stages(run, toy_rows(ROWS) if rows is None else rows, toy_stages(calls, **changes), shard_rows=SHARD_ROWS, console=quiet())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def shard(folder: Path, stage: str, index: int) -> Path:
    return next(folder.glob(f"*_{stage}-*")) / f"{index:05d}.parquet"


def shards_called(calls: Path) -> Counter[tuple[str, int]]:
    order = {row: number // SHARD_ROWS for number, row in enumerate(toy_rows(ROWS).column("id").to_pylist())}
    return Counter({(call["stage"], order[call["ids"][0]]): 1 for call in read_calls(calls)})  # type: ignore[index]


@dataclass(frozen=True, kw_only=True)
class Stub:
    """A stage whose callable is given."""

    call: StageCall
    outputs: tuple[str, ...] = ("made",)
    inputs: tuple[str, ...] = ("id",)
    name: str = "stub"
    batch_size: int = 2

    @property
    def spec(self) -> StageSpec:
        outputs = {name: pa.int32() for name in self.outputs}
        return StageSpec(name=self.name, version="1", inputs=self.inputs, outputs=outputs, batch_size=self.batch_size)

    def build(self) -> StageCall:
        return self.call


def run_stub(folder: Path, monkeypatch: pytest.MonkeyPatch, *stages: Stage) -> None:
    """Functions have no canonical form, so the stubs' configurations are left out of their fingerprints."""
    monkeypatch.setattr("rpo.engine.layers.canonical", lambda stage, models: None)
    with open_run(folder, resume=True) as run:
        run_stages(run, toy_rows(ROWS), stages, shard_rows=SHARD_ROWS, console=quiet())


def test_results_do_not_depend_on_workers_or_on_what_was_done_before(tmp_path: Path) -> None:
    run_toy(tmp_path / "one", tmp_path / "calls")
    run_toy(tmp_path / "three", tmp_path / "calls3", workers=3)
    run_toy(tmp_path / "half", tmp_path / "calls_half")
    for index in (1, 3, 4):
        shard(tmp_path / "half", "edit", index).unlink()
    run_toy(tmp_path / "half", tmp_path / "calls_half")
    assert len(contents(tmp_path / "one")) == 5 * 6
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "half")


@pytest.mark.parametrize("cycle", [False, True])
def test_stage_by_stage_holds_one_callable_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cycle: bool) -> None:
    alive: list[str] = []
    together: list[list[str]] = []

    class Model:
        """Weights that are there as long as somebody holds them."""

        def __init__(self, name: str) -> None:
            self.name = name
            self.itself = self if cycle else None
            alive.append(name)

        def __del__(self) -> None:
            alive.remove(self.name)

        def __call__(self, batch: Batch) -> Batch:
            together.append(list(alive))
            return {self.name: [1] * len(batch["id"])}

    class Loaded(Stub):
        def build(self) -> StageCall:
            return Model(self.name)

    monkeypatch.setattr("rpo.engine.layers.canonical", lambda stage, models: None)
    stages = [Loaded(name=name, outputs=(name,), call=dict) for name in ("one", "two", "three")]
    with open_run(tmp_path / "run") as run:
        run_stages(run, toy_rows(ROWS), stages, shard_rows=SHARD_ROWS, console=quiet(), stage_by_stage=True)
    assert together == [["one"]] * 11 + [["two"]] * 11 + [["three"]] * 11
    run_stub(tmp_path / "overlapping", monkeypatch, *stages)
    assert contents(tmp_path / "overlapping") == contents(tmp_path / "run")


def test_shares_change_no_results(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    whole = contents(tmp_path / "run")
    shard(tmp_path / "run", "edit", 2).unlink()
    with pytest.raises(ValueError, match="no stage 'edits' to give a share; the stages are source, critique, edit, score"):
        Engine(workers=("edits=2",)).check(toy_stages(tmp_path / "calls"))
    with pytest.raises(ValueError, match="workers must be at least 1"), open_run(tmp_path / "run", resume=True) as run:
        run_stages(run, toy_rows(ROWS), toy_stages(tmp_path / "calls"), shares={"edit": {"workers": 0}}, console=quiet())
    engine = Engine(workers=("edit=2", "score=3"), cpus=("edit=0.5",), gpus=("edit=0.25",))
    assert engine.shares() == {"edit": {"workers": 2, "cpus": 0.5, "gpus": 0.25}, "score": {"workers": 3}}
    with open_run(tmp_path / "run", resume=True) as run:
        run_stages(run, toy_rows(ROWS), toy_stages(tmp_path / "calls"), shard_rows=SHARD_ROWS, console=quiet(), shares=engine.shares())
    assert contents(tmp_path / "run") == whole
    with pytest.raises(ValueError, match="--gpus takes STAGE=NUMBER, such as edit=2, got 'edit'"):
        Engine(gpus=("edit",))
    with pytest.raises(ValueError, match="stage_by_stage is for the local engine"):
        Engine(kind="ray", stage_by_stage=True)


def test_batches_are_cut_by_row_index_and_dropped_rows_are_left_out(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    run_toy(tmp_path / "run", calls)
    ids = toy_rows(ROWS).column("id").to_pylist()
    table = read_run(tmp_path / "run", ["source_text", "score_text", "status"])
    position = {name: number for number, name in enumerate(NAMES)}
    fell = {row: status for row, status in zip(ids, table.column("status").to_pylist(), strict=True) if status}
    for number, name in enumerate(NAMES):
        live = [row for row in ids if row not in fell or position[fell[row].removeprefix("drop:").removesuffix("_odd")] >= number]
        batches = [[row for row in ids[start : start + 2] if row in live] for start in range(0, ROWS, 2)]
        assert [call["ids"] for call in read_calls(calls) if call["stage"] == name] == [batch for batch in batches if batch]
    assert fell and table.column("id").to_pylist() == ids
    lost = [row for row in table.to_pylist() if row["status"] == "drop:source_odd"]
    assert all(row["score_text"] is None and row["source_text"] is not None for row in lost)


def test_a_finished_run_calls_and_builds_nothing(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    before = contents(tmp_path / "run")
    done = read_calls(tmp_path / "calls")
    run_toy(tmp_path / "run", tmp_path / "calls")
    assert read_calls(tmp_path / "calls") == done and contents(tmp_path / "run") == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rpo-")]


def test_funnel_counts_every_row_once(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    stages = funnel(tmp_path / "run")
    assert [stage["stage"] for stage in stages] == list(NAMES)
    assert stages[0]["rows_in"] == ROWS
    for stage, following in itertools.pairwise(stages):
        assert stage["kept"] == following["rows_in"]
    assert all(stage["rows_in"] - stage["kept"] == sum(stage["dropped"].values()) for stage in stages)
    live = read_run(tmp_path / "run", []).column("status").null_count
    assert stages[-1]["kept"] == live < ROWS
    seconds = stage_seconds(tmp_path / "run")
    assert seconds.keys() == set(NAMES)
    lines = funnel_lines(stages, seconds)
    assert len(lines) == 4 and "source_odd" in lines[0] and " s" in lines[0]
    run_toy(tmp_path / "run", tmp_path / "calls")
    assert stage_seconds(tmp_path / "run") == seconds, "seconds survive a resume"
    log = next((tmp_path / "run").glob("2_*")) / "seconds.jsonl"
    log.write_text(log.read_text() + '{"shard": 3, "seco')
    assert stage_seconds(tmp_path / "run") == seconds, "a line cut short by a kill does not count"


def test_a_deleted_shard_and_what_depends_on_it_is_redone_and_nothing_else(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    before = contents(tmp_path / "run")
    shard(tmp_path / "run", "critique", 2).unlink()
    run_toy(tmp_path / "run", tmp_path / "again")
    assert set(shards_called(tmp_path / "again")) == {("critique", 2), ("edit", 2), ("score", 2)}
    assert contents(tmp_path / "run") == before


def test_a_shard_that_comes_out_different_is_not_mixed_with_what_was_made_from_the_old_one(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    path = shard(tmp_path / "run", "source", 1)
    table = pq.read_table(path)
    changed = table.set_column(1, "source_text", pa.array(["other"] * table.num_rows))
    from rpo.engine.layers import stored_layers, write_layer_shard

    upstream = pq.read_metadata(path).metadata[b"rpo.upstream"].decode()
    write_layer_shard(stored_layers(tmp_path / "run")[1], 1, changed.replace_schema_metadata(None), upstream)
    with pytest.raises(RpoError, match="out of date"):
        read_run(tmp_path / "run", ["score_text"])
    run_toy(tmp_path / "run", tmp_path / "again")
    assert set(shards_called(tmp_path / "again")) == {("critique", 1), ("edit", 1), ("score", 1)}


def test_a_lost_plan_shard_is_written_again_from_the_prompts(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    before = contents(tmp_path / "run")
    shard(tmp_path / "run", "plan", 0).unlink()
    run_toy(tmp_path / "run", tmp_path / "again")
    assert contents(tmp_path / "run") == before and not read_calls(tmp_path / "again")


@pytest.mark.parametrize("cut", ["half", "empty", "middle", "tail"])
def test_a_damaged_shard_is_named_with_the_way_out(tmp_path: Path, cut: str) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    before = contents(tmp_path / "run")
    path = shard(tmp_path / "run", "edit", 3)
    data = bytearray(path.read_bytes())
    if cut == "middle":
        data[data.rindex(b"\x28\xb5\x2f\xfd") + 8] ^= 4  # in the last compressed page
    kept = {"half": len(data) // 2, "empty": 0, "tail": len(data) - 1}.get(cut, len(data))
    path.write_bytes(data[:kept])
    shard(tmp_path / "run", "score", 3).unlink()
    with pytest.raises(RpoError, match=r"3_edit-.*00003\.parquet is damaged .*Delete it and run again with --resume"):
        run_toy(tmp_path / "run", tmp_path / "early")
        read_run(tmp_path / "run", ["edit_text", "edit_image"])
    path.unlink()
    run_toy(tmp_path / "run", tmp_path / "again")
    assert set(shards_called(tmp_path / "again")) == {("edit", 3), ("score", 3)}
    assert contents(tmp_path / "run") == before


def test_shards_exchanged_between_folders_are_noticed(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    shutil.copy(shard(tmp_path / "run", "edit", 1), shard(tmp_path / "run", "critique", 1))
    with pytest.raises(RpoError, match="does not belong to this stage"):
        run_toy(tmp_path / "run", tmp_path / "calls")


def test_a_changed_setting_is_refused_with_its_name_and_the_ways_out(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    stages = toy_stages(tmp_path / "calls")
    stages[2] = replace(stages[2], salt="pepper")  # type: ignore[type-var]
    with open_run(tmp_path / "run", resume=True) as run, pytest.raises(RpoError) as refused:
        run_stages(run, toy_rows(ROWS), stages, shard_rows=SHARD_ROWS, console=quiet())
    for part in ("stage 'edit'", "salt was '' and is 'pepper'", "Go on with the old one", "new folder", "--overwrite"):
        assert part in str(refused.value)
    with open_run(tmp_path / "run", overwrite=True) as run:
        run_stages(run, toy_rows(ROWS), stages, shard_rows=SHARD_ROWS, console=quiet())
    assert len(list((tmp_path / "run").glob("3_edit-*"))) == 1


@pytest.mark.parametrize("change", ["rows", "shard_rows", "fewer stages", "other seed"])
def test_other_changes_are_refused_too(tmp_path: Path, change: str) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    rows, size, stages = toy_rows(ROWS), SHARD_ROWS, toy_stages(tmp_path / "calls")
    if change == "rows":
        rows = toy_rows(ROWS + 2)
    if change == "other seed":
        rows = plan(fan_out([f"prompt {n}" for n in range(ROWS // 2)], 2), seed=8, columns={"sample": pa.int32()})
    size = 8 if change == "shard_rows" else size
    stages = stages[:3] if change == "fewer stages" else stages
    named = "score" if change == "fewer stages" else "plan"
    with pytest.raises(RpoError, match=f"stage '{named}'"):
        refuse_changed(tmp_path / "run", lay_out(tmp_path / "run", rows, stages, shard_rows=size))


def test_a_stage_without_results_may_still_change(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    for path in (tmp_path / "run").glob("4_score-*/*.parquet"):
        path.unlink()
    stages = toy_stages(tmp_path / "calls")
    stages[3] = replace(stages[3], salt="pepper")  # type: ignore[type-var]
    with open_run(tmp_path / "run", resume=True) as run:
        run_stages(run, toy_rows(ROWS), stages, shard_rows=SHARD_ROWS, console=quiet())
    assert len(list((tmp_path / "run").glob("4_score-*"))) == 1
    assert read_run(tmp_path / "run", ["score_text"]).num_rows == ROWS


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda ids: {"made": [1]}, "must return 2 rows, returned 1 of 'made'"),
        (lambda ids: {"made": [1, 2], "more": [1, 2]}, "must return ['made'], returned ['made', 'more']"),
        (lambda ids: {}, "must return ['made'], returned []"),
        (lambda ids: {"made": ["a", "b"]}, "declares 'made' as int32"),
        (lambda ids: {"made": [1, 2**40]}, "declares 'made' as int32"),
        (lambda ids: {"made": [1, 2], "status": ["bad", None]}, "a status is None, 'drop:REASON'"),
    ],
)
def test_a_stage_that_breaks_its_word_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[str]], Batch], told: str
) -> None:
    with pytest.raises(RpoError) as caught:
        run_stub(tmp_path / "run", monkeypatch, Stub(call=lambda batch: answer(list(batch["id"]))))  # type: ignore[arg-type]
    assert told in str(caught.value) and "stage 'stub', shard 00000" in str(caught.value)
    assert isinstance(caught.value.__cause__, AssertionError)


def test_the_first_error_stops_the_run_and_a_second_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = toy_rows(ROWS).column("id").to_pylist()
    called: list[object] = []
    broken = True

    def call(batch: Batch) -> Batch:
        if broken and rows[9] in batch["id"]:
            raise OSError(errno.EIO, "the wire is cut")
        called.extend(batch["id"])
        return {"made": [1] * len(batch["id"])}

    with pytest.raises(RpoError, match=r"stage 'stub', shard 00002, rows 8 to 9: OSError: .*wire is cut.*--resume") as caught:
        run_stub(tmp_path / "run", monkeypatch, Stub(call=call))
    assert isinstance(caught.value.__cause__, OSError)
    broken = False
    run_stub(tmp_path / "run", monkeypatch, Stub(call=call))
    assert called == rows, "nothing is lost, nothing is paid twice"


def test_an_error_while_building_names_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unbuildable(Stub):
        def build(self) -> StageCall:
            raise RpoError("weights are corrupt; fetch them again")

    with pytest.raises(RpoError, match="stage 'stub', while it was built: weights are corrupt"):
        run_stub(tmp_path / "run", monkeypatch, Unbuildable(call=dict))


def test_stages_overlap_but_only_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpo.engine.local.QUEUE_SHARDS", 2)
    first, second = [0], [0]
    release, ahead = threading.Event(), []

    def fast(batch: Batch) -> Batch:
        first[0] += 1
        return {"made": [1] * len(batch["id"])}

    def slow(batch: Batch) -> Batch:
        if not second[0]:
            release.wait(0.5)  # all the time the fast stage needs to run away
        ahead.append(first[0] - second[0])
        second[0] += 1
        return {"more": [1] * len(batch["id"])}

    stages = (Stub(call=fast, batch_size=SHARD_ROWS), Stub(call=slow, name="slow", outputs=("more",), batch_size=SHARD_ROWS))
    run_stub(tmp_path / "run", monkeypatch, *stages)
    assert ahead[0] == 3, "the shard in the slow stage's hands and two that wait"
    assert first == second == [6]


def test_half_written_files_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    leftover = shard(tmp_path / "run", "edit", 0).with_suffix(".parquet.tmp")
    leftover.write_bytes(b"PAR1")
    (tmp_path / "run" / "pairs.parquet.tmp").write_bytes(b"PAR1")
    run_toy(tmp_path / "run", tmp_path / "calls")
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_an_unfinished_run_is_not_read_as_a_whole_one(tmp_path: Path) -> None:
    run_toy(tmp_path / "run", tmp_path / "calls")
    shard(tmp_path / "run", "score", 5).unlink()
    with pytest.raises(RpoError, match=r"score-.*00005\.parquet is missing"):
        read_run(tmp_path / "run", ["prompt"])
    assert funnel(tmp_path / "run")[-1]["rows_in"] < funnel(tmp_path / "run")[-2]["kept"]
    with pytest.raises(ValueError, match="columns \\['scroe'\\] are made by no stage"):
        list(read_shards(tmp_path / "run", ["scroe"]))
    with pytest.raises(RpoError, match="holds no rows"):
        read_run(tmp_path / "nothing", ["prompt"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([{"inputs": ("nothing",)}], "inputs ['nothing'] are made by no stage before it"),
        ([{}, {}], "two stages are named 'stub'"),
        ([{}, {"name": "other"}], "outputs ['made'] exist already"),
    ],
)
def test_stages_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[dict[str, Any]], told: str
) -> None:
    with pytest.raises(ValueError) as caught:
        run_stub(tmp_path / "run", monkeypatch, *(Stub(call=dict, **change) for change in changes))
    assert told in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong", [{"name": "Big"}, {"name": "plan"}, {"batch_size": 0}, {"workers": 0}, {"outputs": {"status": pa.int8()}}]
)
def test_wrong_specs_are_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"name": "a", "version": "1", "inputs": ("id",), "outputs": {"x": pa.int32()}, "batch_size": 1}
    StageSpec(**right)
    with pytest.raises(ValueError):
        StageSpec(**right | wrong)


def test_row_errors_become_one_short_line() -> None:
    assert error_status("critique", RowError("not\n json")) == "error:critique:not json"
    assert len(error_status("critique", RowError("x" * 1000))) == 200
    assert error_status("critique", RowError()) == "error:critique:unknown"


def test_lines_for_a_log_file_and_nothing_torn_in_stage_json(tmp_path: Path) -> None:
    console = quiet()
    with open_run(tmp_path / "run") as run:
        run_stages(run, toy_rows(ROWS), toy_stages(tmp_path / "calls"), shard_rows=SHARD_ROWS, console=console)
    printed = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[0] for line in printed] == list(NAMES) and all(f"{ROWS} rows" in line for line in printed)
    for path in (tmp_path / "run").glob("*/stage.json"):
        assert json.loads(path.read_text())["fingerprint"].startswith(path.parent.name[-8:])


def test_a_thousand_different_reasons_are_one_short_line_and_a_bounded_funnel() -> None:
    rare = {f"error:critique:unanswered: HTTP 400: {'words ' * 50}{number}": 1 for number in range(1000)}
    lines = funnel_lines([{"stage": "critique", "rows_in": 1010, "kept": 3, "dropped": {"no_issue": 7, **rare}}])
    assert len(lines) == 1 and len(lines[0]) < 1200
    assert "dropped 1007: no_issue 7, error:critique:unanswered: HTTP 400" in lines[0] and lines[0].endswith(
        "and 995 other reasons for 995"
    )
    told = _summed_up("critique", Counter({"no_issue": 7, "error:critique:odd 1": 2, **rare, "blurred": 1}))
    assert len(told) <= REASONS_MAX + 3 and sum(told.values()) == 1010 and told["no_issue"] == 7
    rows = unanswered_rows({"stage": "critique", "rows_in": 1010, "kept": 0, "dropped": told})
    assert rows == 1000, "rows that are asked again keep their kind"

"""The Ray engine makes the files of the local engine, whatever dies on the way. One runtime for all tests: a start costs seconds."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from toy_pipeline import NAMES, SHARD_ROWS, read_calls, toy_rows, toy_stages

import rpo
from rpo.accounting.ledger import spent
from rpo.core.run_folder import open_run
from rpo.engine import local as local_engine
from rpo.engine import ray as ray_engine
from rpo.engine.stage import StageSpec
from rpo.errors import RpoError
from rpo.recipes import load
from rpo.testing.server import FakeServer

# Ray warns of settings that it makes itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
ROWS = 22
CALLS = "TOY_CALLS"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray of this module's own, and the file that the stages log their calls in."""
    calls = tmp_path_factory.mktemp("ray") / "calls"
    os.environ[CALLS] = str(calls)
    ray = ray_engine._ray()
    with ray_engine._session(ray, {"CPU": 6.0, "GPU": 0.0}):
        yield calls


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def run(engine: Any, folder: Path, calls: Path, *, rows: int = ROWS, shares: Any = None, **changes: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    stages = toy_stages(calls, **changes)
    with open_run(folder, resume=True) as opened:
        engine.run_stages(opened, toy_rows(rows), stages, shard_rows=SHARD_ROWS, console=console, shares=shares)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_same_bytes_as_the_local_engine(runtime: Path, tmp_path: Path) -> None:
    run(local_engine, tmp_path / "local", tmp_path / "calls")
    told = run(ray_engine, tmp_path / "ray", runtime, shares={"edit": {"workers": 2, "cpus": 0.5}})
    assert contents(tmp_path / "ray") == contents(tmp_path / "local") and "6 of 6 shards done" in told
    made = {(call["stage"], tuple(call["ids"])) for call in read_calls(tmp_path / "calls")}  # type: ignore[arg-type]
    on_ray = [(call["stage"], tuple(call["ids"])) for call in read_calls(runtime)]  # type: ignore[arg-type]
    assert set(on_ray) == made and len(on_ray) == len(made), "each batch once"
    processes = {call["stage"]: call["process"] for call in read_calls(runtime)}
    assert len(set(processes.values()) | {os.getpid()}) == len(NAMES) + 1, "every stage in a process of its own"


@pytest.mark.slow
def test_what_one_engine_began_the_other_goes_on_with(runtime: Path, tmp_path: Path) -> None:
    run(local_engine, tmp_path / "whole", runtime)
    run(local_engine, tmp_path / "cut", runtime)
    for index in (1, 4):
        next((tmp_path / "cut").glob("3_edit-*")).joinpath(f"{index:05d}.parquet").unlink()
    before = len(read_calls(runtime))
    run(ray_engine, tmp_path / "cut", runtime)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert {call["stage"] for call in read_calls(runtime)[before:]} == {"edit", "score"}, "what lies before is not made again"
    before = len(read_calls(runtime))
    assert run(ray_engine, tmp_path / "cut", runtime) == "" and len(read_calls(runtime)) == before


def test_what_a_recipe_file_defines_reaches_the_workers(runtime: Path, tmp_path: Path) -> None:
    """No worker can import the file."""
    source = """
from dataclasses import dataclass
from toy_pipeline import Toy

@dataclass(frozen=True, kw_only=True)
class Mine(Toy):
    pass

def stage():
    return Mine(name="source", reads="prompt")
"""
    (tmp_path / "mine.py").write_text(source)
    stage = load(f"{tmp_path / 'mine.py'}:stage")
    for engine in (local_engine, ray_engine):
        with open_run(tmp_path / engine.__name__) as opened:
            engine.run_stages(opened, toy_rows(ROWS), [stage], shard_rows=SHARD_ROWS, console=Console(file=io.StringIO()))
    assert contents(tmp_path / ray_engine.__name__) == contents(tmp_path / local_engine.__name__)


def test_a_killed_actor_loses_nothing(runtime: Path, tmp_path: Path) -> None:
    rows = 60
    run(local_engine, tmp_path / "local", tmp_path / "calls", rows=rows, delay_s=0.02)
    before, killed = len(read_calls(runtime)), []

    def kill() -> None:
        while len(killed) < 3:
            for call in read_calls(runtime)[before:]:
                if call["stage"] == NAMES[len(killed)] and call["process"] not in killed:
                    os.kill(int(call["process"]), signal.SIGKILL)  # type: ignore[call-overload]
                    killed.append(call["process"])
                    break
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run(ray_engine, tmp_path / "ray", runtime, rows=rows, delay_s=0.02)
    killer.join(5)
    assert len(killed) == 3
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.slow
def test_an_error_in_an_actor_is_told_as_on_one_machine(runtime: Path, tmp_path: Path) -> None:
    run(local_engine, tmp_path / "run", runtime)
    shard = next((tmp_path / "run").glob("2_critique-*")) / "00003.parquet"
    next((tmp_path / "run").glob("3_edit-*")).joinpath("00003.parquet").unlink()
    data = bytearray(shard.read_bytes())
    data[60] ^= 4
    shard.write_bytes(data)
    with pytest.raises(RpoError, match=r"stage 'edit', shard 00003: .*critique-.*00003.parquet is damaged.*Delete it"):
        run(ray_engine, tmp_path / "run", runtime)


def test_a_cluster_that_is_too_small_is_refused_before_the_start(runtime: Path, tmp_path: Path) -> None:
    with pytest.raises(RpoError, match=r"ask for 11 CPUs at once and the Ray cluster has 6: Ray would wait for ever"):
        run(ray_engine, tmp_path / "run", runtime, shares={"edit": {"workers": 7}})
    with pytest.raises(RpoError, match=r"ask for 0\.5 GPUs"):
        run(ray_engine, tmp_path / "run", runtime, shares={"edit": {"gpus": 0.5}})


def test_what_the_stages_need() -> None:
    specs = [StageSpec(name=n, version="1", inputs=(), outputs={}, batch_size=1, workers=w, cpus=0.5, gpus=g) for n, w, g in
             (("a", 1, 0.0), ("b", 3, 0.25))]  # fmt: skip
    assert ray_engine.needed(specs) == {"CPU": 3.0, "GPU": 0.75}


@pytest.mark.slow
def test_stages_that_ask_a_model_stay_where_their_accounts_lie(tmp_path: Path) -> None:
    """On two nodes; SQLite's locks, which hold the caps over processes, do not reach beyond one machine."""

    def told(folder: str, workers: int, max_calls: int) -> str:
        paths = os.pathsep.join([str(Path(rpo.__file__).parents[1]), str(Path(__file__).parent)])
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": paths}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}
        command = [
            sys.executable,
            str(Path(__file__).parent / "two_nodes.py"),
            str(tmp_path / folder),
            server.url,
            str(workers),
            str(max_calls),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with FakeServer(lambda asked: "yes") as server:
        said = told("run", workers=3, max_calls=1000)
        assert "near {'here': 3}" in said and "'elsewhere'" in said.partition("far")[2]
        assert server.requests == len(server.questions) == 80
        assert "50 calls are made, and --max-calls is 50" in told("capped", workers=3, max_calls=50)
        (asked,) = spent(tmp_path / "capped" / "ledger.sqlite")
        assert asked.calls == 50 and server.requests <= 80 + 50, "several processes keep to one cap; one may end before it sends"
        assert "this machine, where their accounts lie, has 4: Ray would wait for ever" in told("crowded", workers=4, max_calls=50)


@pytest.mark.slow
def test_strangers_are_not_answered(runtime: Path) -> None:
    """A process without the token cannot join, and nothing is reported home."""
    import ray

    address = ray.get_runtime_context().gcs_address
    program = f"import ray; ray.init(address={address!r}, log_to_driver=False, logging_level='CRITICAL'); print('joined')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"RAY_AUTH_MODE": "token"}
    environment |= {"RAY_AUTH_TOKEN": "0" * 64}
    tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert tried.returncode != 0 and "joined" not in tried.stdout
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0" and os.environ["RAY_AUTH_MODE"] == "token"

"""Fail the first write, sync or rename; then the second; then the third … until nothing fails any more, once and for ever.

(Every step among the slow tests; some of them always.)

Whatever fails: a clean error, no part of a file visible, and a later run that ends as if nothing had been.
"""

import errno
import io
import itertools
import os
import resource
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from rpo.core.parquet import IMAGE
from rpo.core.run_folder import open_run
from rpo.data.export import EXPORTS
from rpo.data.hub import new_folder, write_tables
from rpo.data.pairs import SCHEMA, pair_tables, write_pairs
from rpo.engine.local import run_stages
from rpo.engine.stage import Batch, StageCall, StageSpec, fan_out, plan
from rpo.errors import RpoError
from tiny_diffusion import make_pairs

PLANNED = plan(fan_out([f"prompt {number}" for number in range(6)], 1), seed=0, columns={"sample": pa.int32()})
PAIRS = make_pairs(3)


@dataclass(frozen=True, kw_only=True)
class Paint:
    name: str
    reads: str

    @property
    def spec(self) -> StageSpec:
        return StageSpec(name=self.name, version="1", inputs=("id", self.reads), outputs={f"{self.name}_image": IMAGE}, batch_size=2)

    def build(self) -> StageCall:
        def call(batch: Batch) -> Batch:
            return {f"{self.name}_image": [{"bytes": str(row).encode() * 40, "path": None} for row in batch["id"]]}

        return call


def curate(folder: Path) -> None:
    stages = (Paint(name="first", reads="prompt"), Paint(name="second", reads="first_image"))
    with open_run(folder, resume=True) as run:
        run_stages(run, PLANNED, stages, shard_rows=4, console=Console(file=io.StringIO()))


def select(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_pairs(folder / "pairs.parquet", iter(PAIRS))


def publish(folder: Path) -> None:
    """A new dataset over an old one."""
    if not (folder / "set").exists():
        with new_folder(folder / "set") as new:
            (new / "README.md").write_text("old")
    with new_folder(folder / "set", overwrite=True) as new:
        write_tables(new / "data", "train", SCHEMA, pair_tables(PAIRS))
        EXPORTS["webdataset"](new, "train", PAIRS)


class Faults:
    """Counts every write, sync and rename, and fails the one it is told to, or that and all that follow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.forever = 0, 0, False
        for module in ("rpo.core.parquet", "rpo.data.export", "rpo.data.card"):
            monkeypatch.setattr(f"{module}.create", self._create)
        for name in ("fsync", "replace", "write"):
            monkeypatch.setattr(f"os.{name}", self._counted(getattr(os, name)))

    def step(self) -> None:
        self.count += 1
        if self.at and (self.count == self.at or (self.forever and self.count > self.at)):
            raise OSError(errno.EIO, "Input/output error")

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*arguments: Any, **named: Any) -> Any:
            self.step()
            return real(*arguments, **named)

        return faulty

    def _create(self, path: Path) -> Any:
        faults = self

        class File(io.FileIO):
            def write(self, data: Any, /) -> int:
                faults.step()
                return super().write(data)

        return File(path, "wb")


def contents(folder: Path) -> dict[str, bytes]:
    """What others see: every file but logs of times and the lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", "seconds.jsonl")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize(("work", "stride"), [(curate, 29), (select, 1), (publish, 7), pytest.param(curate, 1, marks=pytest.mark.slow),
                                              pytest.param(publish, 1, marks=pytest.mark.slow)])  # fmt: skip
def test_every_step_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Path], None], stride: int, forever: bool
) -> None:
    work(tmp_path / "whole")
    whole, before = contents(tmp_path / "whole"), None
    if work is publish:
        with new_folder(tmp_path / "before" / "set") as new:
            (new / "README.md").write_text("old")
        before = contents(tmp_path / "before")
    faults = Faults(monkeypatch)
    for number in itertools.count(1, stride):
        folder = tmp_path / f"run{number}"
        if before is not None:
            with new_folder(folder / "set") as new:
                (new / "README.md").write_text("old")
        faults.count, faults.at, faults.forever = 0, number, forever
        try:
            work(folder)
        except (RpoError, OSError) as error:
            assert "Input/output error" in str(error)
        else:
            assert faults.count < number, f"step {number} failed and nobody was told"
            break
        finally:
            faults.at = 0
        left = contents(folder)
        assert not [name for name in left if ".tmp" in name], number
        if before is None:
            assert all(whole[name] == data for name, data in left.items()), number
        else:
            assert left in (before, whole), f"step {number}: the old dataset or the new one, nothing between"
        work(folder)
        assert contents(folder) == whole, number
    assert number > {curate: 100, select: 8, publish: 50}[work]


def test_a_file_size_limit(tmp_path: Path) -> None:
    curate(tmp_path / "whole")
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*.parquet"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, largest // 2, largest - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises((RpoError, OSError), match="File too large"):
                curate(tmp_path / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list((tmp_path / "run").rglob("*.tmp"))
    curate(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        with pytest.raises((RpoError, OSError), match="No space left"):
            curate(disk / "run")
        with suppress(OSError):  # no room for the lock's process number is an error too
            assert not list((disk / "run").rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        curate(disk / "run")
        curate(tmp_path / "whole")
        assert contents(disk / "run") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)

"""A shard is whole or absent, equal for equal rows, and never read wrong."""

import errno
import os
import random
import re
from pathlib import Path

import pyarrow as pa
import pytest

from rpo.core.parquet import IMAGE, atomic_path, read_footer, read_shard, sweep, write_shard, write_text
from rpo.data.images import image_cell
from rpo.errors import RpoError


def sample(seed: int = 0, rows: int = 64) -> pa.Table:
    rng = random.Random(seed)
    return pa.table(
        {
            "id": [f"{rng.getrandbits(64):016x}" for _ in range(rows)],
            "image": pa.array([image_cell(rng.randbytes(60)) for _ in range(rows)], IMAGE),
            "score": pa.array([rng.random() for _ in range(rows)], pa.float64()),
            "count": pa.array([rng.randrange(9) for _ in range(rows)], pa.int32()),
            "ok": [rng.random() < 0.5 for _ in range(rows)],
            "scores": pa.array([[rng.random()] * rng.randrange(3) for _ in range(rows)], pa.list_(pa.float32())),
            "status": pa.array([rng.choice([None, None, "drop:x"]) for _ in range(rows)], pa.string()),
        }
    )


def test_round_trip(tmp_path: Path) -> None:
    table, path = sample(rows=100), tmp_path / "00000.parquet"
    write_shard(path, table, {"rpo.fingerprint": "f" * 64})
    assert read_shard(path).equals(table)
    assert read_shard(path, ["status", "id"]).equals(table.select(["status", "id"]))
    rows, metadata = read_footer(path)
    assert rows == 100 and metadata["rpo.fingerprint"] == "f" * 64
    assert '"image": {"_type": "Image"}' in metadata["huggingface"]


def test_equal_rows_make_equal_bytes(tmp_path: Path) -> None:
    table = sample()
    pieces = pa.concat_tables([sample().slice(0, 10), sample().slice(10)])
    for name, made in (("a", table), ("b", sample()), ("c", pieces)):
        write_shard(tmp_path / name, made, {"rpo.fingerprint": "f"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_no_flipped_bit_is_read_as_data(tmp_path: Path) -> None:
    table, path = sample(), tmp_path / "00000.parquet"
    write_shard(path, table)
    data = path.read_bytes()
    rng = random.Random(1)
    noticed = 0
    assert read_shard(path).equals(table)
    # Footer and page headers are few bytes of many: half of the flips go to the last third, where the footer lies.
    for trial in range(1500):
        bit = rng.randrange(len(data) * 8) if trial % 2 else rng.randrange(len(data) * 16 // 3, len(data) * 8)
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            assert read_shard(path).equals(table), f"bit {bit} changed what is read"
        except RpoError as error:
            assert str(path) in str(error) and "--resume" in str(error)
            noticed += 1
    assert noticed > 1000


def test_no_truncated_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    write_shard(path, sample())
    data = path.read_bytes()
    rng = random.Random(2)
    for length in (0, 1, 8, len(data) - 1, *(rng.randrange(len(data)) for _ in range(50))):
        path.write_bytes(data[:length])
        for read in (read_shard, read_footer):
            with pytest.raises(RpoError, match="is damaged"):
                read(path)
    for start in range(0, len(data), 512):
        path.write_bytes(data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :])
        with pytest.raises(RpoError, match="is damaged"):
            read_shard(path)


def test_a_missing_shard_is_missing_and_not_damaged(tmp_path: Path) -> None:
    for read in (read_shard, read_footer):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "00000.parquet")


@pytest.mark.parametrize("step", ["write", "os.fsync", "os.replace"])
def test_a_fault_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def fault(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if step != "write":
            patch.setattr(step, fault)
        with pytest.raises(RpoError, match=r"summary\.json: No space left on device\. Make room.*--resume"), atomic_path(path) as partial:
            partial.write_text("new")
            if step == "write":
                fault()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["summary.json"]


def test_the_bytes_are_synced_before_the_name_and_the_name_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        order.append(f"sync {re.sub('[0-9a-f]{8}', '*', name)}")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        order.append(f"rename {target.name}")
        replace(source, target)

    monkeypatch.setattr("os.fsync", note_fsync)
    monkeypatch.setattr("os.replace", note_replace)
    write_text(tmp_path / "a", "x")
    assert order == ["sync a.*.tmp", "rename a", f"sync {re.sub('[0-9a-f]{8}', '*', tmp_path.name)}"]


def test_sweep_takes_only_partial_files(tmp_path: Path) -> None:
    mine = ["00000.parquet", "notes.tmp", "notes.txt", "00000001.tmp"]
    for name in ("00000.parquet.tmp", "summary.json.0123abcd.tmp", ".tmpA1b2C3", *mine):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.0123abcd.tmp").mkdir()
    (tmp_path / "link.0123abcd.tmp").symlink_to(tmp_path / "notes.txt")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, "folder.0123abcd.tmp", "link.0123abcd.tmp"])


def test_a_second_writer_of_the_same_shard_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    write_shard(tmp_path / "whole", sample())
    with atomic_path(path) as partial:
        partial.write_bytes(b"half")
        write_shard(path, sample())
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()
        partial.write_bytes((tmp_path / "whole").read_bytes())
    assert path.read_bytes() == (tmp_path / "whole").read_bytes() and len(os.listdir(tmp_path)) == 2

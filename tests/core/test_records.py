"""JSON of a run folder: whole, or named with the way out."""

import json
import os
import random
import stat
from pathlib import Path

import pytest

from rpo.core.atomic import atomic_folder, check_manifest
from rpo.core.parquet import atomic_path
from rpo.core.records import read_lines, read_record, record_line, write_record
from rpo.errors import RpoError

RECORD = {"version": 1, "seconds": {"train": 1.5}, "name": "größe", "none": None}


def test_every_flip_and_cut_of_a_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_record(path, RECORD)
    assert read_record(path, "") == RECORD and read_record(tmp_path / "none.json", "") is None
    whole, rng = path.read_bytes(), random.Random(0)
    for number in range(300):
        data = bytearray(whole)
        if number % 3:
            bit = rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
        else:
            del data[rng.randrange(len(data) - 1) :]
        path.write_bytes(data)
        try:
            assert read_record(path, "Make it again.") == RECORD, "a flip in white space changes nothing"
        except RpoError as error:
            assert str(error).startswith(f"{path} is damaged (") and str(error).endswith("Make it again.")


@pytest.mark.parametrize("text", ["[1]", "7", "null", '"x"', "", "{", "[" * 100_000, '{"a": 1, "sha256": 5}'])
def test_a_file_of_another_kind_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RpoError, match=r"a\.json is damaged \(.*\)\. Do this\."):
        read_record(tmp_path / "a.json", "Do this.")


def test_files_of_earlier_versions_have_no_digest(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORD))
    assert read_record(tmp_path / "a.json", "") == RECORD


def test_lines_that_are_cut_or_changed_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        record_line({"step": 1}) + record_line({"step": 2}).replace("2", "3", 1) + '{"step": 4}\n' + record_line({"step": 5})[:-9]
    )
    assert read_lines(path) == ([{"step": 1}, {"step": 4}], [2, 4])
    assert read_lines(tmp_path / "none") == ([], [])


def test_what_is_written_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "file") as partial:
            partial.touch(0o600)
        with atomic_folder(tmp_path / "folder", manifest=True) as folder:
            (folder / "weights").touch(0o600)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "file", *(tmp_path / "folder").iterdir())} == {0o640}


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "link"])
def test_a_manifest_finds_every_damage(tmp_path: Path, damage: str) -> None:
    with atomic_folder(tmp_path / "weights", manifest=True) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "a.safetensors").write_bytes(b"0123456789")
    assert check_manifest(tmp_path / "weights", "")
    file = tmp_path / "weights" / "unet" / "a.safetensors"
    match damage:
        case "flip":
            file.write_bytes(b"0123456788")
        case "cut":
            file.write_bytes(b"012345678")
        case "missing":
            file.unlink()
        case _:
            file.rename(tmp_path / "b")
            file.symlink_to(tmp_path / "b")
    with pytest.raises(RpoError, match=r"a\.safetensors is (damaged|missing).*Make it again\."):
        check_manifest(tmp_path / "weights", "Make it again.")

"""Who may enter a run folder, and what an existing one asks for."""

import os
from pathlib import Path

import pytest

from rpo.core.records import write_record
from rpo.core.run_folder import open_run, reading_run
from rpo.errors import RpoError


def begun(path: Path) -> Path:
    """A run folder as a run leaves it, with files of the user's among its own."""
    with open_run(path):
        for folder in ("1_source-0123abcd", "train"):
            (path / folder).mkdir()
        write_record(path / "recipe.json", {"recipe": {}, "versions": {}})
        write_record(path / "1_source-0123abcd" / "stage.json", {"name": "source", "fingerprint": "0123abcd55"})
        write_record(path / "train" / "config.json", {"objective": {}, "pairs": ""})
        for name in ("1_source-0123abcd/00000.parquet", "train/cache/latents-01.safetensors", "summary.json", "rounds/plan.txt"):
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text("x")
        for name in MINE:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("mine")
    return path


MINE = (
    "notes.txt",
    "train/photo.jpg",
    "train/weights/own.bin",
    "evaluation/scan.png",
    "published/list.txt",
    "1_source-0123abcd/n.txt",
)


def test_an_existing_run_asks_for_resume_or_overwrite(tmp_path: Path) -> None:
    path = begun(tmp_path / "runs" / "a")
    with pytest.raises(RpoError, match=r"already holds a run.*--resume.*--overwrite"), open_run(path):
        pass
    with open_run(path, resume=True):
        assert (path / "recipe.json").exists()
    with pytest.raises(ValueError, match="exclude each other"), open_run(path, resume=True, overwrite=True):
        pass


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    path = begun(tmp_path / "run")
    (path / "train" / "weights" / "own.bin").rename(path / "own.bin")
    with open_run(path, overwrite=True):
        left = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    assert left == sorted([".lock", "own.bin", "rounds/plan.txt", *(name for name in MINE if "weights" not in name)])


def test_weights_of_the_user_stop_an_overwrite(tmp_path: Path) -> None:
    path = begun(tmp_path / "run")
    with pytest.raises(RpoError, match=r"own\.bin was written by no training.*move it"), open_run(path, overwrite=True):
        pass
    assert (path / "summary.json").exists() and (path / "1_source-0123abcd" / "00000.parquet").exists(), "nothing is removed before"
    assert all((path / name).read_text() == "mine" for name in MINE)


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("lock", [None, "", "4711\n", "other tool\n"])
def test_names_of_ours_prove_nothing(tmp_path: Path, flags: dict[str, bool], lock: str | None) -> None:
    files = ("train/photo1.jpg", "validation/photo2.jpg", "evaluation/scan.png", "published/page.html", "recipe.json", "summary.json")
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"name": "soup"}')
    if lock is not None:
        (tmp_path / ".lock").write_text(lock)
    with pytest.raises(RpoError, match="is not a run folder"), open_run(tmp_path, **flags):
        pass
    assert all((tmp_path / name).read_text() == '{"name": "soup"}' for name in files)
    assert lock is None or (tmp_path / ".lock").read_text() == lock


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "diary").write_text("dear")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "diary")
    with pytest.raises(RpoError, match=r"\.lock is a link, remove it"), open_run(tmp_path / "run"):
        pass
    assert (tmp_path / "diary").read_text() == "dear"


def test_runs_of_earlier_versions_are_known(tmp_path: Path) -> None:
    for name, content in {
        "by_recipe/recipe.json": '{"recipe": {}, "versions": {}, "git": null}',
        "by_stage/0_plan-0123abcd/stage.json": '{"name": "plan", "fingerprint": "0123abcd", "columns": [], "recipe": {}}',
        "by_training/train/config.json": '{"objective": {}, "pairs": "", "versions": {}}',
        "by_evaluation/evaluation/index.json": '{"models": {}, "num_images": 0}',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
        folder = tmp_path / name.split("/")[0]
        (folder / ".lock").write_text("4711\n")
        with open_run(folder, resume=True):
            pass
    (tmp_path / "study" / "cells").mkdir(parents=True)
    (tmp_path / "study" / ".lock").write_text("4711\n")
    with open_run(tmp_path / "study", resume=True):
        pass


def test_a_try_that_ends_before_its_first_shard_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(RpoError, match="nobody answers"), open_run(path):
            write_record(path / "recipe.json", {"recipe": {}, "versions": {}})
            (path / "0_plan-0123abcd").mkdir()
            write_record(path / "0_plan-0123abcd" / "stage.json", {"name": "plan", "fingerprint": "0123abcd"})
            (path / "0_plan-0123abcd" / "00000.parquet").write_text("x")
            raise RpoError("nobody answers")
        assert not path.exists()
    with pytest.raises(KeyError), open_run(path):
        (path / "ledger.sqlite").write_text("paid")
        raise KeyError
    with open_run(path):
        assert (path / "ledger.sqlite").read_text() == "paid", "what was paid is remembered"


def test_readers_share_the_lock_and_a_writer_waits_for_none(tmp_path: Path) -> None:
    with open_run(tmp_path) as run, pytest.raises(RpoError, match="is being written by another process"), reading_run(run.path):
        pass
    with reading_run(tmp_path), reading_run(tmp_path):
        with pytest.raises(RpoError, match="is in use by another process, such as an export"), open_run(tmp_path, resume=True):
            pass
    with open_run(tmp_path, resume=True):
        pass


def test_a_run_that_made_nothing_needs_no_flag(tmp_path: Path) -> None:
    with open_run(tmp_path / "run"):
        pass
    with open_run(tmp_path / "run") as run:
        assert run.path == tmp_path / "run"
    (tmp_path / "empty").mkdir()
    with open_run(tmp_path / "empty"):
        pass


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, flags: dict[str, bool]) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RpoError, match=r"is not a run folder \(it holds 'thesis.tex'"), open_run(tmp_path, **flags):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("name", ["evaluation", "train"])
def test_overwrite_does_not_follow_links(tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    path = tmp_path / "run"
    with open_run(path):
        write_record(path / "recipe.json", {"recipe": {}, "versions": {}})
        (path / "summary.json").write_text("x")
    (path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(RpoError, match=f"{name} is a link, and --overwrite removes nothing through one"), open_run(path, overwrite=True):
        pass
    assert (path / name).is_symlink() and (tmp_path / "precious" / "file").exists() and (path / "recipe.json").exists()


def test_two_writers_in_one_process_are_refused_too(tmp_path: Path) -> None:
    with open_run(tmp_path / "run"):
        with pytest.raises(RpoError, match=f"is being written by process {os.getpid()}"), open_run(tmp_path / "run", resume=True):
            pass
    with open_run(tmp_path / "run", resume=True):
        pass


def test_the_lock_is_released_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), open_run(tmp_path / "run"):
        raise KeyError
    with open_run(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RpoError, match=r"cannot write in .*file/run.*Choose a folder"), open_run(tmp_path / "file" / "run"):
        pass
    with pytest.raises(RpoError, match=r"cannot write in .*/file"), open_run(tmp_path / "file"):
        pass

    def denied(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", denied)
    with pytest.raises(RpoError, match="Permission denied"), open_run(tmp_path / "run"):
        pass

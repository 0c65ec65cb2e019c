"""Who may enter a run folder, and what an existing one asks for."""

import os
from pathlib import Path

import pytest

from rpo.data.run_folder import open_run
from rpo.errors import RpoError


def begun(path: Path) -> Path:
    with open_run(path):
        for name in ("0_plan-00000000", "train"):
            (path / name).mkdir()
        (path / "recipe.json").write_text("{}")
        (path / "notes.txt").write_text("mine")
    return path


def test_an_existing_run_asks_for_resume_or_overwrite(tmp_path: Path) -> None:
    path = begun(tmp_path / "runs" / "a")
    with pytest.raises(RpoError, match=r"already holds a run.*--resume.*--overwrite"), open_run(path):
        pass
    with open_run(path, resume=True):
        assert (path / "recipe.json").exists()
    with open_run(path, overwrite=True):
        assert sorted(os.listdir(path)) == [".lock", "notes.txt"], "only what runs make is removed"
    with pytest.raises(ValueError, match="exclude each other"), open_run(path, resume=True, overwrite=True):
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


def test_overwrite_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    path = begun(tmp_path / "run")
    (path / "evaluation").symlink_to(tmp_path / "precious")
    with open_run(path, overwrite=True):
        assert not (path / "evaluation").exists()
    assert (tmp_path / "precious" / "file").exists()


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

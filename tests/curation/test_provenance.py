"""What a model is called in a pair's provenance: weights by content, wherever they lie."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from rpo.curation.provenance import made_by, weights_of


def folder(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(content)
    return path


def test_a_folder_counts_by_its_content(tmp_path: Path) -> None:
    one, same, other = (folder(tmp_path / name, text) for name, text in (("a", "1"), ("b", "1"), ("c", "2")))
    assert weights_of(str(one)) == weights_of(str(same)) != weights_of(str(other))


def test_a_hub_model_is_its_commit_and_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the local store alone, whose files are named by their content."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, store = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--some--model"
    folder(store / "blobs", "weights").joinpath("model.safetensors").rename(store / "blobs" / "f00d")
    (store / "snapshots" / commit).mkdir(parents=True)
    (store / "snapshots" / commit / "model.safetensors").symlink_to(store / "blobs" / "f00d")
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    name = weights_of("some/model")
    assert name.startswith(f"commit:{commit} sha256:") and weights_of(f"some/model@{commit}") == name
    (store / "blobs" / "f00d").rename(store / "blobs" / "beef")
    (store / "snapshots" / commit / "model.safetensors").unlink()
    (store / "snapshots" / commit / "model.safetensors").symlink_to(store / "blobs" / "beef")
    assert weights_of("some/model") != name
    assert weights_of("another/model") == "another/model", "on a server, perhaps"


def test_a_model_says_its_class(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Mine:
        path: str

    config = Mine(str(folder(tmp_path / "weights", "1")))
    assert made_by(config, (config.path,))["model"] == "Mine" and "weights" in made_by(config, (config.path,))["weights"]  # type: ignore[operator]

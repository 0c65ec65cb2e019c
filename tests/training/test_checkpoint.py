import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rpo.errors import RpoError
from rpo.training.config import TrainConfig
from rpo.training.runtime.checkpoint import (
    TrainState,
    best_weights,
    check_weights,
    checkpoints,
    finite,
    load_newest,
    open_train_folder,
    save_checkpoint,
)
from rpo.training.runtime.metrics import Trend, Watch
from rpo.training.runtime.optimizer import Descent


def network(seed: int = 0, **settings: Any) -> Descent:
    generator = torch.Generator().manual_seed(seed)
    conv = torch.nn.Parameter(torch.randn((64, 16, 3, 3), generator=generator).to(memory_format=torch.channels_last))
    config = TrainConfig(model="", lr=0.1, **settings)
    return Descent(config, {"conv": conv, "bias": torch.nn.Parameter(torch.randn(5, generator=generator))})


def advance(descent: Descent, steps: int) -> None:
    for _ in range(steps):
        descent.backward(sum(parameter.square().sum() + parameter.sum() for parameter in descent.trained.values()))
        descent.step(0.1)


def save(folder: Path, state: TrainState, descent: Descent, keep: int = 2) -> None:
    save_checkpoint(folder, state, descent.weights(), descent.state(), keep=keep)


def save_at(folder: Path, *steps: int, keep: int = 2, best: int = 0) -> None:
    descent = network()
    for step in steps:
        advance(descent, 1)
        state = TrainState(step=step, watch=Watch(chosen=Trend(steps=step, mean=0.5)), best_step=best if step >= best else 0)
        save(folder, state, descent, keep)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw8bit"])
@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9}, {"precision": "fp16"}])
def test_going_on_from_a_checkpoint_is_bitwise_the_same(tmp_path: Path, optimizer: str, settings: dict[str, Any]) -> None:
    descent, again = network(optimizer=optimizer, **settings), network(seed=9, optimizer=optimizer, **settings)
    advance(descent, 3)
    save(tmp_path, TrainState(step=3, seconds=1.5), descent)
    advance(descent, 4)
    assert load_newest(tmp_path, again, print) == TrainState(step=3, seconds=1.5)
    advance(again, 4)
    for left, right in ((again.weights(), descent.weights()), (again.state(), descent.state()), (again.result(), descent.result())):
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    save_at(tmp_path / "two", 5, 10, 1_000_000, 2_000_000)
    assert [path.name for path in checkpoints(tmp_path / "two")] == ["step-1000000", "step-2000000"]
    save_at(tmp_path / "best", 5, 10, 15, 20, 25, keep=1, best=10)
    assert [path.name for path in checkpoints(tmp_path / "best")] == ["step-000010", "step-000025"]


def test_the_best_weights_are_their_average_where_there_is_one(tmp_path: Path) -> None:
    descent, state = network(ema_decay=0.5), TrainState(step=3, best_step=3)
    advance(descent, 3)
    save(tmp_path, state, descent)
    expected = {name: value.clone() for name, value in descent.result().items()}
    advance(descent, 1)
    found = best_weights(tmp_path, state)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    (tmp_path / "step-000003" / "trained.safetensors").write_bytes(b"")
    with pytest.raises(RpoError, match="the best checkpoint, is damaged"):
        best_weights(tmp_path, state)


def test_nothing_saved_means_step_0(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "checkpoints", network(), print) == TrainState()


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path: Path, name: str, damage: str) -> None:
    save_at(tmp_path, 5, 10)
    file = tmp_path / "step-000010" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "flip":
            file.write_bytes(content)
        case "truncate":
            file.write_bytes(content[:-7])
        case "delete":
            file.unlink()
    said: list[str] = []
    assert load_newest(tmp_path, network(), said.append).step == 5
    assert len(said) == 1 and "step-000010 is damaged" in said[0] and "the checkpoint before it" in said[0]
    assert len(list(tmp_path.glob("damaged-step-000010-*"))) == 1, "it is kept"


def test_an_empty_manifest_vouches_for_nothing(tmp_path: Path) -> None:
    save_at(tmp_path, 5, 10)
    (tmp_path / "step-000010" / "manifest.json").write_text("{}")
    assert load_newest(tmp_path, network(), lambda _: None).step == 5


def test_a_half_written_checkpoint_is_invisible(tmp_path: Path) -> None:
    save_at(tmp_path, 5)
    partial = tmp_path / ".partial-step-000010"
    partial.mkdir()
    (partial / "trained.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path, network(), print).step == 5
    assert not partial.exists()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_at(tmp_path, 5)
    other = Descent(TrainConfig(model=""), {"conv": network().trained["conv"]})
    with pytest.raises(RpoError, match="another network"):
        load_newest(tmp_path, other, print)


def opened(folder: Path, resume: bool = False, overwrite: bool = False, **config: object) -> None:
    settings = {"objective": {}, "pairs": "", "lr": 0.1, "steps": 5, "versions": {"torch": "1"}, **config}
    open_train_folder(folder, settings, resume=resume, overwrite=overwrite)


def test_an_existing_folder_needs_resume_or_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    opened(folder)
    opened(folder)  # nothing was done yet
    save_at(folder / "checkpoints", 5)
    with pytest.raises(RpoError, match=r"--resume goes on with it, --overwrite starts anew"):
        opened(folder)
    opened(folder, resume=True)
    with pytest.raises(ValueError, match="exclude each other"):
        opened(folder, resume=True, overwrite=True)


def test_a_changed_config_is_refused_by_name(tmp_path: Path) -> None:
    opened(tmp_path)
    save_at(tmp_path / "checkpoints", 5)
    with pytest.raises(RpoError, match=r"started with lr = 0\.1, now it is 0\.2"):
        opened(tmp_path, resume=True, lr=0.2)
    with pytest.raises(RpoError, match=r"lr = 0\.1.*\(1 more differ\)"):
        opened(tmp_path, resume=True, lr=0.2, steps=6)
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.1


def test_other_versions_are_told_and_not_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.warns(UserWarning, match="bits may differ"):
        opened(tmp_path, resume=True, versions={"torch": "2"})


def test_overwrite_empties_all_but_the_cache(tmp_path: Path) -> None:
    opened(tmp_path)
    save_at(tmp_path / "checkpoints", 5)
    mine = ("photo.jpg", "checkpoints/notes.txt", "cache/own.bin")
    for name in ("cache/latents-0a.safetensors", "weights/pytorch_lora_weights.safetensors", "metrics.jsonl", *mine):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    opened(tmp_path, overwrite=True, lr=0.3)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"config.json", "cache/latents-0a.safetensors", *mine}, "what training wrote goes, but for the cache"
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.3


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "photo.jpg").write_text("x")
    with pytest.raises(RpoError, match=r"is no training of rpo's \(it holds 'photo\.jpg'"):
        opened(tmp_path / "train", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "train")
    with pytest.raises(RpoError, match="is a link, and nothing is removed through one"):
        opened(tmp_path / "link", overwrite=True)
    assert (tmp_path / "train" / "photo.jpg").read_text() == "x"


def test_weights_of_nobody_are_not_taken_for_a_result(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "pytorch_lora_weights.safetensors").write_text("x")
    with pytest.raises(RpoError, match=r"weights is there without the config\.json of the training that made it"):
        opened(tmp_path, resume=True)


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    save_at(tmp_path, 5, 10)
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def refused(path: Path) -> str:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("rpo.training.runtime.checkpoint.sha256_of", refused)
        with pytest.raises(RpoError, match=rf"trained\.safetensors: {os.strerror(code)}\. .*--resume"):
            load_newest(tmp_path, network(), print)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert load_newest(tmp_path, network(), print).step == 10


def test_what_a_kill_before_the_pruning_left_is_removed(tmp_path: Path) -> None:
    save_at(tmp_path, 5, 10, 15, keep=9)
    load_newest(tmp_path, network(), print, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000010", "step-000015"]


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    good, bad = {"a": torch.ones(2)}, {"a": torch.tensor([1.0, float("nan")])}
    assert finite(good) == good
    with pytest.raises(RpoError, match="the weights a are not finite"):
        finite(bad)
    for name, weights in {"good": good, "bad": bad}.items():
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "pytorch_lora_weights.safetensors")
    check_weights(tmp_path / "good")
    with pytest.raises(RpoError, match=r"pytorch_lora_weights\.safetensors: the weights a are not finite"):
        check_weights(tmp_path / "bad")

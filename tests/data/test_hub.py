"""A published folder is whole or not there, proves what it holds, and is uploaded only so."""

import json
import os
import random
import threading
from pathlib import Path

import httpx2
import pytest
import requests

from rpo.core.atomic import sha256_of
from rpo.data.hub import MANIFEST, check_published, new_folder, push_folder, write_tables
from rpo.data.pairs import SCHEMA, pair_tables
from rpo.data.readers import load_pairs
from rpo.errors import RpoError
from tiny_diffusion import make_pairs


def published(folder: Path, count: int = 5) -> Path:
    with new_folder(folder) as new:
        write_tables(new / "data", "train", SCHEMA, pair_tables(make_pairs(count)))
        (new / "README.md").write_text("# a card\n")
    return folder


def test_what_was_published_is_trained_on(tmp_path: Path) -> None:
    folder = published(tmp_path / "set")
    assert load_pairs(folder) == (make_pairs(5), {})
    assert json.loads((folder / MANIFEST).read_text())["files"].keys() == {"README.md", "data/train-00000.parquet"}


def test_large_sets_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpo.data.hub.SHARD_BYTES", 1)
    folder = published(tmp_path / "set", 130)
    assert [path.name for path in sorted((folder / "data").iterdir())] == [f"train-{number:05d}.parquet" for number in range(3)]
    assert load_pairs(folder) == (make_pairs(130), {})
    with new_folder(tmp_path / "none") as new:
        write_tables(new / "data", "train", SCHEMA, pair_tables([]))
    assert not list((tmp_path / "none" / "data").iterdir())


def damaged_in_every_way(data: bytes, rng: random.Random) -> list[bytes]:
    """200 flipped bits, 50 truncations, 20 zeroed pages."""
    flips = []
    for _ in range(200):
        bit = rng.randrange(len(data) * 8)
        copy = bytearray(data)
        copy[bit // 8] ^= 1 << bit % 8
        flips.append(bytes(copy))
    pages = [rng.randrange(0, max(1, len(data) - 4096)) for _ in range(20)]
    zeroed = [data[:at] + bytes(len(data[at : at + 4096])) + data[at + 4096 :] for at in pages]
    return flips + [data[: rng.randrange(len(data))] for _ in range(50)] + zeroed


def test_every_damage_to_a_published_file_is_noticed(tmp_path: Path) -> None:
    folder = published(tmp_path / "set", 20)
    check_published(folder)
    rng = random.Random(0)
    path = folder / "data" / "train-00000.parquet"
    whole = path.read_bytes()
    for data in damaged_in_every_way(whole, rng):
        path.write_bytes(data)
        with pytest.raises(RpoError, match=f"{path.name} is damaged"):
            check_published(folder)
    path.write_bytes(whole)
    check_published(folder)


def test_files_that_have_not_changed_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = published(tmp_path / "set", 20), tmp_path / "cache" / "published.json"
    read: list[str] = []
    monkeypatch.setattr("rpo.data.hub.sha256_of", lambda path: read.append(path.name) or sha256_of(path))

    def checked() -> list[str]:
        read.clear()
        check_published(folder, seen)
        return sorted(read)

    every = checked()
    assert "train-00000.parquet" in every and checked() == every, "so young that they may change within one tick of their times"
    monkeypatch.setattr("rpo.data.hub._SETTLED_NS", 0)
    assert checked() == every and checked() == []
    file = folder / "data" / "train-00000.parquet"
    whole, times = file.read_bytes(), file.stat()
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times does
    with pytest.raises(RpoError, match=f"{file.name} is damaged"):
        checked()
    file.write_bytes(whole)
    assert checked() == [file.name] and checked() == []
    seen.write_text(seen.read_text().replace(file.name, "other"))
    assert checked() == every, "a damaged record is no proof"


def test_the_card_may_be_edited_and_junk_is_no_part_of_the_set(tmp_path: Path) -> None:
    folder = published(tmp_path / "set")
    (folder / "README.md").write_text("Mine.")
    for name in (".DS_Store", "data/._train-00000.parquet", "data/Thumbs.db"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    check_published(folder)
    assert load_pairs(folder)[0]


def test_files_that_are_missing_or_foreign_are_named(tmp_path: Path) -> None:
    folder = published(tmp_path / "set")
    (folder / "data" / "more.parquet").write_bytes(b"")
    with pytest.raises(RpoError, match=r"more.parquet is not in the manifest"):
        check_published(folder)
    (folder / "data" / "more.parquet").unlink()
    (folder / "README.md").unlink()
    with pytest.raises(RpoError, match=r"README.md is missing"):
        check_published(folder)
    with pytest.raises(RpoError, match=r"is no published dataset.*rpo export"):
        check_published(tmp_path)
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(RpoError, match=r"manifest.json is damaged"):
        check_published(folder)


def test_an_export_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "set") as new:
        (new / "README.md").write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    published(tmp_path / "set")
    with pytest.raises(RpoError, match="exists; replace it by --overwrite"), new_folder(tmp_path / "set"):
        pass
    with pytest.raises(KeyError), new_folder(tmp_path / "set", overwrite=True):
        raise KeyError
    check_published(tmp_path / "set")
    with new_folder(tmp_path / "set", overwrite=True) as new:
        (new / "README.md").write_text("new")
    assert check_published(tmp_path / "set")["files"].keys() == {"README.md"} and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "precious").mkdir()
    with pytest.raises(RpoError, match="exists; choose another"), new_folder(tmp_path / "precious", overwrite=True):
        pass


class Hub:
    """Takes what is uploaded, as the Hub's client would."""

    taken: list[tuple[str, str, bool | None]] = []
    failure: Exception = OSError("the wire is cut")

    def create_repo(self, repository: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.taken.append((repository, repo_type, private))

    def upload_folder(self, *, repo_id: str, repo_type: str, folder_path: str, commit_message: str) -> None:
        if "refused" in repo_id:
            raise self.failure
        check_published(Path(folder_path))
        self.taken.append((repo_id, repo_type, None))


def test_pushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(tmp_path / "set")
    Hub.taken.clear()
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RpoError, match=r"no token for the Hub.*hf auth login.*HF_TOKEN"):
        push_folder(folder, "me/pairs", private=True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_canary")
    assert push_folder(folder, "me/pairs", private=True) == "https://huggingface.co/datasets/me/pairs"
    assert Hub.taken == [("me/pairs", "dataset", True), ("me/pairs", "dataset", None)]
    with pytest.raises(RpoError, match=r"did not take me/refused: the wire is cut.*push again") as caught:
        push_folder(folder, "me/refused", private=True)
    assert "hf_canary" not in str(caught.value)
    with pytest.raises(ValueError, match="owner/name"):
        push_folder(folder, "pairs", private=True)
    (folder / "data" / "train-00000.parquet").write_text("x")
    with pytest.raises(RpoError, match=r"train-00000.parquet is damaged"):
        push_folder(folder, "me/pairs", private=True)


@pytest.mark.parametrize(
    "failure",
    [
        httpx2.ConnectError("[Errno -2] Name or service not known"),
        httpx2.ReadTimeout("timed out"),
        httpx2.InvalidURL("no host"),
        requests.ConnectionError("Failed to resolve 'hub.invalid'"),
        TimeoutError("timed out"),
        RuntimeError(""),
    ],
    ids=lambda failure: f"{type(failure).__module__}.{type(failure).__name__}",
)
def test_whatever_the_hub_s_transport_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    folder = published(tmp_path / "set")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_canary")
    monkeypatch.setattr(Hub, "failure", failure)
    with pytest.raises(RpoError, match=r"the Hub did not take me/refused: .+What was uploaded stays; push again") as caught:
        push_folder(folder, "me/refused", private=True)
    assert "\n" not in str(caught.value) and (str(failure) or type(failure).__name__) in str(caught.value)


def test_an_old_dataset_is_replaced_or_stays(tmp_path: Path) -> None:
    target = tmp_path / "set"

    def publish(text: str) -> None:
        with new_folder(target, overwrite=True) as new:
            (new / "README.md").write_text(text)

    for text in ("old", "new"):
        publish(text)
        assert (target / "README.md").read_text() == text and [path.name for path in tmp_path.iterdir()] == ["set"]
    target.rename(tmp_path / ".old-set-0123456789abcdef")  # as a process that died between two renames leaves it
    with pytest.raises(ZeroDivisionError), new_folder(target, overwrite=True):
        raise ZeroDivisionError
    assert (target / "README.md").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_neighbors_of_an_export_are_left_alone(tmp_path: Path) -> None:
    for name in ("set.tmp", "set.old.tmp", ".partial-set", ".old-set-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    published(tmp_path / "set")
    with new_folder(tmp_path / "set", overwrite=True) as new:
        (new / "README.md").write_text("new")
    assert len(list(tmp_path.glob("*/precious"))) == 4
    assert len(list(tmp_path.iterdir())) == 5


def test_what_a_killed_export_left_is_removed_and_what_a_running_one_makes_is_not(tmp_path: Path) -> None:
    left = tmp_path / ".partial-set-0123456789abcdef"
    left.mkdir()
    with new_folder(tmp_path / "set") as first:
        (first / "README.md").write_text("first")
        published(tmp_path / "other")
        with new_folder(tmp_path / "other", overwrite=True):
            pass
        with new_folder(tmp_path / "set") as second:
            (second / "README.md").write_text("second")
        assert first.is_dir() and not left.exists()
        (tmp_path / "set").rename(tmp_path / "elsewhere")
    assert check_published(tmp_path / "set") and (tmp_path / "set" / "README.md").read_text() == "first"


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_exports_at_once_both_succeed_or_one_says_so(tmp_path: Path, overwrite: bool) -> None:
    if overwrite:
        published(tmp_path / "set")
    said: list[str] = []
    began = threading.Barrier(4)

    def publish(count: int) -> None:
        began.wait()
        try:
            with new_folder(tmp_path / "set", overwrite=overwrite) as new:
                write_tables(new / "data", "train", SCHEMA, pair_tables(pairs[:count]))
        except RpoError as error:
            said.append(str(error))

    pairs = make_pairs(4)
    threads = [threading.Thread(target=publish, args=(count,)) for count in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == (0 if overwrite else 3) and all("exists; replace it by --overwrite" in line for line in said)
    check_published(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_export_never_replaces_files_of_the_user(tmp_path: Path) -> None:
    folder = published(tmp_path / "set")
    (folder / "notes.txt").write_text("mine")
    with (
        pytest.raises(RpoError, match=r"notes\.txt was written by no export and would be removed; move it"),
        new_folder(folder, overwrite=True),
    ):
        pass
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(RpoError, match="exists; choose another"), new_folder(tmp_path / "link", overwrite=True):
        pass
    check_published(folder)

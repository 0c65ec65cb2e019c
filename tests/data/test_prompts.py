import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpo.data.prompts import Prompt, read_prompt_set, read_prompts

ROWS = [{"Prompt": "a  red star", "Category": "A"}, {"Prompt": "a blue star", "Category": "B"}, {"Prompt": "a red star", "Category": "C"}]
EXPECTED = {"a red star": "A", "a blue star": "B"}


def test_every_layout_is_read(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text("a  red star\n\na blue star\na red star\n")
    assert read_prompts(tmp_path / "set.txt") == {"a red star": None, "a blue star": None}
    (tmp_path / "set.tsv").write_text("Prompt\tCategory\tx\n" + "".join(f"{r['Prompt']}\t{r['Category']}\t1\n" for r in ROWS))
    (tmp_path / "set.csv").write_text("Prompt,Category\n" + "".join(f'"{r["Prompt"]}",{r["Category"]}\n' for r in ROWS))
    (tmp_path / "set.jsonl").write_text(
        "".join(json.dumps({"prompt": r["Prompt"], "tag": r["Category"], "include": []}) + "\n" for r in ROWS)
    )
    pq.write_table(
        pa.Table.from_pylist([{"caption": r["Prompt"], "category": r["Category"], "jpg": b"x"} for r in ROWS]), tmp_path / "set.parquet"
    )
    for layout in ("tsv", "csv", "jsonl", "parquet"):
        assert read_prompts(tmp_path / f"set.{layout}") == EXPECTED, layout


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.jsonl", None, "cannot read the prompts file"),
        ("cut.jsonl", b'{"prompt": "a', "cannot read the prompts file"),
        ("latin.txt", b"caf\xe9", "cannot read the prompts file"),
        ("bad.parquet", b"PAR1nonsense", "cannot read the prompts file"),
        ("list.jsonl", b"[1]", "row 1: no text of at most 2000 characters in a column prompt, text, caption"),
        ("number.jsonl", b'{"prompt": "x"}\n{"prompt": 5}', "row 2: no text"),
        ("long.txt", b"x" * 2001, "row 1: no text of at most 2000 characters"),
        ("empty.csv", b"prompt\n", "holds no prompt"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read_prompts(tmp_path / name)


def test_source_kind_and_split_are_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "a red star", "category": "color", "split": "val", "seen": True}, {"prompt": "a blue star", "tag": "counting"}]
    (tmp_path / "t2i_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_prompt_set(tmp_path / "t2i_val.jsonl")
    assert first == Prompt(text="a red star", kind="color", source="t2i_val", split="val")
    assert second == Prompt(text="a blue star", kind="counting", source="t2i_val", split=None)


BENCHMARKS = {
    "partiprompts.jsonl": '{"id": 0, "prompt": "a boat", "category": "Abstract", "challenge": "Basic"}',
    "drawbench.jsonl": '{"id": 1, "prompt": "a boat", "tifa_id": "drawbench_153"}',
    "geneval.jsonl": '{"id": 0, "tag": "counting", "include": [{"class": "boat", "count": 1}], "exclude": [], "prompt": "a boat"}',
    "t2i_compbench_val.jsonl": '{"id": "color_000", "prompt": "a boat", "category": "color", "seen": true}',
    "t2i_compbench_train.jsonl": '{"id": "color_000", "prompt": "a boat", "category": "color"}',
    "imagereward_benchmark.jsonl": '{"id": "005695-0057", "prompt": "a boat"}',
    "PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\na boat\tAbstract\tBasic\t\n",
    "color_val.txt": "a boat\n",
}
"""One line of ours in the layout of each public set."""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_public_sets_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(BENCHMARKS[name])
    (prompt,) = read_prompt_set(tmp_path / name)
    kind = {"geneval": "counting", "t2i_compbench_val": "color", "t2i_compbench_train": "color"}.get(prompt.source)
    kind = "Abstract" if prompt.source.lower() == "partiprompts" else kind
    assert (prompt.text, prompt.kind) == ("a boat", kind) and prompt.source == name.rpartition(".")[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets.*", "ignore::ResourceWarning")
def test_a_dataset_of_the_hub_is_read_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder for what the Hub would give; images in its rows are never opened."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "somebody" / "prompts"
    home.mkdir(parents=True)
    cell = pa.array([{"bytes": None, "path": "/etc/passwd"}] * 2, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    for split, texts in (("train", ["a red star", "a  blue star"]), ("test", ["a red star", "a green star"])):
        pq.write_table(pa.table({"prompt": texts, "category": ["x", "y"], "image": cell}), home / f"{split}-00000.parquet")
    found = read_prompt_set(Path("somebody/prompts"))
    assert [(p.text, p.kind, p.source, p.split) for p in found] == [
        ("a red star", "x", "somebody/prompts", "train"),
        ("a blue star", "y", "somebody/prompts", "train"),
        ("a green star", "y", "somebody/prompts", "test"),
    ]
    assert [p.text for p in read_prompt_set(Path("somebody/prompts:test"))] == ["a red star", "a green star"]
    with pytest.raises(ValueError, match="cannot read the dataset somebody/prompts:validation: it has the splits train, test"):
        read_prompts(Path("somebody/prompts:validation"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'rpo\[hub\]'"):
        read_prompts(Path("somebody/prompts"))

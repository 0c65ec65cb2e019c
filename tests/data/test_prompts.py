import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpo.data.prompts import Prompt, read_prompt_set, read_prompts

ROWS = [{"Prompt": "a  red star", "Category": "A"}, {"Prompt": "a blue star", "Category": "B"}, {"Prompt": "a red star", "Category": "C"}]
EXPECTED = {"a red star": "A", "a blue star": "B"}


def test_every_layout_is_read(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text("a  red star\n\na blue star\na red star\n")
    repeats = "1 rows repeat the prompt of an earlier row, which is read once"
    with pytest.warns(UserWarning, match=repeats):
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
        with pytest.warns(UserWarning, match=repeats):
            assert read_prompts(tmp_path / f"set.{layout}") == EXPECTED, layout


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.jsonl", None, "cannot read the prompts file"),
        ("cut.jsonl", b'{"prompt": "a', "cannot read the prompts file"),
        ("latin.txt", b"caf\xe9", "cannot read the prompts file"),
        ("bad.parquet", b"PAR1nonsense", "cannot read the prompts file"),
        ("list.jsonl", b"[1]", "row 1: no text in a column prompt, text, caption"),
        ("number.jsonl", b'{"prompt": "x"}\n{"prompt": 5}', "row 2: no text"),
        ("long.txt", b"x" * 2001, "1 prompts left out for over 2000 characters .row 1 has 2,001 characters"),
        ("empty.csv", b"prompt\n", "holds no prompt"),
        ("third.jsonl", b'{"prompt": "x"}\n{"prompt": "y"}\nnonsense', "third.jsonl, row 3: Expecting value"),
        ("wide.csv", b"prompt,category\na cat, on a mat,x\n", "row 1: it has more cells than the first row"),
        ("quote.csv", b'prompt,category\n"a cat,x\na dog,y\n', "unexpected end of data"),
        ("set.md", b"a cat", "prompts are read from .txt, .jsonl"),
        ("pairs.tar", b"a cat", "ends in '.tar'"),
        ("nul.txt", b"a\0cat", "row 1: prompt with control characters"),
        ("half.jsonl", b'{"prompt": "a"}\n{"prompt": "a \\ud83d cat"}', "row 2: prompt that is no text"),
        ("null.jsonl", b'{"prompt": "a"}\n{"prompt": null}', "row 2: no text in a column"),
        ("utf16.txt", "a cat".encode("utf-16"), "not UTF-8"),
        ("deep.jsonl", b"[" * 100_000, "cannot read the prompts file"),
        ("parts.jsonl", b"[" + b"{}," * 300_000 + b"{}]", "row 1: no text|too large|parts"),
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
@pytest.mark.filterwarnings("ignore:.*repeat the prompt")
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
    with pytest.raises(ValueError, match=r"pip install 'rpo-diffusion\[hub\]'"):
        read_prompts(Path("somebody/prompts"))


BOM = b"\xef\xbb\xbf"
SAME = {
    "list.json": b'[\n "a red cat",\n "a dog"\n]',
    "objects.json": b'[{"prompt": "a red cat"}, {"prompt": "a dog"}]',
    "lines.json": b'{"prompt": "a red cat"}\n{"prompt": "a dog"}\n',
    "a.ndjson": b'{"prompt": "a red cat"}\n{"prompt": "a dog"}\n',
    "A.JSONL": b'{"prompt": "a red cat"}\r\n{"text": "a dog", "prompt": null}\r\n',
    "A.CSV": b"prompt\r\na red cat\r\na dog\r\n",
    "A.TSV": b"prompt\tcategory\r\na red cat\tx\r\na dog\ty\r\n",
    "mark.txt": BOM + b"a red cat\na dog\n",
    "mark.csv": BOM + b"category,prompt\nx,a red cat\ny,a dog\n",
    "first.csv": BOM + b"prompt,category\na red cat,x\na dog,y\n",
    "mark.jsonl": BOM + b'{"prompt": "a red cat"}\n{"prompt": "a dog"}\n',
    "mark.json": BOM + b'  \n ["a red cat", "a dog"]',
    "quote.tsv": b"Prompt\tx\na red cat\t\na dog\t\n",
}


@pytest.mark.parametrize("name", SAME)
def test_endings_marks_and_arrays_change_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(SAME[name])
    found = read_prompts(tmp_path / name)
    assert list(found) == ["a red cat", "a dog"]
    if b"category" in SAME[name]:
        assert list(found.values()) == ["x", "y"]


def test_quotes_in_tab_separated_prompts_stay_and_swallow_no_rows(tmp_path: Path) -> None:
    texts = ['a sign that says "hello"', '"hello" in neon', 'an odd " quote', '"another odd', "the last"]
    (tmp_path / "set.tsv").write_text("Prompt\tCategory\n" + "".join(f"{text}\tx\n" for text in texts))
    assert list(read_prompts(tmp_path / "set.tsv")) == texts


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    odd = "a cat\u2028on\u2029a\x85mat\x0bhere"
    (tmp_path / "set.jsonl").write_text(json.dumps({"prompt": odd[:-5]}, ensure_ascii=False) + '\n{"prompt": "b"}\n', encoding="utf-8")
    (tmp_path / "set.txt").write_text("a cat\u2028on a mat\nb\n", encoding="utf-8")
    assert list(read_prompts(tmp_path / "set.jsonl")) == ["a cat on a mat", "b"]
    assert list(read_prompts(tmp_path / "set.txt")) == ["a cat on a mat", "b"]


def test_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text("a cat\n" + "x" * 120_000 + "\n" + "y" * 3000 + "\na dog\n")
    with pytest.warns(UserWarning, match=r"2 prompts left out for over 2000 characters \(row 2 has 120,000 characters\)"):
        assert list(read_prompts(tmp_path / "set.txt")) == ["a cat", "a dog"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".json"])
def test_pipes_links_and_devices_are_not_opened(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"link{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=r"is a link|no regular file"):
            read_prompts(tmp_path / f"{name}{suffix}")


def test_a_line_without_an_end_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "set.txt").open("wb") as file:
        file.truncate(10**11)
    with pytest.raises(ValueError, match="a line of over 4,000,000 bytes"):
        read_prompts(tmp_path / "set.txt")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"]), content=st.binary(max_size=300))
def test_any_bytes_are_prompts_or_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"set{suffix}").write_bytes(content)
    try:
        assert all(prompt.strip() == prompt != "" for prompt in read_prompts(tmp_path / f"set{suffix}"))
    except ValueError as error:
        assert "set" in str(error) and "\n" not in str(error)

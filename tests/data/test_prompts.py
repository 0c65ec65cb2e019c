import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpo.data.readers import read_prompts

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

"""Whole runs against servers that refuse everything, go away, or repeat the key, through the command line."""

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rpo.cli import main
from rpo.engine.layers import read_run
from rpo.shapes.critic import ShapesCriticConfig
from rpo.shapes.serving import embedded_responder
from rpo.shapes.weights import weights_folder
from rpo.testing.server import Asked, FakeServer, Raw, Said

KEY = "sk-canary/0123456789="
Answer = str | Said | Raw


@pytest.fixture(scope="module")
def embedded() -> Callable[[Asked], Answer]:
    return embedded_responder(ShapesCriticConfig(model=str(weights_folder() / "critic")).build())


def curate(server: FakeServer, folder: Path, rows: int, *more: str) -> int:
    chats = [f"--curate.{chat}.server" for chat in ("critique.critic.chat", "instruct.instructor.chat")]
    patience = [text for chat in chats for text in (f"{chat}.pacing.breaker-pause-s", "0.2", f"{chat}.attempts", "2")]
    wanted = ["--out", str(folder), "--vlm-url", server.url, "--curate.prompts.count", str(rows)]
    return main(["curate", "shapes_vlm", *wanted, *patience, *more])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


def test_a_server_that_refuses_every_question_ends_the_run_and_resume_asks_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], embedded: Callable[[Asked], Answer]
) -> None:
    refusing = True

    def answer(asked: Asked) -> Answer:
        return Raw(status=400, body={"detail": "Server is pinned to SmolLM2"}) if refusing else embedded(asked)

    with FakeServer(answer) as server:
        assert curate(server, tmp_path / "run", 16) == 1
        told = said(capsys)
        assert "the server refuses every question with HTTP 400: Server is pinned to SmolLM2" in told and "BASE_URL/models" in told
        assert f"{server.url}/chat/completions" in told and server.requests <= 8
        refusing = False
        assert curate(server, tmp_path / "run", 16, "--resume") == 0
    assert not any("error" in (status or "") for status in read_run(tmp_path / "run", []).column("status").to_pylist())


def test_a_run_of_too_few_rows_to_tell_ends_with_the_reason_and_resume_asks_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], embedded: Callable[[Asked], Answer]
) -> None:
    refusing = True

    def answer(asked: Asked) -> Answer:
        return Raw(status=400, body={"error": {"message": "no such thing"}}) if refusing else embedded(asked)

    with FakeServer(answer) as server, FakeServer(embedded) as calm:
        assert curate(server, tmp_path / "run", 4) == 1
        told = said(capsys)
        assert "every row of stage 'critique' ended in an error, most by: unanswered: HTTP 400: no such thing (4 of 4)" in told
        assert f"rpo show {tmp_path / 'run'} --stage critique --kept errors; the same command with --resume asks again" in told
        refusing, before = False, server.requests
        curate(server, tmp_path / "run", 4, "--resume")
        assert server.requests >= before + 4 and "4 rows without an answer of a remote model are asked again" in said(capsys)
        curate(calm, tmp_path / "calm", 4)
    columns = ["prompt", "critique", "instruction"]
    assert read_run(tmp_path / "run", columns).equals(read_run(tmp_path / "calm", columns))


def test_rows_lost_on_the_way_are_told_and_asked_again_and_the_end_is_that_of_a_calm_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], embedded: Callable[[Asked], Answer]
) -> None:
    ill = True

    def answer(asked: Asked) -> Answer:
        return Raw(status=500, body=b"") if ill and "red" in str(asked.texts) and asked.images else embedded(asked)

    with FakeServer(answer) as server, FakeServer(embedded) as calm:
        assert curate(server, tmp_path / "run", 24) == 0
        lost = re.search(r"(\d+) rows have no answer of a remote model; the same command with --resume asks again", said(capsys))
        assert lost is not None and int(lost[1]) > 0
        ill, before = False, dict(server.questions)
        assert curate(server, tmp_path / "run", 24, "--resume") == 0
        assert f"{lost[1]} rows without an answer of a remote model are asked again" in said(capsys)
        again = {question for question, times in server.questions.items() if times > before.get(question, 0) and question in before}
        assert len(again) == int(lost[1]), "only those"
        assert curate(calm, tmp_path / "calm", 24) == 0
    columns = ["prompt", "critique", "instruction", "chosen_side", "gap"]
    assert read_run(tmp_path / "run", columns).equals(read_run(tmp_path / "calm", columns))
    assert (tmp_path / "run" / "pairs.parquet").read_bytes() == (tmp_path / "calm" / "pairs.parquet").read_bytes()


def cells(path: Path) -> Iterator[str]:
    """Everything that a file holds, as text: the cells of a table, the values of a database, the characters of anything else."""
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        yield repr(file.read().to_pylist()) + repr(file.metadata.metadata)
    elif path.suffix == ".sqlite":
        with closing(sqlite3.connect(path)) as connection:
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                yield repr(connection.execute(f"SELECT * FROM {table}").fetchall())
    yield path.read_bytes().decode("latin-1")


def unescaped(text: str) -> str:
    for old, new in (
        ("\\/", "/"),
        ("\\u003d", "="),
        ("\\u003D", "="),
        ("\\x3d", "="),
        ("&#x3D;", "="),
        ("&#61;", "="),
        ("%2F", "/"),
        ("%3D", "="),
    ):
        text = text.replace(old, new)
    return text


def test_a_key_that_a_server_repeats_everywhere_is_found_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], embedded: Callable[[Asked], Answer]
) -> None:
    monkeypatch.setenv("RPO_API_KEY", f"{KEY}\r\n")
    echo = "".join(f"\\u{ord(c):04x}" if c in "/=" else c for c in KEY)

    def parrot(asked: Asked) -> Answer:
        told = embedded(asked)
        assert isinstance(told, str)
        number = sum(map(ord, str(asked.texts))) % 8
        if number == 0:
            return Raw(status=400, body=f'{{"error": {{"message": "your key {echo} is fine"}}}}'.encode())
        if number == 1:
            return Raw(
                status=422,
                body=f'{{"detail": [{{"loc": ["{echo}"], "msg": "see {echo}"}}]}}'.encode(),
                headers={"Content-Type": f"a/{KEY}"},
            )
        if number == 2:
            return Said(text=told, finish=f"by {KEY}")
        if asked.schema_name == "critique":
            value = json.loads(told)
            return json.dumps(value | {"keep": [*value["keep"], f"the {KEY}"]}).replace("/", "\\/")
        return told

    run = tmp_path / "run"
    with FakeServer(parrot, key=KEY) as server:
        assert curate(server, run, 40) == 0
    assert main(["report", str(run)]) == 0
    assert main(["export", str(run)]) == 0
    for kept in ("all", "errors"):
        assert main(["show", str(run), "--stage", "critique", "--kept", kept, "--rows", "40"]) == 0
    told = "".join(capsys.readouterr())
    assert "[key]" in told and KEY not in unescaped(told)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".parquet", ".sqlite", ".html", ".md", ".json"} <= {path.suffix for path in files}
    found = {path: [cell for cell in cells(path) if "sk-canary" in cell or KEY in unescaped(cell)] for path in files}
    assert not [path for path, leaks in found.items() if leaks]
    assert any("[key]" in cell for path in files for cell in cells(path)), "the server did repeat it"

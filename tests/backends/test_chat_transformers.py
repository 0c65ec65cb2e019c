"""A tiny vision-language model with random weights, in process and behind `transformers serve`: real formats, no sense."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rpo.backends.chat.openai import ChatServer, OpenAIChatConfig
from rpo.backends.chat.transformers import TransformersChat, TransformersChatConfig
from rpo.core.progress import quiet
from rpo.data.chat import ChatAnswer, ChatRequest, Message, Sampling
from rpo.errors import RowError, RpoError
from tiny_vlm import save_vlm

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet()
    return save_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def chat(folder: Path) -> TransformersChat:
    return TransformersChatConfig(model=str(folder), device="cpu").build()


def asked(*parts: str | np.ndarray, **changes: object) -> ChatRequest:
    return ChatRequest(**{"messages": (Message(role="user", parts=parts),), "sampling": Sampling(max_tokens=4), **changes})  # type: ignore[arg-type]


def test_an_answer_does_not_depend_on_its_neighbours(chat: TransformersChat) -> None:
    one, other = asked("what is it?", IMAGE), asked("and this?", IMAGE[::-1].copy())
    together, alone = chat.complete([one, other, one]), chat.complete([one])
    assert repr(together[0]) == repr(together[2]) == repr(alone[0]) and getattr(together[0], "raw", together[0]) == getattr(
        alone[0], "raw", alone[0]
    )


def test_all_who_ask_one_model_hold_it_once(chat: TransformersChat, folder: Path) -> None:
    assert TransformersChatConfig(model=str(folder), device="cpu", side_max=64).build()._model is chat._model


def test_provenance_names_the_revision() -> None:
    config = TransformersChatConfig(model="owner/name")
    assert config.models() == ("owner/name",) and replace(config, revision="abc").models() == ("owner/name@abc",)


def test_the_first_word_is_behind_marks_and_line_breaks(chat: TransformersChat) -> None:
    tokens = chat._processor.tokenizer
    marks, word = (tokens.encode(text, add_special_tokens=False) for text in ("**", "Yes"))
    assert chat._first_word(torch.tensor([*marks, *word])) == len(marks) and chat._first_word(torch.tensor(marks)) == 0


def test_an_answer_that_does_not_end_is_cut_short(chat: TransformersChat) -> None:
    (answer,) = chat.complete([asked("what is it?", IMAGE)])
    assert isinstance(answer, RowError) and "max_tokens" in str(answer) and answer.raw


def test_samples_are_drawn_each_from_its_own_seed(chat: TransformersChat) -> None:
    requests = [asked("hm", IMAGE, sampling=Sampling(max_tokens=4, temperature=1.5), sample=sample) for sample in (1, 2, 1)]
    said = [getattr(answer, "raw", None) or answer.text for answer in chat.complete(requests)]  # type: ignore[union-attr]
    assert said[0] == said[2] != said[1]


def test_the_first_token_has_probabilities(chat: TransformersChat) -> None:
    (answer,) = chat.complete([asked("yes or no?", IMAGE, first_token=20, sampling=Sampling(max_tokens=1))])
    assert isinstance(answer, ChatAnswer) and 0 < len(answer.first_token) <= 20 and answer.input_tokens > 5
    assert all(logprob <= 0 for logprob in answer.first_token.values())


def test_what_is_no_such_model_is_told(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(RpoError, match="cannot be loaded as a vision-language model"):
        TransformersChatConfig(model=str(tmp_path)).build()


@pytest.mark.slow
def test_a_server_that_nobody_here_wrote(folder: Path, tmp_path: Path) -> None:
    """`transformers serve`: every row ends with its own error, since random weights say nothing, and the run with a count."""
    from rpo.cli import main
    from rpo.testing.server import FakeServer

    with FakeServer(lambda asked: "") as free:  # a port that is free a moment later
        port = int(free.url.split(":")[2].split("/")[0])
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        serving = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
    try:
        url = f"http://localhost:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                assert serving.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
        (unknown,) = (
            OpenAIChatConfig(model=str(folder), server=ChatServer(base_url=f"{url}/v1"))
            .build()
            .complete([asked("yes or no?", IMAGE, first_token=5)])
        )
        assert isinstance(unknown, RowError) and "no log probabilities" in str(unknown)
        arguments = ["--vlm-url", f"{url}/v1", "--vlm-model", str(folder), "--curate.prompts.count", "12"]
        arguments += ["--curate.critique.critic.max-tokens", "8", "--out", str(tmp_path / "run")]
        assert main(["curate", "shapes_vlm", *arguments]) == 0
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        (critique,) = [stage for stage in summary["funnel"] if stage["stage"] == "critique"]
        assert sum(count for reason, count in critique["dropped"].items() if reason.startswith("error:critique:")) == 12
        assert summary["pairs_kept"] == 0 and summary["words"]["asked"] == 12 and summary["words"]["parsed"] == 0
    finally:
        serving.send_signal(signal.SIGINT)
        serving.wait(timeout=30)


STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def test_a_template_without_a_system_role_is_told_and_has_a_setting(chat: TransformersChat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat._processor, "chat_template", STRICT + chat._processor.chat_template)
    talk = (Message(role="system", parts=("be fair",)), Message(role="user", parts=("hi", IMAGE)))
    with pytest.raises(RpoError, match=r"refuses the question \(System role not supported\).*system_as_user"):
        chat.complete([asked(messages=talk)])
    monkeypatch.setattr(chat, "_system_as_user", True)
    (answer,) = chat.complete([asked(messages=talk, first_token=2)])
    assert isinstance(answer, ChatAnswer)

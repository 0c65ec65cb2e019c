"""The questions of `rpo doctor --vlm-url`: a server that can do everything passes, and each want is told with what to do."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from test_chat_servers import raw_server

from rpo.backends.chat.canary import COLOR_SCHEMA, COLORS, Check, check_chat, check_server
from rpo.backends.chat.openai import hang_up
from rpo.cli import main
from rpo.curation.vlm.schema import critique_schema
from rpo.data.chat import ChatAnswer, ChatRequest
from rpo.errors import RowError
from rpo.testing.server import Asked, FakeServer, Said

SCHEMAS = {"critique": critique_schema()}


def color_of(image: np.ndarray) -> str:
    """Of an image that may have been encoded with losses."""
    return min(COLORS, key=lambda name: float(np.abs(image.mean((0, 1)) - COLORS[name]).sum()))


@dataclass(frozen=True)
class Server:
    """A chat that can do everything but what is switched off."""

    sees: bool = True
    counts_images: bool = True
    honors_schemas: bool = True
    accepts_schemas: bool = True
    gives_logprobs: bool = True
    honors_temperature: bool = True
    thinks: bool = False

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        return [self._one(request) for request in requests]

    def _one(self, request: ChatRequest) -> ChatAnswer | RowError:
        images = [part for part in request.messages[0].parts if isinstance(part, np.ndarray)]
        if request.schema is not None and not self.accepts_schemas:
            return RowError("HTTP 400: failed to parse grammar")
        if request.first_token:
            return (
                ChatAnswer(text="Yes", first_token={"Yes": -0.1})
                if self.gives_logprobs
                else RowError("the server tells no log probabilities")
            )
        text = f"A story, number {request.sample if self.honors_temperature else 0}."
        if request.schema is COLOR_SCHEMA and self.honors_schemas:
            text = json.dumps({"animal": "otter", "legs": 4})
        elif "color" in str(request.messages[0].parts[-1]):
            text = f"{color_of(images[0])}." if images and self.sees else "Red"
        return ChatAnswer(
            text=("<think>blue</think>" if self.thinks else "") + text, input_tokens=30 + 80 * len(images) * self.counts_images
        )


def wrong(server: Server) -> dict[str, Check]:
    return {check.what: check for check in check_chat(server, SCHEMAS) if check.fix is not None}


def test_a_server_that_can_do_everything_passes() -> None:
    assert wrong(Server()) == wrong(Server(thinks=True)) == {}
    assert [check.what for check in check_chat(Server(), SCHEMAS)] == [
        "image seen", "schema honored", "schemas accepted", "temperature", "logprobs given",
    ]  # fmt: skip


@pytest.mark.parametrize(("server", "what", "found"), [
    (Server(sees=False, counts_images=False), "image seen", "no (30 prompt tokens with the image, 30 without"),
    (Server(sees=False), "image seen", "not understood (110 prompt tokens"),
    (Server(honors_schemas=False), "schema honored", "no: 'A story"),
    (Server(gives_logprobs=False), "logprobs given", "no: 'the server tells no log"),
    (Server(honors_temperature=False), "temperature", "ignored: 3 equal answers"),
])  # fmt: skip
def test_each_want_is_told(server: Server, what: str, found: str) -> None:
    told = wrong(server)
    assert list(told) == [what] and told[what].found.startswith(found) and told[what].fix


@dataclass(frozen=True)
class Endless:
    """Never ends an answer."""

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        return [RowError("the answer was cut short at max_tokens", raw=f"I think {request.sample}") for request in requests]


def test_a_model_that_does_not_end_is_told() -> None:
    checks = {check.what: check for check in check_chat(Endless(), SCHEMAS)}
    assert "turn its thinking off" in str(checks["image seen"].fix) and checks["image seen"].fix == checks["schema honored"].fix
    assert checks["schemas accepted"].fix is None and checks["temperature"].fix is None


def test_schemas_that_are_refused() -> None:
    told = wrong(Server(accepts_schemas=False))
    assert list(told) == ["schema honored", "schemas accepted"] and "send_schema" in str(told["schemas accepted"].fix)
    assert "critique is refused: HTTP 400" in told["schemas accepted"].found


def respond(asked: Asked) -> str | Said:
    if asked.first_token:
        return Said(text="Yes", first_token={"Yes": math.log(0.9), "No": math.log(0.1)})
    if asked.schema_name == "animal":
        return '{"animal": "heron", "legs": 2}'
    if "color" in asked.texts[-1]:
        return color_of(asked.images[0]) if asked.images else "none"
    return f"A story {asked.body.get('seed')}."


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(respond) as server:
        yield server
        hang_up()


def test_over_the_wire(server: FakeServer) -> None:
    checks = list(check_server(server.url, None, SCHEMAS))
    assert [check.fix for check in checks] == [None] * 6 and checks[0].found == "fake"
    listed, *others = check_server(server.url, "other", SCHEMAS)
    assert listed.found == "other is not among: fake" and "--vlm-model" in str(listed.fix) and len(others) == 5


def test_addresses_that_are_none(server: FakeServer) -> None:
    (no_address,) = check_server("localhost", None, SCHEMAS)
    assert "base_url must be like" in no_address.found and no_address.fix
    (missing,) = check_server(server.url + "/v1", None, SCHEMAS)
    assert "HTTP 404" in missing.found and "ends in /v1" in str(missing.fix)
    nobody = server.url
    server.__exit__()
    (gone,) = check_server(nobody, None, SCHEMAS)
    assert "no list of models" in gone.found and "start the server" in str(gone.fix)
    server.__enter__()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"data": [{"id": "m-sk-canary-0123\\u001b[2J"}]}', "m-[key]"),
        (b"<html>sk-canary-0123</html>", "no list of models (<html>[key]"),
        (b'{"data": "sk-canary-0123"}', "no list of models"),
        (b"[" * 100_000, "no list of models"),
        (b'{"data": [null, 5, {"id": null}, {"id": {}}]}', "no model"),
    ],
)
def test_a_list_of_models_that_is_none_or_repeats_the_key(body: bytes, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPO_API_KEY", "sk-canary-0123")
    with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body) as url:
        listed = next(check_server(url, None, {}))
    assert found in listed.found and "canary" not in str(listed) and "\x1b" not in listed.found and len(listed.found) < 300


@pytest.mark.parametrize("key", ["sk-canary\nX: 1", "canary"])
def test_a_key_that_cannot_be_sent_or_redacted_is_told_without_it(key: str, monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> None:
    monkeypatch.setenv("RPO_API_KEY", key)
    (told,) = check_server(server.url, None, {})
    assert "RPO_API_KEY holds" in told.found and told.fix and "canary" not in str(told)


def test_a_list_of_models_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpo.backends.chat.canary.LIST_TIMEOUT_S", 0.3)
    with raw_server(b"HTTP/1.1 200 OK\r\n\r\n", drips=True) as url:
        listed = next(check_server(url, None, {}))
    assert "no answer within 0.3 s" in listed.found


def test_on_the_command_line(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--vlm-url", server.url]) == 0
    out = capsys.readouterr().out
    assert out.count("ok   ") == 6 and "image seen" in out and "torch" not in out
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "--vlm-url", server.url, "--vlm-model", "other"])
    assert "-> give --vlm-model a name of the list" in capsys.readouterr().out
    assert main(["doctor", "--vlm-model", "x"]) == 2 and "--vlm-url" in capsys.readouterr().err


def test_a_server_without_log_probabilities_is_told_and_all_else_too() -> None:
    def silent(asked: Asked) -> str | Said:
        return "Yes" if asked.first_token else respond(asked)

    with FakeServer(silent) as server:
        checks = {check.what: check for check in check_server(server.url, None, SCHEMAS)}
    assert [what for what, check in checks.items() if check.fix] == ["logprobs given"] and len(checks) == 6
    assert "no log probabilities" in checks["logprobs given"].found

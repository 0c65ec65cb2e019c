"""The public fake server keeps to the loopback, and is not held up by what is no request of ours."""

import json
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from rpo.testing import server as fake_server
from rpo.testing.server import Asked, FakeServer

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}).encode()


def echo(asked: Asked) -> str:
    return f"answer to {asked.texts[0]}"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(echo) as server:
        yield server


def port_of(server: FakeServer) -> int:
    return int(server.url.split(":")[2].removesuffix("/v1"))


def sent(server: FakeServer, request: bytes) -> bytes:
    """What comes back until the server hangs up or says nothing more."""
    with closing(socket.create_connection(("127.0.0.1", port_of(server)), timeout=10)) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def request(server: FakeServer, body: bytes = BODY, line: str = "POST /v1/chat/completions HTTP/1.1", **changes: str | None) -> bytes:
    headers = {"Host": f"127.0.0.1:{port_of(server)}", "Content-Type": "application/json", "Content-Length": str(len(body))}
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [line, *(f"{name}: {value}" for name, value in headers.items() if value is not None), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_request_of_this_machine_is_served(server: FakeServer, host: str) -> None:
    assert b"answer to Hi" in sent(server, request(server, Host=f"{host}:{port_of(server)}"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": None}, 421),
        ({"Host": "127.0.0.1:1"}, 421),
        ({"Host": "127.0.0.1"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": None}, 415),
        ({"Content_Type": "application/jsonp"}, 415),
        ({"Content_Length": "60000000"}, 413),
        ({"Content_Length": "9" * 5000}, 413),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": "ten"}, 411),
        ({"Content_Length": "\u00b2"}, 411),
        ({"Transfer_Encoding": "chunked"}, 411),
        ({"X": "x" * 100_000}, 431),
    ],
)
def test_other_requests_are_refused(
    server: FakeServer, changes: dict[str, str | None], expected: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert status(sent(server, request(server, **changes))) == expected
    assert server.requests == 0 and "".join(capfd.readouterr()) == ""
    assert b"answer to Hi" in sent(server, request(server))


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"messages": 5}', b'{"model": "m", "messages": [{"role": "user", "content": 5}]}',
    b'{"model": "m", "messages": [{"role": "user"}]}', b"\xff", b"9" * 5000, b'{"model": "m", "messages": [], "response_format": 5}',
])  # fmt: skip
def test_what_is_no_question_is_refused_without_a_traceback(server: FakeServer, body: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    assert status(sent(server, request(server, body))) in (400, 200)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("garbage", [b"\r\n\r\n", b"\x16\x03\x01" + b"\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\n:\r\n\r\n", b""])
def test_what_is_no_http_is_outlived(server: FakeServer, garbage: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    sent(server, garbage)
    assert b"answer to Hi" in sent(server, request(server)) and "".join(capfd.readouterr()) == ""


def test_silent_connections_are_ended_and_not_more_than_so_many_are_held(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_server, "CONNECTIONS_MAX", 4)
    held = [socket.create_connection(("127.0.0.1", port_of(server)), timeout=10) for _ in range(4)]
    for connection in held:
        connection.sendall(b"POST ")
    one_more = socket.create_connection(("127.0.0.1", port_of(server)), timeout=10)
    assert b"503" in one_more.recv(100)
    one_more.close()
    for connection in held:
        connection.close()
    monkeypatch.setattr(fake_server, "REQUEST_S", 0.2)
    with closing(socket.create_connection(("127.0.0.1", port_of(server)), timeout=10)) as silent:
        assert silent.recv(100) == b"", "hung up"


def test_a_token_is_wanted_where_there_is_one() -> None:
    with FakeServer(echo, key="t0ken-0123456789") as server:
        assert status(sent(server, request(server))) == 401
        assert status(sent(server, request(server, Authorization="Bearer \xe9"))) == 401
        assert b"answer to Hi" in sent(server, request(server, Authorization="Bearer t0ken-0123456789"))

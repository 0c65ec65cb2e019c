"""The ways in which a server, or the wire to it, is known to fail. Each writes its fault; whether the connection may be used again."""

import asyncio
import gzip
import json
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

Fault = Callable[[asyncio.StreamWriter], Awaitable[bool]]

DRIP_S = 0.05
"""Between two bytes of a slow drip."""
_WHOLE: dict[str, Any] = {
    "id": "fault",
    "object": "chat.completion",
    "created": 0,
    "model": "fault",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "a fault"}, "finish_reason": "stop"}],
}
"""Without `usage`: what is billed is no fault to be asked again."""


def _message(status: str, body: bytes, *, length: int | None = None, kind: str = "application/json", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body) if length is None else length}\r\n{more}\r\n"
    return head.encode() + body


def _answer(status: str, body: object, kind: str = "application/json", more: Callable[[], str] = str) -> Fault:
    """A whole HTTP response with something wrong in it."""
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def send(writer: asyncio.StreamWriter) -> bool:
        writer.write(_message(status, encoded, kind=kind, more=more()))
        await writer.drain()
        return True

    return send


def _busy(more: Callable[[], str] = str) -> Fault:
    return _answer("429 Too Many Requests", {"error": {"message": "slow down", "code": "rate_limit"}}, more=more)


def _changed(**changes: object) -> dict[str, Any]:
    return _WHOLE | changes


def _choice(**changes: object) -> dict[str, Any]:
    return _changed(choices=[_WHOLE["choices"][0] | changes])


async def _reset_before(writer: asyncio.StreamWriter) -> bool:
    writer.transport.abort()
    return False


async def _reset_inside(writer: asyncio.StreamWriter) -> bool:
    body = json.dumps(_WHOLE).encode()
    writer.write(_message("200 OK", body[: len(body) // 2], length=len(body)))
    await writer.drain()
    writer.transport.abort()
    return False


def _raw(sent: bytes) -> Fault:
    """Bytes that are no HTTP response."""

    async def send(writer: asyncio.StreamWriter) -> bool:
        writer.write(sent)
        await writer.drain()
        return False

    return send


async def _slow_drip(writer: asyncio.StreamWriter) -> bool:
    """One byte at a time, for ever as far as a client's patience goes."""
    body = json.dumps(_WHOLE).encode()
    for byte in _message("200 OK", body):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(DRIP_S)
    return True


async def _huge(writer: asyncio.StreamWriter) -> bool:
    body = json.dumps(_choice(message={"role": "assistant", "content": "x" * 10_000_000})).encode()
    writer.write(_message("200 OK", body))
    await writer.drain()
    return True


FAULTS: dict[str, Fault] = {
    "429": _busy(),
    "429-seconds": _busy(lambda: "Retry-After: 1\r\n"),
    "429-milliseconds": _busy(lambda: "retry-after-ms: 20\r\n"),
    "429-date": _busy(lambda: f"Retry-After: {formatdate(time.time() + 1, usegmt=True)}\r\n"),
    "429-negative": _busy(lambda: "Retry-After: -5\r\n"),
    "429-for-ever": _busy(lambda: "Retry-After: 1000000000\r\n"),
    "429-nonsense": _busy(lambda: "Retry-After: soon\r\n"),
    "500": _answer("500 Internal Server Error", b"<html>oops</html>", "text/html"),
    "502": _answer("502 Bad Gateway", b"", "text/plain"),
    "503": _answer("503 Service Unavailable", {"error": "overloaded"}),
    "504": _answer("504 Gateway Timeout", b"\xff\xfe not text", "application/json"),
    "reset-before": _reset_before,
    "reset-inside": _reset_inside,
    "slow-drip": _slow_drip,
    "truncated": _answer("200 OK", json.dumps(_WHOLE).encode()[:-30]),
    "malformed": _answer("200 OK", b'{"choices": [}'),
    "no-object": _answer("200 OK", [_WHOLE]),
    "wrong-type": _answer("200 OK", b"<html>welcome to the hotel's network</html>", "text/html"),
    "content-number": _answer("200 OK", _choice(message={"role": "assistant", "content": 7})),
    "content-list": _answer("200 OK", _choice(message={"role": "assistant", "content": [["a"]]})),
    "choices-text": _answer("200 OK", _changed(choices="none")),
    "no-choices": _answer("200 OK", _changed(choices=[])),
    "no-message": _answer("200 OK", _changed(choices=[{"index": 0, "finish_reason": "stop"}])),
    "error-in-200": _answer("200 OK", {"id": "x", "choices": None, "error": {"message": "overloaded", "code": 502}}),
    "error-text-in-200": _answer("200 OK", {"error": "the backend went away"}),
    "bad-status-line": _raw(b"HTTP/1.1 twohundred\r\n\r\n"),
    "bad-chunk": _raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "huge": _huge,
    "gzip-bomb": _answer("200 OK", gzip.compress(b" " * 5_000_000, 1), more=lambda: "Content-Encoding: gzip\r\n"),
    "deep": _answer("200 OK", b"[" * 10_000),
}
"""By name. None of them is an answer."""

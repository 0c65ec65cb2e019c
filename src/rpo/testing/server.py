"""An OpenAI-compatible server on the loopback, for tests and for trying things out: answers with a function, and fails on request.

with FakeServer(lambda asked: "a red star", faults=Faults(rate=0.3)) as server:
    chat = OpenAIChatConfig(model="any", server=ChatServer(base_url=server.url)).build()
"""

import asyncio
import base64
import binascii
import hashlib
import json
import random
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np

from rpo.data.images import decode_image
from rpo.errors import RpoError
from rpo.testing.faults import FAULTS, Fault

BODY_MAX = 8_000_000
"""Bytes of a request."""
REQUEST_S = 30.0
"""For a request to arrive, from the connection or the answer before on."""
CONNECTIONS_MAX = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """One question as the server understood it."""

    model: str
    system: str
    texts: tuple[str, ...]
    """What the user and the assistant said, in order."""
    images: tuple[np.ndarray, ...]
    schema_name: str
    """Of the JSON schema that was asked for; empty without one."""
    first_token: int
    """How many alternatives of the first token are wanted."""
    body: Mapping[str, Any]
    """The whole request."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """An answer with more than its text."""

    text: str
    finish: str = "stop"
    first_token: Mapping[str, float] = field(default_factory=dict)
    """Log probabilities of alternatives of the first token."""


@dataclass(frozen=True, kw_only=True)
class Raw:
    """An HTTP response as a server of another kind would send it."""

    body: bytes | Mapping[str, Any]
    """A mapping is sent as JSON."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


Responder = Callable[[Asked], str | Said | Raw]
"""May raise `ValueError` for a question it does not understand: the request is refused with these words."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """A wire that fails."""

    rate: float
    """Share of requests that fail, 0 to 1."""
    kinds: tuple[str, ...] = tuple(FAULTS)
    """Names of the faults, drawn evenly."""
    seed: int = 0
    """Decides which request fails and how."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must be 0 to 1, got {self.rate}")
        if unknown := set(self.kinds) - FAULTS.keys():
            raise ValueError(f"there are no faults {sorted(unknown)}; known are {', '.join(FAULTS)}")


class FakeServer:
    """Serves `/v1/chat/completions` and `/v1/models` in a thread of its own from `with` on; refuses any address but the loopback's."""

    def __init__(
        self, responder: Responder, *, faults: Faults | None = None, port: int = 0, key: str = "", latency_s: float = 0.0, slots: int = 0
    ) -> None:
        """`key`: the one bearer token that is accepted, if set. `latency_s` and `slots`: how long an answer takes and how many are
        made at once, of a server whose rate is known; without slots there is no limit."""
        self._responder, self._faults, self._port, self._key = responder, faults, port, key
        self._latency_s, self._num_slots = latency_s, slots
        self._random = random.Random(faults.seed if faults else 0)
        self.requests = 0
        """Questions received, those that failed included."""
        self._connections = 0
        self.at_once = 0
        self.at_once_max = 0
        """The most questions that were under way together."""
        self.questions: Counter[str] = Counter()
        """How often each question was received, by the hash of its body."""
        self.failed: Counter[str] = Counter()
        """Faults by name."""
        self.busy_s = 0.0
        """Summed over slots: how long they worked."""
        self.url = ""

    def __enter__(self) -> "FakeServer":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rpo-fake-server", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._slots = asyncio.Semaphore(self._num_slots) if self._num_slots else nullcontext()
        try:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        except OSError as error:
            raise RpoError(f"cannot listen on port {self._port} of the loopback ({error.strerror}); choose another") from error
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_default_executor()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections > CONNECTIONS_MAX:
                await _refuse(writer, 503, f"at most {CONNECTIONS_MAX} connections are served at once")
                return
            while await self._one_request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError, asyncio.CancelledError):
            pass  # the client is gone or silent, or the server ends
        except asyncio.LimitOverrunError:
            await _refuse(writer, 431, "the request's head is too large")
        finally:
            self._connections -= 1
            writer.close()

    async def _one_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serves one request; whether the connection may be used again."""
        async with asyncio.timeout(REQUEST_S):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            lines = head.split("\r\n")
            headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
            if (refusal := self._refusal(headers)) is not None:
                return await _refuse(writer, *refusal)
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, path, *_ = [*lines[0].split(" "), "", ""]
        if (method, path) == ("GET", "/v1/models"):
            return await _send(writer, 200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})
        if (method, path) != ("POST", "/v1/chat/completions"):
            return await _send(writer, 404, {"error": {"message": f"there is no {method} {path}"}})
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return await _send(writer, 415, {"error": {"message": "a request is application/json"}})
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        try:
            return await self._chat(body, writer)
        finally:
            self.at_once -= 1

    def _refusal(self, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """Status and words for a request whose body is not even read: it is too large, or comes from a page in a browser."""
        port, length = self.url.split(":")[2].removesuffix("/v1"), headers.get("content-length", "0")
        if headers.get("host", "").lower() not in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
            return 421, "Host must be the loopback with this server's port"
        if "origin" in headers:
            return 403, "pages in a browser are not served"
        if self._key and not secrets.compare_digest(headers.get("authorization", "").encode(), f"Bearer {self._key}".encode()):
            return 401, f"wrong key {headers.get('authorization')}"
        if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
            return 411, "Content-Length must be a number, without Transfer-Encoding"
        return (413, f"a request has at most {BODY_MAX:,} bytes") if len(length) > 12 or int(length) > BODY_MAX else None

    async def _chat(self, body: bytes, writer: asyncio.StreamWriter) -> bool:
        self.requests += 1
        self.questions[hashlib.sha256(body).hexdigest()] += 1
        fault = self._drawn_fault()
        if fault is not None:
            return await fault(writer)
        try:
            asked = understand(body)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return await _send(writer, 400, {"error": {"message": f"the request is not understood: {error}"}})
        try:
            async with self._slots:
                said = await self._answer(asked)
        except ValueError as error:  # the responder's way to say that it is no question for it
            return await _send(writer, 400, {"error": {"message": str(error)}})
        if isinstance(said, Raw):
            return await _send(writer, said.status, said.body, said.headers)
        return await _send(writer, 200, _completion(asked, said))

    def _drawn_fault(self) -> Fault | None:
        if self._faults is None or self._random.random() >= self._faults.rate:
            return None
        kind = self._random.choice(self._faults.kinds)
        self.failed[kind] += 1
        return FAULTS[kind]

    async def _answer(self, asked: Asked) -> Said | Raw:
        began = self._loop.time()
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
            said = self._responder(asked)  # what stands for a model's time is the latency: no thread besides
        else:
            said = await self._loop.run_in_executor(None, self._responder, asked)
        self.busy_s += self._loop.time() - began
        return Said(text=said) if isinstance(said, str) else said


def understand(body: bytes) -> Asked:
    """Reads a request. Raises `ValueError`, `KeyError` or `TypeError` for what is none; images only as data URLs."""
    given: dict[str, Any] = json.loads(body)
    texts: list[str] = []
    images: list[np.ndarray] = []
    system = ""
    for message in given["messages"]:
        content = message["content"]
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "image_url":
                images.append(_image(part["image_url"]["url"]))
            elif message["role"] == "system":
                system += part["text"]
            else:
                texts.append(part["text"])
    form = given.get("response_format") or {}
    return Asked(
        model=given["model"],
        system=system,
        texts=tuple(texts),
        images=tuple(images),
        schema_name=form.get("json_schema", {}).get("name", ""),
        first_token=given.get("top_logprobs", 0) if given.get("logprobs") else 0,
        body=given,
    )


def _image(url: str) -> np.ndarray:
    kind, _, data = url.partition(";base64,")
    if not kind.startswith("data:image/"):
        raise ValueError("images are read from data URLs only")
    try:
        return decode_image(base64.b64decode(data, validate=True))
    except binascii.Error as error:
        raise ValueError(f"an image is not base64 ({error})") from error


def _completion(asked: Asked, said: Said) -> dict[str, Any]:
    read = sum(len(text.split()) for text in (asked.system, *asked.texts)) + 100 * len(asked.images)
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": said.text}, "finish_reason": said.finish}
    if asked.first_token:
        best = sorted(said.first_token.items(), key=lambda item: -item[1])[: asked.first_token]
        top = [{"token": token, "logprob": logprob, "bytes": list(token.encode())} for token, logprob in best]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}] if top else []}
    written = len(said.text.split())
    return {
        "id": f"fake-{hashlib.sha256(said.text.encode()).hexdigest()[:12]}",
        "object": "chat.completion",
        "created": 0,
        "model": asked.model,
        "choices": [choice],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


_JSON = {"Content-Type": "application/json"}


async def _send(writer: asyncio.StreamWriter, status: int, value: bytes | Mapping[str, Any], headers: Mapping[str, str] = _JSON) -> bool:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    reason = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {text}" for name, text in headers.items()), f"Content-Length: {len(body)}"]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    await writer.drain()
    return True


async def _refuse(writer: asyncio.StreamWriter, status: int, words: str) -> bool:
    """Answers a request whose body is left unread; the connection is not used again."""
    await _send(writer, status, {"error": {"message": words}}, _JSON | {"Connection": "close"})
    return False

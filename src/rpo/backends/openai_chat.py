"""Any vision-language model behind an OpenAI-compatible address: vLLM, SGLang, `transformers serve`, a hosted one.

The SDK carries one attempt; everything beyond that is here: `chat_pace` decides when, `chat_wire` what is sent and what it means,
and the answers and the ledger in the run folder see to it that nothing is asked or paid for twice.
"""

import asyncio
import atexit
import json
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from rpo.backends.chat_connections import Connections
from rpo.backends.chat_pace import Pace, Pacing, backoff_s, retry_after_s
from rpo.backends.chat_wire import ImageFormat, Question, Reply, Wire, redacted, refused, understood, unfinished
from rpo.data.answers import Answers
from rpo.data.chat import ChatAnswer, ChatRequest
from rpo.data.ledger import Account, Ledger
from rpo.errors import RowError, RpoError

_CLOSING_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """Where a model is served and how patiently it is asked: nothing here changes an answer."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Up to and without /chat/completions."""
    key_env: str = "RPO_API_KEY"
    """Environment variable that holds the key; servers of one's own need none."""
    prices: tuple[tuple[str, float, float], ...] = ()
    """(model, US dollars per million tokens read, the same per million written); --max-cost needs the model's."""
    timeout_s: float = 120.0
    """For one attempt."""
    deadline_s: float = 300.0
    """For one question from its first attempt on, waiting included."""
    attempts: int = 6
    """For one question."""
    retry_after_max_s: float = 120.0
    """A server that asks to wait longer is asked again after this."""
    pacing: Pacing = field(default_factory=Pacing)
    """How many at once, and when to pause."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must be like http://127.0.0.1:8000/v1, got {self.base_url!r}")
        if parts.username or parts.password or parts.query:
            raise ValueError("base_url must hold no key or password; put it into the environment variable that key_env names")
        for name in ("timeout_s", "deadline_s", "retry_after_max_s", "attempts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def price(self, model: str) -> tuple[float, float] | None:
        """US dollars per token read and per token written."""
        return next(((read / 1e6, written / 1e6) for name, read, written in self.prices if name == model), None)


@dataclass(frozen=True, kw_only=True)
class OpenAIChatConfig:
    """A model behind an OpenAI-compatible address. Builds a `Chat`."""

    model: str
    """As the server calls it."""
    server: ChatServer = field(default_factory=ChatServer, metadata={"changes_results": False})
    """Where it is served."""
    revision: str = ""
    """Of the weights, if known: answers of another revision are not taken from the cache."""
    side_max: int = 1024
    """Larger images are made smaller here: a server that does it on its CPU starves its GPU."""
    image_format: ImageFormat = "webp"
    """webp is lossless and read by vLLM, SGLang, transformers and hosted servers; png, for any other, is as exact and takes twice the
    processor's time; jpeg (quality 90) a sixth of it."""
    send_schema: bool = True
    """Whether the server is given the JSON schema; answers are validated either way."""
    extra: str = "{}"
    """JSON object of further fields of the request, such as {"chat_template_kwargs": {"enable_thinking": false}}."""

    def __post_init__(self) -> None:
        if self.side_max < 16:
            raise ValueError(f"side_max must be at least 16, got {self.side_max}")
        try:
            told = json.loads(self.extra)
        except ValueError as error:
            raise ValueError(f"extra must be a JSON object ({error}), got {self.extra!r}") from error
        if not isinstance(told, dict):
            raise ValueError(f"extra must be a JSON object, got {self.extra!r}")
        if "messages" in told:
            raise ValueError("extra must not hold 'messages': they would take the place of the question and its images")

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def at(self, *, base_url: str | None, model: str | None) -> "OpenAIChatConfig":
        """The same, served elsewhere or by another model."""
        return replace(self, server=replace(self.server, base_url=base_url or self.server.base_url), model=model or self.model)

    def build(self) -> "OpenAIChat":
        """Without a run folder: answers and ledger are forgotten with the process."""
        return self.build_metered(None)

    def build_metered(self, account: Account | None) -> "OpenAIChat":
        if account is not None and account.max_cost is not None and self.server.price(self.model) is None:
            raise ValueError(f"--max-cost needs the price of {self.model!r}; add it to server.prices")
        return OpenAIChat(self, _line(self.server, account))


class OpenAIChat:
    """A `Chat`. All of a process that ask the same server share one line to it, and so one limit of requests at once."""

    def __init__(self, config: OpenAIChatConfig, line: "_Line") -> None:
        self._line, self._model, self._price = line, config.model, config.server.price(config.model)
        self._wire = Wire(
            model=config.model,
            revision=config.revision,
            side_max=config.side_max,
            image_format=config.image_format,
            send_schema=config.send_schema,
            extra=config.extra,
        )

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        asked = [self._line.submit(self._line.answer(self._wire.question(r), self._model, self._price)) for r in requests]
        answers: list[ChatAnswer | RowError] = []
        stop: RpoError | None = None
        for future in asked:  # all of them, also after a stop: what is under way is paid for and must be kept
            try:
                answers.append(future.result())
            except RpoError as error:
                stop = stop or error
        if stop is not None:
            raise stop
        return answers


_lines: list["_Line"] = []
_lines_lock = threading.Lock()


def _line(server: ChatServer, account: Account | None) -> "_Line":
    with _lines_lock:
        for line in _lines:
            if line.ends == (server, account) and line.stopped is None:
                return line
        _lines.append(_Line(server, account))
        return _lines[-1]


def hang_up() -> None:
    """Closes every line of this process; also done at its end."""
    with _lines_lock:
        lines = _lines[:]
        _lines.clear()
    for line in lines:
        line.close()


atexit.register(hang_up)


class _Line:
    """One event loop in a thread, with the connections, one pace and the two databases in it."""

    def __init__(self, server: ChatServer, account: Account | None) -> None:
        self.ends = (server, account)
        self._ledger, self._answers = Ledger(account), Answers(account and account.answers)
        self._server = server
        self._key = os.environ.get(server.key_env, "")
        self._connections = Connections(server.base_url, self._key, server.timeout_s)
        self.pace = Pace(server.pacing, server.base_url)
        self.stopped: RpoError | None = None
        self._stopping = asyncio.Event()
        self._counts_money = account is not None and account.max_cost is not None
        self._asking: dict[str, asyncio.Task[ChatAnswer | RowError]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rpo-chat", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        if not self._loop.is_running():
            return
        self.submit(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        """Sends nothing more and waits a little for what is under way, which is paid for."""
        self._stop_for(RpoError("the line to the server is closed"))
        if self._asking:
            await asyncio.wait(list(self._asking.values()), timeout=_CLOSING_S)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._connections.close()
        self._ledger.close()
        self._answers.close()

    async def answer(self, question: Question, model: str, price: tuple[float, float] | None) -> ChatAnswer | RowError:
        """From the cache, from whoever is asking the same, or from the server."""
        kept = self._answers.get(question.key)
        if kept is not None:
            return _whole(*kept, question)
        task = self._asking.get(question.key)
        if task is None:
            task = self._asking[question.key] = asyncio.create_task(self._ask(question, model, price))
            task.add_done_callback(lambda _: self._asking.pop(question.key, None))
        return await task

    async def _ask(self, question: Question, model: str, price: tuple[float, float] | None) -> ChatAnswer | RowError:
        attempt, deadline, body = 0, None, None
        while True:
            entered = await self.pace.enter()
            deadline = deadline or self._loop.time() + self._server.deadline_s
            try:
                # Not before its turn, so that no more images wait encoded than are under way; on all cores, while others are.
                body = body or await asyncio.to_thread(question.body)
                reply = await self._attempt(question, body, model, price, deadline)
            except BaseException as error:
                self.pace.leave_unused()
                self._stop_for(error)
                raise
            self._leave(entered, reply)
            if reply.answer is not None:
                return _whole(reply.answer, reply.finish, question)
            if reply.final == "row":
                return RowError(reply.why)
            attempt += reply.outcome != "unreachable"  # a server that is not there is no fault of the row's
            floor = min(reply.retry_after_s, self._server.retry_after_max_s)
            wait = max(backoff_s(max(attempt, 1), floor), self.pace.retry_wait_s())
            if attempt >= self._server.attempts:
                return RowError(f"{reply.why} (after {attempt} attempts)")
            if reply.outcome == "unreachable":
                deadline = deadline + wait
            elif self._loop.time() + wait >= deadline:
                return RowError(f"{reply.why} (no time left of {self._server.deadline_s:g} s after {attempt} attempts)")
            await self._sleep(wait)

    async def _sleep(self, wait: float) -> None:
        try:
            async with asyncio.timeout(wait):
                await self._stopping.wait()
        except TimeoutError:
            return
        assert self.stopped is not None
        raise self.stopped

    def _leave(self, entered: int, reply: Reply) -> None:
        try:
            self.pace.leave(entered, reply.outcome, reply.why)
            if reply.final == "run":
                raise RpoError(f"{self._server.base_url}: {reply.why}. Then go on with --resume.")
        except RpoError as error:
            self._stop_for(error)
            raise

    def _stop_for(self, error: BaseException) -> None:
        """After what ends the run nothing more is sent; what is under way is awaited, since it is paid for."""
        if isinstance(error, RpoError) and self.stopped is None:
            self.stopped = error
            self.pace.close(error)
            self._stopping.set()

    async def _attempt(self, question: Question, body: bytes, model: str, price: tuple[float, float] | None, deadline: float) -> Reply:
        """One HTTP request, entered in the ledger before and after."""
        number = self._ledger.begin(question.purpose, model, question.key)
        began = time.monotonic()
        reply = await self._post(body, question.only_first_token, deadline)
        answer = reply.answer or ChatAnswer(text="")
        if reply.answer is not None:  # before the ledger: a process that dies in between must not ask again
            self._answers.put(question.key, answer, reply.finish)
        cost = price[0] * answer.input_tokens + price[1] * answer.output_tokens if price else 0.0
        outcome = "answered" if reply.answer else reply.why
        if reply.answer and self._counts_money and not answer.input_tokens:
            raise RpoError(f"{self._server.base_url} tells no token counts, so --max-cost cannot be held; use --max-calls")
        self._ledger.end(number, outcome, time.monotonic() - began, answer.input_tokens, answer.output_tokens, cost)
        return reply

    async def _post(self, body: bytes, only_first_token: bool, deadline: float) -> Reply:
        import httpx2
        import openai

        allowed = min(self._server.timeout_s, deadline - self._loop.time())
        try:
            async with asyncio.timeout(max(allowed, 0.001)):  # httpx's own time-outs start anew with every byte of a slow drip
                response = await self._connections.post(body)
            content = redacted(response.content, self._key)
            return understood(response.headers.get("content-type", ""), content, only_first_token)
        except (TimeoutError, openai.APITimeoutError) as error:
            unreached = isinstance(error.__cause__, httpx2.ConnectTimeout)
            return Reply(outcome="unreachable" if unreached else "busy", why=f"no answer within {allowed:.1f} s")
        except openai.APIStatusError as error:
            content = redacted(error.response.content, self._key)
            return refused(error.status_code, content, retry_after_s(error.response.headers))
        except openai.APIConnectionError as error:
            unreached = isinstance(error.__cause__, httpx2.ConnectError)
            return Reply(outcome="unreachable" if unreached else "bad", why=f"the connection failed: {error.__cause__ or error}")
        except httpx2.HTTPError as error:  # while the body of a refusal was read
            return Reply(outcome="bad", why=f"the connection failed: {error}")


def _whole(answer: ChatAnswer, finish: str, question: Question) -> ChatAnswer | RowError:
    why = unfinished(finish, question.only_first_token)
    return RowError(why, raw=answer.text) if why else answer

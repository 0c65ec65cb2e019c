"""Any vision-language model behind an OpenAI-compatible address: vLLM, SGLang, `transformers serve`, a hosted one.

`chat_connections` carries one attempt, `chat_pace` decides when, `chat_wire` what is sent and `chat_replies` what came back; the
answers and the ledger in the run folder see to it that nothing is asked or paid for twice.
"""

import asyncio
import atexit
import json
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from rpo.accounting.answers import Answers
from rpo.accounting.ledger import Account, Ledger
from rpo.backends.chat.connections import Connections, Response, read_key, secret_of, unreachable
from rpo.backends.chat.pacing import Outcome, Pace, Pacing, Turn, backoff_s
from rpo.backends.chat.replies import (
    NO_LOGPROBS,
    Answer,
    Redactor,
    Refusals,
    Reply,
    Retry,
    StopRun,
    parsed,
    refused,
    understood,
    unfinished,
)
from rpo.backends.chat.wire import ImageFormat, Question, Wire
from rpo.data.chat import ChatAnswer, ChatRequest
from rpo.errors import RowError, RpoError, UnansweredError

_CLOSING_S = 5.0
_LEAST_S = 3.0
"""Nothing is sent with less time than this for its answer, or a quarter of the time that an attempt or a question has in all."""
_OTHER_S = 0.25
"""Between two looks at whether another process has its answer."""


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """Where a model is served and how patiently it is asked: nothing here changes an answer."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Up to and without /chat/completions."""
    key_env: str = "RPO_API_KEY"
    """Environment variable that holds the key; servers of one's own need none. White space around the key is left out. A key is
    redacted in all that a server returns, and must have at least 8 characters; EMPTY and such words count as no secret."""
    prices: tuple[tuple[str, float, float], ...] = ()
    """(model, US dollars per million tokens read, the same per million written); --max-cost needs the model's."""
    timeout_s: float = 120.0
    """For one attempt."""
    deadline_s: float = 300.0
    """For one question: its attempts and the waits between them, without the time in which it waits for its turn or the server
    is left alone. One that has no answer by then is asked again by --resume."""
    attempts: int = 6
    """For one question; those in which the server was not there do not count."""
    retry_after_max_s: float = 120.0
    """A server that asks to wait longer is asked again after this."""
    pacing: Pacing = field(default_factory=Pacing)
    """How many at once, and when to pause."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.username or parts.password or parts.query:  # refused first: the other message repeats the address
            raise ValueError("base_url must hold no key or password; put it into the environment variable that key_env names")
        try:
            _, well_formed = parts.port, " " not in self.base_url and self.base_url.isprintable()
        except ValueError:  # the port is no number, or too large
            well_formed = False
        if parts.scheme not in ("http", "https") or not parts.hostname or not well_formed:
            raise ValueError(f"base_url must be like http://127.0.0.1:8000/v1, got {self.base_url!r}")
        for name in ("timeout_s", "deadline_s", "retry_after_max_s", "attempts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def key(self) -> str:
        """The key from the environment. Raises `RpoError` for one that cannot be sent or redacted."""
        return read_key(self.key_env)

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
    """JSON object of further fields of the request, such as {"chat_template_kwargs": {"enable_thinking": false}}; null leaves a field
    out, as in {"max_tokens": null, "max_completion_tokens": 1024}."""
    system_as_user: bool = field(default=False, metadata={"added": True})
    """Whether the system text is sent as the first text of the user, for chat templates that know no system role (Gemma 2, PaliGemma)."""

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

    def unreachable(self) -> str | None:
        return unreachable(self.server.base_url)

    def build(self) -> "OpenAIChat":
        """Without a run folder: answers and ledger are forgotten with the process."""
        return self.build_metered(None)

    def check_account(self, account: Account) -> None:
        self.server.key()
        if account.max_cost is not None and self.server.price(self.model) is None:
            raise ValueError(f"--max-cost needs the price of {self.model!r}; add it to server.prices")

    def build_metered(self, account: Account | None) -> "OpenAIChat":
        if account is not None:
            self.check_account(account)
        return OpenAIChat(self, _line(self.server, account))

    def close_metered(self, account: Account | None) -> None:
        """Closes the connections that models with this server and account have open in this process."""
        hang_up((self.server, account))


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
            system_as_user=config.system_as_user,
        )

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        futures = [self._line.submit(self._line.answer(self._wire.question(r), self._model, self._price)) for r in requests]
        answers: list[ChatAnswer | RowError] = []
        stop: RpoError | None = None
        for future in futures:  # all of them, also after a stop: what is under way is paid for and must be kept
            try:
                answers.append(future.result())
            except RpoError as error:
                stop = stop or error
        if stop is not None:
            raise stop
        return answers


_Ends = tuple[ChatServer, Account | None]
_lines: list["_Line"] = []
_lines_lock = threading.Lock()


def _line(server: ChatServer, account: Account | None) -> "_Line":
    with _lines_lock:
        for line in _lines:
            if line.ends == (server, account) and line.stopped is None:
                return line
        _lines.append(_Line(server, account))
        return _lines[-1]


def hang_up(ends: _Ends | None = None) -> None:
    """Closes every line of this process, or those between `ends` only; also done at its end."""
    with _lines_lock:
        lines = [line for line in _lines if ends is None or line.ends == ends]
        _lines[:] = [line for line in _lines if line not in lines]
    for line in lines:
        line.close()


atexit.register(hang_up)


class _Line:
    """One event loop in a thread, with the connections, one pace and the two databases in it."""

    def __init__(self, server: ChatServer, account: Account | None) -> None:
        self.ends: _Ends = (server, account)
        self._server = server
        key = server.key()
        self._redact = Redactor(secret_of(key))
        self._connections = Connections(server.base_url, key)
        self._ledger, self._answers = Ledger(account), Answers(account and account.answers)
        self.pace = Pace(server.pacing, server.base_url, server.timeout_s)
        self.stopped: RpoError | None = None
        self._stopping = asyncio.Event()
        self._counts_money = account is not None and account.max_cost is not None
        self._gave_logprobs = False
        self._refusals = Refusals()
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
        server, body, tries, reply = self._server, None, 0, None
        left, least = server.deadline_s, min(_LEAST_S, server.timeout_s / 4, server.deadline_s / 4)
        try:
            while True:
                turn = await self._claimed_turn(question)  # time at the gate is not the question's
                if isinstance(turn, RowError | ChatAnswer):
                    return turn
                began = self._loop.time()
                try:
                    # Not before its turn, so that no more images wait encoded than are under way; on all cores, while others are.
                    body = body or await asyncio.to_thread(question.body)
                    reply = await self._attempt(question, body, model, price, min(server.timeout_s, left))
                except BaseException as error:
                    self.pace.leave_unused()
                    self._stop_for(error)
                    raise
                self._leave(turn, question, reply, whole_time=left >= server.timeout_s)
                if isinstance(reply, Answer):
                    return _whole(reply.answer, reply.finish, question)
                if not isinstance(reply, Retry):
                    return UnansweredError(reply.why)
                wait = backoff_s(max(tries, 1), min(reply.retry_after_s, server.retry_after_max_s))
                # A server that is not there, or asks everybody for less, is no fault of this question.
                if not (reply.trouble == "unreachable" or (reply.trouble == "busy" and self.pace.paused)):
                    tries, left = tries + 1, left - (self._loop.time() - began) - wait
                    if tries >= server.attempts:
                        return UnansweredError(f"{reply.why} (after {tries} attempts)")
                    if left < least:
                        return UnansweredError(f"{reply.why} (no time left of {server.deadline_s:g} s after {tries} attempts)")
                await self._sleep(wait)
        finally:
            if not isinstance(reply, Answer):
                self._answers.release(question.key)

    async def _claimed_turn(self, question: Question) -> Turn | ChatAnswer | RowError:
        """A turn to ask a question that nobody else asks; the answer if another process that shares the answers had it meanwhile."""
        lease = self._server.timeout_s + self._server.retry_after_max_s + 60
        while True:
            if not self._answers.is_claimed(question.key):
                turn = await self.pace.enter()
                try:
                    if self._answers.claim(question.key, lease):
                        return turn
                except BaseException as error:
                    self.pace.leave_unused()
                    self._stop_for(error)
                    raise
                self.pace.leave_unused()
            kept = self._answers.get(question.key)
            if kept is not None:
                return _whole(*kept, question)
            await self._sleep(_OTHER_S)

    async def _sleep(self, wait: float) -> None:
        try:
            async with asyncio.timeout(wait):
                await self._stopping.wait()
        except TimeoutError:
            return
        assert self.stopped is not None
        raise self.stopped

    def _leave(self, turn: Turn, question: Question, reply: Reply, *, whole_time: bool) -> None:
        """Tells the pace how the attempt ended, and ends the run when no question can be answered."""
        if isinstance(reply, Retry) and reply.trouble == "late" and not whole_time:
            return self.pace.leave_unused()  # the question had little time left, and the server no chance
        outcome: Outcome = reply.trouble if isinstance(reply, Retry) else "answered" if isinstance(reply, Answer) else "refused"
        if isinstance(reply, StopRun):
            self._stop_for(self._stop(reply.why))  # before the next may enter
        try:
            self.pace.leave(turn, outcome, reply.why if isinstance(reply, Retry) else "")
            if why := self._refusals.add(question.key, reply, paused=self.pace.paused):
                raise self._stop(why)
        except RpoError as error:
            self._stop_for(error)
        if self.stopped is not None and not isinstance(reply, Answer):
            raise self.stopped

    def _stop(self, why: str) -> RpoError:
        return RpoError(f"{self._connections.url}: {why}{self._connections.through}. Then go on with --resume.")

    def _stop_for(self, error: BaseException) -> None:
        """After what ends the run nothing more is sent; what is under way is awaited, since it is paid for."""
        if isinstance(error, RpoError) and self.stopped is None:
            self.stopped = error
            self.pace.close(error)
            self._stopping.set()

    async def _attempt(self, question: Question, body: bytes, model: str, price: tuple[float, float] | None, limit_s: float) -> Reply:
        """One HTTP request, entered in the ledger before and after, with all that it is billed whatever it came to."""
        number = self._ledger.begin(question.purpose, model, question.key)
        began = time.monotonic()
        reply = self._redacted(await self._connections.post(body, limit_s), question)
        usage = reply.usage
        if isinstance(reply, Answer):  # before the ledger: a process that dies in between must not ask again
            self._answers.put(question.key, reply.answer, reply.finish)
        cost = price[0] * usage.input_tokens + price[1] * usage.output_tokens if price else 0.0
        outcome = "answered" if isinstance(reply, Answer) else reply.why
        self._ledger.end(number, outcome, time.monotonic() - began, usage.input_tokens, usage.output_tokens, cost)
        if isinstance(reply, Answer) and self._counts_money and not (usage.input_tokens or usage.output_tokens):
            raise RpoError(f"{self._server.base_url} tells no token counts, so --max-cost cannot be held; use --max-calls")
        return reply

    def _redacted(self, response: Response | Retry | StopRun, question: Question) -> Reply:
        """What a response means, without the key."""
        if not isinstance(response, Response):
            return replace(response, why=self._redact.text(response.why))
        if response.status != 200:
            return refused(response.status, parsed(response.body, self._redact), response.headers, self._redact)
        reply = understood(response.headers, response.body, question.only_first_token, self._redact)
        if question.only_first_token and isinstance(reply, Answer):
            self._gave_logprobs |= bool(reply.answer.first_token)
            if reply.finish == NO_LOGPROBS and not self._gave_logprobs:
                return StopRun(why=unfinished(NO_LOGPROBS, True), usage=reply.usage)
        return reply


def _whole(answer: ChatAnswer, finish: str, question: Question) -> ChatAnswer | RowError:
    why = unfinished(finish, question.only_first_token)
    return RowError(why, raw=answer.text) if why else answer

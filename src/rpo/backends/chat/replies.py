"""What comes back from an OpenAI-compatible server, as an answer or the reason why there is none. Pure functions."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

from rpo.accounting.ledger import MAYBE_BILLED
from rpo.backends.chat.pacing import Trouble, retry_after_s
from rpo.data.chat import FIRST_TOKEN_MAX, ChatAnswer
from rpo.data.model_text import clean

TEXT_MAX = 64_000
"""Characters of an answer, at most; no question of ours has a longer one."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that a server billed; 0 where it gives no number that makes sense."""

    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer, whole or not: `unfinished` says which by its finish reason. It is paid for and never asked for again."""

    answer: ChatAnswer
    finish: str
    usage: Usage = Usage()


@dataclass(frozen=True, kw_only=True)
class Retry:
    """No answer this time; the same question may have one later."""

    trouble: Trouble
    why: str
    status: int = 0
    """Of the HTTP response, if there was one."""
    retry_after_s: float = 0.0
    usage: Usage = Usage()


@dataclass(frozen=True, kw_only=True)
class RefuseRow:
    """The server refuses this question, whenever it is asked."""

    why: str
    of_content: bool = False
    """Whether for what the question shows or says (moderation), which tells nothing about other questions."""
    usage: Usage = Usage()


@dataclass(frozen=True, kw_only=True)
class StopRun:
    """No question can be asked until the user changes something."""

    why: str
    usage: Usage = Usage()


Reply = Answer | Retry | RefuseRow | StopRun
"""What one HTTP attempt came to."""

NO_LOGPROBS = "no log probabilities"
_NO_TEXT = "no text"
_UNUSABLE = "unusable: "
_WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "end")
_CUT = ("length", "max_tokens", "max_new_tokens")
_ADDRESS = "base_url must be the address up to and without /chat/completions, such as http://HOST:PORT/v1"
_MENDS = {
    401: "the server does not accept the key; put the right one into the environment variable that server.key_env names",
    402: "the account has no credit left",
    403: "the key has no right to this model",
    404: f"no such model or address; {_ADDRESS}, and `model` must be a name that BASE_URL/models lists",
    405: f"the address takes no questions; {_ADDRESS}",
    407: "the proxy wants a login; put it into the proxy's address, or list the server in NO_PROXY",
}
_HINTS = (
    (r"system.{0,30}role|role.{0,30}system|roles? must alternate", "set system_as_user to True for a chat template without a system role"),
    (r"response_format|json_schema|grammar|guided|schema", "set send_schema to False if the server knows no JSON schemas"),
    (r"max_tokens", 'a null in `extra` leaves a field out, as in {"max_tokens": null, "max_completion_tokens": 1024}'),
    (r"logprobs", "yes/no questions need a server that gives log probabilities"),
    (r"image|webp|concatenate", "the model must read images; image_format png is read by every server that does"),
    (r"model.{0,60}(not|unknown|exist|invalid|load)|unknown model|pinned", "`model` must be a name that BASE_URL/models lists"),
)
_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_CODES = {"rate_limit": 429, "overloaded": 503, "unavailable": 503, "timeout": 504, "invalid": 400, "context_length": 400,
          "unsupported": 400, "not_found": 404, "authentication": 401, "permission": 403}  # fmt: skip
"""Statuses for words in the `code` or `type` of an error that comes with HTTP 200."""
_BUSY = (408, 429, 503, 529)
_ONE_LINE = 300
_MODERATION = re.compile("moderat|flagged|content.?(filter|policy|management)|safety", re.IGNORECASE)
_ALIKE, _BROKEN_ALIKE = 5, 3
"""Different questions that show that a server refuses all: with a refusal (4xx), or with as many failures (500) as make a pause."""
_REQUEST_ID = re.compile(r"\b(?:req_|chatcmpl-)\w+|\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b[0-9a-f]{16,}\b", re.IGNORECASE)
"""What differs from one refusal to the next although the reason is the same."""


def one_line(text: str, length: int = _ONE_LINE) -> str:
    """The beginning of a server's words, without line breaks and what could control a terminal or a log."""
    return clean(text[: 4 * length])[:length]


@dataclass(frozen=True)
class Redactor:
    """Takes the key out of a server's strings, in whatever way it is escaped there."""

    key: str = ""

    def __call__(self, value: Any) -> Any:
        """A decoded JSON value without the key, and without halves of surrogate pairs, which no file could hold."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self(item) for item in cast("list[Any]", value)]
        if isinstance(value, dict):
            return {self.text(name): self(item) for name, item in cast("dict[str, Any]", value).items()}
        return value

    def text(self, text: str) -> str:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not text.isascii() else text
        return _escaped(self.key).sub("[key]", text) if self.key else text


@lru_cache(maxsize=4)
def _escaped(key: str) -> re.Pattern[str]:
    """The key with each character as it is, or in JSON's, a URL's or HTML's way to write it."""
    forms = (
        rf"(?:\\{{0,4}}{re.escape(c)}|\\{{1,4}}u00(?i:{ord(c):02x})|%(?i:{ord(c):02x})|&#0?{ord(c)};|&#x(?i:{ord(c):x});)" for c in key
    )
    return re.compile("".join(forms))


def _dict(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def parsed(body: bytes, redact: Redactor) -> Any:
    """The JSON value of a body, whatever its content type; the body's text if it is no JSON."""
    text = body.decode("utf-8-sig", errors="replace")
    try:
        return redact(json.loads(text))
    except (ValueError, RecursionError):
        return redact.text(text[: 16 * _ONE_LINE])


def read_usage(given: Any) -> Usage:
    """What a body bills. Numbers that make no sense are none."""
    told = _dict(_dict(given).get("usage"))
    read, written = (_count(told, *names) for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")))
    total = _count(told, "total_tokens")
    return Usage(input_tokens=read or max(total - written, 0), output_tokens=written or (max(total - read, 0) if read else 0))


def _count(told: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = told.get(name)
        if isinstance(value, str) and value.isdecimal() and len(value) < 10:
            value = int(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9:
            return int(value)
    return 0


def complaint(given: Any) -> tuple[str, str]:
    """(words, code and type) of a refusal: OpenAI's `error`, a bare `message`, FastAPI's `detail`, or whatever text there is."""
    if not isinstance(given, dict):
        return one_line(given if isinstance(given, str) else json.dumps(given)), ""
    body = _dict(given)
    error = next((body[name] for name in ("error", "detail", "errors") if body.get(name)), body)
    if isinstance(error, list):
        return one_line("; ".join(_detail(item) for item in _list(error)[:5])), ""
    if not isinstance(error, dict):
        return one_line(str(error)), f"{_text(body.get('code'))} {_text(body.get('type'))}"
    words = next((text for name in ("message", "msg", "detail", "error") if (text := _text(error.get(name)))), "")
    return one_line(words or (json.dumps(error) if error else "")), f"{error.get('code')} {error.get('type')}"


def _detail(item: Any) -> str:
    """An entry of FastAPI's list: the place in the request and what is wrong there."""
    where = ".".join(str(place) for place in _list(_dict(item).get("loc")))
    words = _text(_dict(item).get("msg")) or _text(_dict(item).get("message")) or str(item)
    return f"{where}: {words}" if where else words


def hint(words: str) -> str:
    """What to try when a server refuses with these words; empty if nothing is known."""
    return next((told for pattern, told in _HINTS if re.search(pattern, words, re.IGNORECASE)), "")


def refused(status: int, given: Any, headers: Mapping[str, str] | None = None, redact: Redactor | None = None) -> Reply:
    """The reply of a status that is not 200, or of an error inside a 200."""
    headers, redact = headers or {}, redact or Redactor()
    words, code = complaint(given)
    usage, wait = read_usage(given), retry_after_s(headers)
    why = f"HTTP {status}" + (f": {_REQUEST_ID.sub('…', words)}" if words else "")
    if any(name in code for name in _QUOTA):
        return StopRun(why=f"{why} ({_MENDS[402]})", usage=usage)
    if 300 <= status < 400:
        target = one_line(redact.text(headers.get("location", "")))
        way = f"to {target}: set base_url to {target.removesuffix('/').removesuffix('/chat/completions')}" if target else "to nowhere"
        return StopRun(why=f"HTTP {status}: the address redirects {way}", usage=usage)
    if status in (400, 403, 422) and _MODERATION.search(f"{words} {code}"):
        return RefuseRow(why=why, of_content=True, usage=usage)
    if status in _MENDS:
        return StopRun(why=f"{why} ({_MENDS[status]})", usage=usage)
    if status in _BUSY:
        return Retry(trouble="busy", why=why, status=status, retry_after_s=wait, usage=usage)
    if status >= 500 or status in (409, 425):
        return Retry(trouble="bad", why=why, status=status, retry_after_s=wait, usage=usage)
    return RefuseRow(why=why, usage=usage)


def _status_of(error: Any) -> int:
    """The status that an error inside a 200 would have had."""
    given = _dict(error)
    for name in ("code", "status", "status_code"):
        value = given.get(name)
        value = int(value) if isinstance(value, str) and value.isdecimal() and len(value) == 3 else value
        if isinstance(value, int) and 300 <= value < 600:
            return value
    words = f"{given.get('code')} {given.get('type')}".lower()
    return next((status for word, status in _CODES.items() if word in words), 500)


def understood(headers: Mapping[str, str], body: bytes, first_token: bool, redact: Redactor | None = None) -> Reply:
    """The reply of a status 200: an answer, an error that came as 200, or a body that is neither and may be asked for again."""
    redact = redact or Redactor()
    given = parsed(body, redact)
    if not isinstance(given, dict):
        kind = one_line(redact.text(headers.get("content-type", "")), 60) or "no content type"
        why = f"the server sent no JSON object ({kind}; {MAYBE_BILLED}): {one_line(str(given), 80)}"
        return Retry(trouble="bad", why=why, status=200)
    usage = read_usage(given)
    choice = _dict(next(iter(_list(_dict(given).get("choices"))), None))
    error = _dict(given).get("error") or choice.get("error")
    if error and not _dict(choice.get("message")).get("content"):
        return replace(refused(_status_of(error), {"error": error}, headers, redact), usage=usage)
    answer = _answer(choice, usage, first_token)
    if isinstance(answer, Answer):
        return answer
    why = f"the server's body is no chat completion: {answer}"
    if usage.input_tokens or usage.output_tokens:  # paid for: the same question would be paid for again
        return Answer(answer=ChatAnswer(text=""), finish=f"{_UNUSABLE}{why}", usage=usage)
    return Retry(trouble="bad", why=why, status=200)


def _answer(choice: Mapping[str, Any], usage: Usage, first_token: bool) -> Answer | str:
    """What a choice says, or why it is none."""
    if not choice:
        return "it has no choices"
    if "message" not in choice or not isinstance(choice["message"], dict):
        return "its choice has no message"
    message, finish = _dict(choice["message"]), choice.get("finish_reason") or ""
    content = message.get("content")
    odd = isinstance(content, list) and not all(isinstance(part, str | dict) for part in _list(content))
    if odd or not isinstance(finish, str) or not (content is None or isinstance(content, str | list)):
        return "its content or finish_reason is no text"
    text = content if isinstance(content, str) else "".join(_parts(_list(content)))
    finish = one_line(finish, 60)
    if len(text) > TEXT_MAX:
        text, finish = "", f"{_UNUSABLE}the answer has {len(text):,} characters, at most {TEXT_MAX:,} are read"
    elif content is None or (not text and not isinstance(content, str)):
        refusal = one_line(_text(message.get("refusal")))
        finish = f"{_NO_TEXT}: {refusal}" if refusal else finish if unfinished(finish, first_token) else _NO_TEXT
        finish = finish or _NO_TEXT
    alternatives = _first_token(choice.get("logprobs")) if first_token else {}
    if first_token and text and not alternatives:
        finish = NO_LOGPROBS
    said = ChatAnswer(text=text, input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, first_token=alternatives)
    return Answer(answer=said, finish=finish, usage=usage)


def _parts(content: list[Any]) -> Iterator[str]:
    """The texts of a content that comes in parts; what a model thought is none."""
    for part in content:
        if isinstance(part, str):
            yield part
        elif (_dict(part).get("type") or "text") in ("text", "output_text"):
            yield _text(_dict(part).get("text"))


def _first_token(logprobs: Any) -> dict[str, float]:
    """Alternatives of the first token that is a word (not a line break or a mark), by their text; spellings of one text add up, and what
    is no log probability is left out."""
    places = _list(_dict(logprobs).get("content"))
    words = (place for place in places if any(letter.isalnum() for letter in _text(_dict(place).get("token")) or "x"))
    place = _dict(next(words, places[0] if places else None))
    found: dict[str, float] = {}
    for alternative in _list(place.get("top_logprobs"))[: 4 * FIRST_TOKEN_MAX]:
        token, logprob = _dict(alternative).get("token"), _dict(alternative).get("logprob")
        if not isinstance(token, str) or len(token) > 1000 or isinstance(logprob, bool) or not isinstance(logprob, int | float):
            continue
        if not -math.inf < logprob <= 0.001:
            continue
        before = math.exp(found[token]) if token in found else 0.0
        found[token] = math.log(before + math.exp(logprob)) if before else float(logprob)
    return found


def unfinished(finish: str, only_first_token: bool) -> str:
    """Why an answer that ended for the reason `finish` is not whole; empty if it is."""
    reason = finish.lower()
    if reason in _WHOLE or (only_first_token and reason in _CUT):
        return ""
    if reason in _CUT:
        return "the answer was cut short at max_tokens"
    if finish.startswith(_NO_TEXT):
        return f"the model gave no text{finish.removeprefix(_NO_TEXT)}"
    if finish == NO_LOGPROBS:
        return "the server gives no log probabilities; yes/no questions need them (logprobs)"
    if finish.startswith(_UNUSABLE):
        return finish.removeprefix(_UNUSABLE)
    return f"the answer ended by {finish or 'no reason that was given'}"


class Refusals:
    """The questions that a server refuses while it has answered none: after a few different ones it is taken to refuse them all."""

    def __init__(self) -> None:
        self._answered = False
        self._alike: dict[int, set[str]] = {}

    def add(self, question: str, reply: Reply, *, paused: bool) -> str:
        """Why the run must end with this reply; empty while it need not. `paused`: whether the server failed many times in a row."""
        self._answered |= isinstance(reply, Answer)
        refuses = isinstance(reply, RefuseRow) and not reply.of_content
        if self._answered or not (refuses or isinstance(reply, Retry)):
            return ""
        status = 400 if isinstance(reply, RefuseRow) else reply.status
        if status not in (200, 400, 500, 501):
            self._alike.clear()  # a server that is ill in another way may get well
            return ""
        alike = self._alike.setdefault(status, set())
        alike.add(question)
        if len(alike) < _ALIKE if refuses else not paused or len(alike) < _BROKEN_ALIKE:
            return ""
        told = _ADDRESS if status == 200 else hint(reply.why)
        how = "answers no question:" if status == 200 else "refuses every question with"
        return f"the server {how} {reply.why}" + (f" ({told})" if told else "")

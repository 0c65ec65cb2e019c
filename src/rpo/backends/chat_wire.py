"""Questions as the bytes of an OpenAI-compatible request, and what comes back as an answer or a reason. Pure functions."""

import binascii
import hashlib
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rpo.backends.chat_pace import Outcome
from rpo.data.chat import FIRST_TOKEN_MAX, ChatAnswer, ChatRequest

ImageFormat = Literal["png", "webp", "jpeg"]
TEXT_MAX = 64_000
"""Characters of an answer; longer ones are cut off by nobody who means well."""
_ENCODING: dict[ImageFormat, dict[str, Any]] = {
    # zlib looks for runs only: photographs have few longer repetitions, and without them it is faster and makes no more bytes.
    "png": {"compress_level": 1, "compress_type": zlib.Z_RLE},
    "webp": {"lossless": True, "quality": 0, "method": 0},
    "jpeg": {"quality": 90, "subsampling": 0},
}


def encoded_image(image: np.ndarray, side_max: int, image_format: ImageFormat) -> bytes:
    """The image's bytes as they are sent, at most `side_max` on its longer side: equal images give equal bytes, without metadata."""
    height, width = image.shape[:2]
    if max(height, width) > side_max:
        scale = side_max / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(out, format=image_format.upper(), **_ENCODING[image_format])
    return out.getvalue()


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request ready to be sent."""

    key: str
    """sha256 of all that can change the answer, and of nothing else: the images by their pixels, no host, no key, no time-out."""
    body: Callable[[], bytes]
    """Encodes the images, which takes longer than all else: a question that has its answer already never does."""
    purpose: str
    only_first_token: bool


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How questions are put to a model."""

    model: str
    revision: str
    side_max: int
    image_format: ImageFormat
    send_schema: bool
    extra: str
    """JSON object of further fields of the body."""

    def question(self, request: ChatRequest) -> Question:
        parts = [part for message in request.messages for part in message.parts]
        texts, images = [part for part in parts if isinstance(part, str)], [part for part in parts if not isinstance(part, str)]
        # Where an image goes is marked by what no text can contain: a hash of all of them.
        mark = hashlib.sha256("\0".join(texts).encode(errors="replace")).hexdigest()
        body = self._body(request, mark)
        named = {"v": 2, "body": body, "revision": self.revision, "sample": request.sample, "first_token": request.first_token}
        named["images"] = [
            [self.image_format, self.side_max, image.shape, hashlib.sha256(np.ascontiguousarray(image)).hexdigest()] for image in images
        ]
        key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
        made = partial(self._filled, json.dumps(body, ensure_ascii=False), mark, images)
        return Question(key=key, body=made, purpose=request.purpose, only_first_token=request.first_token > 0)

    def _filled(self, text: str, mark: str, images: Sequence[np.ndarray]) -> bytes:
        first, *others = re.split(f'"{mark}\\d+"', text)  # fewer than images if `extra` replaces the messages
        body = [first.encode(errors="replace")]
        for image, after in zip(images, others, strict=False):
            data = binascii.b2a_base64(encoded_image(image, self.side_max, self.image_format), newline=False)
            body += [f'"data:image/{self.image_format};base64,'.encode(), data, b'"', after.encode(errors="replace")]
        return b"".join(body)

    def _body(self, request: ChatRequest, mark: str) -> dict[str, Any]:
        """The body with a marked place for each image."""
        sampling, numbers = request.sampling, itertools.count()
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": m.role, "content": self._content(m.parts, mark, numbers)} for m in request.messages],
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
        }
        if sampling.temperature > 0:
            body |= {"top_p": sampling.top_p, "seed": request.sample}
        if request.first_token:
            body |= {"logprobs": True, "top_logprobs": request.first_token}
        if request.schema is not None and self.send_schema:
            schema = {"name": request.schema_name, "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body | json.loads(self.extra)

    def _content(self, parts: tuple[str | np.ndarray, ...], mark: str, numbers: Iterator[int]) -> Any:
        if all(isinstance(part, str) for part in parts):
            return "\n".join(part for part in parts if isinstance(part, str))
        content: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                content.append({"type": "image_url", "image_url": {"url": f"{mark}{next(numbers)}"}})
        return content


class _Given(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
Token = Annotated[str, Field(max_length=1000)]
Logprob = Annotated[float, Field(allow_inf_nan=False, le=0.001)]


class _Alternative(_Given):
    token: Token
    logprob: Logprob


class _Place(_Given):
    token: Token | None = None
    top_logprobs: Annotated[list[_Alternative], Field(max_length=4 * FIRST_TOKEN_MAX)]


class _Logprobs(_Given):
    content: list[_Place] | None = None


class _Message(_Given):
    content: str | None = None
    refusal: str | None = None


class _Choice(_Given):
    message: _Message
    finish_reason: Annotated[str, Field(max_length=100)] | None
    logprobs: _Logprobs | None = None


class _Usage(_Given):
    prompt_tokens: Count
    completion_tokens: Count


class _Envelope(_Given):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


class _Complaint(_Given):
    message: str = ""
    code: str | int | None = None
    type: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an HTTP attempt came to. Either an answer, or `why` there is none."""

    outcome: Outcome
    answer: ChatAnswer | None = None
    finish: str = ""
    why: str = ""
    final: Literal["", "row", "run"] = ""
    """Whose end an answerless reply is, beyond any retry: the row's (the question is refused) or the run's (nothing can be asked)."""
    retry_after_s: float = 0.0


_MENDS = {
    401: "the server does not accept the key; put the right one into the environment variable that server.key_env names",
    402: "the account has no credit left",
    403: "the key has no right to this model",
    404: "no such model or address; base_url usually ends in /v1, and `model` must be a name that BASE_URL/models lists",
}
_BUSY = (408, 429, 503, 529)
_ONE_LINE = 300


def one_line(text: str, length: int = _ONE_LINE) -> str:
    return " ".join(text[: 4 * length].split())[:length]


def complaint(content: bytes) -> _Complaint:
    """What a server says of its refusal, as far as it can be understood."""
    try:
        given = json.loads(content)
        given = given.get("error", given) if isinstance(given, dict) else given
        return _Complaint.model_validate(given) if isinstance(given, dict) else _Complaint(message=one_line(str(given)))
    except (ValueError, RecursionError):
        return _Complaint(message=one_line(content[:2000].decode(errors="replace")))


def refused(status: int, content: bytes, retry_after_s: float) -> Reply:
    """The reply of a status that is not 200."""
    said = complaint(content)
    why = f"HTTP {status}" + (f": {one_line(said.message)}" if said.message else "")
    if status in _MENDS or said.code == "insufficient_quota":
        return Reply(outcome="good", final="run", why=f"{why} ({_MENDS.get(status, _MENDS[402])})")
    if status in _BUSY:
        return Reply(outcome="busy", why=why, retry_after_s=retry_after_s)
    if status >= 500 or status in (409, 425):
        return Reply(outcome="bad", why=why, retry_after_s=retry_after_s)
    return Reply(outcome="good", final="row", why=why)


def understood(content_type: str, content: bytes, first_token: bool) -> Reply:
    """The reply of a status 200: an answer, or a body that is none and may be asked for again."""
    if content_type.split(";")[0].strip().lower() != "application/json":
        return Reply(outcome="bad", why=f"the server sent {one_line(content_type, 60) or 'no content type'} in place of JSON")
    try:
        envelope = _Envelope.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(place) for place in first["loc"])
        return Reply(outcome="bad", why=one_line(f"the server's body is no chat completion: {where + ': ' if where else ''}{first['msg']}"))
    choice = envelope.choices[0]
    if choice.message.content is None:
        said = choice.message.refusal or choice.finish_reason or "no reason given"
        return Reply(outcome="good", final="row", why=f"the model gave no text ({one_line(said)})")
    if len(choice.message.content) > TEXT_MAX:
        return Reply(outcome="bad", why=f"the answer has {len(choice.message.content):,} characters, at most {TEXT_MAX:,} are read")
    usage = envelope.usage or _Usage(prompt_tokens=0, completion_tokens=0)
    alternatives = _first_token(choice.logprobs) if first_token else {}
    if first_token and not alternatives:
        return Reply(outcome="good", final="row", why="the server tells no log probabilities; yes/no questions need them (logprobs)")
    answer = ChatAnswer(
        text=choice.message.content,
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        first_token=alternatives,
    )
    return Reply(outcome="good", answer=answer, finish=choice.finish_reason or "")


def _first_token(logprobs: _Logprobs | None) -> dict[str, float]:
    """Alternatives of the first token that is a word (not a line break or a mark), by their text; spellings of one text add up."""
    places = (logprobs.content or []) if logprobs else []
    words = (place for place in places if place.token is None or any(letter.isalnum() for letter in place.token))
    place = next(words, places[0] if places else None)
    found: dict[str, float] = {}
    for alternative in place.top_logprobs if place else []:
        before = math.exp(found[alternative.token]) if alternative.token in found else 0.0
        found[alternative.token] = math.log(before + math.exp(alternative.logprob)) if before else alternative.logprob
    return found


def unfinished(finish: str, only_first_token: bool) -> str:
    """Why an answer that ended for the reason `finish` is not whole; empty if it is."""
    if finish == "stop" or (only_first_token and finish == "length"):
        return ""
    if finish == "length":
        return "the answer was cut short at max_tokens"
    return f"the answer ended by {one_line(finish, 60) or 'no reason that was told'}"


def redacted(content: bytes, secret: str) -> bytes:
    """The content without the key, should a server repeat it."""
    return content.replace(secret.encode(), b"[key]") if secret else content

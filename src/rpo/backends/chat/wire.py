"""Questions as the bytes of an OpenAI-compatible request. Pure functions."""

import binascii
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image

from rpo.data.chat import ChatRequest, without_system

ImageFormat = Literal["png", "webp", "jpeg"]
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
    """JSON object of further fields of the body; null leaves a field out."""
    system_as_user: bool = False
    """Whether the system text is sent as the first text of the user."""

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
        messages = without_system(request.messages) if self.system_as_user else request.messages
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": m.role, "content": self._content(m.parts, mark, numbers)} for m in messages],
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
        return {name: value for name, value in (body | json.loads(self.extra)).items() if value is not None}

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

"""A vision-language model in this process, through transformers: for a machine that serves nothing."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from rpo.backends.diffusers.pipelines import pick_device, pinned
from rpo.backends.scorers.towers import shared
from rpo.data.chat import ChatAnswer, ChatRequest, Message, without_system
from rpo.errors import RowError, RpoError
from rpo.models.pipeline_folder import check_bounds

_ONE_AT_A_TIME = threading.Lock()
"""For all models: they share the generator that sampling draws from."""


@dataclass(frozen=True, kw_only=True)
class TransformersChatConfig:
    """A vision-language model loaded here. Builds a `Chat`."""

    model: str
    """Hub id or folder of an `AutoModelForImageTextToText` with its processor and chat template, as safetensors."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    device: str | None = None
    """cuda or cpu; the best there is if not given."""
    dtype: str = "auto"
    """bfloat16, float16, float32, or auto: as the weights are."""
    side_max: int = 1024
    """Larger images are made smaller first."""
    system_as_user: bool = field(default=False, metadata={"added": True})
    """Whether the system text is sent as the first text of the user, for chat templates that know no system role (Gemma 2, PaliGemma)."""

    def models(self) -> tuple[str, ...]:
        return (pinned(self.model, self.revision),)

    def build(self) -> "TransformersChat":
        return TransformersChat(self)


class TransformersChat:
    """A `Chat` that answers one question after the other, so that no answer depends on its neighbours. Schemas bind nobody here."""

    def __init__(self, config: TransformersChatConfig) -> None:
        self._side_max, self._system_as_user = config.side_max, config.system_as_user
        self._name, self._device = config.model, pick_device(config.device)
        where = {"revision": config.revision, "trust_remote_code": False}
        if Path(config.model).is_dir():
            check_bounds(Path(config.model))
        try:
            self._processor: Any = AutoProcessor.from_pretrained(config.model, **where)
            dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
            load = partial(AutoModelForImageTextToText.from_pretrained, config.model, dtype=dtype, use_safetensors=True, **where)
            # Critic, instructor and judges on one model hold it once.
            key = ("chat", config.model, config.revision, self._device, config.dtype)
            self._model: Any = shared(key, lambda: load().to(self._device).eval())
        except (OSError, ValueError, ImportError) as error:
            raise RpoError(
                f"{config.model} cannot be loaded as a vision-language model ({' '.join(str(error).split())[:400]}). If it needs a video "
                "processor or code of its own, serve it (docs/vlm.md) and ask it by rpo.backends.chat.openai."
            ) from error
        if getattr(self._processor, "chat_template", None) is None:
            raise RpoError(f"{config.model} has no chat template, so it is not known how to ask it; take its instruction-tuned variant")

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        with _ONE_AT_A_TIME:
            return [self._answer(request) for request in requests]

    def _image(self, image: np.ndarray) -> Image.Image:
        small = Image.fromarray(image)
        small.thumbnail((self._side_max, self._side_max), Image.Resampling.LANCZOS)
        return small

    def _turn(self, message: Message) -> dict[str, Any]:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": self._image(part)}
            for part in message.parts
        ]
        return {"role": message.role, "content": content}

    @torch.inference_mode()
    def _answer(self, request: ChatRequest) -> ChatAnswer | RowError:
        messages = without_system(request.messages) if self._system_as_user else request.messages
        turns = [self._turn(message) for message in messages]
        try:
            inputs = self._processor.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self._device, dtype=self._model.dtype)
        except TemplateError as error:
            why = f"the chat template of {self._name} refuses the question ({' '.join(str(error).split())[:300]})"
            raise RpoError(f"{why}; if it knows no system role, set system_as_user to True") from error
        read = inputs["input_ids"].shape[1]
        sampling = request.sampling
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        # Sampling draws from the global generator: it is set for this answer alone and put back.
        with torch.random.fork_rng([torch.device(self._device)] if self._device.startswith("cuda") else []):
            torch.manual_seed(request.sample)
            out = self._model.generate(
                **inputs, **drawn, max_new_tokens=sampling.max_tokens, return_dict_in_generate=True, output_logits=request.first_token > 0
            )
        written = out.sequences[0, read:]
        text = self._processor.decode(written, skip_special_tokens=True)
        if request.first_token:
            first = self._alternatives(out.logits[self._first_word(written)][0], request.first_token)
            return ChatAnswer(text=text, input_tokens=read, output_tokens=len(written), first_token=first)
        if int(written[-1]) not in self._ends():
            return RowError("the answer was cut short at max_tokens", raw=text)
        return ChatAnswer(text=text, input_tokens=read, output_tokens=len(written))

    def _first_word(self, written: torch.Tensor) -> int:
        """Place of the first token that is a word; of the first without one."""
        tokens = (self._processor.decode([token], skip_special_tokens=True) for token in written.tolist())
        return next((place for place, token in enumerate(tokens) if any(letter.isalnum() for letter in token)), 0)

    def _ends(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _alternatives(self, logits: torch.Tensor, count: int) -> dict[str, float]:
        """Of the untempered distribution, as servers tell it; tokens of equal text add up."""
        top = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1]))
        found: dict[str, float] = {}
        for logprob, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            word = self._processor.decode([token])
            found[word] = float(np.logaddexp(found[word], logprob)) if word in found else logprob
        return found

"""The Qwen2-VL processor without its video half, which transformers can only build where torchvision is installed."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, ProcessorMixin, Qwen2VLImageProcessorPil, Qwen2VLProcessor


class PictureReader(Qwen2VLProcessor):
    """Prepares images and text just as its parent does, always with Pillow, so that results depend on no optional library."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        # The parent's own would ask for a video processor; what a processor holds follows from this signature.
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def load(cls, folder: Path) -> "PictureReader":
        """The reader of a `Qwen2VLProcessor` folder."""
        return cls(Qwen2VLImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))

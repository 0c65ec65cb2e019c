"""How an editor wants to be spoken to: the families' wording, and the one request that is made of several instructions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

EditorFamily = Literal["ip2p", "kontext", "qwen", "klein"]
REQUEST_MAX = 1500
"""Characters of a request to an editor."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """One family's manner."""

    template: str
    """Name of the template that tells the instructor how to write."""
    max_words: int
    """Of one instruction."""
    joiner: str
    """Between two changes of one request."""
    keeps: str
    """What is said about the rest; `{}` stands for what the critique wants kept."""


_KEEP = "Keep everything else exactly the same{}."
WORDINGS: dict[EditorFamily, Wording] = {
    # InstructPix2Pix and ControlNet-ip2p know short imperatives; words about what to keep become changes.
    "ip2p": Wording(template="wording_ip2p", max_words=25, joiner=" and ", keeps=""),
    "kontext": Wording(template="wording_full", max_words=40, joiner=". ", keeps=_KEEP),
    "qwen": Wording(template="wording_full", max_words=40, joiner=". ", keeps=_KEEP),
    # FLUX.2-klein is known to beautify the whole picture and to shift it.
    "klein": Wording(
        template="wording_full", max_words=40, joiner=". ", keeps=_KEEP + " Do not change style, lighting, sharpness or framing."
    ),
}


def edit_request(instructions: Sequence[str], keep: Sequence[str], family: EditorFamily) -> str:
    """The words the editor reads for all `instructions` at once; empty without any. Of `keep`, what fits into `REQUEST_MAX`."""
    wording = WORDINGS[family]
    if not instructions or not wording.keeps:
        return wording.joiner.join(instructions)
    changes = wording.joiner.join(_sentence(instruction) for instruction in instructions)
    kept: list[str] = []
    for words in keep:
        if len(changes) + len(wording.keeps) + len(", ".join([*kept, words])) < REQUEST_MAX:
            kept.append(words)
    return f"{changes}. {wording.keeps.format(': ' + ', '.join(kept) if kept else '')}"


def _sentence(instruction: str) -> str:
    bare = instruction.rstrip(". ")
    return bare[:1].upper() + bare[1:]

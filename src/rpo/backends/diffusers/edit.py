"""Editors that diffusers runs in process: pipelines that take an image and an instruction. What differs between them is a table.

InstructPix2Pix (arXiv 2211.09800) on Stable Diffusion 1.5 and SDXL, ControlNet v1.1 ip2p (arXiv 2302.05543), FLUX.1 Kontext, FLUX.2 klein,
Qwen-Image-Edit and its Plus, LongCat-Image-Edit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline, UNet2DConditionModel
from PIL import Image

from rpo.backends.diffusers.pipelines import Halving, Offload, load_pipeline, pick_device, pick_dtype, pinned, seeded, to_arrays
from rpo.data.images import Frame, FrameFit, resized
from rpo.errors import RpoError


@dataclass(frozen=True, kw_only=True)
class EditFamily:
    """How one pipeline class is called."""

    steps: int
    """Denoising steps when the user says nothing."""
    guidance: float
    """Guidance when the user says nothing."""
    guidance_name: str = "guidance_scale"
    image_guidance: bool = False
    """Whether guidance towards the source is a scale of its own."""
    batches: bool = True
    """Whether several images with an instruction each make one call."""
    sized: bool = True
    """Whether it is told height and width; else it takes the size from the image, or always works at `work_side`."""
    work_side: int | None = None
    """The one side that the pipeline works at, whatever it is given."""
    side: int | None = 1024
    """Width and height when the user says nothing; `None` asks the network."""
    multiple: int = 32
    """Sides are multiples of this."""
    tokens_max: int | None = None
    """Instructions are cut after so many tokens, where the pipeline would break on more."""
    sequential: bool = True
    """Whether it runs while its layers wait in main memory."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the call."""


FAMILIES: dict[str, EditFamily] = {
    "StableDiffusionInstructPix2PixPipeline": EditFamily(
        steps=25, guidance=7.5, image_guidance=True, sized=False, side=None, multiple=8),
    "StableDiffusionXLInstructPix2PixPipeline": EditFamily(steps=30, guidance=5.0, image_guidance=True, side=None, multiple=8),
    "StableDiffusionControlNetPipeline": EditFamily(steps=25, guidance=7.5, side=None, multiple=8),
    "FluxKontextPipeline": EditFamily(steps=28, guidance=2.5, extra={"_auto_resize": False}),
    "Flux2KleinPipeline": EditFamily(steps=4, guidance=1.0, batches=False),
    "QwenImageEditPipeline": EditFamily(
        steps=50, guidance=4.0, guidance_name="true_cfg_scale", batches=False, sized=False, work_side=1024, tokens_max=1000,
        extra={"negative_prompt": " "}),
    "QwenImageEditPlusPipeline": EditFamily(
        steps=50, guidance=4.0, guidance_name="true_cfg_scale", batches=False, sized=False, work_side=1024, tokens_max=1000,
        extra={"negative_prompt": " "}),
    "LongCatImageEditPipeline": EditFamily(
        steps=50, guidance=4.5, batches=False, sized=False, work_side=1024, tokens_max=480, sequential=False),
}  # fmt: skip
"""By pipeline class. A new editor of diffusers is a line here."""


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """How an edit pipeline is called; what is not given is what its authors advise."""

    model: str
    """Hub id or folder of a pipeline whose class is in `FAMILIES`; for a ControlNet, of the model it steers."""
    controlnet: str | None = None
    """Hub id or folder of an instruction ControlNet (`lllyasviel/control_v11e_sd15_ip2p`) that makes a text-to-image model an editor."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; its main branch if not given."""
    controlnet_revision: str | None = None
    """The same of the ControlNet."""
    steps: int | None = None
    """Denoising steps."""
    guidance: float | None = None
    """Guidance scale towards the instruction; 1 switches all guidance off."""
    image_guidance: float = 1.5
    """Guidance scale towards the source, of InstructPix2Pix."""
    side: int | None = None
    """Width and height in pixels to which every source is fitted and in which edits come back; the model's own if not given."""
    fit: FrameFit = "square"
    """How sources of other shapes are fitted: square keeps the largest center square, letterbox the whole image on white, nearest the
    largest center box in the shape of the editor's nearest own size, of about side² pixels."""
    device: str | None = None
    """cuda or cpu; the best there is if not given."""
    offload: Offload = "none"
    """none, model or sequential: where weights wait that are not at work."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.controlnet_revision is not None and self.controlnet is None:
            raise ValueError("controlnet_revision is given without controlnet; name the ControlNet too")

    def models(self) -> tuple[str, ...]:
        net = [pinned(self.controlnet, self.controlnet_revision)] if self.controlnet else []
        return (pinned(self.model, self.revision), *net)

    def frame(self) -> Frame:
        """The geometry of sources and edits; reads configuration files of the pipeline where `side` is not given, no weights."""
        return Frame(side=self.side or _own_side(self), fit=self.fit)

    def build(self) -> "DiffusersEditor":
        return DiffusersEditor(self)


def _own_side(config: EditorConfig) -> int:
    """The side of a pipeline by its family's table, or its network's sample size times the stride of its autoencoder."""
    try:
        settings: Any = DiffusionPipeline.load_config(config.model, revision=config.revision)
        name = "StableDiffusionControlNetPipeline" if config.controlnet else settings["_class_name"]
        family = FAMILIES.get(name)
        if family is not None and family.side is not None:
            return family.side
        unet: Any = UNet2DConditionModel.load_config(config.model, subfolder="unet", revision=config.revision)
        vae: Any = AutoencoderKL.load_config(config.model, subfolder="vae", revision=config.revision)
        return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, KeyError, TypeError) as error:
        told = f"cannot read the input size of the editor {config.model!r}: {' '.join(str(error).split())}"
        raise RpoError(f"{told}. Give a folder or a hub id of a pipeline, or name the size with --curate.edit.editor.side.") from error


def _load(config: EditorConfig) -> tuple[Any, str]:
    """(pipeline, what was loaded)."""
    settings: dict[str, Any] = {"device": config.device, "revision": config.revision, "offload": config.offload}
    if config.controlnet is None:
        return load_pipeline(config.model, **settings)
    dtype = pick_dtype(pick_device(config.device))
    try:
        net = ControlNetModel.from_pretrained(config.controlnet, revision=config.controlnet_revision, use_safetensors=True, dtype=dtype)
    except OSError as error:
        raise RpoError(f"cannot load the ControlNet {config.controlnet!r}: {error}. Give a folder or a hub id.") from error
    return load_pipeline(config.model, kind=StableDiffusionControlNetPipeline, controlnet=net, **settings)


class DiffusersEditor:
    """An `Editor` over any pipeline class in `FAMILIES`."""

    def __init__(self, config: EditorConfig) -> None:
        self.config = config
        self.pipeline, self.loaded = _load(config)
        self.halving = Halving(self.pipeline.maybe_free_model_hooks)
        name = type(self.pipeline).__name__
        if name not in FAMILIES:
            raise RpoError(f"{config.model} holds a {name}; editors are {', '.join(FAMILIES)}")
        if config.offload == "sequential" and not FAMILIES[name].sequential:
            raise RpoError(f"a {name} cannot run with offload='sequential': it sends its inputs to where its weights wait; take 'model'")
        self.family = family = FAMILIES[name]
        own = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor if family.side is None else family.side
        self.side = config.side or own
        if self.side % family.multiple:
            raise ValueError(f"side must be a multiple of {family.multiple} for a {name}, got {self.side}")
        self.frame = Frame(side=self.side, fit=config.fit)
        self.working = Frame(side=family.work_side or self.side, fit="nearest" if config.fit == "nearest" else "square")
        """What frames are resized to for the pipeline, and back from."""

    def _arguments(self, images: Sequence[np.ndarray], guidance: float | None) -> dict[str, Any]:
        """Of one call; `images` are of one size."""
        family, config = self.family, self.config
        arguments: dict[str, Any] = dict(family.extra)
        pictures = [Image.fromarray(image) for image in images]
        arguments["image"] = pictures if family.batches else pictures[0]
        arguments[family.guidance_name] = guidance or config.guidance or family.guidance
        if family.image_guidance:
            arguments["image_guidance_scale"] = config.image_guidance
        if family.sized:
            arguments |= {"height": images[0].shape[0], "width": images[0].shape[1]}
        if "_auto_resize" in family.extra:
            arguments["max_area"] = images[0].shape[0] * images[0].shape[1]
        return arguments

    def _run(
        self, images: Sequence[np.ndarray], run: Callable[[list[int], list[np.ndarray]], list[np.ndarray]], batches: bool = True
    ) -> list[np.ndarray]:
        """Images fitted to the frame, through `run` in calls of one working size (or of one row), and back in the frame."""
        fitted = [self.frame.fitted(image) for image in images]
        working = [resized(image, *self.working.size(image)) for image in fitted]
        calls: dict[object, list[int]] = {}
        for row, image in enumerate(working):
            calls.setdefault(image.shape if batches else row, []).append(row)
        out: dict[int, np.ndarray] = {}
        for rows in calls.values():

            def part(picked: slice, rows: list[int] = rows) -> list[np.ndarray]:
                return run(rows[picked], [working[row] for row in rows[picked]])

            out |= dict(zip(rows, self.halving(len(rows), part), strict=True))
        return [resized(out[row], *image.shape[:2]) for row, image in enumerate(fitted)]

    def _cut(self, instruction: str) -> str:
        most = self.family.tokens_max
        if most is None:
            return instruction
        places = self.pipeline.tokenizer(instruction, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        return instruction if len(places) <= most else instruction[: places[most][0]]

    @torch.inference_mode()
    def edit(
        self, images: Sequence[np.ndarray], instructions: Sequence[str], seeds: Sequence[int], *, guidance: float | None = None
    ) -> list[np.ndarray]:
        texts = [self._cut(instruction) for instruction in instructions]

        def run(rows: list[int], working: list[np.ndarray]) -> list[np.ndarray]:
            out = self.pipeline(
                prompt=[texts[row] for row in rows],
                num_inference_steps=self.config.steps or self.family.steps,
                generator=seeded([seeds[row] for row in rows]),
                output_type="np",
                **self._arguments(working, guidance),
            )
            return to_arrays(out.images)

        return self._run(images, run, self.family.batches)

    def round_trip(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._encoded(images, None)

    def sampled_round_trip(self, images: Sequence[np.ndarray], seeds: Sequence[int]) -> list[np.ndarray]:
        return self._encoded(images, seeds)

    @torch.inference_mode()
    def _encoded(self, images: Sequence[np.ndarray], seeds: Sequence[int] | None) -> list[np.ndarray]:
        """Images through the autoencoder, by the mode of its posterior, or a sample by each row's seed."""
        vae, device = self.pipeline.vae, self.pipeline._execution_device  # where it computes, also when weights wait elsewhere
        video = "z_dim" in vae.config  # Qwen-Image's autoencoder is one of videos

        def run(rows: list[int], working: list[np.ndarray]) -> list[np.ndarray]:
            pixels = (torch.from_numpy(np.stack(working)).permute(0, 3, 1, 2).float() / 255 * 2 - 1).to(device, vae.dtype)
            posterior = vae.encode(pixels.unsqueeze(2) if video else pixels).latent_dist
            latents = posterior.mode() if seeds is None else posterior.sample(seeded([seeds[row] for row in rows]))
            decoded = vae.decode(latents).sample.float()
            shown = decoded[:, :, 0] if video else decoded
            return to_arrays(((shown + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())

        return self._run(images, run)

"""Editors that diffusers runs in process: pipelines that take an image and an instruction. What differs between them is a table.

InstructPix2Pix (arXiv 2211.09800) on Stable Diffusion 1.5 and SDXL, ControlNet v1.1 ip2p (arXiv 2302.05543), FLUX.1 Kontext, FLUX.2 klein,
Qwen-Image-Edit and its Plus, LongCat-Image-Edit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline, UNet2DConditionModel
from PIL import Image

from rpo.backends.diffusers_pipelines import Halving, Offload, load_pipeline, pick_device, pick_dtype, pinned, seeded, to_arrays
from rpo.data.images import Frame, FrameFit, fit_square
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
    """How sources of other shapes are fitted: square keeps the largest center square, letterbox the whole image on white."""
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
        if family.side is None:
            own = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        else:
            own = family.side
        self.side = config.side or own
        if self.side % family.multiple:
            raise ValueError(f"side must be a multiple of {family.multiple} for a {name}, got {self.side}")
        self.work_side = family.work_side or self.side

    def _arguments(self, images: Sequence[np.ndarray], guidance: float | None) -> dict[str, Any]:
        family, config = self.family, self.config
        arguments: dict[str, Any] = dict(family.extra)
        pictures = [Image.fromarray(fit_square(image, self.work_side)) for image in images]
        arguments["image"] = pictures if family.batches else pictures[0]
        arguments[family.guidance_name] = guidance or config.guidance or family.guidance
        if family.image_guidance:
            arguments["image_guidance_scale"] = config.image_guidance
        if family.sized:
            arguments |= {"height": self.work_side, "width": self.work_side}
        if "_auto_resize" in family.extra:
            arguments["max_area"] = self.work_side**2
        return arguments

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

        def run(part: slice) -> list[np.ndarray]:
            out = self.pipeline(
                prompt=texts[part],
                num_inference_steps=self.config.steps or self.family.steps,
                generator=seeded(seeds[part]),
                output_type="np",
                **self._arguments(images[part], guidance),
            )
            return [fit_square(image, self.side) for image in to_arrays(out.images)]

        if not self.family.batches:
            return [self.halving(1, lambda _, row=row: run(slice(row, row + 1)))[0] for row in range(len(images))]
        return self.halving(len(images), run)

    @torch.inference_mode()
    def round_trip(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        vae, device = self.pipeline.vae, self.pipeline._execution_device  # where it computes, also when weights wait elsewhere

        def run(part: slice) -> list[np.ndarray]:
            fitted = np.stack([fit_square(image, self.work_side) for image in images[part]])
            pixels = (torch.from_numpy(fitted).permute(0, 3, 1, 2).float() / 255 * 2 - 1).to(device, vae.dtype)
            video = "z_dim" in vae.config  # Qwen-Image's autoencoder is one of videos
            encoded = vae.encode(pixels.unsqueeze(2) if video else pixels).latent_dist.mode()
            decoded = vae.decode(encoded).sample.float()
            shown = decoded[:, :, 0] if video else decoded
            arrays = to_arrays(((shown + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())
            return [fit_square(image, self.side) for image in arrays]

        return self.halving(len(images), run)

"""Published text-to-image models tuned on pairs that are brought (`--pairs`): Diffusion-DPO with a LoRA."""

from dataclasses import replace
from typing import Any

from rpo.accounting.metering import served_by, served_models
from rpo.backends.chat.openai import OpenAIChatConfig
from rpo.backends.diffusers.generate import GeneratorConfig
from rpo.backends.scorers.clip import ClipScorerConfig
from rpo.backends.scorers.vision_chat import FactsConfig, PairwiseConfig, RubricConfig
from rpo.recipe import BroughtPrompts, Evaluation, Recipe
from rpo.training.config import TrainConfig

CLIP = ClipScorerConfig(model="openai/clip-vit-large-patch14", scale="cosine")
CHAT = OpenAIChatConfig(model="Qwen/Qwen3-VL-8B-Instruct")
PICK_SCORE = ClipScorerConfig(model="yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")


def judged_by_rewards() -> Evaluation:
    """PickScore and CLIP score on prompts that are brought; distances between images on CLIP's embeddings."""
    return Evaluation(prompts=BroughtPrompts(), scorers=(("clip", CLIP), ("pickscore", PICK_SCORE)), headline="pickscore", batch_size=8)


def judged_by_vlm(evaluation: Evaluation, *, base_url: str | None, model: str | None) -> Evaluation:
    """The evaluation with the models over a wire that it asks where `base_url` and `model` say; without any, with marks, facts and
    comparisons by that one.
    """
    if not served_models(evaluation):
        alone = (("rubric", RubricConfig(chat=CHAT)), ("facts", FactsConfig(chat=CHAT)))
        compared = ("vlm_prefers", PairwiseConfig(chat=CHAT, purpose="evaluate"))
        evaluation = replace(evaluation, judges=(*evaluation.judges, *alone, compared))
    return served_by(evaluation, base_url=base_url, model=model)


def _recipe(name: str, model: str, *, sampler: dict[str, Any], train: dict[str, Any]) -> Recipe:
    # Pairs that are brought may come from anywhere; on a poor editor's, DPO ruins a model while its loss falls (docs/objectives.md).
    tuning = TrainConfig(model=model, precision="bf16", stop_on_alarm=True, **train)
    return Recipe(name=name, generator=GeneratorConfig(model=model, **sampler), train=tuning, evaluate=judged_by_rewards())


def sd15_dpo() -> Recipe:
    """Stable Diffusion 1.5 at 512 pixels."""
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    return _recipe("sd15_dpo", model, sampler={"steps": 50, "guidance": 7.5}, train={"resolution": 512})


def sdxl_dpo() -> Recipe:
    """Stable Diffusion XL at 1024 pixels."""
    model = "stabilityai/stable-diffusion-xl-base-1.0"
    big = {"resolution": 1024, "gradient_checkpointing": True, "accumulation": 16, "cache_batch": 4}
    return _recipe("sdxl_dpo", model, sampler={"steps": 50, "guidance": 5.0}, train=big)


def sd3_dpo() -> Recipe:
    """Stable Diffusion 3.5 medium at 1024 pixels."""
    model = "stabilityai/stable-diffusion-3.5-medium"
    big = {"resolution": 1024, "gradient_checkpointing": True, "accumulation": 16, "cache_batch": 4}
    return _recipe("sd3_dpo", model, sampler={"steps": 40, "guidance": 4.5}, train=big)


def flux_dpo() -> Recipe:
    """FLUX.1 [dev] at 1024 pixels; its licence is non-commercial."""
    model = "black-forest-labs/FLUX.1-dev"
    big = {"resolution": 1024, "gradient_checkpointing": True, "accumulation": 32, "cache_batch": 2}
    return _recipe("flux_dpo", model, sampler={"steps": 28, "guidance": 3.5}, train=big)

"""Pairs from edits of a published model's own samples, criticised by a vision-language model: the paper's parts, and today's.

Both ask a vision-language model over a wire (`--vlm-url`, `--vlm-model`) and take prompts from `--prompts`. Rewards that are published as
pickles are converted once (`docs/editors-and-rewards.md`); their folders are looked for in `models/`, or named on the command line.
"""

from rpo.backends.diffusers.edit import EditorConfig
from rpo.backends.diffusers.generate import GeneratorConfig, ProjectorConfig
from rpo.backends.scorers.clip import ClipScorerConfig
from rpo.backends.scorers.image_reward import ImageRewardConfig
from rpo.backends.scorers.vision_chat import VerifierConfig, VqaScorerConfig
from rpo.curation.stages.candidates import AttemptStage
from rpo.curation.stages.check import CheckStage
from rpo.curation.stages.critique import CritiqueStage
from rpo.curation.stages.edit import EditStage
from rpo.curation.stages.instruct import InstructStage
from rpo.curation.stages.label import LabelStage
from rpo.curation.stages.project import ProjectStage
from rpo.curation.stages.score import ScoreStage
from rpo.curation.stages.source import SourceStage
from rpo.curation.stages.verify import VerifyStage
from rpo.curation.vlm.critic import VlmCriticConfig
from rpo.curation.vlm.instructor import VlmInstructorConfig
from rpo.recipe import BroughtPrompts, Curation, Recipe
from rpo.recipes.dpo import CHAT, CLIP, judged_by_rewards
from rpo.training.config import TrainConfig

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
IMAGE_REWARD = ImageRewardConfig(model="models/image_reward")
HPS = ClipScorerConfig(model="models/hps_v2.1", scale="cosine")


def _tuning() -> TrainConfig:
    # An editor is not the policy: on pairs it made, DPO can ruin a model while its loss falls (docs/objectives.md).
    return TrainConfig(model=SD15, resolution=512, precision="bf16", stop_on_alarm=True)


def paper_sd15() -> Recipe:
    """ControlNet-ip2p on Stable Diffusion 1.5 edits, ImageReward labels. Secondary sources name these parts for the paper (arXiv
    2503.11720); its own settings are not known, so these are ours.
    """
    generator = GeneratorConfig(model=SD15, steps=50, guidance=7.5)
    editor = EditorConfig(model=SD15, controlnet="lllyasviel/control_v11e_sd15_ip2p", steps=25, guidance=7.5)
    return Recipe(
        name="paper_sd15",
        generator=generator,
        train=_tuning(),
        evaluate=judged_by_rewards(),
        curate=Curation(
            prompts=BroughtPrompts(),
            source=SourceStage(generator=generator),
            critique=CritiqueStage(critic=VlmCriticConfig(chat=CHAT, profile="paper")),
            instruct=InstructStage(instructor=VlmInstructorConfig(chat=CHAT, max_instructions=1)),
            edit=EditStage(editor=editor),
            check=CheckStage(),
            score=ScoreStage(rewards=(("image_reward", IMAGE_REWARD),)),
            label=LabelStage(rewards=("image_reward",), rule="single", rejected_side="original"),
        ),
    )


def practical() -> Recipe:
    """FLUX.2 klein (Apache-2.0) edits, in two attempts; two of three rewards must agree, and the change must be seen.

    Klein is much stronger than Stable Diffusion 1.5 and touches up whole pictures, so both sides are taken back onto the policy, and
    edits are held against the neutral edit of the same editor.
    """
    generator = GeneratorConfig(model=SD15, steps=50, guidance=7.5)
    editor = EditorConfig(model="black-forest-labs/FLUX.2-klein-4B", side=512)
    rewards = (("image_reward", IMAGE_REWARD), ("hps", HPS), ("vqa", VqaScorerConfig(chat=CHAT)))
    check = CheckStage(embedder=CLIP, distance_min=0.005, distance_max=0.4)
    projected = tuple(f"{side}_projected" for side in ("edited", "neutral"))
    return Recipe(
        name="practical",
        generator=generator,
        train=_tuning(),
        evaluate=judged_by_rewards(),
        curate=Curation(
            prompts=BroughtPrompts(),
            source=SourceStage(generator=generator),
            critique=CritiqueStage(critic=VlmCriticConfig(chat=CHAT)),
            instruct=InstructStage(instructor=VlmInstructorConfig(chat=CHAT, family="klein"), family="klein"),
            edit=EditStage(editor=editor, attempts=2),
            attempts=AttemptStage(count=2, rewards=(("hps", HPS),), check=check),
            check=check,
            verify=VerifyStage(verifier=VerifierConfig(chat=CHAT)),
            project=ProjectStage(projector=ProjectorConfig(generator=generator, strength=0.3)),
            score=ScoreStage(rewards=rewards, sides=("source", "original", "second", "neutral", *projected)),
            label=LabelStage(rewards=tuple(name for name, _ in rewards), votes_min=2, projected=True),
        ),
    )

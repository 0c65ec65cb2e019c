"""The recipes that edit published models' samples, with tiny models of the same classes in their places, from prompts to pairs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from published_rewards import ImageReward, OpenClip, save
from rpo.api import curate, read_summary
from rpo.backends.diffusers.edit import EditorConfig
from rpo.backends.diffusers.generate import GeneratorConfig, ProjectorConfig
from rpo.backends.scorers.clip import ClipScorerConfig
from rpo.backends.scorers.convert import convert_hps, convert_image_reward
from rpo.backends.scorers.image_reward import ImageRewardConfig
from rpo.backends.scorers.vision_chat import PairwiseConfig, VerifierConfig, VqaScorerConfig
from rpo.core.run_folder import open_run
from rpo.curation.stages.candidates import AttemptStage
from rpo.curation.stages.check import CheckStage
from rpo.curation.stages.critique import CritiqueStage
from rpo.curation.stages.pairwise import PairwiseStage
from rpo.data.chat import ChatAnswer, ChatRequest
from rpo.data.pairs import read_pairs
from rpo.data.schema import Critique, Instruction, Instructions, Issue
from rpo.engine.layers import read_run
from rpo.errors import RowError
from rpo.recipe import Curation
from rpo.recipes import load
from rpo.report.page import write_report
from rpo.shapes.networks import tokenizer
from tiny_diffusion import save_pipeline
from tiny_editors import save_editor
from tiny_rewards import clip_folder

NOTHING = CheckStage(change_min=0.0, agreement_min=-1.0, moved_max=9.0)


@dataclass(frozen=True)
class Words:
    """Stands for critic, instructor and the model that is shown pictures: always finds something, always says yes."""

    def models(self) -> tuple[str, ...]:
        return ("words",)

    def build(self) -> "Words":
        return self

    def critique(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Critique | RowError]:
        issue = Issue(aspect="alignment", severity=2, evidence="it is not red")
        return [Critique(reasoning="seen", aspects=(), issues=(issue,), keep=(), overall=3, no_issue=False) for _ in images]

    def instruct(self, prompts: Sequence[str], critiques: Sequence[Critique]) -> list[Instructions | RowError]:
        one = Instruction(op="recolor", target="it", instruction="make it red", addresses=(0,), expected_visible_change="it is red")
        return [Instructions(instructions=(one,)) for _ in prompts]

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        light = [float(np.mean([part.mean() for part in r.messages[0].parts if isinstance(part, np.ndarray)])) for r in requests]
        return [ChatAnswer(text="Yes", first_token={"Yes": -0.3 - value / 1000, "No": -1.5}) for value in light]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rewards")
    base = clip_folder(folder / "base")
    words = tokenizer()
    hps = convert_hps(save(OpenClip(len(words), words.model_max_length), folder / "hps.pt"), str(base), folder / "hps")
    reward = convert_image_reward(save(ImageReward(len(words)), folder / "reward.pt"), str(base), folder / "image_reward")
    return {"hps": ClipScorerConfig(model=str(hps), scale="cosine"), "image_reward": ImageRewardConfig(model=str(reward))}


def small(curation: Curation, generator: GeneratorConfig, editor: EditorConfig, rewards: dict[str, Any]) -> Curation:
    """The curation with tiny models; every stage stays."""
    scorers = tuple((name, rewards.get(name, VqaScorerConfig(chat=Words()))) for name, _ in curation.score.rewards)
    attempts = curation.attempts and AttemptStage(count=2, rewards=(("hps", rewards["hps"]),), check=NOTHING)
    return replace(
        curation,
        source=replace(curation.source, generator=generator),
        critique=CritiqueStage(critic=Words()),
        instruct=replace(curation.instruct, instructor=Words()),
        edit=replace(curation.edit, editor=editor),
        attempts=attempts,
        check=replace(NOTHING, embedder=rewards["hps"]),
        verify=curation.verify and replace(curation.verify, verifier=VerifierConfig(chat=Words())),
        project=curation.project and replace(curation.project, projector=ProjectorConfig(generator=generator, strength=0.5)),
        score=replace(curation.score, rewards=scorers),
        # A random autoencoder moves scores more than any edit does, so all that is measured here lies within the noise floor.
        label=replace(curation.label, rule="trust_edit"),
    )


@pytest.mark.parametrize("name", ["paper_sd15", "practical"])
def test_from_prompts_to_pairs(tmp_path: Path, name: str, rewards: dict[str, Any]) -> None:
    recipe = load(name)
    assert recipe.curate.label.rule == {"paper_sd15": "single", "practical": "vote"}[name]
    base = save_pipeline(tmp_path / "sd", prediction="epsilon")
    generator = GeneratorConfig(model=str(base), steps=2, guidance=1.0)
    if name == "paper_sd15":
        save_editor("StableDiffusionControlNetPipeline", tmp_path / "editor" / "base")
        editor = EditorConfig(model=str(base), controlnet=str(tmp_path / "editor" / "controlnet_ip2p"), steps=2)
        assert recipe.curate.edit.editor.controlnet == "lllyasviel/control_v11e_sd15_ip2p"
    else:
        editor = EditorConfig(model=str(save_editor("Flux2KleinPipeline", tmp_path / "klein")), steps=1, side=64)
    recipe = replace(recipe, curate=small(recipe.curate, generator, editor, rewards))
    (tmp_path / "prompts.txt").write_text("\n".join(f"a {color} circle" for color in ("red", "blue", "green", "gray", "purple", "white")))
    with open_run(tmp_path / "run") as run:
        curate(recipe, run, Console(quiet=True), tmp_path / "prompts.txt")
        pairs = read_pairs(tmp_path / "run" / "pairs.parquet")
        told = [json.loads(pair.provenance) for pair in pairs]
        curate(recipe, run, Console(quiet=True), tmp_path / "prompts.txt")  # all is there: nothing is done, nothing changes
        assert read_pairs(tmp_path / "run" / "pairs.parquet") == pairs
    stages = [stage["stage"] for stage in read_summary(tmp_path / "run")["funnel"]]
    assert stages == [stage.spec.name for stage in recipe.curate.stages()]
    assert {"attempts", "verify", "project"} <= set(stages) or name == "paper_sd15"
    assert pairs and "distance" in read_run(tmp_path / "run", ["distance"]).column_names
    for row in told:
        assert row["edited_by"]["model"] == "EditorConfig" and len(row["edited_by"]["attempts"]) == recipe.curate.edit.attempts
        assert row["scored_by"].keys() == set(recipe.curate.label.rewards)
        assert str(row["scored_by"]["image_reward"]["weights"]["image_reward"]).startswith("sha256:")
    page = write_report(tmp_path / "run").read_text()
    assert 'id="rewards"' in page and ('id="attempts"' in page) == (name == "practical")


def test_prompts_are_brought(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run, pytest.raises(ValueError, match="--prompts"):
        curate(load("paper_sd15"), run, Console(quiet=True))


def test_a_curation_that_cannot_be_is_told_at_once() -> None:
    curation = load("practical").curate
    asks = PairwiseStage(comparer=PairwiseConfig(chat=Words()))
    for wrong, word in (
        ({"attempts": None}, "attempts"),
        ({"pairs_per_prompt_max": 0}, "pairs_per_prompt_max"),
        ({"human_share": 1.0}, "human_share"),
        ({"label": replace(curation.label, rule="pairwise")}, "pairwise stage"),
        ({"pairwise": asks}, "name the same"),
    ):
        with pytest.raises(ValueError, match=word):
            replace(curation, **wrong)

"""A run folder as a real run leaves it, made in a second from renders of the embedded world: nothing is trained."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from rpo.data.images import EncodedImage, encode_png
from rpo.data.pairs import Pair, write_pairs
from rpo.data.schema import AspectScore, Critique, Issue
from rpo.evaluation.run import evaluate
from rpo.evaluation.tasks import Task
from rpo.protocols import Metric
from rpo.shapes.render import render_scene
from rpo.shapes.scenes import COLORS, SHAPES, Scene, caption, differences, join_instructions, parse_caption, scenes

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \" ' & {{ 7*7 }}"


def _bias(sign_rate: float, shift: float) -> dict[str, float]:
    ends = {"sign_low": sign_rate - 0.1, "sign_high": sign_rate + 0.1, "shift_low": shift - 0.15, "shift_high": shift + 0.15}
    return {"rows": 90, "sign_rate": sign_rate, "shift": shift, **ends}


def spoiled(scene: Scene, rng: np.random.Generator) -> Scene:
    """Another scene: one thing in another colour, or another shape, or both."""
    i, change = int(rng.integers(len(scene.things))), rng.integers(3)
    thing = scene.things[i]
    if change != 0:
        thing = replace(thing, color=str(rng.choice([color for color in COLORS if color != thing.color])))
    if change != 1:
        thing = replace(thing, shape=str(rng.choice([shape for shape in SHAPES if shape != thing.shape])))
    return replace(scene, things=(*scene.things[:i], thing, *scene.things[i + 1 :]))


class FakePainter:
    """Renders the caption's scene, or with probability `wrong` another one; its pictures tell the judge which by their corner."""

    def __init__(self, wrong: float, salt: int) -> None:
        self.wrong, self.salt = wrong, salt

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            scene = parse_caption(prompt)
            correct = np.random.default_rng(seed + self.salt).random() >= self.wrong
            image = render_scene(scene if correct else spoiled(scene, rng), rng).astype(float)
            image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
            image[0, 0] = 255 * correct
            images.append(image)
        return images


class FakeJudge:
    DECLARED: ClassVar = {name: Metric(kind="fraction") for name in
                          ("fully_correct", "count", "background", "color", "shape", "size", "relation")}  # fmt: skip

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        out = []
        for image in images:
            good = float(image[0, 0, 0] > 128)
            noise = np.random.default_rng(int(image.astype(np.int64).sum()))
            fails = noise.choice(["count", "background", "color", "shape", "size", "relation"])
            parts = {name: 1.0 if good or name != fails else 0.5 for name in ("count", "background", "color", "shape", "size", "relation")}
            out.append({"fully_correct": good, **parts, "quality": float(np.clip(0.9 + noise.normal(0, 0.04), 0, 1))})
        return out

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([image.reshape(-1, 3).mean(0) for image in images])


def _pair(index: int, rng: np.random.Generator, prompt: str | None = None) -> Pair:
    wanted = next(scenes(rng, held_out=False))
    seen = spoiled(wanted, rng)
    edits = differences(seen, wanted)
    issues = tuple(Issue(aspect=e.aspect, severity=1 + i % 3, evidence=f"the {e.target} is not as asked") for i, e in enumerate(edits))
    critique = Critique(
        reasoning=f"Asked for {caption(wanted)}; the image shows {caption(seen)}.",
        aspects=(AspectScore(aspect="alignment", score=2), AspectScore(aspect="text_rendering", score=None)),
        issues=issues, keep=(f"the {wanted.background} background",), overall=2, no_issue=False,
    )  # fmt: skip
    before, after = rng.normal(0, 1, 2), rng.normal(1.5, 0.8, 2)
    return Pair(
        id=f"{index:016x}", prompt=prompt or caption(wanted), chosen=EncodedImage.of(encode_png(render_scene(wanted, rng))),
        rejected=EncodedImage.of(encode_png(render_scene(seen, rng))), gap=float((after - before).mean()), split="train",
        critique=critique.model_dump_json(), instruction=prompt or join_instructions([e.instruction for e in edits]),
        scores=json.dumps({
            "pick_score": {"chosen": after[0], "rejected": before[0]}, "log_likelihood": {"chosen": after[1], "rejected": before[1]},
        }),
        provenance=json.dumps({"seed": index, "chosen": "edit", "rejected": "source", "run": "1f3a9c02"}),
    )  # fmt: skip


def _metrics(steps: int, rng: np.random.Generator) -> str:
    lines = []
    for step in range(1, steps + 1):
        done = 1 - np.exp(-step / (0.4 * steps))
        margin = 4e-3 * done + rng.normal(0, 1e-3)
        line = {
            "step": step, "loss": 0.693 - 0.2 * done + rng.normal(0, 0.02), "gradient_norm": 0.4 + rng.gamma(2, 0.05), "lr": 1e-4,
            "chosen_over_reference": -1e-3 * done + rng.normal(0, 4e-4), "rejected_over_reference": 3e-3 * done + rng.normal(0, 6e-4),
            "margin_p10": margin - 5e-3, "margin_p50": margin, "margin_p90": margin + 6e-3, "alarm": "",
        }  # fmt: skip
        if step % 10 == 0:
            line["held_out_accuracy"] = 0.5 + 0.35 * done + rng.normal(0, 0.01)
        lines.append(json.dumps(line))
    return "\n".join(lines) + "\n"


def summary(evaluation: dict) -> dict:
    return {
        "seed": 0,
        "pairs_kept": 700,
        "funnel": [
            {"stage": "source", "rows_in": 1600, "kept": 1600, "dropped": {}},
            {"stage": "critique", "rows_in": 1600, "kept": 858, "dropped": {"no_issue": 731, "error:critique:unreadable": 11}},
            {"stage": "instruct", "rows_in": 858, "kept": 846, "dropped": {"no_edit_needed": 12}},
            {"stage": "edit", "rows_in": 846, "kept": 846, "dropped": {}},
            {"stage": "check", "rows_in": 846, "kept": 801, "dropped": {"no_op": 28, "over_edit": 17}},
            {"stage": "score", "rows_in": 801, "kept": 801, "dropped": {}},
            {"stage": "label", "rows_in": 801, "kept": 700, "dropped": {"low_margin": 61, "rewards_disagree": 27, "edit_lost": 13}},
        ],
        "seconds": {"source": 52.1, "critique": 6.4, "instruct": 0.3, "edit": 96.8, "check": 4.2, "score": 9.9, "label": 0.2,
                    "train": 141.7, "evaluate": 73.0},
        "controls": {
            "fingerprint_auc": 0.87,
            "leakage": {"pairs": 90, "auc": 0.87, "auc_low": 0.8, "auc_high": 0.93, "paired": 0.6, "paired_low": 0.5, "paired_high": 0.7},
            "roundtrip": {"clip": _bias(0.53, 0.02)},
            "neutral": {"clip": _bias(0.1, -0.8)},
            "pattern": {"edited": {"levels": 0.3, "low": 0.1, "high": 0.5, "rows": 90}, "neutral": None},
        },
        "pairs": {"judge_prefers_edit": 0.817},
        "evaluation": evaluation,
    }  # fmt: skip


def make_run(folder: Path, *, num_pairs: int = 60, num_prompts: int = 150, hostile: bool = False) -> Path:
    """Writes the run folder; with `hostile`, prompts, instructions, reasons and the recipe try to break out of the page."""
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train").mkdir()
    write_pairs(folder / "pairs.parquet", [_pair(i, rng, HOSTILE if hostile else None) for i in range(num_pairs)])
    (folder / "train" / "metrics.jsonl").write_text(_metrics(400, rng))
    source = scenes(rng, held_out=True)
    prompts = [caption(next(source)) for _ in range(num_prompts)]
    kinds = {prompt: "two things" if " of " in prompt or " the " in prompt else "one thing" for prompt in prompts}
    task = Task.of("shapes-held-out", prompts, seeds_per_prompt=2, categories=kinds)
    painters = {"base": FakePainter(0.52, 1), "tuned": FakePainter(0.37, 2), "broken": FakePainter(0.9, 3)}
    comparisons = evaluate(
        task, {name: lambda painter=painter: painter for name, painter in painters.items()}, {"judge": FakeJudge},
        folder / "evaluation", declared=FakeJudge.DECLARED, headline="fully_correct",
        fingerprints={"base": "b", "tuned": "t", "broken": "x", "judge": "j"}, curation_prompts=[],
        references=lambda: rng.normal(99, 9, (80, 8, 8, 3)).astype(np.uint8),
    )  # fmt: skip
    numbers = comparisons["tuned"]
    told = summary(numbers) | {"comparisons": comparisons, "headline": "fully_correct", "baseline": "base"}
    recipe = {"recipe": "shapes", "seed": 0, "objective": {"class": "DiffusionDPO", "k": 2500}, "versions": {"torch": "2.13.0"}}
    if hostile:
        told["funnel"][1]["dropped"] = {HOSTILE: 3}
        told["evaluation"] = {HOSTILE: numbers["fully_correct"]}
        recipe["recipe"] = HOSTILE
    (folder / "summary.json").write_text(json.dumps(told))
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder

import os
import subprocess
import sys

import pytest

from rpo.errors import RpoError
from rpo.evaluation.tasks import Task, checked_overlap, noise_seed, normalised, overlap, prompt_id, prompt_set


def test_prompt_ids_are_content_hashes() -> None:
    task = Task.of("t", ["a red star", "a blue star", "a red star"])
    assert [text for _, text in task.prompts] == ["a red star", "a blue star"]
    assert task.prompts[0][0] == prompt_id("a red star") and len(prompt_id("a red star")) == 16
    with pytest.raises(ValueError, match="content hash"):
        Task(name="t", prompts=(("0", "a red star"),))


def test_noise_depends_on_task_prompt_and_index_and_nothing_else() -> None:
    seeds = [noise_seed(task, prompt, index) for task in "xy" for prompt in ("a", "b") for index in (0, 1, 2)]
    assert len(set(seeds)) == 12 and all(0 <= seed < 2**63 for seed in seeds)
    code = "from rpo.evaluation.tasks import prompt_set, noise_seed; print(noise_seed('x', 'a', 0))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert int(other.stdout) == seeds[0]
    few, many = Task.of("x", ["a"], seeds_per_prompt=1).places(), Task.of("x", ["b", "a"], seeds_per_prompt=3).places()
    assert few[0] in many


@pytest.mark.parametrize(("field", "build"), [
    ("name", lambda: Task.of("", ["a"])),
    ("prompts", lambda: Task.of("t", [])),
    ("empty text", lambda: Task.of("t", ["  "])),
    ("seeds_per_prompt", lambda: Task.of("t", ["a"], seeds_per_prompt=0)),
    ("twice", lambda: Task(name="t", prompts=((prompt_id("a"), "a"),) * 2)),
])  # fmt: skip
def test_a_task_that_makes_no_sense_is_refused(field: str, build) -> None:
    with pytest.raises(ValueError, match=field):
        build()


def test_overlap_is_found_through_case_space_and_punctuation() -> None:
    task = Task.of("t", ["A red star.", "a green star", "a  BLUE star!", "a blue circle"])
    found = overlap(task, ["A red star.", "a blue star", "a red square"])
    assert found.exact == ("A red star.",) and found.near == ("a  BLUE star!",)
    with pytest.raises(RpoError, match=r"2 of 4 .*1 word for word, 1 apart.*'A red star\.'"):
        checked_overlap(task, ["A red star.", "a blue star"], allowed=False)
    checked_overlap(task, ["a red square"], allowed=False)


def test_normalised_sees_compatibility_forms() -> None:
    assert normalised("Ａ　red-star…") == normalised("a red star")
    assert normalised("a red star") != normalised("a red stars")


def test_a_public_set_says_when_it_is_not_whole() -> None:
    whole, nothing = prompt_set("geneval", 553)
    assert whole.images_per_prompt == 4 and nothing == ""
    assert "553 prompts, these are 12" in prompt_set("geneval", 12)[1]
    with pytest.raises(ValueError, match="Did you mean 'geneval'"):
        prompt_set("genevl", 553)

"""What README and docs tell people to type exists: targets, commands, options, files."""

import re
import shlex
import subprocess
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest

from rpo.cli.commands import COMMANDS, RecipeCommand
from rpo.cli.options import parse
from rpo.recipes import BUILT_IN, load
from rpo.training.objectives import preference as objectives
from rpo.training.objectives import safeguards
from rpo.training.objectives import schedules as strengths

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S):
            found += [(page.name, shlex.split(line, comments=True)) for line in block.splitlines() if line.strip()]
    return [(page, words) for page, words in found if words]


def test_there_are_commands() -> None:
    told = {tuple(words[:2]) for page, words in commands() if page == "README.md"}
    assert {("make", "run"), ("make", "test"), ("rpo", "run"), ("rpo", "train")} <= told


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_each_command_is_understood(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "make":
        assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, check=False).returncode == 0
        return
    if words[0] == "torchrun":
        assert "-m" in words
        words = words[words.index("-m") + 1 :]
    assert words[0] == "rpo" and words[1] in COMMANDS, f"{page}: no such command"
    command = COMMANDS[words[1]]
    if not isinstance(command, RecipeCommand) or words[2] not in BUILT_IN:
        return
    recipe = replace(load(words[2]), ready=None)  # what a command says is tested here, not whether weights are there
    monkeypatch.setattr("rpo.recipes.load", lambda name: recipe)
    parsed, resolved = parse(words[1], words[2], command.options, command.sections, words[3:])
    assert resolved.name == recipe.name and parsed is not None


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_page_shows_a_control_that_cannot_fail_as_evidence() -> None:
    """The share of votes that the round trip wins: its threshold comes from the differences that it is applied to."""
    for page in PAGES:
        for line in page.read_text().splitlines():
            if "roundtrip_win_rate" in line or "round-trip control" in line.lower():
                assert "No evidence" in line, f"{page.name}: {line[:80]}"


def test_the_recipe_of_the_objectives_page_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "objectives.md").read_text()
    for module in (objectives, safeguards, strengths):
        classes = [name for name, found in vars(module).items() if isinstance(found, type) and found.__module__ == module.__name__]
        for name in classes:
            if is_dataclass(getattr(module, name)) and name != "PairErrors":
                assert f"| `{name}` |" in text, f"the page says nothing of {name}"
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (tmp_path / "my_recipe.py").write_text(block)
    recipe = load(f"{tmp_path / 'my_recipe.py'}:guarded")
    assert recipe.train is not None and "winner-preserving (mu=0.5)" in recipe.train.objective.describe()


def test_the_programs_of_the_page_on_vlms_run() -> None:
    """The critic in ten lines, asked over a wire that says yes to the first picture and no to the second."""
    import math

    import numpy as np

    from rpo.backends.chat.openai import ChatServer, OpenAIChatConfig, hang_up
    from rpo.testing.server import Asked, FakeServer, Said

    def answer(asked: Asked) -> Said:
        chance = 0.9 if asked.images[0].max() else 0.2
        return Said(text="Yes", finish="length", first_token={"Yes": math.log(chance), "no": math.log(1 - chance)})

    found: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "vlm.md").read_text(), flags=re.S):
        exec(block, found)
    assert found["critic"].samples == 3 and found["instructor"].family == "kontext"
    with FakeServer(answer) as server:
        chat = OpenAIChatConfig(model="m", server=ChatServer(base_url=server.url))
        images = [np.full((8, 8, 3), value, dtype=np.uint8) for value in (255, 0)]
        good, bad = found["MatchCritic"](chat=chat).build().critique(images, ["a cat", "a dog"])
        hang_up()
    assert (good.no_issue, good.reasoning, bad.no_issue, bad.overall) == (True, "P(yes) = 0.90", False, 2)


def test_install_lines_name_our_distribution() -> None:
    """`rpo` on PyPI is another project."""
    texts = [*PAGES, *(ROOT / "src").rglob("*.py"), ROOT / "pyproject.toml"]
    assert not [path for path in texts if re.search(r"(install\s+['\"]?rpo\b(?!-))|\brpo\[", path.read_text())]

"""`import rpo`: the public names, what they cost, and a run driven by them."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rpo
from tiny_diffusion import save_pipeline

NAMES = {
    *("Critique", "Difference", "EncodedImage", "Evaluation", "Instructions", "Interrupted", "Pair", "Recipe", "RowError", "RpoError"),
    *("Run", "TrainConfig", "TrainResult", "__version__", "curate", "evaluate", "iterate_pairs", "load_recipe", "read_pairs", "train"),
    *("write_pairs", "write_report"),
}
RECIPE = f"{Path(__file__).parent / 'fake_recipe.py'}:fake"


def test_public_names_are_these() -> None:
    assert set(rpo.__all__) == NAMES == {*rpo._PUBLIC, "__version__"}
    for name in NAMES - {"__version__"}:
        assert inspect.getdoc(getattr(rpo, name)), name
        assert not inspect.ismodule(getattr(rpo, name)), name
    assert set(dir(rpo)) >= NAMES
    with pytest.raises(AttributeError, match=r"no attribute 'curat'; public names: Critique"):
        _ = rpo.curat  # pyright: ignore[reportAttributeAccessIssue]


def test_the_import_loads_nothing_heavy() -> None:
    program = "import sys, rpo; print(sorted({'torch', 'numpy', 'pyarrow', 'diffusers', 'rpo.api', 'rpo.recipe'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert (Path(rpo.__file__).parent / "py.typed").is_file()


def test_functions_stay_functions_after_their_rooms_are_imported() -> None:
    program = (
        "import rpo, rpo.api.curation, rpo.training.loop, rpo.evaluation.run\n"
        "print(*(function.__name__ for function in (rpo.curate, rpo.train, rpo.evaluate)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["curate", "train", "evaluate"]


def test_a_run_by_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODEL", str(save_pipeline(tmp_path / "tiny", pooled=True)))
    recipe = rpo.load_recipe(RECIPE)
    assert recipe.curate is not None
    prompts = recipe.curate.prompts.prompts(0)[:40]
    with pytest.raises(ValueError, match=r"prompts, number 2: "):
        rpo.curate(recipe, out=tmp_path / "run", prompts=[prompts[0], "no caption at all"], quiet=True)
    run = rpo.curate(recipe, out=tmp_path / "run", prompts=prompts, quiet=True)
    pairs = list(run.pairs())
    assert pairs and {pair.prompt for pair in pairs} <= set(prompts)
    assert run.funnel[0]["rows_in"] == 40 and run.funnel[-1]["kept"] == len(pairs)
    with pytest.raises(rpo.RpoError, match="already holds a run"):
        rpo.curate(recipe, out=tmp_path / "run", prompts=prompts, quiet=True)
    with pytest.raises(rpo.RpoError, match="no tuned weights"):
        _ = run.weights

    result = rpo.train(recipe, run, allow_leakage=True, quiet=True)
    assert result.weights == run.weights
    evaluation = rpo.evaluate(recipe, run, quiet=True)
    assert evaluation.headline == "fully_correct" and evaluation.gain is evaluation.metrics["fully_correct"]
    gain = evaluation.gain
    assert gain.interval is not None and gain.interval[0] <= gain.difference <= gain.interval[1] and gain.prompts == 20
    assert gain.difference == pytest.approx(gain.tuned - gain.base)

    again = rpo.train(recipe, pairs=pairs, out=tmp_path / "again", allow_leakage=True, quiet=True)
    files = [sorted(weights.glob("*.safetensors"))[0].read_bytes() for weights in (result.weights, again.weights)]
    assert files[0] == files[1], "pairs in memory train as the same pairs of a run folder do"
    with pytest.raises(ValueError, match=r"run=.*or on other pairs"):
        rpo.train(recipe, run, pairs=pairs, out=tmp_path / "third")


def _program(page: str) -> str:
    text = (Path(__file__).parents[1] / page).read_text()
    if page.endswith(".ipynb"):
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    [program] = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    return program


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "examples/first_run.ipynb"])
def test_the_program_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the recipe of fakes in place of `shapes`; the prompts of a page are captions that it knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_MODEL", str(save_pipeline(tmp_path / "tiny", pooled=True)))
    load = rpo.load_recipe
    monkeypatch.setattr(rpo, "load_recipe", lambda name: load({"shapes": RECIPE}[name]))
    program = re.sub(r", prompts=\[[^]]*\]", "", _program(page)).replace(
        "rpo.train(recipe, run)", "rpo.train(recipe, run, allow_leakage=True)"
    )
    exec(program, {})
    assert "Difference(base=" in capsys.readouterr().out
    assert not page.endswith(".ipynb") or len(list(Path("runs").glob("notebook-*.png"))) == 3

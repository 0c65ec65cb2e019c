"""The house: who may import whom, what a bare import loads, how long files and functions may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rpo"
FILES = sorted(SOURCE.rglob("*.py"))
FILE_LINES_MAX, LOOP_LINES_MAX, FUNCTION_LINES_MAX = 400, 300, 60
BAD_NAMES = ("utils", "helpers", "manager", "base_")


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("rpo.")}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_rooms_import_only_what_they_may(path: Path) -> None:
    mine = room(module_of(path))
    others = {room(name) for name in imports(path)}
    separate = {"curate", "train", "evaluate"}
    if mine in separate:
        assert not others & (separate - {mine}), "curate, train and evaluate know nothing of each other"
    if mine in {"data", "models", "curate", "train", "evaluate", "report"}:
        assert not others & {"backends", "recipes", "cli", "workflow", "shapes"}
    if mine == "backends":
        assert others <= {"backends", "data", "errors", "protocols", "models"}
    if "recipes" in others:
        assert mine in {"cli", "recipes"}, "only cli looks into recipes"
    if "backends" in others:
        assert mine in {"recipes", "backends", "shapes"}, "only recipes, and the embedded world's own tools, know the backends"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_budgets_and_names(path: Path) -> None:
    text = path.read_text()
    limit = LOOP_LINES_MAX if module_of(path) == "rpo.training.loop" else FILE_LINES_MAX
    assert len(text.splitlines()) <= limit
    assert not any(bad in path.stem for bad in BAD_NAMES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < FUNCTION_LINES_MAX, f"{node.name} is too long"


@pytest.mark.parametrize("statement", ["import rpo", "import rpo.cli", "import rpo.protocols", "import rpo.data.pairs"])
def test_light_imports(statement: str) -> None:
    heavy = "{'torch', 'ray', 'datasets', 'diffusers', 'transformers', 'pandas'}"
    program = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_labels_never_read_the_judge() -> None:
    """No room that makes or reads labels names a judge; the recipe gives the curation none of the evaluation's judges."""
    paths = [*(SOURCE / "curate").rglob("*.py"), *(SOURCE / "train").rglob("*.py")]
    assert SOURCE / "curate" / "prompts" / "critic.py" in paths
    for path in paths:
        assert judges_named(path.read_text()) == set(), path


def judges_named(text: str) -> set[str]:
    """Identifiers of any sort that name a judge: variables, attributes, arguments, imports, definitions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            name = getattr(node, field, None)
            found |= {name} if isinstance(name, str) and "judge" in name.lower() else set()
    return found


@pytest.mark.parametrize(
    "text",
    ["x = recipe.evaluate.judges", "import judge_x", "from rpo.evaluation.judges import y", "def f(judge): ...", "f(judge=1)", "Judge()"],
)
def test_a_judge_is_found_wherever_it_is_named(text: str) -> None:
    assert judges_named(text)


def test_every_file_is_documented() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        if tree.body and path.name != "__init__.py":
            assert ast.get_docstring(tree), path

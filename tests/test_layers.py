"""The house: who may import whom, what a bare import loads, how long files and functions may be."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rpo"
FILES = sorted(SOURCE.rglob("*.py"))
FILE_LINES_MAX, LOOP_LINES_MAX, FUNCTION_LINES_MAX, FOLDER_FILES_MAX = 400, 300, 60, 12
BAD_NAMES = ("utils", "helpers", "manager", "base_")


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if path == SOURCE / "__init__.py":
            break  # it names everything, and imports nothing before it is used
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "rpo"}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


EDGES = {
    "": set(),
    "__main__": {"cli"},
    "accounting": {"data", "errors"},
    "api": {
        *("", "accounting", "core", "curation", "data", "engine", "errors", "evaluation", "models", "protocols", "recipe", "recipes"),
        "training",
    },
    "arrays": set(),
    "backends": {"accounting", "data", "errors", "models", "protocols"},
    "cli": {"", "api", "core", "doctor", "engine", "errors", "models", "recipe", "recipes", "report", "shapes", "study", "training"},
    "core": {"errors"},
    "curation": {"", "core", "data", "engine", "errors", "protocols"},
    "data": {"core", "errors"},
    "doctor": {"errors", "shapes"},
    "engine": {"", "accounting", "core", "data", "errors"},
    "errors": set(),
    "evaluation": {"core", "data", "errors", "protocols"},
    "models": {"arrays", "core", "errors"},
    "protocols": {"data", "errors"},
    "recipe": {"curation", "engine", "protocols", "training"},
    "recipes": {"", "accounting", "backends", "curation", "data", "recipe", "shapes", "training"},
    "report": {"core", "curation", "data", "engine", "errors", "evaluation"},
    "shapes": {"backends", "core", "data", "errors", "protocols", "testing"},
    "study": {"api", "core", "curation", "data", "engine", "evaluation", "protocols", "recipe", "report", "training"},
    "testing": {"data", "errors"},
    "training": {"arrays", "core", "data", "errors", "models"},
}
"""Every room or file of the package and all that it imports from others; a new edge is a decision, made here."""


def test_rooms_import_exactly_these() -> None:
    known = {module_of(path) for path in FILES}
    found: dict[str, set[str]] = {}
    for path in FILES:
        mine = room(module_of(path))
        named = {name if name in known else name.rpartition(".")[0] for name in imports(path)}
        found.setdefault(mine, set()).update({room(name) for name in named if name in known} - {mine})
    assert found == EDGES


def test_rooms_form_no_circle() -> None:
    left = {name: set(others) for name, others in EDGES.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"
    separate = {"curation", "training", "evaluation"}
    assert not any(EDGES[name] & separate for name in separate), "curation, training and evaluation know nothing of each other"
    assert [name for name, others in EDGES.items() if "recipes" in others] == ["api", "cli"], "only api and cli load recipes"


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


def test_folders_hold_few_files() -> None:
    folders = Counter(path.parent for path in FILES if path.name != "__init__.py")
    crowded = {str(folder.relative_to(SOURCE)): count for folder, count in folders.items() if count > FOLDER_FILES_MAX}
    assert not crowded


@pytest.mark.parametrize("statement", ["import rpo", "import rpo.cli", "import rpo.protocols", "import rpo.data.pairs"])
def test_light_imports(statement: str) -> None:
    heavy = "{'torch', 'ray', 'datasets', 'diffusers', 'transformers', 'pandas'}"
    program = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_labels_never_read_the_judge() -> None:
    """No room that makes or reads labels names a judge; the recipe gives the curation none of the evaluation's judges."""
    paths = [*(SOURCE / "curation").rglob("*.py"), *(SOURCE / "training").rglob("*.py")]
    assert SOURCE / "curation" / "vlm" / "critic.py" in paths
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

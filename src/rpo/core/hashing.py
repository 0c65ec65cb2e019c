"""What a stage's results depend on, as one number: equal fingerprints mean interchangeable results."""

import ast
import dataclasses
import enum
import hashlib
import inspect
import json
import math
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

Json = Any
"""None, bool, int, float, str, and lists and string-keyed dictionaries of these."""


_MODULE_IN_FINGERPRINTS = {
    "rpo.backends.chat.openai": "rpo.backends.openai_chat",
    "rpo.backends.chat.transformers": "rpo.backends.transformers_chat",
    "rpo.backends.diffusers.edit": "rpo.backends.diffusers_editors",
    "rpo.backends.diffusers.generate": "rpo.backends.diffusers_images",
    "rpo.curation.external_pairs": "rpo.curate.brought",
    "rpo.curation.label_rules": "rpo.curate.rules",
    "rpo.curation.sample_pairs": "rpo.curate.duels",
    "rpo.curation.stages.candidates": "rpo.curate.attempts",
    "rpo.curation.stages.check": "rpo.curate.checking",
    "rpo.curation.stages.critique": "rpo.curate.stages",
    "rpo.curation.stages.edit": "rpo.curate.stages",
    "rpo.curation.stages.instruct": "rpo.curate.stages",
    "rpo.curation.stages.label": "rpo.curate.select",
    "rpo.curation.stages.pairwise": "rpo.curate.checking",
    "rpo.curation.stages.project": "rpo.curate.stages",
    "rpo.curation.stages.refine": "rpo.curate.attempts",
    "rpo.curation.stages.score": "rpo.curate.stages",
    "rpo.curation.stages.source": "rpo.curate.stages",
    "rpo.curation.stages.verify": "rpo.curate.checking",
    "rpo.curation.vlm.critic": "rpo.curate.prompts.critic",
    "rpo.curation.vlm.instructor": "rpo.curate.prompts.instructor",
    "rpo.recipe": "rpo.config",
    "rpo.training.config": "rpo.train.config",
    "rpo.training.objectives.preference": "rpo.train.objectives",
    "rpo.training.objectives.safeguards": "rpo.train.safeguards",
    "rpo.training.objectives.schedules": "rpo.train.strengths",
}
"""Module of a configuration's class -> the module that fingerprints name for it: a class that moves keeps its identity."""


def _class_name(value: object) -> str:
    module = type(value).__module__
    return f"{_MODULE_IN_FINGERPRINTS.get(module, module)}.{type(value).__qualname__}"


def _binds(statement: ast.stmt) -> set[str]:
    """Names of a module that a top-level statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    nodes = list(ast.walk(statement))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    return names | {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}


@lru_cache(maxsize=256)
def code_identity(kind: type) -> str | None:
    """sha256 of the code of a class: its statement and all statements of its file that it names, directly or through others.

    Comments and layout do not count, and imported modules are not followed. `None` for a class without a source file.
    """
    try:
        tree = ast.parse(Path(inspect.getfile(kind)).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    binds = [_binds(statement) for statement in tree.body]
    used: set[str] = set()
    todo = [kind.__qualname__.split(".")[0]]
    while todo:
        name = todo.pop()
        if name in used:
            continue
        used.add(name)
        for statement, names in zip(tree.body, binds, strict=True):
            if name in names:
                todo += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return digest([_dumped(statement) for statement, names in zip(tree.body, binds, strict=True) if names & used])


def _dumped(statement: ast.stmt) -> str:
    """The statement as text; imports from this package count by the names alone, since its modules may move."""
    if isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] == "rpo":
        statement = ast.ImportFrom(module="rpo", names=statement.names, level=0)
    return ast.dump(statement)


def canonical(value: object, models: Mapping[str, str] | None = None) -> Json:
    """A JSON value that is equal exactly when the configurations are: class names, enum names and tuples are kept apart.

    Takes None, bool, int, float, str, enums, `Path`, tuples, mappings with string keys and dataclasses, nested at will;
    anything else is a `TypeError`. A string or path that is a key of `models` is replaced by the value there,
    so that a model folder counts by its content and may be moved. Fields of a dataclass whose metadata say
    `{"changes_results": False}`, such as the address of a server, are left out, and those with `{"added": True}`, which an earlier
    version did not have, at their default. Classes from outside this package count by
    their code as well, so that results of an own critic or reward are not kept when its code has changed.
    """
    models = models or {}
    if isinstance(value, enum.Enum):
        return {"enum": f"{_class_name(value)}.{value.name}"}
    if isinstance(value, str | Path) and str(value) in models:
        return {"model": models[str(value)]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple):
        return [canonical(item, models) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"keys of a configuration's mapping must be strings, got {list(value)}")
        return {"mapping": {key: canonical(value[key], models) for key in sorted(value)}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        counted = [field for field in dataclasses.fields(value) if _counts(field, getattr(value, field.name))]
        values = {field.name: canonical(getattr(value, field.name), models) for field in counted}
        code = None if _class_name(value).startswith("rpo.") else code_identity(type(value))
        return {"class": _class_name(value)} | ({} if code is None else {"code": code}) | {"fields": values}
    raise TypeError(f"a configuration cannot hold a {_class_name(value)}: it has no canonical form, so results could not be told apart")


def _counts(field: "dataclasses.Field[Any]", value: object) -> bool:
    return field.metadata.get("changes_results", True) and not (field.metadata.get("added", False) and value == field.default)


def digest(value: Json) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


@lru_cache(maxsize=256)
def _content_hash(root: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """sha256 over names and bytes; the sizes and times in `files` only key the cache."""
    total = hashlib.sha256()
    for name, _, _ in files:
        with (root / name).open("rb") as file:
            total.update(json.dumps([name, hashlib.file_digest(file, "sha256").hexdigest()]).encode())
    return total.hexdigest()


def model_identity(model: str | Path) -> str:
    """What a model is: for a local file or folder a hash of its names and bytes, for anything else (a hub id) the string itself.

    Costs one read of the folder; the answer is kept while names, sizes and modification times stay.
    """
    root = Path(model)
    if root.is_file():
        root, names = root.parent, [root.name]
    elif root.is_dir():
        names = sorted(
            os.path.relpath(os.path.join(folder, name), root) for folder, _, files in os.walk(root, followlinks=True) for name in files
        )
    else:
        return str(model)
    stats = [(name, (root / name).stat()) for name in names]
    return f"sha256:{_content_hash(root.absolute(), tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))}"


def _leaves(value: Any, path: str = "") -> dict[str, Json]:
    """Every scalar of a JSON value by its dotted path; the wrappers that `canonical` adds do not show."""
    if isinstance(value, dict):
        plain = value.get("fields", value.get("mapping", value))
        labels = [name for name in ("class", "code") if "class" in value and name in value]
        leaves: dict[str, Json] = {f"{path}.{name}".lstrip("."): value[name] for name in labels}
        for key, item in plain.items():
            leaves |= _leaves(item, f"{path}.{key}".lstrip("."))
        return leaves
    if isinstance(value, list):
        return {key: leaf for i, item in enumerate(value) for key, leaf in _leaves(item, f"{path}[{i}]").items()}
    return {path: value}


def first_difference(old: Json, new: Json) -> str | None:
    """The first setting in which two canonical values differ, as "NAME was OLD and is NEW"; `None` when they are equal."""
    before, after = _leaves(old), _leaves(new)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name, "absent") != after.get(name, "absent"):
            return f"{name} was {before.get(name, 'absent')!r} and is {after.get(name, 'absent')!r}"
    return None

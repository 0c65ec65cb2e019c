"""The only place where concrete classes meet. A recipe is a function without arguments that returns a `rpo.recipe.Recipe`."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from rpo import RECIPE_FILE

BUILT_IN = {
    "shapes": "rpo.recipes.shapes:shapes",
    "shapes_objectives": "rpo.recipes.shapes:shapes_objectives",
    "shapes_vlm": "rpo.recipes.shapes:shapes_vlm",
    "paper_sd15": "rpo.recipes.edits:paper_sd15",
    "practical": "rpo.recipes.edits:practical",
    "sd15_dpo": "rpo.recipes.dpo:sd15_dpo",
    "sdxl_dpo": "rpo.recipes.dpo:sdxl_dpo",
    "sd3_dpo": "rpo.recipes.dpo:sd3_dpo",
    "flux_dpo": "rpo.recipes.dpo:flux_dpo",
}
"""Name -> where its function is; imported when it is asked for."""


def load(name: str) -> Any:
    """The recipe `name`: a built-in one, `package.module:function`, or `file.py:function`. Raises `ValueError` if there is none."""
    place = BUILT_IN.get(name, name)
    module_name, colon, function_name = place.rpartition(":")
    if not colon:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        known = ", ".join(BUILT_IN)
        raise ValueError(f"there is no recipe {name!r}.{hint} Known are {known}; your own is module:function or file.py:function.")
    try:
        module = _from_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(f"recipe {name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"recipe {name!r}: {module_name} has no function {function_name!r}")
    return cast(Callable[[], Any], function)()


def server_checks(url: str, model: str | None) -> Iterator[tuple[str, str, str | None]]:
    """(what, found, what to do about it or `None`) of a few questions to a served vision-language model."""
    from rpo.backends.chat.canary import check_server
    from rpo.backends.scorers.prompt_facts import FACTS_SCHEMA
    from rpo.curation.vlm.schema import critique_schema, instructions_schema, one_call_schema
    from rpo.data.schema import MAX_INSTRUCTIONS

    schemas = {
        "critique": critique_schema(),
        "instructions": instructions_schema(MAX_INSTRUCTIONS),
        "critique_and_instructions": one_call_schema(MAX_INSTRUCTIONS),
        "facts": FACTS_SCHEMA,
    }
    for check in check_server(url, model, schemas):
        yield check.what, check.found, check.fix


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"{RECIPE_FILE}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that what it defines can be sent to a process that has loaded it too
    spec.loader.exec_module(module)
    return module

"""Rich Preference Optimization: better text-to-image models without annotators (arXiv 2503.11720).

recipe = rpo.load_recipe("shapes")
run = rpo.curate(recipe, out="runs/mine")
rpo.train(recipe, run)
print(rpo.evaluate(recipe, run).gain)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rpo.api.functions import Difference, Evaluation, Run, curate, evaluate, load_recipe, train
    from rpo.data.images import EncodedImage
    from rpo.data.pairs import Pair, iterate_pairs, read_pairs, write_pairs
    from rpo.data.schema import Critique, Instructions
    from rpo.errors import Interrupted, RowError, RpoError
    from rpo.recipe import Recipe
    from rpo.report.page import write_report
    from rpo.training.config import TrainConfig
    from rpo.training.loop import TrainResult

__version__ = "0.1.0"

RECIPE_FILE = "recipe_file_"
"""Prefix of the name of a module that was loaded from a recipe's file: another process cannot import it."""

_PUBLIC = {
    "Critique": "rpo.data.schema",
    "Difference": "rpo.api.functions",
    "EncodedImage": "rpo.data.images",
    "Evaluation": "rpo.api.functions",
    "Instructions": "rpo.data.schema",
    "Interrupted": "rpo.errors",
    "Pair": "rpo.data.pairs",
    "Recipe": "rpo.recipe",
    "RowError": "rpo.errors",
    "RpoError": "rpo.errors",
    "Run": "rpo.api.functions",
    "TrainConfig": "rpo.training.config",
    "TrainResult": "rpo.training.loop",
    "curate": "rpo.api.functions",
    "evaluate": "rpo.api.functions",
    "iterate_pairs": "rpo.data.pairs",
    "load_recipe": "rpo.api.functions",
    "read_pairs": "rpo.data.pairs",
    "train": "rpo.api.functions",
    "write_pairs": "rpo.data.pairs",
    "write_report": "rpo.report.page",
}
"""Public name -> module, imported when the name is first used, so that `import rpo` takes milliseconds."""

__all__ = [
    "Critique",
    "Difference",
    "EncodedImage",
    "Evaluation",
    "Instructions",
    "Interrupted",
    "Pair",
    "Recipe",
    "RowError",
    "RpoError",
    "Run",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "curate",
    "evaluate",
    "iterate_pairs",
    "load_recipe",
    "read_pairs",
    "train",
    "write_pairs",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rpo' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""CPU seconds of `rpo train shapes` before its first step, by part, for one or more source trees in turns.

    python benchmarks/start_up.py runs/shapes/pairs.parquet --steps 1 20 450 --rounds 2
    python benchmarks/start_up.py runs/shapes/pairs.parquet --trees ../before/src src

Each run is a process of its own with one thread and an empty run folder. Imports are those of the libraries and of this package;
`rest` is everything between the parts that are listed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PARTS = ("imports", "probe", "images and prompts", "reference errors", "rest")


def measure(pairs: Path, steps: int) -> None:
    """One start in this process: prints a JSON object of seconds by part."""
    import time

    seconds = dict.fromkeys(PARTS, 0.0)
    import rpo.api
    from rpo.api import training as tuning
    from rpo.recipes import load
    from rpo.training import loop
    from rpo.training import setup as preparation

    recipe = load("shapes")
    seconds["imports"] = time.process_time()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.process_time() - began

        return call

    def first_step(*_: Any) -> None:
        seconds["rest"] = time.process_time() - sum(seconds.values())
        print(json.dumps(seconds), flush=True)
        os._exit(0)

    tuning.pairs_leakage = timed("probe", tuning.pairs_leakage)
    preparation.encode_pairs = timed("images and prompts", preparation.encode_pairs)
    preparation.precompute = timed("reference errors", preparation.precompute)
    loop.take_step = first_step
    import dataclasses

    from rpo.core.run_folder import open_run
    from rpo.core.terminal import Terminal

    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=steps, checkpoint_every=steps, eval_every=steps))
    with tempfile.TemporaryDirectory() as folder, open_run(Path(folder) / "run") as run:
        rpo.api.tune(recipe, run, Terminal(stderr=True, quiet=True), pairs_file=pairs)


def start(tree: Path, pairs: Path, steps: int) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(pairs), "--child", "--steps", str(steps)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trees", type=Path, nargs="+", default=[Path(__file__).parents[1] / "src"])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        measure(options.pairs, options.steps[0])
        return
    for steps in options.steps:
        runs: dict[Path, list[dict[str, float]]] = {tree: [] for tree in options.trees}
        for _ in range(options.rounds):
            for tree, found in runs.items():
                found.append(start(tree, options.pairs, steps))
        for tree, found in runs.items():
            medians = {part: statistics.median(run[part] for run in found) for part in PARTS}
            parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in medians.items())
            print(f"{steps:4d} steps, {tree}: {sum(medians.values()):.1f} s ({parts})", flush=True)


if __name__ == "__main__":
    main()

"""One part of the GPU check in a process of its own: imports first, waits for its turn, measures, writes what it has after every figure.

Started by `gpu_check.py`, which sends one line of JSON when the card is free. So a part's imports overlap with the part before it.
"""

import faulthandler
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DUMP_BEFORE_END_S = 4.0
"""The stack of a part that is about to be killed is written this long before."""


@dataclass(kw_only=True)
class Job:
    """What a part is told, and where its figures go."""

    smoke: bool
    """Tiny sizes on the CPU."""
    limit_s: float
    output: Path
    scratch: Path
    """A folder for files, removed after the part."""
    machine: Mapping[str, Any]
    """Figures of the part `machine`, if it has run."""
    began: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.began)

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    def tell(self, result: Mapping[str, Any]) -> None:
        """Figures so far, in place of earlier ones. `problems` in them is a list of what is wrong."""
        self._write({"result": dict(result)})

    def fail(self, status: str, why: str) -> None:
        """Keeps the figures that there are."""
        known = json.loads(self.output.read_text()) if self.output.exists() else {}
        self._write(known | {"status": status, "why": why})

    def _write(self, content: Mapping[str, Any]) -> None:
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        os.replace(partial, self.output)


def out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    seen: list[BaseException] = []
    while error not in seen:  # also where the package has turned it into an error of its own
        seen.append(error)
        if (torch is not None and isinstance(error, torch.OutOfMemoryError)) or isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__ or error
    return False


def free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    module, function, output, scratch = sys.argv[1:5]
    problem: BaseException | None = None
    part: Any = None
    try:
        part = getattr(importlib.import_module(module), function)
        for name in sys.argv[5:]:
            importlib.import_module(name)
    except Exception as error:  # told when its turn comes
        problem = error
    Path(output).with_suffix(".ready").touch()
    turn = sys.stdin.readline()
    if not turn:
        return  # the check has ended
    told = json.loads(turn)
    job = Job(output=Path(output), scratch=Path(scratch), **told)
    faulthandler.dump_traceback_later(max(1.0, job.limit_s - DUMP_BEFORE_END_S), exit=False)
    try:
        if problem is not None:
            raise problem
        torch = sys.modules.get("torch")
        if torch is not None and not job.smoke and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA card; --cpu-smoke tries the check on the CPU")
        part(job)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, SystemExit) and not error.code:
            return
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        why = f"{line} ({Path(where.filename).name}:{where.lineno})"
        job.fail("out of memory" if out_of_memory(error) else "failed", why)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads and the driver need not be waited for: the figures are written


if __name__ == "__main__":
    main()

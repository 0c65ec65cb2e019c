"""Which engine runs the stages, and what share of the machine each stage gets. Results do not depend on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from rich.console import Console

from rpo.core.run_folder import RunFolder
from rpo.engine import local as local_engine
from rpo.engine import ray as ray_engine
from rpo.engine.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the stages of a curation are run."""

    kind: Literal["local", "ray"] = "local"
    """local: threads of this process; ray: processes of a Ray cluster."""
    stage_by_stage: bool = False
    """Each stage makes all its shards before the next is loaded: one model in memory at a time."""
    workers: tuple[str, ...] = ()
    """STAGE=NUMBER: threads, or processes of the Ray engine, of a stage."""
    cpus: tuple[str, ...] = ()
    """STAGE=SHARE: logical CPUs of each process of a stage, on the Ray engine."""
    gpus: tuple[str, ...] = ()
    """STAGE=SHARE: share of a GPU of each process of a stage, on the Ray engine."""

    def __post_init__(self) -> None:
        if self.stage_by_stage and self.kind != "local":
            raise ValueError("stage_by_stage is for the local engine; on Ray, give every stage its share by --gpus")
        self.shares()

    def shares(self) -> dict[str, dict[str, float]]:
        """What is said of each stage. Raises `ValueError` for anything but STAGE=NUMBER."""
        shares: dict[str, dict[str, float]] = {}
        for field, kind in (("workers", int), ("cpus", float), ("gpus", float)):
            for text in getattr(self, field):
                stage, _, number = text.partition("=")
                try:
                    shares.setdefault(stage, {})[field] = kind(number)
                except ValueError as error:
                    raise ValueError(f"--{field} takes STAGE=NUMBER, such as edit=2, got {text!r}") from error
        return shares

    def check(self, stages: Sequence[Stage]) -> None:
        """Raises `ValueError` when something is said of a stage that there is not."""
        names = [stage.spec.name for stage in stages]
        if unknown := self.shares().keys() - set(names):
            raise ValueError(f"there is no stage {sorted(unknown)[0]!r} to give a share; the stages are {', '.join(names)}")

    def run(self, run: RunFolder, rows: pa.Table, stages: Sequence[Stage], console: Console, max_seconds: float | None = None) -> None:
        """Makes what is not done; stops after `max_seconds` with all that is done kept."""
        names = {stage.spec.name for stage in stages}  # may be some of those that something is said of
        limits: dict[str, Any] = {
            "shares": {name: share for name, share in self.shares().items() if name in names},
            "max_seconds": max_seconds,
        }
        if self.kind == "ray":
            ray_engine.run_stages(run, rows, stages, console=console, **limits)
        else:
            local_engine.run_stages(run, rows, stages, console=console, stage_by_stage=self.stage_by_stage, **limits)

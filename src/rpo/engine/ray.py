"""Runs stages on a Ray cluster: the same stage classes, each in a pool of actors with its share of CPUs and GPUs.

Through Ray go references only (shard number and chain values). Every actor reads what it needs from the run folder and commits its
own shard there before it passes the reference on, so a dead actor or node costs the shard in its hands, and a new start goes on from
the disk, on either engine. On several machines the run folder lies on a file system that all of them see. Stages that ask a model
over a wire stay on the machine the run was started on: the ledger and the answers are SQLite files, whose locks hold on one machine.
"""

import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pyarrow as pa
from rich.console import Console

from rpo import RECIPE_FILE
from rpo.accounting.metering import served_models
from rpo.core.run_folder import RunFolder
from rpo.core.signals import signals_to
from rpo.core.terminal import Terminal
from rpo.engine.layers import SHARD_ROWS, Layer, lay_out, prepare, scan_shard, shard_sizes
from rpo.engine.shard import ShardMaker, Shares, shared_specs, told
from rpo.engine.stage import Stage, StageSpec
from rpo.errors import CapReached, Interrupted, RpoError

OBJECT_STORE_BYTES = 100 * 2**20
"""Enough for references; Ray would take 30 % of the machine's memory."""
SPARE_CPUS = 1
"""For Ray's own tasks: with every CPU given to actors, they would wait for ever (ray-project/ray#44687)."""

_REFERENCE = pa.schema([("shard", pa.int64()), ("chain", pa.list_(pa.string())), ("error", pa.string())])


class ShardActor:
    """One worker of one stage, as `map_batches` wants it: a reference in, its shard made and committed, the reference out."""

    def __init__(self, position: int, maker: ShardMaker) -> None:
        self.position, self.maker = position, maker

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._passed_on(reference) for reference in batch.to_pylist()], schema=_REFERENCE)

    def _passed_on(self, reference: dict[str, Any]) -> dict[str, Any]:
        chain = reference["chain"]
        if reference["error"] is not None or len(chain) > self.position + 1:
            return reference
        try:
            made = self.maker.make(reference["shard"], chain[-1])
        except Exception as error:  # told to the driver, which raises it: Ray would wrap it in the traceback of its own tasks
            return reference | {"error": f"{self.maker.where}: {told(error)}"}
        return reference | {"chain": [*chain, made]}


def _ray() -> Any:
    # Read when ray is imported, and by what it starts: nothing is reported home, and no request without the token is answered.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a process without a share sees no GPU
    try:
        import ray
        import ray.data  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise RpoError("the Ray engine needs Ray: pip install 'rpo-diffusion[ray]'") from error
    return ray


def needed(specs: Sequence[StageSpec]) -> dict[str, float]:
    """Logical CPUs and GPUs that the stages' actors hold at once, and the CPU that Ray needs beside them."""
    return {"CPU": SPARE_CPUS + sum(spec.workers * spec.cpus for spec in specs), "GPU": sum(spec.workers * spec.gpus for spec in specs)}


def _check_room(wanted: Mapping[str, float], there: Mapping[str, float], who: str, where: str) -> None:
    for kind, amount in wanted.items():
        if amount > there.get(kind, 0.0):
            raise RpoError(
                f"{who} ask for {amount:g} {kind}s at once and {where} has {there.get(kind, 0.0):g}: Ray would wait for ever. "
                f"Give them less (--workers, --cpus, --gpus), or add nodes."
            )


def _held_here(ray: Any, makers: Mapping[int, ShardMaker]) -> dict[int, dict[str, Any]]:
    """By position, what keeps the actors on this machine of those stages that must stay. Raises `RpoError` without room for them."""
    asking = {position: maker.spec for position, maker in makers.items() if served_models(maker.stage)}
    if not asking:
        return {}
    here = ray.get_runtime_context().get_node_id()
    there = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    _check_room(needed(list(asking.values())), there, "the stages that ask a model over a wire", "this machine, where their accounts lie,")
    return {key: {"label_selector": {"ray.io/node-id": here}} for key in asking}


@contextmanager
def _session(ray: Any, wanted: Mapping[str, float]) -> Generator[None, None, None]:
    """Ray as it runs already in this process, the cluster at $RAY_ADDRESS, or one of our own that ends with the block."""
    if ray.is_initialized():
        _check_room(wanted, ray.cluster_resources(), "the stages", "the Ray cluster")
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # CPUs are logical here: the operating system shares the real ones out.
        cpus = max(os.cpu_count() or 1, math.ceil(wanted["CPU"]))
        own: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "object_store_memory": OBJECT_STORE_BYTES}
        # What this process can import, such as the module of a recipe, its workers can.
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}
        ray.init(num_cpus=cpus, runtime_env=environment, **own, **quiet)
    try:
        _check_room(wanted, ray.cluster_resources(), "the stages", "the Ray cluster")
        yield
    finally:
        ray.shutdown()


def _stop(signum: int) -> None:
    """Ray itself would leave without a word."""
    raise Interrupted(signum)


def _flow(ray: Any, references: list[dict[str, Any]], makers: Mapping[int, ShardMaker]) -> Any:
    """The references on their way through the actor pools of the stages that have something to do."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A block per shard: Ray would gather the tiny references into one, and a stage would wait for all shards of the one before.
    context.target_min_block_size = 1
    data = ray.data.from_items(references, override_num_blocks=len(references))
    held = _held_here(ray, makers)
    for position, maker in makers.items():
        spec = maker.spec
        data = data.map_batches(
            ShardActor,
            fn_constructor_args=(position, maker),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=spec.workers),
            num_cpus=spec.cpus,
            num_gpus=spec.gpus or None,
            **held.get(position, {}),
        )
    return data


def _references(layers: tuple[Layer, ...]) -> list[dict[str, Any]]:
    """The shards that are not done, with the chain values of what is."""
    chains = ((index, scan_shard(layers, index, rows)) for index, rows in enumerate(shard_sizes(layers)))
    return [{"shard": index, "chain": chain, "error": None} for index, chain in chains if len(chain) < len(layers)]


def run_stages(
    run: RunFolder,
    rows: pa.Table,
    stages: Sequence[Stage],
    *,
    shard_rows: int = SHARD_ROWS,
    console: Console | None = None,
    shares: Shares | None = None,
    max_seconds: float | None = None,
) -> None:
    """What `rpo.engine.local.run_stages` does, with the same files as the result, on the processes of a Ray cluster.

    Raises `RpoError` when Ray is not installed or its cluster too small, and as the local engine does.
    """
    specs = shared_specs(stages, shares or {})
    layers = lay_out(run.path, rows, stages, shard_rows=shard_rows)
    prepare(run, rows, layers, shard_rows=shard_rows)
    console = console or Terminal(stderr=True)
    references = _references(layers)
    if not references:
        return
    first = min(len(reference["chain"]) for reference in references) - 1
    makers = {
        position: ShardMaker(stage=stage, spec=spec, layers=layers[: position + 2], shard_rows=shard_rows)
        for position, (stage, spec) in enumerate(zip(stages, specs, strict=True))
        if position >= first
    }
    ray, began = _ray(), time.monotonic()
    for name, module in list(sys.modules.items()):
        if name.startswith(RECIPE_FILE):  # what it defines travels to the workers, who have no such module
            ray.cloudpickle.register_pickle_by_value(module)
    with _session(ray, needed([maker.spec for maker in makers.values()])), signals_to(_stop):
        _warn_of_idle_gpus(ray, specs, console)
        # Closed before Ray is: its executor would ask a Ray that is gone, which ends the process without a word.
        with closing(iter(_flow(ray, references, makers).iter_rows())) as made:
            for done, reference in enumerate(made, start=1):
                if reference["error"] is not None:
                    raise RpoError(reference["error"])
                if max_seconds is not None and done < len(references) and time.monotonic() - began >= max_seconds:
                    raise CapReached(f"the {max_seconds:g} s of --max-time are over; what is done is kept, go on with --resume")
                if done == len(references) or done % max(1, len(references) // 20) == 0:
                    console.print(f"{done} of {len(references)} shards done", highlight=False)


def _warn_of_idle_gpus(ray: Any, specs: Sequence[StageSpec], console: Console) -> None:
    if ray.cluster_resources().get("GPU", 0) and not any(spec.gpus for spec in specs):
        console.print("warning: the cluster has GPUs and no stage asks for one; give them out, as in --gpus source=0.5 edit=0.5")

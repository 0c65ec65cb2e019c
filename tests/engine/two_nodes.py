"""A Ray cluster of two nodes on one machine: on which node does each stage run? `two_nodes.py FOLDER URL WORKERS MAX_CALLS`"""

import io
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from rpo.accounting.metering import account_in, metered
from rpo.backends.chat.openai import ChatServer, OpenAIChatConfig
from rpo.core.run_folder import open_run
from rpo.data.chat import ChatRequest, Message
from rpo.engine import ray as ray_engine
from rpo.engine.layers import read_run
from rpo.engine.stage import Batch, StageCall, StageSpec, plan
from rpo.errors import RpoError


@dataclass(frozen=True, kw_only=True)
class Where:
    """Writes down the node it runs on, and asks a model if it has one."""

    name: str
    chat: OpenAIChatConfig | None = None
    workers: int = 1

    @property
    def spec(self) -> StageSpec:
        outputs = {f"{self.name}_node": pa.string(), f"{self.name}_process": pa.int64()}
        return StageSpec(name=self.name, version="1", inputs=("prompt",), outputs=outputs, batch_size=4, workers=self.workers)

    def build(self) -> StageCall:
        chat = self.chat and self.chat.build()
        node = ray.get_runtime_context().get_node_id()

        def call(batch: Batch) -> Batch:
            if chat is not None:
                chat.complete([ChatRequest(messages=(Message(role="user", parts=(str(prompt),)),)) for prompt in batch["prompt"]])
            time.sleep(0.05)
            rows = len(batch["prompt"])
            return {f"{self.name}_node": [node] * rows, f"{self.name}_process": [os.getpid()] * rows}

        return call


def main(folder: Path, url: str, workers: int, max_calls: int) -> None:
    ray_engine._ray()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    cluster.add_node(num_cpus=8)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    head = ray.get_runtime_context().get_node_id()
    chat = OpenAIChatConfig(model="m", server=ChatServer(base_url=url))
    planned = plan([{"prompt": f"prompt {number}"} for number in range(80)], seed=0)
    stages = metered(
        (Where(name="near", chat=chat, workers=workers), Where(name="far", workers=4)), account_in(folder, None, None, max_calls)
    )
    try:
        with open_run(folder, resume=True) as run:
            ray_engine.run_stages(run, planned, stages, shard_rows=4, console=Console(file=io.StringIO()))
        for name in ("near", "far"):
            rows = set(zip(*(read_run(folder, [f"{name}_{what}"]).column(1).to_pylist() for what in ("node", "process")), strict=True))
            print(name, dict(Counter("here" if node == head else "elsewhere" for node, _ in rows)))
    except RpoError as error:
        print(error)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

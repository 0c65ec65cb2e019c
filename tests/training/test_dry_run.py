import gc
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from rpo.errors import RpoError
from rpo.training.config import TrainConfig
from rpo.training.dry_run import activation_bytes, rehearse
from rpo.training.inputs.batches import Visit
from rpo.training.runtime.distributed import Processes
from rpo.training.runtime.interruption import StopRequest
from rpo.training.setup import prepare
from tiny_diffusion import make_pairs, save_pipeline


def test_says_what_a_run_would_take_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    config = TrainConfig(model=str(save_pipeline(tmp_path / "model")), steps=100, batch_pairs=2, accumulation=1, lora_rank=2, draws=4)
    before = sorted(tmp_path.rglob("*"))
    said: list[str] = []
    rehearse(config, make_pairs(20), said.append)
    text = "\n".join(said)
    assert '"lora_rank": 2' in said[0]
    assert "20 pairs, 100 steps of 2: 10.0 visits of each pair" in text
    for part in ("trained numbers", "activations: ", "latents", "prompts", "reference errors", "filling the caches", "steps:"):
        assert part in text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("lora_rank", [2, None])
def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(tmp_path: Path, lora_rank: int | None) -> None:
    model = str(save_pipeline(tmp_path / "model"))

    def live_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    def kept(num_pairs: int, **settings: bool) -> int:
        config = TrainConfig(model=model, steps=1, batch_pairs=8, accumulation=1, lora_rank=lora_rank, draws=1, **settings)
        alone = Processes(device=torch.device("cpu"))
        training = prepare(config, make_pairs(8), [], tmp_path / "cache", StopRequest(), Progress(console=Console(quiet=True)), alone)
        visits = [Visit(pair=pair, number=0) for pair in range(num_pairs)]
        activations, before = activation_bytes(training, visits), live_tensors()
        assert activation_bytes(training, visits) == activations
        assert live_tensors() == before, "activations are never freed"
        return activations

    assert kept(8) == pytest.approx(2 * kept(4), rel=0.01)  # so no weights are among them
    assert kept(8, gradient_checkpointing=True) < 0.5 * kept(8)


def test_stops_where_the_run_would(tmp_path: Path) -> None:
    config = TrainConfig(model=str(tmp_path / "nothing"))
    with pytest.raises(RpoError, match="no pairs to train on"):
        rehearse(config, [], print)
    with pytest.raises(RpoError, match="neither a folder nor a hub id"):
        rehearse(config, make_pairs(2), print)

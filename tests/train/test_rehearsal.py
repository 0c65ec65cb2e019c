from pathlib import Path

import pytest

from rpo.errors import RpoError
from rpo.train.config import TrainConfig
from rpo.train.rehearsal import rehearse
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
    for part in ("trained numbers", "latents", "prompts", "reference errors", "filling the caches", "steps:"):
        assert part in text
    assert sorted(tmp_path.rglob("*")) == before


def test_stops_where_the_run_would(tmp_path: Path) -> None:
    config = TrainConfig(model=str(tmp_path / "nothing"))
    with pytest.raises(RpoError, match="no pairs to train on"):
        rehearse(config, [], print)
    with pytest.raises(RpoError, match="neither a folder nor a hub id"):
        rehearse(config, make_pairs(2), print)

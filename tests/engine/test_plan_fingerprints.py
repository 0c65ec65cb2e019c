"""Row ids depend on content alone, fingerprints on all that results depend on."""

import enum
import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from toy_pipeline import toy_rows, toy_stages

from rpo.backends.chat.openai import OpenAIChatConfig
from rpo.core.hashing import canonical, digest, first_difference, model_identity
from rpo.core.parquet import IMAGE
from rpo.engine.layers import lay_out
from rpo.engine.stage import StageSpec, fan_out, plan

SAMPLE = {"sample": pa.int32()}


def test_ids_are_hashes_of_content_and_seeds_follow_the_run_seed() -> None:
    rows = plan(fan_out(["a red star", "ein Würfel"], 2), seed=1, columns=SAMPLE)
    assert rows.column_names == ["id", "prompt", "seed", "sample"] and rows.schema.field("seed").type == pa.int64()
    ids = rows.column("id").to_pylist()
    assert all(re.fullmatch("[0-9a-f]{16}", row) for row in ids) and len(set(ids)) == 4
    other = plan(fan_out(["another", "a red star", "ein Würfel"], 3), seed=2, columns=SAMPLE)
    assert set(ids) < set(other.column("id").to_pylist()), "neither place nor run seed nor neighbours change an id"
    both = [dict(zip(t.column("id").to_pylist(), t.column("seed").to_pylist(), strict=True)) for t in (rows, other)]
    assert all(both[0][row] != both[1][row] for row in ids) and all(0 <= seed < 2**63 for seed in both[0].values())


def test_equal_rows_are_one_row() -> None:
    rows = plan(fan_out(["b", "a", "b"], 1), seed=0, columns=SAMPLE)
    assert rows.column("prompt").to_pylist() == ["b", "a"]


def test_source_pairs_are_rows_with_images() -> None:
    sources = [{"prompt": "p", "source": {"bytes": bytes([number]), "path": None}} for number in range(3)]
    rows = plan(sources, seed=0, columns={"source": IMAGE})
    assert rows.num_rows == 3 and rows.column("source").to_pylist()[2]["bytes"] == b"\x02"


@pytest.mark.parametrize(
    ("rows", "columns", "told"),
    [
        ([], {}, "rows is empty"),
        ([{"text": "x"}], {}, "row 0 of the plan must hold"),
        ([{"prompt": "x"}, {"prompt": 3}], {}, "row 1 of the plan must hold"),
        ([{"prompt": "x", "more": 1}], {}, "row 0 of the plan must hold"),
        ([{"prompt": "x", "sample": "one"}], SAMPLE, "'sample' of the plan must be int32"),
        ([{"prompt": "\ud800"}], {}, "'prompt' of the plan must be string"),
        ([{"prompt": "x", "seed": 3}], {"seed": pa.int64()}, "may not be named"),
    ],
)
def test_wrong_rows_are_told(rows: list[dict[str, Any]], columns: dict[str, pa.DataType], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plan(rows, seed=0, columns=columns)


class Rule(enum.Enum):
    VOTE = "vote"
    ONE = "one"


class Loud(enum.StrEnum):
    VOTE = "vote"


@dataclass(frozen=True)
class A:
    value: object = 1


@dataclass(frozen=True)
class B:
    value: object = 1


def test_different_configurations_have_different_canonical_forms() -> None:
    values: list[object] = [
        None, True, False, 0, 1, 1.0, 0.1, float("inf"), float("-inf"), "", "1", "1.0", "None", (), (1,), ((1,),), ("1",), {}, {"value": 1},
        A(), B(), A(B()), B(A()), A(2), A((1, 2)), A({"value": 1}), Rule.VOTE, Rule.ONE, Loud.VOTE, "vote", Path("a"), "a",
        {"class": "A"}, {"path": "a"}, {"mapping": {}},
    ]  # fmt: skip
    forms = [digest(canonical(value)) for value in values]
    assert len(set(forms)) == len(values)
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})


@pytest.mark.parametrize("wrong", [object(), [1], {1, 2}, b"x", A, lambda: None, {1: 2}, A(A([1])), pa.int32()])
def test_what_has_no_canonical_form_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError):
        canonical(wrong)


def test_a_model_folder_counts_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_bytes(b"12345")
    first = model_identity(str(folder))
    assert first == model_identity(folder) and first.startswith("sha256:")
    moved = folder.rename(tmp_path / "moved")
    assert model_identity(moved) == first
    (moved / "unet" / "weights").write_bytes(b"12346")
    os.utime(moved / "unet" / "weights", ns=(1, 1))
    assert model_identity(moved) != first
    (moved / "unet" / "weights").write_bytes(b"12345")
    assert model_identity(moved) == first
    (moved / "unet" / "weights").rename(moved / "unet" / "other")
    assert model_identity(moved) != first
    assert model_identity("runwayml/stable-diffusion-v1-5@abc") == "runwayml/stable-diffusion-v1-5@abc"
    assert model_identity(moved / "unet" / "other").startswith("sha256:")


def fingerprints(stages: list[Any], shard_rows: int = 4) -> list[str]:
    return [layer.fingerprint for layer in lay_out(Path("run"), toy_rows(8), stages, shard_rows=shard_rows)]


def changed_from(old: list[str], new: list[str]) -> int:
    """Position of the first layer that differs; all after it must differ as well."""
    same = [a == b for a, b in zip(old, new, strict=True)]
    position = same.index(False) if False in same else len(same)
    assert not any(same[position:])
    return position


def test_a_fingerprint_changes_with_the_stage_and_with_all_before_it(tmp_path: Path) -> None:
    stages = toy_stages(tmp_path)
    old = fingerprints(stages)
    assert old == fingerprints(toy_stages(tmp_path)), "and with nothing else"
    assert changed_from(old, fingerprints(toy_stages(tmp_path, workers=3))) == 5
    assert changed_from(old, fingerprints(stages, shard_rows=8)) == 0
    assert changed_from(old, fingerprints(toy_stages(tmp_path, salt="x"))) == 1
    assert changed_from(old, fingerprints(toy_stages(tmp_path, batch_size=1))) == 1
    assert changed_from(old, fingerprints([*stages[:2], *toy_stages(tmp_path, delay_s=1.0)[2:]])) == 3


@dataclass(frozen=True, kw_only=True)
class Modelled:
    model: str
    version: str = "1"
    kind: str = "int32"

    @property
    def spec(self) -> StageSpec:
        outputs = {"x": pa.int32() if self.kind == "int32" else pa.int64()}
        return StageSpec(name="m", version=self.version, inputs=(), outputs=outputs, batch_size=1, models=(self.model,))

    def build(self) -> Any:
        raise AssertionError("not built to be fingerprinted")


def test_models_may_move_but_not_change(tmp_path: Path) -> None:
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(weights)
    a, b, c = (fingerprints([Modelled(model=str(tmp_path / name))]) for name in "abc")
    assert a == b and changed_from(a, c) == 1
    assert changed_from(a, fingerprints([Modelled(model=str(tmp_path / "a"), version="2")])) == 1


def test_the_difference_is_told_by_name() -> None:
    old, new = canonical(A((1, {"k": "x"}))), canonical(A((1, {"k": "y"})))
    assert first_difference(old, new) == "value[1].k was 'x' and is 'y'"
    assert first_difference(old, old) is None
    assert "class was" in str(first_difference(canonical(A()), canonical(B())))


OWN = '''
"""A recipe's file."""
from dataclasses import dataclass

SHIFT = 0.0
UNUSED = 1


def helper(value):
    return value + SHIFT


class Reward:
    def score(self, value):
        return helper(value)


@dataclass(frozen=True)
class RewardConfig:
    weight: float = 1.0

    def build(self):
        return Reward()
'''


def _own(tmp_path: Path, number: int, text: str) -> object:
    file = tmp_path / f"own_recipe_{number}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("own_recipe", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_recipe"] = module
    spec.loader.exec_module(module)
    return module.RewardConfig()


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("SHIFT = 0.0", "SHIFT = 1000.0", True),
        ("return value + SHIFT", "return 1000 + value + SHIFT", True),
        ("return helper(value)", "return -helper(value)", True),
        ("UNUSED = 1", "UNUSED = 2", False),
        ("SHIFT = 0.0", "SHIFT = 0.0  # a comment", False),
    ],
)
def test_own_code_counts(tmp_path: Path, old: str, new: str, changes: bool) -> None:
    """An own reward that was corrected makes its stage's results stale; what it does not use changes nothing."""
    before = canonical(_own(tmp_path, 0, OWN))
    after = canonical(_own(tmp_path, 1, OWN.replace(old, new)))
    assert (digest(before) != digest(after)) is changes
    if changes:
        assert "code was " in str(first_difference(before, after))
    del sys.modules["own_recipe"]


def test_our_own_classes_count_by_their_names(tmp_path: Path) -> None:
    """An update of the package leaves run folders usable."""
    from rpo.models.lora import Lora

    assert canonical(Lora()).keys() == {"class", "fields"}


@dataclass(frozen=True)
class Grown:
    value: int = 1
    late: bool = field(default=False, metadata={"added": True})


def test_a_setting_of_a_later_version_counts_where_it_is_set_and_changes_no_older_folder() -> None:
    assert canonical(Grown())["fields"] == {"value": 1}
    assert canonical(Grown(late=True))["fields"] == {"value": 1, "late": True}
    assert "system_as_user" not in canonical(OpenAIChatConfig(model="m"))["fields"]
    assert canonical(OpenAIChatConfig(model="m", system_as_user=True))["fields"]["system_as_user"] is True

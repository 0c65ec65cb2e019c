from dataclasses import is_dataclass, replace

import pytest
import torch

from rpo.training.objectives import preference as objectives
from rpo.training.objectives import safeguards
from rpo.training.objectives import schedules as strengths
from rpo.training.objectives.preference import DMPO, IPO, SFT, DiffusionDPO, DiffusionKTO, Hinge, MaPO, OffsetDPO, PairErrors, SoftDPO
from rpo.training.objectives.safeguards import WithSFT
from rpo.training.objectives.schedules import AutoK, ScheduledK, TimestepWeighted

ON_MARGINS = [DiffusionDPO, IPO, Hinge, SoftDPO, OffsetDPO, DMPO, DiffusionKTO]


def errors(seed: int = 0, num_pairs: int = 6, spread: float = 1.0) -> PairErrors:
    generator = torch.Generator().manual_seed(seed)
    values = spread * torch.rand((5, num_pairs), generator=generator, dtype=torch.float64)
    return PairErrors(*values[:4], gap=values[4], timestep=torch.arange(num_pairs) * 150)


@pytest.mark.parametrize("kind", ON_MARGINS)
def test_a_schedule_is_the_objective_with_another_k(kind: type) -> None:
    wrapped = ScheduledK(of=kind(k=8.0), first=0.25, last=4.0)
    for progress, factor in [(0.0, 0.25), (0.5, 1.0), (1.0, 4.0)]:
        batch = replace(errors(), progress=progress)
        assert torch.allclose(wrapped(batch), kind(k=8.0 * factor)(batch))


def test_auto_k_holds_the_gradient_factor() -> None:
    wrapped = AutoK(of=DiffusionDPO(k=1e6), target=0.2)
    for spread in (1e-3, 1.0):
        batch = errors(spread=spread)
        size = batch.margin().abs().mean()
        k = torch.log(torch.tensor(4.0, dtype=torch.float64)) / size
        assert torch.sigmoid(-k * size) == pytest.approx(0.2)
        assert torch.allclose(wrapped(batch), DiffusionDPO(k=k.item())(batch))


def test_auto_k_stays_below_its_own_and_begins_at_log_2() -> None:
    batch = errors()
    assert torch.allclose(AutoK(of=DiffusionDPO(k=0.5), target=0.01)(batch), DiffusionDPO(k=0.5)(batch))
    same = replace(batch, chosen=batch.ref_chosen, rejected=batch.ref_rejected)
    assert torch.allclose(AutoK()(same), torch.full((6,), 2.0, dtype=torch.float64).log())


def test_auto_k_is_no_part_of_the_gradient() -> None:
    batch = errors()
    batch.chosen.requires_grad_()
    (gradient,) = torch.autograd.grad(AutoK(of=DiffusionDPO(k=1e6))(batch).sum(), batch.chosen)
    k = torch.log(torch.tensor(4.0)) / batch.margin().abs().mean()
    (plain,) = torch.autograd.grad(DiffusionDPO(k=k.item())(batch).sum(), batch.chosen)
    assert torch.allclose(gradient, plain)


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 3.0])
def test_timestep_weights_have_a_mean_of_one(power: float) -> None:
    steps = 10_000
    batch = PairErrors(*torch.zeros((4, steps)), timestep=torch.arange(steps))
    weights = TimestepWeighted(of=DiffusionDPO(), power=power, num_timesteps=steps)(batch) / torch.tensor(2.0).log()
    assert weights.mean().item() == pytest.approx(1.0, abs=0.01)
    assert power == 0 or (weights[-1] > weights[0]).item() == (power > 0)


def test_wrappers_ask_for_what_they_wrap() -> None:
    assert not TimestepWeighted(of=SFT()).paired() and not TimestepWeighted(of=SFT()).referenced()
    assert ScheduledK().paired() and ScheduledK().referenced()
    assert WithSFT(of=AutoK(), weight=2.0).describe().startswith("DiffusionDPO, k=2500")


@pytest.mark.parametrize("kind", [ScheduledK, AutoK])
def test_what_has_no_strength_on_the_margin_is_refused(kind: type) -> None:
    for objective in (SFT(), MaPO(), WithSFT()):
        with pytest.raises(ValueError, match="has none"):
            kind(of=objective)
    with pytest.raises(ValueError, match="each side by itself"):
        AutoK(of=DiffusionKTO())


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="first must be above 0"):
        ScheduledK(first=0.0)
    with pytest.raises(ValueError, match=r"target must be above 0 and below 0.5, got 0.5"):
        AutoK(target=0.5)
    with pytest.raises(ValueError, match="power must be above -1"):
        TimestepWeighted(power=-1.0)
    with pytest.raises(ValueError, match="give timestep"):
        TimestepWeighted()(PairErrors(*torch.zeros((4, 2))))


def _of_step(batch: PairErrors, rows: slice) -> PairErrors:
    """One micro-batch of a step."""
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "timestep", "gap", "alignment")
    return replace(batch, **{name: getattr(batch, name)[rows] for name in names}, step=lambda: batch)


EVERY = [
    kind
    for module in (objectives, safeguards, strengths)
    for kind in vars(module).values()
    if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.__name__ and kind is not PairErrors
]


@pytest.mark.parametrize("kind", EVERY)
def test_the_loss_of_a_pair_does_not_depend_on_micro_batches(kind: type) -> None:
    """Every objective there is, also under a wrapper that changes its strength, and every wrapper of one that looks at other pairs."""
    batch = replace(errors(), alignment=torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5)
    fields = kind.__dataclass_fields__
    several = [kind()]
    several += [ScheduledK(of=kind(k=2.0), first=3.0, last=3.0)] if kind in ON_MARGINS else []
    several += [kind(of=DiffusionKTO(k=2.0))] if "of" in fields and kind is not AutoK else []
    for objective in several:
        together = objective(batch)
        parts = [objective(_of_step(batch, rows)) for rows in (slice(0, 2), slice(2, 3), slice(3, 6))]
        assert torch.allclose(torch.cat(parts), together)


def test_a_statistic_over_a_micro_batch_would_be_another() -> None:
    batch = replace(errors(spread=0.1), alignment=torch.zeros(6))
    for objective in (DiffusionKTO(), AutoK(of=DiffusionDPO(k=1e6)), ScheduledK(of=DiffusionKTO())):
        alone = objective(replace(_of_step(batch, slice(0, 2)), step=None))
        assert not torch.allclose(alone, objective(batch)[:2])

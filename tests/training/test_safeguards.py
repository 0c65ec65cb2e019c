from dataclasses import replace

import pytest
import torch
from torch import nn

from rpo.training.inputs.errors import SideErrors
from rpo.training.objectives.preference import SFT, DiffusionDPO, MaPO, Objective, PairErrors
from rpo.training.objectives.safeguards import Anchored, LoserGradient, WinnerPreserving, WithSFT


def errors(seed: int = 0, num_pairs: int = 6) -> PairErrors:
    values = torch.rand((5, num_pairs), generator=torch.Generator().manual_seed(seed))
    return PairErrors(*(row.clone().requires_grad_(i < 2) for i, row in enumerate(values[:4])), alignment=values[4] - 0.3)


def gradients(objective: Objective, batch: PairErrors) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.autograd.grad(objective(batch).sum(), (batch.chosen, batch.rejected))


def test_loser_gradient_scales_the_gradient_and_not_the_value() -> None:
    plain, scaled = DiffusionDPO(k=10.0), LoserGradient(of=DiffusionDPO(k=10.0), scale=0.25)
    assert torch.equal(plain(errors()), scaled(errors()))
    (chosen, rejected), (chosen_too, scaled_down) = gradients(plain, errors()), gradients(scaled, errors())
    assert torch.allclose(scaled_down, 0.25 * rejected) and torch.equal(chosen, chosen_too)


def residual_errors(residuals: torch.Tensor, reference: torch.Tensor) -> PairErrors:
    """As the trainer makes them, of residuals (2p, c, h, w)."""
    chosen, rejected = residuals.chunk(2)
    products = (chosen.square(), rejected.square(), chosen * rejected)
    sides = SideErrors(*(product.mean(dim=(1, 2, 3)) for product in products))
    ref_chosen, ref_rejected = reference.square().mean(dim=(1, 2, 3)).chunk(2)
    return PairErrors(sides.chosen, sides.rejected, ref_chosen, ref_rejected, alignment=sides.alignment)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("likeness", [-0.5, 0.3, 0.95])
def test_a_step_at_the_output_leaves_the_winner_its_share(mu: float, likeness: float) -> None:
    """One small gradient step on a network of one shared output offset per pair: what both sides share moves both."""
    generator = torch.Generator().manual_seed(3)
    base, other = torch.randn((2, 4, 4, 8, 8), generator=generator, dtype=torch.float64)
    rejected = 1.5 * (likeness * base + (1 - likeness**2) ** 0.5 * other)
    fixed = torch.cat([base, rejected])

    def change(objective: Objective) -> torch.Tensor:
        shared = nn.Parameter(torch.zeros(4, 4, 8, 8, dtype=torch.float64))
        batch = residual_errors(fixed + shared.repeat(2, 1, 1, 1), fixed)
        objective(batch).sum().backward()
        step = 1e-3 * shared.grad
        return (base - step).square().mean(dim=(1, 2, 3)) - base.square().mean(dim=(1, 2, 3))

    class ChosenOnly(DiffusionDPO):
        def __call__(self, errors: PairErrors) -> torch.Tensor:
            return super().__call__(replace(errors, rejected=errors.rejected.detach()))

    alone, guarded = change(ChosenOnly(k=1.0)), change(WinnerPreserving(of=DiffusionDPO(k=1.0), mu=mu))
    assert (guarded <= mu * alone + 1e-9).all(), "the winner keeps at least its share of the descent"
    if likeness == 0.95:
        assert (change(DiffusionDPO(k=1.0)) > 0).all(), "without the safeguard the winner gets worse"


def test_opposite_gradients_are_left_alone() -> None:
    batch = replace(errors(), alignment=torch.full((6,), -0.1))
    plain, guarded = DiffusionDPO(k=10.0), WinnerPreserving(of=DiffusionDPO(k=10.0))
    assert all(torch.equal(*sides) for sides in zip(gradients(plain, batch), gradients(guarded, batch), strict=True))


def test_the_anchor_pulls_only_where_the_chosen_side_got_worse() -> None:
    batch = errors()
    worse = batch.chosen > batch.ref_chosen
    assert 0 < worse.sum() < 6
    plain, anchored = DiffusionDPO(k=10.0)(batch), Anchored(of=DiffusionDPO(k=10.0), weight=3.0)(batch)
    assert torch.allclose(anchored - plain, 3 * (batch.chosen - batch.ref_chosen).clamp(min=0), atol=1e-6)
    assert Anchored(of=SFT()).referenced() and not Anchored(of=SFT()).paired()


def test_sft_beside_an_objective() -> None:
    batch = replace(errors(), weight=torch.arange(6.0))
    mixed = WithSFT(of=DiffusionDPO(k=10.0), weight=2.0)(batch)
    assert torch.allclose(mixed, torch.arange(6.0) * (DiffusionDPO(k=10.0)(errors()) + 2 * batch.chosen))


def test_safeguards_can_be_put_one_into_the_other() -> None:
    both = Anchored(of=WinnerPreserving(of=MaPO(k=10.0)), weight=5.0)
    assert both.paired() and both.referenced() and torch.isfinite(both(errors())).all()
    assert both.describe() == "MaPO, k=10 (T 40 and beta 0.1 in MaPO's script), winner-preserving (mu=0.9), anchored x5"


def test_what_makes_no_sense_is_refused() -> None:
    for wrong, message in (
        (lambda: LoserGradient(scale=2.0), r"scale must be between 0 and 1, got 2\.0"),
        (lambda: WinnerPreserving(mu=-0.1), "mu must be between"),
        (lambda: Anchored(weight=0.0), "weight must be above 0"),
        (lambda: WithSFT(weight=-1.0), "weight must be above 0"),
        (lambda: WinnerPreserving()(replace(errors(), alignment=None)), "alignment"),
        (lambda: LoserGradient(of=SFT())(PairErrors(torch.ones(1))), "no rejected side"),
        (lambda: Anchored(of=SFT())(PairErrors(torch.ones(1))), "ref_chosen"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()

import math

import pytest
import torch
import torch.nn.functional as F

from rpo.train.objectives import SFT, DiffusionDPO, Objective, PairErrors


def errors(seed: int = 0, num_pairs: int = 6, **extra: torch.Tensor) -> PairErrors:
    values = torch.rand((4, num_pairs), generator=torch.Generator().manual_seed(seed))
    return PairErrors(*(row.clone().requires_grad_(i < 2) for i, row in enumerate(values)), **extra)


def test_loss_is_log_2_where_policy_and_reference_agree() -> None:
    chosen, rejected = torch.rand(5), torch.rand(5)
    loss = DiffusionDPO(k=2500.0)(PairErrors(chosen, rejected, chosen, rejected))
    assert torch.equal(loss, torch.full((5,), math.log(2)))


def test_closed_form() -> None:
    # m = (0.5 - 0.4) - (0.3 - 0.35) = 0.15
    one = PairErrors(torch.tensor([0.4]), torch.tensor([0.35]), torch.tensor([0.5]), torch.tensor([0.3]))
    assert one.margin().item() == pytest.approx(0.15, abs=1e-7)
    assert DiffusionDPO(k=10.0)(one).item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-6)


def test_gradient_lowers_the_chosen_error_and_raises_the_rejected_one() -> None:
    batch = errors()
    DiffusionDPO(k=3.0)(batch).sum().backward()
    assert (batch.chosen.grad > 0).all() and (batch.rejected.grad < 0).all()
    assert torch.allclose(batch.chosen.grad, 3 * torch.sigmoid(-3 * batch.margin().detach()))


def test_k_multiplies_the_margin() -> None:
    batch = errors()
    assert torch.allclose(DiffusionDPO(k=20.0)(batch), -F.logsigmoid(20 * batch.margin()))
    assert not torch.allclose(DiffusionDPO(k=20.0)(batch), DiffusionDPO(k=10.0)(batch))


def per_element(seed: int, num_pairs: int = 4) -> list[torch.Tensor]:
    """Squared errors per element, chosen first then rejected: policy, reference."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((2 * num_pairs, 4, 8, 8), generator=generator, dtype=torch.float64) for _ in range(2)]


def salesforce_losses(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    w, rest = policy.mean(dim=(1, 2, 3)).chunk(2)
    ref_w, ref_rest = reference.mean(dim=(1, 2, 3)).chunk(2)
    return -F.logsigmoid(-0.5 * beta * ((w - rest) - (ref_w - ref_rest)))


def diffusers_losses(policy: torch.Tensor, reference: torch.Tensor, beta_dpo: float) -> torch.Tensor:
    w, rest = policy.mean(dim=(1, 2, 3)).chunk(2)
    ref_w, ref_rest = reference.mean(dim=(1, 2, 3)).chunk(2)
    return -F.logsigmoid(beta_dpo * ((ref_w - ref_rest) - (w - rest)))


@pytest.mark.parametrize("seed", range(3))
def test_parity_with_the_authors_and_with_diffusers(seed: int) -> None:
    policy, reference = per_element(seed)
    objective = DiffusionDPO(k=2500.0)
    mine = objective(PairErrors(*policy.mean(dim=(1, 2, 3)).chunk(2), *reference.mean(dim=(1, 2, 3)).chunk(2)))
    assert torch.allclose(mine, salesforce_losses(policy, reference, objective.beta), rtol=1e-9)
    assert torch.allclose(mine, diffusers_losses(policy, reference, objective.k), rtol=1e-9)


def test_a_pair_s_loss_does_not_depend_on_the_others() -> None:
    batch, objective = errors(), DiffusionDPO(k=10.0)
    alone = [
        objective(PairErrors(*(side[i : i + 1] for side in (batch.chosen, batch.rejected, batch.ref_chosen, batch.ref_rejected))))
        for i in range(6)
    ]
    assert torch.equal(objective(batch), torch.cat(alone))


def test_loser_gradient_scales_the_gradient_and_not_the_value() -> None:
    plain, scaled = errors(), errors()
    loss, scaled_loss = DiffusionDPO(k=10.0)(plain), DiffusionDPO(k=10.0, loser_gradient=0.25)(scaled)
    assert torch.equal(loss, scaled_loss)
    loss.sum().backward()
    scaled_loss.sum().backward()
    assert torch.allclose(scaled.rejected.grad, 0.25 * plain.rejected.grad)
    assert torch.equal(scaled.chosen.grad, plain.chosen.grad)


@pytest.mark.parametrize("objective", [DiffusionDPO(k=5.0), SFT()])
def test_weight_multiplies_the_loss(objective: Objective) -> None:
    weight = torch.tensor([0.0, 1, 2, 3, 4, 5])
    assert torch.allclose(objective(errors(weight=weight)), weight * objective(errors()))


def test_sft_is_the_chosen_error() -> None:
    chosen = torch.rand(3)
    assert torch.equal(SFT()(PairErrors(chosen)), chosen)
    assert not SFT().needs_pair() and DiffusionDPO().needs_pair()


def test_both_strengths_are_told() -> None:
    assert "k=2500" in DiffusionDPO(k=2500.0).describe() and "beta=5000" in DiffusionDPO(k=2500.0).describe()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k must be above 0, got -1\.0"):
        DiffusionDPO(k=-1.0)
    with pytest.raises(ValueError, match=r"loser_gradient must be between 0 and 1, got 2\.0"):
        DiffusionDPO(loser_gradient=2.0)
    with pytest.raises(ValueError, match="ref_chosen"):
        DiffusionDPO()(PairErrors(torch.ones(1), torch.ones(1)))

import math

import pytest
import torch
import torch.nn.functional as F

from rpo.training.objectives.preference import (
    DMPO,
    IPO,
    SFT,
    DiffusionDPO,
    DiffusionKTO,
    Hinge,
    LinearDPO,
    MaPO,
    Objective,
    OffsetDPO,
    PairErrors,
    SoftDPO,
)

GAP = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
PAIRED = [
    DiffusionDPO(k=5.0),
    IPO(k=5.0),
    Hinge(k=5.0),
    SoftDPO(k=5.0, temperature=0.5, smoothing=0.1),
    OffsetDPO(k=5.0, offset=0.5),
    DiffusionKTO(k=5.0),
    MaPO(k=5.0),
    DMPO(k=5.0),
    LinearDPO(k=5.0),
]
ids = {"ids": lambda objective: type(objective).__name__}


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
    """SalesforceAIResearch/DiffusionDPO, train.py, L1125-1145."""
    w, rest = policy.mean(dim=(1, 2, 3)).chunk(2)
    ref_w, ref_rest = reference.mean(dim=(1, 2, 3)).chunk(2)
    return -F.logsigmoid(-0.5 * beta * ((w - rest) - (ref_w - ref_rest)))


def diffusers_losses(policy: torch.Tensor, reference: torch.Tensor, beta_dpo: float) -> torch.Tensor:
    """diffusers, examples/research_projects/diffusion_dpo/train_diffusion_dpo.py, L851-885, sigmoid."""
    w, rest = policy.mean(dim=(1, 2, 3)).chunk(2)
    ref_w, ref_rest = reference.mean(dim=(1, 2, 3)).chunk(2)
    return -F.logsigmoid(beta_dpo * ((ref_w - ref_rest) - (w - rest)))


@pytest.mark.parametrize("seed", range(3))
def test_parity_with_the_authors_and_with_diffusers(seed: int) -> None:
    policy, reference = per_element(seed)
    objective = DiffusionDPO(k=2500.0)
    mine = objective(PairErrors(*policy.mean(dim=(1, 2, 3)).chunk(2), *reference.mean(dim=(1, 2, 3)).chunk(2)))
    assert torch.allclose(mine, salesforce_losses(policy, reference, 2 * objective.k), rtol=1e-9)
    assert torch.allclose(mine, diffusers_losses(policy, reference, objective.k), rtol=1e-9)


def float64(seed: int = 0) -> tuple[PairErrors, list[list[float]]]:
    """Errors of pairs, and the same as plain numbers (chosen, rejected, ref_chosen, ref_rejected, gap)."""
    values = torch.rand((5, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return PairErrors(*values[:4], gap=values[4]), values.T.tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def f(e: float) -> float:
    """MaPO utils.py, L286-301: the likelihood of an error."""
    return 0.5 * e / (math.exp(0.5 * e) - 1)


K = 7.0
FORMULAS = [
    (DiffusionDPO(k=K), lambda m, w, r, wr, rr, g: math.log(1 + math.exp(-K * m))),
    (IPO(k=K), lambda m, w, r, wr, rr, g: K * K * (m - 1 / (2 * K)) ** 2),
    (Hinge(k=K), lambda m, w, r, wr, rr, g: max(0.0, 1 - K * m)),
    (
        SoftDPO(k=K, temperature=0.3, smoothing=0.1),
        lambda m, w, r, wr, rr, g: (
            -sum(
                p * math.log(q)
                for p, q in zip(
                    (0.8 * sigmoid(g / 0.3) + 0.1, 0.8 * sigmoid(-g / 0.3) + 0.1), (sigmoid(K * m), sigmoid(-K * m)), strict=True
                )
            )
        ),
    ),
    (OffsetDPO(k=K, offset=2.0), lambda m, w, r, wr, rr, g: -math.log(sigmoid(K * m - 2 * g))),
    # diffusers' scripts and MaPO's add the chosen error; T = 4k
    (MaPO(k=K, weight=0.1), lambda m, w, r, wr, rr, g: w - 0.1 * math.log(sigmoid(4 * K * (f(w) - f(r))))),
    (
        DMPO(k=K, alpha=0.02),
        lambda m, w, r, wr, rr, g: sigmoid(K * m) * math.log(sigmoid(K * m) / 0.98) + sigmoid(-K * m) * math.log(sigmoid(-K * m) / 0.02),
    ),
    (LinearDPO(k=K), lambda m, w, r, wr, rr, g: -K * m),
    (SFT(), lambda m, w, r, wr, rr, g: w),
]


@pytest.mark.parametrize(("objective", "formula"), FORMULAS, ids=lambda value: type(value).__name__)
def test_against_formulas_written_by_hand(objective: Objective, formula) -> None:
    batch, rows = float64()
    expected = [formula((wr - w) - (rr - r), w, r, wr, rr, g) for w, r, wr, rr, g in rows]
    assert objective(batch).tolist() == pytest.approx(expected, rel=1e-9)


def test_kto_as_its_script_writes_it() -> None:
    """Diffusion-KTO, train.py L1452-1509: loss 1 - sigmoid(+-beta (g - KL)), KL the mean of both sides' mean advantages, not below 0."""
    for shift in (0.0, 1.0):  # with 1, the KL estimate is cut at 0
        batch, rows = float64()
        batch = PairErrors(batch.chosen + shift, batch.rejected + shift, batch.ref_chosen, batch.ref_rejected)
        chosen, rejected = ([row[2 + i] - row[i] - shift for row in rows] for i in (0, 1))
        kl = max(0.0, (sum(chosen) / 6 + sum(rejected) / 6) / 2)
        expected = [2 - sigmoid(K * (w - kl)) - sigmoid(-K * (r - kl)) for w, r in zip(chosen, rejected, strict=True)]
        assert DiffusionKTO(k=K)(batch).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("objective", PAIRED, **ids)
def test_every_objective_prefers_the_chosen_side(objective: Objective) -> None:
    """At policy = reference and equal errors: the chosen error is to fall and the rejected one to rise."""
    same = torch.full((6,), 0.2)
    chosen, rejected = same.clone().requires_grad_(), same.clone().requires_grad_()
    objective(PairErrors(chosen, rejected, same, same, gap=GAP)).sum().backward()
    assert (chosen.grad > 0).all() and (rejected.grad < 0).all()


def test_what_k_is_worth_at_the_start() -> None:
    """The pull on the rejected error, per k, where policy and reference agree: what one k means for each objective."""
    same, gap = torch.full((1,), 1e-5), torch.tensor([0.5])
    slopes = {}
    for objective in (*PAIRED, MaPO(k=5.0, weight=1.0)):
        rejected = same.clone().requires_grad_()
        objective(PairErrors(same, rejected, same, same, gap=gap)).sum().backward()
        slopes[type(objective).__name__] = -rejected.grad.item() / 5
    p = 0.8 * sigmoid(0.5 / 0.5) + 0.1
    expected = {"DiffusionDPO": 1 / 2, "IPO": 1, "Hinge": 1, "SoftDPO": p - 1 / 2, "OffsetDPO": sigmoid(0.25), "DiffusionKTO": 1 / 4}
    expected |= {"MaPO": 1 / 2, "DMPO": math.log(99) / 4, "LinearDPO": 1}
    assert slopes == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("objective", [one for one in PAIRED if not isinstance(one, DiffusionKTO)], **ids)
def test_a_pair_s_loss_does_not_depend_on_the_others(objective: Objective) -> None:
    batch = errors(gap=GAP)
    alone = []
    for i in range(6):
        sides = (side[i : i + 1] for side in (batch.chosen, batch.rejected, batch.ref_chosen, batch.ref_rejected))
        alone.append(objective(PairErrors(*sides, gap=GAP[i : i + 1])))
    assert torch.allclose(objective(batch), torch.cat(alone), rtol=1e-6, atol=0)


def test_certain_labels_make_soft_labels_plain() -> None:
    batch = errors(gap=torch.full((6,), 100.0))
    assert torch.allclose(SoftDPO(k=5.0)(batch), DiffusionDPO(k=5.0)(batch))
    assert torch.allclose(SoftDPO(k=5.0, temperature=0.1)(batch), DiffusionDPO(k=5.0)(batch))


def test_soft_labels_of_no_gap_pull_nowhere_at_the_start() -> None:
    same = torch.full((2,), 0.1)
    rejected = same.clone().requires_grad_()
    SoftDPO(k=5.0, temperature=1.0)(PairErrors(same, rejected, same, same, gap=torch.zeros(2))).sum().backward()
    assert torch.allclose(rejected.grad, torch.zeros(2), atol=1e-7)


def test_dmpo_has_its_minimum_at_its_label() -> None:
    logit = math.log(0.99 / 0.01)
    zero = torch.zeros(3)
    around = torch.tensor([0.9, 1.0, 1.1]) * logit
    losses = DMPO(k=1.0, alpha=0.01)(PairErrors(-around, zero, zero, zero))
    assert losses[1] < losses[0] and losses[1] < losses[2] and losses[1].abs() < 1e-6


@pytest.mark.parametrize("objective", [*PAIRED, SFT()], **ids)
def test_weight_multiplies_the_loss(objective: Objective) -> None:
    weight = torch.tensor([0.0, 1, 2, 3, 4, 5])
    assert torch.allclose(objective(errors(weight=weight, gap=GAP)), weight * objective(errors(gap=GAP)))


def test_sft_is_the_chosen_error() -> None:
    chosen = torch.rand(3)
    assert torch.equal(SFT()(PairErrors(chosen)), chosen)


def test_objectives_say_what_they_read() -> None:
    assert (SFT().paired(), SFT().referenced()) == (False, False)
    assert (MaPO().paired(), MaPO().referenced()) == (True, False)
    assert all(one.paired() and one.referenced() for one in PAIRED if not isinstance(one, MaPO))
    assert torch.isfinite(MaPO()(PairErrors(torch.zeros(1), torch.ones(1)))).all(), "no 0/0 at an error of 0"


def test_both_strengths_are_told() -> None:
    dpo = DiffusionDPO(k=2500.0).describe()
    assert dpo == "DiffusionDPO, k=2500 (beta 5000 in Salesforce's script and diffusers' for SDXL, 2500 in diffusers' for SD)"
    assert "beta 500 in Diffusion-KTO's" in DiffusionKTO(k=500.0).describe()
    assert "T 1000 and beta 0.1 in MaPO's" in MaPO().describe()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k must be above 0, got -1\.0"):
        DiffusionDPO(k=-1.0)
    for wrong, message in (
        (lambda: SoftDPO(temperature=0.0), "temperature must be above 0"),
        (lambda: SoftDPO(smoothing=0.5), "smoothing must be"),
        (lambda: DMPO(alpha=0.0), "alpha must be"),
        (lambda: SoftDPO(temperature=1.0)(errors()), "gap"),
        (lambda: MaPO()(PairErrors(torch.ones(1))), "rejected"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="ref_chosen"):
        DiffusionDPO()(PairErrors(torch.ones(1), torch.ones(1)))

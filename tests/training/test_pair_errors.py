"""With a network that writes down what it is given."""

from dataclasses import replace

import torch

from rpo.models.denoiser import Posterior
from rpo.training.inputs.errors import PairInputs, chosen_errors, edit_weights, pair_errors
from rpo.training.inputs.noise import DrawRange, FreshDraws
from rpo.training.inputs.paths import EpsilonPath

PATH = EpsilonPath(alphas_cumprod=torch.linspace(0.99, 0.01, 1000))


class Recorder:
    """Answers half precision zeros."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls.append((x_t, t, conditions))
        return torch.zeros_like(x_t, dtype=torch.bfloat16)


def inputs(num_pairs: int = 3) -> PairInputs:
    generator = torch.Generator().manual_seed(1)
    shape = (num_pairs, 4, 8, 8)
    draws = FreshDraws(range=DrawRange(seed=0, timesteps=(0, 1000), num_timesteps=1000, drop_probability=0.5))
    return PairInputs(
        chosen=Posterior(mean=torch.randn(shape, generator=generator), std=torch.rand(shape, generator=generator)),
        rejected=Posterior(mean=torch.randn(shape, generator=generator), std=torch.rand(shape, generator=generator)),
        conditions={"embeds": torch.randn((num_pairs, 5, 16), generator=generator)},
        draws=draws.draws([str(i) for i in range(num_pairs)], [0] * num_pairs, shape[1:]),
    )


def test_one_call_with_shared_noise_timestep_and_prompt() -> None:
    network, batch = Recorder(), inputs()
    pair_errors(network, PATH, batch)
    ((x_t, t, conditions),) = network.calls
    chosen_t, rejected_t = t.chunk(2)
    assert torch.equal(chosen_t, rejected_t) and torch.equal(chosen_t, batch.draws.timestep)
    assert torch.equal(*conditions["embeds"].chunk(2))
    a_t = PATH.alphas_cumprod[chosen_t].view(-1, 1, 1, 1)
    for side, noisy in zip((batch.chosen, batch.rejected), x_t.chunk(2), strict=True):
        latents = side.mean + side.std * batch.draws.latent_noise
        assert torch.allclose(noisy - a_t.sqrt() * latents, (1 - a_t).sqrt() * batch.draws.noise, atol=1e-5)


def test_errors_are_float32_means_per_sample() -> None:
    batch = inputs()
    chosen, rejected, alignment = pair_errors(Recorder(), PATH, batch)
    assert chosen.dtype == rejected.dtype == torch.float32
    expected = batch.draws.noise.double().square().mean(dim=(1, 2, 3)).float()  # the network says 0, the target is the noise
    assert torch.allclose(chosen, expected) and torch.allclose(rejected, expected)
    assert torch.allclose(alignment, expected), "both sides have the same residual here, the noise with its sign turned"


def test_half_precision_caches_do_not_reach_the_errors() -> None:
    batch = inputs()
    chosen, rejected = (Posterior(mean=side.mean.half(), std=side.std.half()) for side in (batch.chosen, batch.rejected))
    half = replace(batch, chosen=chosen, rejected=rejected)
    network = Recorder()
    pair_errors(network, PATH, half)
    assert network.calls[0][0].dtype == torch.float32


def test_the_chosen_side_alone_is_the_same_number() -> None:
    batch = inputs()
    assert torch.allclose(chosen_errors(Recorder(), PATH, batch), pair_errors(Recorder(), PATH, batch)[0])


def test_edit_weights_fall_on_what_differs_and_around_it() -> None:
    chosen = torch.zeros(3, 4, 8, 8)
    rejected = chosen.clone()
    rejected[0, 1, 2, 3] = 5.0  # one place
    rejected[1, :, :, :4] = 1.0  # the left half, and next to nothing at the right
    rejected[1, :, :, 6] = 0.1
    weights = edit_weights(chosen, rejected, unchanged=0.2)
    assert weights.shape == (3, 1, 8, 8)
    assert torch.allclose(weights.mean(dim=(1, 2, 3)), torch.ones(3))
    one = weights[0, 0] / weights[0, 0].max()
    expected = torch.full((8, 8), 0.2)
    expected[1:4, 2:5] = 1.0
    assert torch.allclose(one, expected)
    half = weights[1, 0] / weights[1, 0].max()
    assert (half[:, :5] == 1).all() and torch.allclose(half[:, 5:], torch.tensor(0.2))
    assert torch.equal(weights[2], torch.ones(1, 8, 8)), "sides that agree everywhere count alike everywhere"
    assert torch.allclose(edit_weights(chosen, rejected, unchanged=1.0), torch.ones(3, 1, 8, 8))


def test_weighted_errors_against_sums_by_hand() -> None:
    batch = inputs()
    weights = edit_weights(batch.chosen.mean, batch.rejected.mean, unchanged=0.0)
    errors = pair_errors(Recorder(), PATH, replace(batch, weights=weights))
    squared = batch.draws.noise.double().square().mean(dim=1, keepdim=True)  # the network says 0, the target is the noise
    expected = ((squared * weights).sum(dim=(1, 2, 3)) / 64).float()
    assert all(torch.allclose(side, expected, atol=1e-5) for side in errors)
    assert torch.allclose(chosen_errors(Recorder(), PATH, replace(batch, weights=weights)), expected, atol=1e-5)


def test_a_trace_of_a_gradient_is_none() -> None:
    """The backward pass of a pair that is told apart for good runs on zeros, not on denormal numbers; the others keep theirs."""
    scale = torch.ones((), requires_grad=True)
    seen: list[torch.Tensor] = []

    class Scaled:
        def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: object) -> torch.Tensor:
            out = x_t * scale
            out.register_hook(seen.append)
            return out

    errors = pair_errors(Scaled(), PATH, inputs(3))
    (torch.tensor([1.0, 1e-14, 1e-30]) * (errors.chosen - errors.rejected)).sum().backward()
    sides = seen[0].view(2, 3, -1).abs().amax(dim=2)
    assert (sides[:, :2] > 0).all() and (sides[:, 2] == 0).all()

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from rpo.models.denoiser import FlowSchedule, NoiseSchedule
from rpo.training.inputs.paths import EpsilonPath, VelocityPath, path_of
from tiny_families import euler_to_data


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn((2, 6, 4, 8, 8), generator=generator)
    return x0, noise, torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_agrees_with_the_scheduler(prediction: str) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction)
    path = path_of(NoiseSchedule(alphas_cumprod=scheduler.alphas_cumprod, prediction=prediction), torch.device("cpu"))
    x0, noise, t = batch()
    x_t, target = path.sample(x0, noise, t)
    assert path.num_timesteps == 1000
    assert torch.allclose(x_t, scheduler.add_noise(x0, noise, t), atol=1e-6)
    assert torch.allclose(target, noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t), atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_scheduler_needs_to_get_back_to_the_data(prediction: str) -> None:
    kind = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": prediction}
    scheduler = DDPMScheduler(**kind, clip_sample=False)
    path = path_of(NoiseSchedule(alphas_cumprod=scheduler.alphas_cumprod, prediction=prediction), torch.device("cpu"))
    x0, noise, t = batch()
    x_t, target = path.sample(x0, noise, t)
    for row, step in enumerate(t.tolist()):
        back = scheduler.step(target[row], step, x_t[row]).pred_original_sample
        assert torch.allclose(back, x0[row], atol=2e-4), (step, (back - x0[row]).abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_euler_step_along_the_flow_target_lands_on_the_data(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    path = path_of(FlowSchedule(sigmas=scheduler.sigmas.flip(0)), torch.device("cpu"))
    x0, noise, t = batch()
    x_t, target = path.sample(x0, noise, t)
    assert path.num_timesteps == 1000
    assert torch.allclose(x_t, scheduler.scale_noise(x0, scheduler.timesteps[999 - t], noise), atol=1e-6)
    for row, step in enumerate(t.tolist()):
        assert torch.allclose(euler_to_data(scheduler.sigmas[999 - step], target[row], x_t[row]), x0[row], atol=1e-5)


def test_closed_forms() -> None:
    alphas = torch.tensor([1.0, 0.64, 0.0])
    x0, noise = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), 10.0)
    t = torch.tensor([0, 1, 2])
    x_t, target = EpsilonPath(alphas_cumprod=alphas).sample(x0, noise, t)
    assert torch.allclose(x_t.flatten(), torch.tensor([2.0, 0.8 * 2 + 0.6 * 10, 10.0]))
    assert torch.equal(target, noise)
    x_t, target = VelocityPath(alphas_cumprod=alphas).sample(x0, noise, t)
    assert torch.allclose(target.flatten(), torch.tensor([10.0, 0.8 * 10 - 0.6 * 2, -2.0]))


def test_velocity_and_x_t_give_back_both_ends() -> None:
    alphas = torch.linspace(0.999, 0.001, 1000)
    x0, noise, t = batch()
    x_t, v = VelocityPath(alphas_cumprod=alphas).sample(x0, noise, t)
    signal, sigma = (rate.sqrt()[t].view(-1, 1, 1, 1) for rate in (alphas, 1 - alphas))
    assert torch.allclose(signal * x_t - sigma * v, x0, atol=1e-5)
    assert torch.allclose(sigma * x_t + signal * v, noise, atol=1e-5)


def test_every_sample_gets_its_own_timestep() -> None:
    alphas = torch.linspace(0.9, 0.1, 10)
    x_t, _ = EpsilonPath(alphas_cumprod=alphas).sample(torch.ones(10, 1, 1, 1), torch.zeros(10, 1, 1, 1), torch.arange(10))
    assert torch.allclose(x_t.flatten(), alphas.sqrt())
    assert math.isclose(x_t[3].item(), math.sqrt(alphas[3].item()), rel_tol=1e-6)

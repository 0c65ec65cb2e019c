from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import special, stats

from rpo.models.denoiser import FlowSchedule
from rpo.training.inputs.noise import Density, DrawRange, DrawTable, FreshDraws, NoiseProvider, seed_of
from rpo.training.inputs.paths import path_of

SHAPE = (4, 8, 8)
RANGE = DrawRange(seed=3, timesteps=(0, 1000), num_timesteps=1000, drop_probability=0.2)


def same(left: object, right: object) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("timestep", "noise", "latent_noise", "drop_prompt"))


@pytest.mark.parametrize("provider", [FreshDraws(range=RANGE), DrawTable(range=RANGE, num_draws=4)])
def test_a_draw_depends_on_pair_and_visit_alone(provider: NoiseProvider) -> None:
    together = provider.draws(["a", "b", "c"], [0, 1, 2], SHAPE)
    alone = provider.draws(["b"], [1], SHAPE)
    assert torch.equal(together.noise[1:2], alone.noise) and torch.equal(together.timestep[1:2], alone.timestep)
    assert same(alone, provider.draws(["b"], [1], SHAPE))
    assert not torch.equal(alone.noise, provider.draws(["b"], [2], SHAPE).noise)
    assert not torch.equal(alone.noise, provider.draws(["c"], [1], SHAPE).noise)
    assert not torch.equal(alone.noise, alone.latent_noise)


def test_mirroring_is_a_half_of_the_draws_and_changes_nothing_else_about_them() -> None:
    plain = DrawTable(range=RANGE, num_draws=4)
    mirrored = DrawTable(range=replace(RANGE, mirror_probability=0.5), num_draws=4)
    ids, visits = [str(i) for i in range(500) for _ in range(4)], list(range(4)) * 500
    draws = mirrored.draws(ids, visits, (1, 2, 2))
    assert same(draws, plain.draws(ids, visits, (1, 2, 2))) and not plain.draws(ids, visits, (1, 2, 2)).mirrored.any()
    assert 0.46 < draws.mirrored.float().mean() < 0.54
    per_pair = draws.mirrored.view(500, 4).float().mean(1)
    assert (per_pair == 0.5).sum() > 100 and (per_pair == 0).sum() > 10, "each draw decides for itself"
    assert torch.equal(draws.mirrored, mirrored.draws(ids, [visit + 4 for visit in visits], (1, 2, 2)).mirrored)


def test_another_seed_draws_otherwise() -> None:
    other = DrawRange(seed=4, timesteps=(0, 1000), num_timesteps=1000, drop_probability=0.2)
    assert not torch.equal(FreshDraws(range=RANGE).draws(["a"], [0], SHAPE).noise, FreshDraws(range=other).draws(["a"], [0], SHAPE).noise)


def test_the_table_repeats_and_fresh_draws_do_not() -> None:
    table, fresh = DrawTable(range=RANGE, num_draws=4), FreshDraws(range=RANGE)
    assert same(table.draws(["a"], [1], SHAPE), table.draws(["a"], [5], SHAPE))
    assert not same(fresh.draws(["a"], [1], SHAPE), fresh.draws(["a"], [5], SHAPE))
    assert fresh.num_draws is None and table.num_draws == 4 and table.index(5) == 1


def test_each_stratum_of_timesteps_is_drawn_once_in_an_order_of_the_pair_s_own() -> None:
    table = DrawTable(range=RANGE, num_draws=5)
    orders = set()
    for pair in map(str, range(20)):
        strata = (table.draws([pair] * 5, range(5), SHAPE).timestep // 200).tolist()
        assert sorted(strata) == [0, 1, 2, 3, 4]
        orders.add(tuple(strata))
    assert len(orders) > 10


def test_timesteps_are_uniform_in_their_window_and_noise_is_normal() -> None:
    window = DrawRange(seed=0, timesteps=(100, 300), num_timesteps=1000, drop_probability=0.25)
    draws = FreshDraws(range=window).draws([str(i) for i in range(2000)], [0] * 2000, (1, 4, 4))
    t = draws.timestep.float()
    assert t.min() >= 100 and t.max() <= 299 and len(set(t.tolist())) > 190
    assert abs(t.mean() - 199.5) < 4 and abs(t.std() - 57.7) < 3
    assert abs(draws.drop_prompt.float().mean() - 0.25) < 0.03
    assert abs(draws.noise.mean()) < 0.02 and abs(draws.noise.std() - 1) < 0.02


@pytest.mark.parametrize("window", [(0, 1000), (100, 300), (900, 1000)])
@pytest.mark.parametrize("num_draws", [None, 4])
@pytest.mark.parametrize("density", get_args(Density))
def test_timesteps_follow_the_density_cut_off_at_the_window(density: Density, num_draws: int | None, window: tuple[int, int]) -> None:
    """Chi-square over cells of equal width: a window truncates the density, it does not squeeze it; strata leave it as it is."""
    timesteps = DrawRange(seed=7, timesteps=window, num_timesteps=1000, drop_probability=0.0, density=density)
    provider: NoiseProvider = FreshDraws(range=timesteps) if num_draws is None else DrawTable(range=timesteps, num_draws=num_draws)
    visits = [visit for _ in range(600) for visit in range(num_draws or 4)]
    ids = [f"{number // (num_draws or 4)}" for number in range(len(visits))]
    t = provider.draws(ids, visits, (1, 1, 1)).timestep.numpy()
    assert t.min() >= window[0] and t.max() < window[1]
    edges = np.unique(np.linspace(*window, 11).round())
    of = {"uniform": stats.uniform().cdf, "logit_normal": lambda x: stats.norm.cdf(special.logit(x))}[density]
    mass = np.diff(of(edges / 1000))
    expected = len(t) * mass / mass.sum()
    observed, _ = np.histogram(t, edges)
    assert stats.chisquare(observed, expected).pvalue > 1e-4, (observed, expected.round())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_of_flow_matching_come_up_as_in_diffusers_training_scripts(shift: float) -> None:
    """Those draw u from a logit-normal density and shift it to sigma = s u / (1 + (s - 1) u); Kolmogorov-Smirnov."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    path = path_of(FlowSchedule(sigmas=scheduler.sigmas.flip(0)), torch.device("cpu"))
    all_of_them = DrawRange(seed=1, timesteps=(0, 1000), num_timesteps=1000, drop_probability=0.0, density=path.density)
    t = FreshDraws(range=all_of_them).draws([str(pair) for pair in range(4000)], [0] * 4000, (1, 1, 1)).timestep
    x_t, _ = path.sample(torch.zeros(4000, 1, 1, 1), torch.ones(4000, 1, 1, 1), t)
    u = torch.sigmoid(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert stats.ks_2samp(x_t.flatten().numpy(), (shift * u / (1 + (shift - 1) * u)).numpy()).pvalue > 1e-3


def test_no_draws_is_refused() -> None:
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        DrawTable(range=RANGE, num_draws=0)


def test_seeds_do_not_run_into_each_other() -> None:
    assert seed_of(1, "ab", "c") != seed_of(1, "a", "bc") != seed_of(11, "a", "bc")

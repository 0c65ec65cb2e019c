import numpy as np
import pytest
from scipy import stats
from scipy.linalg import sqrtm

from rpo.evaluation.statistics import (
    bootstrap_interval,
    compare,
    frechet_distance,
    holm,
    mean_interval,
    minimum_detectable_effect,
    prompt_means,
    wilcoxon_p,
    wins,
)


def test_seeds_of_a_prompt_are_averaged_within_it() -> None:
    # Prompt "a" has three seeds, "b" one: the mean over images would be 0.25, over prompts it is 1/6.
    result = compare([0, 0, 0, 0], [1, 0, 0, 0], ["a", "a", "a", "b"])
    assert (result.base, result.n) == (0.0, 2)
    assert result.difference == pytest.approx(1 / 6)
    assert result.win_rate == pytest.approx((2 / 3 + 0.5) / 2)
    np.testing.assert_allclose(prompt_means([3, 1, 5], ["z", "a", "z"]), [1, 4])


def test_ties_count_half() -> None:
    np.testing.assert_array_equal(wins([0, 1, 0], [1, 0, 0]), [1, 0, 0.5])


def test_pairing_matters() -> None:
    with pytest.raises(ValueError, match="paired"):
        wins([0], [0, 1])


@pytest.mark.parametrize("values", [[], [float("nan")], [[1.0]]])
def test_values_that_mean_nothing_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(values)


def test_interval_agrees_with_scipy() -> None:
    sample = np.random.default_rng(3).normal(0.1, 1, 200)
    theirs = stats.bootstrap((sample,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(4))
    ours = bootstrap_interval(sample)
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=0.01)


def test_interval_is_seeded_and_does_not_depend_on_the_memory_block(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_interval(sample, resamples=500)
    assert whole == bootstrap_interval(sample, resamples=500)
    assert whole != bootstrap_interval(sample, resamples=500, seed=1)
    monkeypatch.setattr("rpo.evaluation.statistics._BLOCK", 1_000)
    assert bootstrap_interval(sample, resamples=500) == whole


def test_constant_values_have_a_point_interval() -> None:
    assert bootstrap_interval([0.25] * 10) == (0.25, 0.25)


def test_detectable_effect_is_found_in_80_of_100_studies() -> None:
    rng = np.random.default_rng(5)
    n = 400
    effect = minimum_detectable_effect(rng.normal(0, 1, n))
    assert effect == pytest.approx((1.959964 + 0.841621) / np.sqrt(n), rel=0.1)
    samples = rng.normal(effect, 1, (2_000, n))
    found = np.abs(samples.mean(1)) > 1.96 * samples.std(1, ddof=1) / np.sqrt(n)
    assert 0.74 <= found.mean() <= 0.86
    assert minimum_detectable_effect([1.0]) == float("inf")


def test_frechet_of_one_dimension_is_the_closed_form() -> None:
    a, b = np.random.default_rng(0).normal(0, 1, (500, 1)), np.random.default_rng(1).normal(2, 3, (500, 1))
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_frechet_agrees_with_the_matrix_root_and_is_symmetric() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 1
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * np.real(sqrtm(ca @ cb)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_survives_fewer_images_than_features() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 64)), rng.normal(size=(20, 64))
    assert np.isfinite(frechet_distance(a, b)) and frechet_distance(a, b) > 0
    with pytest.raises(ValueError, match="same width"):
        frechet_distance(a, b[:, :5])


def test_signed_rank_p_value_by_enumeration() -> None:
    differences = np.array([0.3, -0.1, 0.5, 0.7, 0.2, 0.0, 0.9, -0.4])
    ranks = stats.rankdata(np.abs(differences))  # Pratt: zeros are ranked, then left out
    ranks = ranks[differences != 0]
    observed = ranks[differences[differences != 0] > 0].sum()
    signs = np.array(np.meshgrid(*[[0, 1]] * len(ranks))).reshape(len(ranks), -1)
    sums = ranks @ signs
    exact = np.mean(np.abs(sums - ranks.sum() / 2) >= abs(observed - ranks.sum() / 2) - 1e-9)
    assert wilcoxon_p(differences) == pytest.approx(exact, abs=0.02), "scipy takes the normal approximation where there are zeros"
    assert wilcoxon_p(differences[differences != 0]) == pytest.approx(stats.wilcoxon(differences[differences != 0], method="exact").pvalue)
    assert wilcoxon_p(np.zeros(5)) == 1.0


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """1,000 simulated studies: 120 prompts, two seeds each, with yes-or-no judgements that go together within a prompt."""
    rng = np.random.default_rng(11)
    prompts = np.repeat(np.arange(120), 2)
    covered = 0
    for study in range(1000):
        easy = rng.beta(2, 2, 120)[prompts]
        base, tuned = rng.random(240) < easy, rng.random(240) < np.minimum(1, easy + 0.1)
        truth = 0.1 - _expected_excess()
        low, high = compare(base, tuned, prompts, resamples=1000, seed=study).ci95
        covered += low <= truth <= high
    assert 0.93 <= covered / 1000 <= 0.97


def _expected_excess() -> float:
    """Of easy + 0.1 over 1, for easy ~ Beta(2, 2): the integral of (e - 0.9) * 6 e (1 - e) from 0.9 to 1."""
    e = np.linspace(0.9, 1, 10_001)
    return float(np.trapezoid((e - 0.9) * 6 * e * (1 - e), e))


SIMULATED = {
    "normal": (lambda rng, n: rng.normal(0.2, 1, n), 0.2, None),
    "differences of yes and no": (lambda rng, n: rng.choice([-1.0, 0.0, 1.0], p=[0.05, 0.8, 0.15], size=n), 0.1, (-1.0, 1.0)),
    "wins": (lambda rng, n: (rng.random(n) < 0.8).astype(float), 0.8, (0.0, 1.0)),
    "wins and ties": (lambda rng, n: rng.choice([0.0, 0.5, 1.0], p=[0.05, 0.8, 0.15], size=n), 0.55, (0.0, 1.0)),
}


@pytest.mark.parametrize("prompts", [3, 5, 10, 20, 40])
@pytest.mark.parametrize("kind", SIMULATED)
def test_the_interval_covers_with_any_number_of_prompts(kind: str, prompts: int) -> None:
    draw, truth, within = SIMULATED[kind]
    rng, covered = np.random.default_rng(prompts), 0
    for study in range(1000):
        interval = mean_interval(draw(rng, prompts), within=within, resamples=400, seed=study)
        assert interval is not None
        covered += interval[0] - 1e-12 <= truth <= interval[1] + 1e-12
    assert covered / 1000 >= 0.92, "0.95, less what 1,000 studies may be off and what a bootstrap of 40 lacks"


def test_the_bootstrap_alone_would_not() -> None:
    """What `BOOTSTRAP_MIN` is for: with 5 and 10 prompts the percentile bootstrap covers too rarely."""
    rng = np.random.default_rng(0)
    for prompts, most in ((5, 0.87), (10, 0.925)):
        samples = rng.normal(0, 1, (600, prompts))
        intervals = [bootstrap_interval(sample, resamples=400, seed=i) for i, sample in enumerate(samples)]
        assert np.mean([low <= 0 <= high for low, high in intervals]) <= most


def test_one_and_two_prompts_have_no_interval() -> None:
    for n in (1, 2):
        found = compare(np.zeros(n), np.arange(n) + 0.5, [f"p{i}" for i in range(n)])
        assert (found.ci95, found.win_ci95, found.interval, found.n) == (None, None, None, n)
    few, enough = (compare(np.zeros(n), np.arange(n), [f"p{i:02}" for i in range(n)]) for n in (29, 30))
    assert (few.interval, enough.interval) == ("t", "bootstrap")
    assert few.ci95 == pytest.approx(tuple(stats.t.interval(0.95, 28, loc=14.0, scale=stats.sem(np.arange(29)))))


def test_prompts_that_are_all_alike_do_not_make_a_point() -> None:
    same = compare(np.zeros(5), np.ones(5), list("abcde"), bounded=True)
    assert same.ci95 is not None and same.ci95[0] < 0.9 and same.ci95[1] == 1.0
    assert same.win_ci95 is not None and same.win_ci95[0] < 0.9 and same.win_ci95[1] == 1.0

"""`torch.compile` of the embedded base: minutes on few cores, so apart from the other checks."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tuning import config_for, first_visits, outcome, perturb, prepared, relative, shape_pairs

# Fused kernels round at other places.
BOUNDS = {"fp32": (6e-4, 4e-2, 3e-2), "bf16": (6e-3, 2.5e-1, 2e-1)}


@pytest.mark.parametrize("precision", BOUNDS)
def test_a_compiled_network_computes_the_same(card: torch.device, precision: str, tmp_path: Path, within: Callable[..., None]) -> None:
    pairs, outcomes, ref = shape_pairs(8), [], None
    for compiled in (False, True):
        training = prepared(config_for(precision=precision, compile=compiled), pairs, card, tmp_path)
        perturb(training, 0.1)
        inputs = training.pairs.inputs(first_visits(training), training.noise)
        ref = torch.stack(training.reference.errors(first_visits(training), inputs)) if ref is None else ref
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the network cannot be compiled")
            outcomes.append(outcome(training, training.denoiser, training.denoiser.trainable(), inputs, ref))
    names = ("errors", "losses", "gradient")
    within({name: relative(getattr(outcomes[1], name), getattr(outcomes[0], name)) for name in names}, BOUNDS[precision])

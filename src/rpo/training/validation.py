"""Measures a run where it was not trained: on held-out pairs or, without any, on training pairs at draws of their own."""

import torch
from torch import Tensor

from rpo.training.config import EVAL_DRAWS
from rpo.training.inputs.batches import Visit
from rpo.training.inputs.cache import chunks
from rpo.training.inputs.errors import pair_errors
from rpo.training.runtime.metrics import preferred
from rpo.training.setup import Training


@torch.no_grad()
def held_out_metrics(training: Training) -> dict[str, Tensor]:
    """Implicit accuracy, per pair over all its draws and per draw, margin and chosen error, always at the same noise and timesteps.

    Names begin with `held_out_` or, of training pairs at draws that are not trained on, `fresh_`.
    """
    assert training.held_out is not None and training.held_out_reference is not None
    every, group = range(len(training.held_out)), training.group
    share, counts = group.equal_share(every)
    sums = torch.zeros(4, device=group.device)
    size = max(1, training.config.cache_batch // (2 * EVAL_DRAWS))
    for part, counted in zip(chunks(share, size), chunks(counts, size), strict=True):
        visits = [Visit(pair=pair, number=draw) for pair in part for draw in range(EVAL_DRAWS)]
        chosen, rejected, _ = pair_errors(training.denoiser, training.path, training.held_out.inputs(visits, training.held_out_noise))
        ref_chosen, ref_rejected = training.held_out_reference.errors(visits)
        margins = ((ref_chosen - chosen) - (ref_rejected - rejected)).view(-1, EVAL_DRAWS)
        over = (chosen - ref_chosen).view(-1, EVAL_DRAWS).mean(dim=1)
        of_pairs = torch.stack([preferred(margins.mean(dim=1)), preferred(margins).mean(dim=1), margins.mean(dim=1), over])
        sums += of_pairs[:, torch.tensor(counted, device=group.device)].sum(dim=1)
    names = [f"{training.measured}_{name}" for name in ("accuracy", "draw_accuracy", "margin", "chosen_over_reference")]
    return dict(zip(names, group.total(sums) / len(every), strict=True))

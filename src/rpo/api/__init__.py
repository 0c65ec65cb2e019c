"""Carries out a recipe in a run folder: curate, tune, compare. Each part reads and writes only that folder."""

from rpo.accounting.metering import served_by
from rpo.api.curation import Caps, curate
from rpo.api.evaluation import check_evaluation, compare, generate, results_tables
from rpo.api.folder import PAIRS, check_drawn_by, read_summary, write_recipe
from rpo.api.publishing import export, export_lora, push
from rpo.api.rounds import run_rounds
from rpo.api.training import rehearse_tuning, tune

__all__ = [
    "PAIRS",
    "Caps",
    "check_drawn_by",
    "check_evaluation",
    "compare",
    "curate",
    "export",
    "export_lora",
    "generate",
    "push",
    "read_summary",
    "rehearse_tuning",
    "results_tables",
    "run_rounds",
    "served_by",
    "tune",
    "write_recipe",
]

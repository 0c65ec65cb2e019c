"""Carries out a recipe in a run folder: curate, tune, compare. Each part reads and writes only that folder."""

from rpo.curate.metering import served_by
from rpo.workflow.comparison import check_evaluation, compare, generate, results_tables
from rpo.workflow.curation import Caps, curate
from rpo.workflow.folder import PAIRS, check_drawn_by, read_summary, write_recipe
from rpo.workflow.publishing import export, export_lora, push
from rpo.workflow.rounds import run_rounds
from rpo.workflow.study import study
from rpo.workflow.tuning import rehearse_tuning, tune

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
    "study",
    "tune",
    "write_recipe",
]

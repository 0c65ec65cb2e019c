"""Carries out a recipe in a run folder: curate, tune, compare. Each part reads and writes only that folder."""

from rpo.workflow.comparison import compare, generate, results_tables
from rpo.workflow.curation import curate
from rpo.workflow.folder import PAIRS, read_summary, write_recipe
from rpo.workflow.publishing import export, push
from rpo.workflow.tuning import rehearse_tuning, tune

__all__ = [
    "PAIRS",
    "compare",
    "curate",
    "export",
    "generate",
    "push",
    "read_summary",
    "rehearse_tuning",
    "results_tables",
    "tune",
    "write_recipe",
]

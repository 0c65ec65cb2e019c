"""Rich Preference Optimization: better text-to-image models without annotators (arXiv 2503.11720)."""

__version__ = "0.1.0"

RECIPE_FILE = "recipe_file_"
"""Prefix of the name of a module that was loaded from a recipe's file: another process cannot import it."""

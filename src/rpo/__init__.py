RECIPE_FILE = "recipe_file_"
"""Begins the name of a module that was loaded from a recipe's file: another process cannot import it."""

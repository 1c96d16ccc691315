"""Recipes: reading a recipe from a file or from flags, and checking every value."""

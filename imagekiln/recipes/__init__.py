"""Recipes: complete TOML files; a recipe is named by its file."""

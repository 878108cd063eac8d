"""Recipes in YAML; core/recipes.py reads them."""

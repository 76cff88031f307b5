"""Torch modules, one file per model family, and their weights."""

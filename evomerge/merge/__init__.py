"""Merging: a recipe becomes weights in one pass over memory."""

"""Fitness: what a merged model is worth, item by item."""

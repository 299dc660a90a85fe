"""Planted circuits: known ground truth for the search."""

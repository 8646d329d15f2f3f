"""Ranks, lanes and reductions."""

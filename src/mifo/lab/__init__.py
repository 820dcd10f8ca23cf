"""Experiments about training rather than with it: comparisons of methods."""

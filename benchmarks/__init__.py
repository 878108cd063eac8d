"""Experiments and benchmarks: commands of their own, whose results are committed under docs/results."""

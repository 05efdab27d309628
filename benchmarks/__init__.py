"""Measurements, run as ``python -m benchmarks.NAME``; ``results/`` contains their figures."""

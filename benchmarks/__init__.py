"""Measurements, run as ``python -m benchmarks.NAME``; what they found lies in ``results/``."""

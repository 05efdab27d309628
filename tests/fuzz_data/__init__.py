"""Mutates valid data files and checks how they are read:  python -m tests.fuzz_data --count 2000 --seed 0

An oracle, a second and simpler reader (Python's ``json`` and ``gzip`` on the whole file at once), gives the expected
samples, skipped records and locations of faults; ``Expect`` gives the expected outcome of each mutation. ``--only K``
repeats mutation K of a seed.
"""

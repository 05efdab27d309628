"""Damages valid data files and checks what is read of them:  python -m tests.fuzz_data --count 2000 --seed 0

What a damaged file has to give is found by a second, plain way of reading it: Python's own ``json`` and ``gzip`` on
the whole file at once. So the samples, the skipped records and the place of each fault are all known. Each kind of
damage says besides what it must come to (``Must``). ``--only K`` repeats mutation K of a seed.
"""

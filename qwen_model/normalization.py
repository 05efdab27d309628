"""NFC normalisation in linear time.

``unicodedata.normalize`` sorts the combining marks behind a letter by moving them one place at a time: the time for a
run of n marks grows with n squared, and a text of 200 kB can take half a minute.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby

# Characters before which a text can be cut: they neither move before nor compose with what precedes them.
SAFE = "\x00-\u02ff\u3400-\u9fff"
_LONG_RUN = re.compile(f"[{SAFE}]?[^{SAFE}]{{200,}}")


def normalize_nfc(text: str) -> str:
    """Return what ``unicodedata.normalize("NFC", text)`` would."""
    if text.isascii():
        return text
    pieces, start = [], 0
    for run in _LONG_RUN.finditer(text):
        pieces += [unicodedata.normalize("NFC", text[start : run.start()]), _normalize_run(run[0])]
        start = run.end()
    return "".join([*pieces, unicodedata.normalize("NFC", text[start:])])


def _normalize_run(text: str) -> str:
    """Decompose and sort the marks here; what remains is linear."""
    decomposed = "".join(unicodedata.normalize("NFD", char) for char in text)
    marks_apart = groupby(decomposed, key=lambda char: unicodedata.combining(char) > 0)
    ordered = (sorted(run, key=unicodedata.combining) if are_marks else run for are_marks, run in marks_apart)
    return unicodedata.normalize("NFC", "".join("".join(run) for run in ordered))

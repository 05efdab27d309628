"""What torch's compiler needs from the machine. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


def missing_for_inductor(on_cpu: bool) -> str:
    """Return what torch's inductor needs on this device and does not find; empty if it finds all."""
    if not on_cpu:
        return "" if importlib.util.find_spec("triton") else "the package triton"
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"a C++ compiler ({compilers[0]})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else "the headers of Python (python3-dev)"

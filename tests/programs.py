"""Programs of the operating system that some tests need."""

from __future__ import annotations

import os
import shutil

import pytest


def require_program(name: str, package: str) -> None:
    """Skip the test if a program is not installed; in CI, where .ci/run installs it, the test fails."""
    if shutil.which(name) is None:
        message = not_installed(name, package)
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


def not_installed(name: str, package: str) -> str:
    return f"NOT TESTED: {name} is not installed (Debian: apt-get install {package})"

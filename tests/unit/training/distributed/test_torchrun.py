"""The launcher that runs torchrun without its report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import environment
from tests.golden import REPO

CHILD = """
import sys
print("finetune.py: error: the fault", file=sys.stderr)
sys.exit(2)
"""


@pytest.mark.parametrize(("own", "code"), [(True, 2), (False, 1)])
def test_the_last_line_is_that_of_the_process(own: bool, code: int, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    launcher = [REPO / "training/distributed/torchrun.py"] if own else ["-m", "torch.distributed.run"]
    result = subprocess.run(
        [sys.executable, *launcher, "--nnodes", "1", "--nproc_per_node", "1", "--max_restarts", "0", "--rdzv_backend",
         "c10d", "--rdzv_endpoint", "localhost:0", script],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == code
    assert (result.stderr == "finetune.py: error: the fault\n") == own, result.stderr

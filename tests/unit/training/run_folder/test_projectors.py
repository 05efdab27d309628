"""Objects that GaLore and APOLLO keep in a checkpoint: loaded if their package is imported, refused otherwise."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from errors import ConfigError
from training.run_folder.states import check_states, known_classes
from training.trainer_resume import move_projectors

MODULE = "galore_torch.galore_projector"


class GaLoreProjector:
    """As in galore_torch: a matrix and a few numbers."""

    def __init__(self) -> None:
        self.rank, self.ortho_matrix = 4, torch.eye(4)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with the state of GaLore, while its package is imported."""
    module: Any = ModuleType(MODULE)
    module.GaLoreProjector = GaLoreProjector
    monkeypatch.setattr(GaLoreProjector, "__module__", MODULE)
    monkeypatch.setitem(sys.modules, MODULE.partition(".")[0], ModuleType(MODULE.partition(".")[0]))
    monkeypatch.setitem(sys.modules, MODULE, module)
    state = {"state": {0: {"projector": GaLoreProjector()}}, "param_groups": [{"params": [0]}]}
    torch.save(state, tmp_path / "optimizer.pt")
    torch.save({}, tmp_path / "scheduler.pt")
    torch.save({"python": 0, "numpy": 0, "cpu": torch.zeros(1)}, tmp_path / "rng_state.pth")
    return tmp_path


def check(folder: Path) -> None:
    check_states(folder, [path.name for path in folder.iterdir()])


def test_a_projector_is_loaded_if_its_package_is_imported(checkpoint: Path) -> None:
    check(checkpoint)
    assert GaLoreProjector in known_classes()
    with torch.serialization.safe_globals(known_classes()):
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert state["state"][0]["projector"].rank == 4


def test_a_projector_of_another_package_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, MODULE)
    with pytest.raises(ConfigError, match=r"optimizer\.pt cannot be loaded \(it would run galore_torch\.galore_projec"):
        check(checkpoint)


def test_projectors_move_to_the_device_of_their_parameter() -> None:
    projector = GaLoreProjector()
    projector.ortho_matrix = [torch.eye(2), torch.eye(3)]  # type: ignore[assignment]
    parameter = torch.empty(2, device="meta")
    other = torch.empty(1)
    move_projectors(SimpleNamespace(state={parameter: {"projector": projector}, other: {"step": 1}}))
    assert [each.device.type for each in projector.ortho_matrix] == ["meta", "meta"] and projector.rank == 4

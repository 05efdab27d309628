"""Manifests find every damage to a checkpoint; the newest intact checkpoint is selected."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from errors import ConfigError
from tests.models import change_json
from training.run_folder.manifest import (
    MANIFEST_VERSION,
    DamagedError,
    check_intact,
    checkpoints_in,
    load_manifest,
    newest_checkpoint,
    newest_intact_checkpoint,
    write_manifest,
)
from training.run_folder.names import MANIFEST
from training.trainer_resume import superseded_by

FACTS = {"mode": "lora", "arguments": {"seed": 1, "output_dir": "here"}, "world_size": 2}


def write_checkpoint(output: Path, step: int) -> Path:
    checkpoint = output / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    draw = random.Random(step)
    for name, size in (("model.safetensors", 3_000_000), ("optimizer.pt", 10), ("global_step/rank_1.pt", 5_000)):
        (checkpoint / name).write_bytes(draw.randbytes(size))
    (checkpoint / "trainer_state.json").write_text("{}")
    write_manifest(checkpoint, step, FACTS)
    return checkpoint


def damage_of(checkpoint: Path) -> str:
    with pytest.raises(DamagedError) as caught:
        check_intact(checkpoint, load_manifest(checkpoint))
    return str(caught.value)


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_content_of_a_manifest(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 4)
    manifest = load_manifest(checkpoint)
    assert manifest["step"] == 4 and manifest["format"] == MANIFEST_VERSION
    assert {name: manifest[name] for name in FACTS} == FACTS
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {MANIFEST}
    # SHA-256 of the two bytes, computed with another program.
    assert manifest["files"]["trainer_state.json"] == {
        "size": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    check_intact(checkpoint, manifest)
    assert newest_intact_checkpoint(tmp_path) == (checkpoint, manifest)
    assert newest_intact_checkpoint(tmp_path / "nowhere") is None


def truncate(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"12345")


def remove_a_file(checkpoint: Path) -> None:
    (checkpoint / "global_step" / "rank_1.pt").unlink()


def remove_the_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def truncate_the_manifest(checkpoint: Path) -> None:
    content = (checkpoint / MANIFEST).read_bytes()
    (checkpoint / MANIFEST).write_bytes(content[: len(content) // 2])


def change_the_manifest(checkpoint: Path) -> None:
    change_json(checkpoint / MANIFEST, world_size=4)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "optimizer.pt has 5 of 10 bytes"),
        (remove_a_file, "global_step/rank_1.pt is missing"),
        (remove_the_manifest, "it has no manifest.json"),
        (truncate_the_manifest, "manifest.json cannot be read"),
        (change_the_manifest, "manifest.json was changed after it was written"),
    ],
)
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], reason: str
) -> None:
    for step in (8, 9, 10):
        write_checkpoint(tmp_path, step)
    damage(tmp_path / "checkpoint-10")
    assert damage_of(tmp_path / "checkpoint-10") == reason
    with caplog.at_level(logging.WARNING):
        newest = newest_intact_checkpoint(tmp_path)
    assert newest is not None and newest[0] == tmp_path / "checkpoint-9"  # steps compare as numbers
    assert caplog.messages == [f"{tmp_path / 'checkpoint-10'} is incomplete or damaged and is skipped: {reason}"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """At random positions of all files, the manifest included."""
    checkpoint, draw = write_checkpoint(tmp_path, 2), random.Random(5)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for number in range(60):
        file = files[number % len(files)]
        position = draw.randrange(8 * file.stat().st_size)
        flip_bit(file, position)
        damage_of(checkpoint)
        flip_bit(file, position)
    check_intact(checkpoint, load_manifest(checkpoint))


def test_a_newer_version_is_refused_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("training.run_folder.manifest.MANIFEST_VERSION", MANIFEST_VERSION + 1)
        checkpoint = write_checkpoint(tmp_path, 2)
    with pytest.raises(ConfigError) as caught:
        newest_intact_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{checkpoint / MANIFEST}: format {MANIFEST_VERSION + 1} is of a newer version of this toolkit "
        f"(this version reads {MANIFEST_VERSION}). "
        "Resume with that version, or give another --output_dir"
    )


def test_only_folders_with_names_of_checkpoints_count(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-", "checkpoint-3b", ".saving"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("")
    assert checkpoints_in(tmp_path) == [tmp_path / "checkpoint-10", tmp_path / "checkpoint-2"]


def test_newest_checkpoint_has_the_highest_step_and_a_trainer_state(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_checkpoint(tmp_path) is None
    for step in (8, 10, 9, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 11:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    ("saved", "limit", "best", "left"),
    [
        (8, None, None, [2, 4, 6, 8]),  # later steps are repeated
        (10, 2, None, [8, 10]),
        (10, 2, 4, [4, 10]),
        (10, 3, 4, [4, 8, 10]),
        (10, 1, None, [10]),
        (10, 1, 4, [4, 10]),  # the best and the newest stay whatever the limit
        (6, 2, 2, [2, 6]),
        (6, 1, 6, [6]),
    ],
)
def test_a_new_checkpoint_supersedes_later_and_old_ones(
    tmp_path: Path, saved: int, limit: int | None, best: int | None, left: list[int]
) -> None:
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "checkpoint-2")  # its files are elsewhere
    superseded = superseded_by(
        tmp_path / f"checkpoint-{saved}", limit, None if best is None else f"elsewhere/checkpoint-{best}"
    )
    assert {path.name for path in superseded} == {f"checkpoint-{step}" for step in {2, 4, 6, 8, 10} - {*left}}

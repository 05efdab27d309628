"""A checkpoint that is not what was written is found, whatever happened to it, and the one before is taken."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from errors import ConfigError
from tests.commands import names_in
from tests.models import change_json
from training.run_folder.manifest import (
    MANIFEST,
    MANIFEST_VERSION,
    DamagedError,
    check_whole,
    checkpoints_in,
    load_manifest,
    newest_whole_checkpoint,
    write_manifest,
)
from training.trainer_resume import remove_superseded

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
        check_whole(checkpoint, load_manifest(checkpoint))
    return str(caught.value)


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_what_a_manifest_says(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 4)
    manifest = load_manifest(checkpoint)
    assert manifest["step"] == 4 and manifest["format"] == MANIFEST_VERSION
    assert {name: manifest[name] for name in FACTS} == FACTS
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {MANIFEST}
    # SHA-256 of two bytes, from elsewhere than the code.
    assert manifest["files"]["trainer_state.json"] == {
        "size": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    check_whole(checkpoint, manifest)
    assert newest_whole_checkpoint(tmp_path) == (checkpoint, manifest)
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None


def truncate(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"12345")


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "global_step" / "rank_1.pt").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def cut_the_manifest(checkpoint: Path) -> None:
    content = (checkpoint / MANIFEST).read_bytes()
    (checkpoint / MANIFEST).write_bytes(content[: len(content) // 2])


def change_the_manifest(checkpoint: Path) -> None:
    change_json(checkpoint / MANIFEST, world_size=4)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "optimizer.pt has 5 of 10 bytes"),
        (lose_a_file, "global_step/rank_1.pt is missing"),
        (lose_the_manifest, "it has no manifest.json"),
        (cut_the_manifest, "manifest.json cannot be read"),
        (change_the_manifest, "manifest.json is not as it was written"),
    ],
)
def test_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], reason: str
) -> None:
    for step in (8, 9, 10):
        write_checkpoint(tmp_path, step)
    damage(tmp_path / "checkpoint-10")
    assert damage_of(tmp_path / "checkpoint-10") == reason
    with caplog.at_level(logging.WARNING):
        found = newest_whole_checkpoint(tmp_path)
    assert found is not None and found[0] == tmp_path / "checkpoint-9"  # 10 is more than 9, as numbers go
    assert caplog.messages == [f"{tmp_path / 'checkpoint-10'} is not whole and is left out: {reason}"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """At random places of all files, that of the manifest included."""
    checkpoint, draw = write_checkpoint(tmp_path, 2), random.Random(5)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for number in range(60):
        file = files[number % len(files)]
        place = draw.randrange(8 * file.stat().st_size)
        flip_bit(file, place)
        damage_of(checkpoint)
        flip_bit(file, place)
    check_whole(checkpoint, load_manifest(checkpoint))


def test_a_newer_version_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("training.run_folder.manifest.MANIFEST_VERSION", MANIFEST_VERSION + 1)
        checkpoint = write_checkpoint(tmp_path, 2)
    with pytest.raises(ConfigError) as caught:
        newest_whole_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{checkpoint / MANIFEST}: format {MANIFEST_VERSION + 1}, of a newer version of this toolkit "
        f"(this one knows {MANIFEST_VERSION}). "
        "Go on with that version, or give another --output_dir"
    )


def test_only_folders_named_like_checkpoints_count(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-", "checkpoint-3b", ".saving"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("")
    assert checkpoints_in(tmp_path) == [tmp_path / "checkpoint-10", tmp_path / "checkpoint-2"]


@pytest.mark.parametrize(
    ("saved", "limit", "best", "left"),
    [
        (8, None, None, [2, 4, 6, 8]),  # later ones are of a past that happens again
        (10, 2, None, [8, 10]),
        (10, 2, 4, [4, 10]),
        (10, 3, 4, [4, 8, 10]),
        (10, 1, None, [10]),
        (10, 1, 4, [4, 10]),  # the best and the newest stay whatever the limit
        (6, 2, 2, [2, 6]),
        (6, 1, 6, [6]),
    ],
)
def test_what_a_new_checkpoint_removes(
    tmp_path: Path, saved: int, limit: int | None, best: int | None, left: list[int]
) -> None:
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_superseded(tmp_path / f"checkpoint-{saved}", limit, None if best is None else f"elsewhere/checkpoint-{best}")
    assert names_in(tmp_path) == sorted(f"checkpoint-{step}" for step in left)

"""A few training samples of a run, beside its adapter or model: the ids and labels as they were trained.

A merge asks them to compare its result with the adapter. They are conversations of the user, so no command copies them
beside merged weights, and checkpoints do not contain them: a reader of ``checkpoint-N`` finds them in the run's folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints.companions import check_inside
from checkpoints.files import is_file, load_json, save_text
from checkpoints.names import TRAINING_SAMPLES

VERSION = 1


@dataclass(frozen=True)
class TrainingSample:
    """A conversation as it was trained.

    Attributes:
        source: its place, ``file.jsonl:12`` or ``file.json:40 (record 3)``.
        ids: of all its tokens, at most 512 as a run writes them.
        labels: as long as ``ids``: the id where it is a target, -100 elsewhere. The first one is never a target.
    """

    source: str
    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TrainingSamples:
    """The content of ``training_samples.json``."""

    samples: Sequence[TrainingSample] = ()

    @classmethod
    def read(cls, folder: Path) -> TrainingSamples:
        """Read those of an adapter's or model's folder, or of the run that a ``checkpoint-N`` belongs to.

        Returns:
            No samples if there is no file: the run was told to write none, or is of an earlier version.
        Raises:
            ConfigError: something else than a file, one that does not follow its schema, or a link out of its folder.
        """
        folder = Path(os.path.abspath(folder))
        folders = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
        for each in folders:
            path = each / TRAINING_SAMPLES
            if is_file(path):
                check_inside(path, each)
                content = load_json(path)
                rows = ((row["source"], row["ids"], row["labels"]) for row in content["samples"])
                return cls([TrainingSample(*row) for row in rows])
        return cls()

    def write(self, folder: Path) -> None:
        """Write the file in one step; without samples, remove it."""
        if not self.samples:
            (folder / TRAINING_SAMPLES).unlink(missing_ok=True)
            return
        lines = ",\n".join(json.dumps(asdict(sample), ensure_ascii=False) for sample in self.samples)
        save_text(f'{{"version": {VERSION}, "samples": [\n{lines}\n]}}\n', folder / TRAINING_SAMPLES)

"""List the recipes: config files for finetune.py, with the memory and time that a rehearsal expects of each.

    python -m scripts.recipes [--gpu_memory GIB] [--gpus N] [WORD ...]

A recipe is used with the command in its file: finetune.py --config recipes/NAME.yaml --data_path FILE --output_dir OUT.
Flags on the command line override those of the file. "fits" is said for the GPUs of this machine, or for those that the
flags describe; WORD chooses the recipes whose names contain all words.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from commands import CommandParser, importing, run_command, set_up_logging
from console import show
from errors import ConfigError
from processes import forget_launcher, has_gpu

if TYPE_CHECKING:
    from planning.expectation import Expectation

FOLDER = Path(__file__).parents[1] / "recipes"
RATE_SHARE = 0.4  # part of the stated rate of matrix products, as in scripts.plan
_MACHINE = re.compile(r"# machine: (\d+) x (\d+) GB, (\d+) TFLOP/s")
_REHEARSED = re.compile(r"# rehearsed: ([\d.]+) GiB per GPU; (.+)")


@dataclass(frozen=True)
class Recipe:
    """A config file and what its first comments say.

    Attributes:
        gpu_gb: memory of a GPU that it is made for.
        tflops: 10^12 operations per second of matrix products that its time assumes for a GPU.
        peak_gib: expected memory of a GPU.
        speed: expected time.
        command: command that uses it.
    """

    path: Path
    title: str
    gpus: int
    gpu_gb: int
    tflops: int
    peak_gib: float
    speed: str
    command: str

    @classmethod
    def read(cls, path: Path) -> Recipe:
        title, machine, rehearsed, command = path.read_text(encoding="utf-8").splitlines()[:4]
        found, expected = _MACHINE.fullmatch(machine), _REHEARSED.fullmatch(rehearsed)
        if not found or not expected:
            what = f"{path}: its second and third line do not say the machine and what was rehearsed"
            raise ConfigError(what, "Write them as the other recipes do")
        gpus, gpu_gb, tflops = map(int, found.groups())
        return cls(path, title[2:], gpus, gpu_gb, tflops, float(expected[1]), expected[2], command[2:])

    def fits(self, memory_gib: float, gpus: int) -> bool:
        from planning.devices import RESERVE_GIB

        return gpus >= self.gpus and self.peak_gib <= memory_gib - RESERVE_GIB


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("python -m scripts.recipes", description=__doc__, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="WORD", help="such as 7b, qlora, thinking")
    parser.add_argument("--gpu_memory", type=float, metavar="GIB", help="memory of a GPU (default: this machine's)")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: this machine's)")
    parser.add_argument("--rehearse", action="store_true", help="rehearse the recipes again and write what they expect")
    args = parser.parse_args(argv)
    for name in ("gpu_memory", "gpus"):
        if (value := getattr(args, name)) is not None and not value > 0:
            parser.error(f"--{name} {value:g} is not valid; give more than 0")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    set_up_logging()
    forget_launcher()
    paths = [path for path in sorted(FOLDER.glob("*.yaml")) if all(word.lower() in path.stem for word in args.words)]
    if not paths:
        raise ConfigError(f"no recipe has {' '.join(args.words)} in its name", f"See {FOLDER}")
    if args.rehearse:
        for path in paths:
            show(f"{path.stem}: {write_expectation(path)}")
        return 0
    memory, gpus = find_machine(args.gpu_memory, args.gpus)
    for recipe in map(Recipe.read, paths):
        fit = "" if not memory else "fits  " if recipe.fits(memory, gpus) else "-     "
        show(f"{fit}{recipe.path.stem:28} {recipe.gpus} x {recipe.peak_gib:5.1f} GiB  {recipe.title}")
    show("")
    if memory:
        show(f"fits: on {gpus} x {memory:g} GiB, with 1 GiB of each left to CUDA")
    else:
        show("no GPU here; --gpu_memory 24 --gpus 1 says what would fit")
    show(f"use:  {Recipe.read(paths[0]).command}")
    return 0


def find_machine(memory: float | None, gpus: int | None) -> tuple[float, int]:
    """Return the memory of a GPU in GiB, 0 without one, and their number."""
    if memory is not None:
        return memory, gpus or 1
    with importing():
        import torch

        from planning.devices import find_device
    if not has_gpu():
        return 0.0, 0
    return round(find_device(None).memory_gib, 1), gpus or torch.cuda.device_count()


def write_expectation(path: Path) -> str:
    """Rehearse a recipe, write the expected memory and time to its third line, and return that."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    machine = _MACHINE.fullmatch(lines[1].rstrip("\n"))
    assert machine is not None, path
    gpus, gpu_gb, tflops = map(int, machine.groups())
    expected = rehearse(path, gpus, gpu_gb, tflops)
    if not expected.fits:
        what = f"{path.name} needs {expected.share.peak_bytes / 2**30:.1f} GiB on each of {gpus} x {gpu_gb} GB"
        raise ConfigError(what, "Change its flags or its machine")
    line = f"{expected.share.peak_bytes / 2**30:.1f} GiB per GPU; {_speed(expected)}"
    lines[2] = f"# rehearsed: {line}\n"
    path.write_text("".join(lines), encoding="utf-8")
    return line


def rehearse(path: Path, gpus: int, gpu_gb: int, tflops: int) -> Expectation:
    """Rehearse a step of a recipe on fake tensors, from the published config of its model."""
    with importing():
        from planning.devices import Device
        from planning.expectation import Machine, Planner
        from planning.model import read_checkpoint
        from planning.published import write_published_config
        from planning.shallow import find_blocks
        from training.checks import check_args
        from training.config.parsing import parse_args as parse_run_args
    name = parse_run_args(["--config", str(path), "--plan"]).model.model_name_or_path
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_published_config(name, Path(temporary, "model"))
        args = parse_run_args(["--config", str(path), "--model_name_or_path", str(folder), "--plan"])
        forget_launcher(gpus)
        try:
            check_args(args)
        finally:
            forget_launcher()
        config = read_checkpoint(args).config
        machine = Machine(Device(f"{gpu_gb} GB", gpu_gb, tflops), gpu_gb, gpus, rate_share=RATE_SHARE)
        return Planner(machine, int(config.hidden_size), blocks=find_blocks(config)).expect(args)


def _speed(expected: Expectation) -> str:
    seconds = expected.seconds
    assert seconds is not None
    samples = len(expected.shape.lengths) * expected.micro_steps * expected.machine.processes
    minutes = 1000 / samples * seconds / 60
    length = expected.shape.lengths[0]
    return f"1,000 samples of {length:,} tokens: {minutes:,.1f} minutes at {RATE_SHARE:.0%} of the rate"


if __name__ == "__main__":
    run_command(main, "scripts.recipes", prints_result=True)

"""Commands whose stdout and stderr are a pipe that nobody reads: they do their work and exit as if somebody did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from tests.commands import PLAIN, environment, names_in, read_json, read_log
from tests.golden import REPO
from tests.models import TINY, write_conversations

# Runs commands one after the other, so that torch is imported once; writes their exit codes to a file.
DRIVER = """
import json, runpy, sys
from pathlib import Path
file, commands, codes = Path(sys.argv[1]), json.loads(sys.argv[2]), []
for module, *words in commands:
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        codes.append(error.code or 0)
    file.write_text(json.dumps(codes))
"""


def test_lost_output_changes_no_command(tmp_path: Path) -> None:
    """The first training gets SIGHUP, as from a terminal that is closed, and saves a checkpoint."""
    data = write_conversations(tmp_path / "train.json")
    train = ["finetune", *PLAIN, "--model_name_or_path", TINY, "--data_path", data, "--use_lora", "--logging_steps", 1]
    stopped, adapter, merged = tmp_path / "stopped", tmp_path / "adapter", tmp_path / "merged"
    commands = [
        ["finetune", "--help"],
        [*train, "--output_dir", stopped, "--max_steps", 100_000],
        [*train, "--output_dir", adapter, "--max_steps", 2],
        ["merge_lora", "--adapter", adapter, "--output", merged],
        ["scripts.preview_data", "--model_name_or_path", TINY, "--data_path", data],
        ["scripts.ask", "--model_name_or_path", merged, "Hi", "--max_new_tokens", 2],
        ["scripts.ask", "--model_name_or_path", merged, ""],
    ]  # fmt: skip
    reading, writing = os.pipe()
    os.close(reading)
    words = [
        sys.executable,
        "-c",
        DRIVER,
        str(tmp_path / "codes"),
        json.dumps([list(map(str, each)) for each in commands]),
    ]
    process = subprocess.Popen(words, cwd=REPO, env=environment(), stdout=writing, stderr=writing)
    os.close(writing)
    try:
        deadline = time.monotonic() + 120
        while not (stopped / "training_log.jsonl").is_file() or len(read_log(stopped)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        process.wait(120)
    finally:
        process.kill()
    assert read_json(tmp_path / "codes") == [0, 143, 0, 0, 0, 0, 2]
    [checkpoint] = [name for name in names_in(stopped) if name.startswith("checkpoint-")]
    assert {"adapter_model.safetensors", "manifest.json"} <= set(names_in(stopped / checkpoint))
    assert read_json(adapter / "run_summary.json")["steps"] == 2
    assert load_file(merged / "model.safetensors")

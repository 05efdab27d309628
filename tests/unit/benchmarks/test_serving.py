"""What ``benchmarks.serving`` writes of servers: this toolkit's, asked over HTTP by several clients at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serving import main
from tests.models import TINY


def test_clients_of_a_server_are_measured_and_added_to_the_results(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    output = tmp_path / "serving.json"
    output.write_text(json.dumps({"models": {"tiny": {"engine": {"tokens": 1}}}}))
    only = ["--only", "servers", "--servers", "ours", "--clients", "1", "3", "--rounds", "1", "--tokens", "4"]
    main(["--model_name_or_path", str(TINY), "--name", "tiny", *only, "--output", str(output)])
    tiny = json.loads(output.read_text())["models"]["tiny"]
    assert tiny["engine"] == {"tokens": 1}
    assert sorted(tiny["servers"]["clients"]) == ["1", "3"]
    figures = tiny["servers"]["clients"]["3"]["ours"]
    assert 0 < figures["first_token_seconds"] <= figures["last_first_token_seconds"]
    assert figures["tokens_per_second"] > 0

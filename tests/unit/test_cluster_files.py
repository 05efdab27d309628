"""Files that start the launchers on a cluster: the Kubernetes manifest against its types, and the Slurm script.

Shell scripts simulate Slurm's own commands.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.golden import REPO

MANIFEST = REPO / "finetune" / "pytorchjob.yaml"
# Types of the objects in the manifest, from the Python packages that the file names.
TYPES = json.loads((REPO / "tests" / "references" / "pytorchjob_types.json").read_text(encoding="utf-8"))["types"]
SCALARS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "bool": bool}


def type_errors(value: Any, expected: str, where: str) -> Iterator[str]:
    """Yield where a value is not of type ``expected``: ``str``, ``list[T]``, ``dict(str, T)`` or an object's name."""
    if match := re.fullmatch(r"list\[(.+)\]", expected):
        if not isinstance(value, list):
            yield f"{where} is not a list"
            return
        for number, item in enumerate(value):
            yield from type_errors(item, match[1], f"{where}[{number}]")
    elif match := re.fullmatch(r"dict\(str, (.+)\)", expected):
        if not isinstance(value, dict):
            yield f"{where} is not a mapping"
            return
        for name, item in value.items():
            yield from type_errors(item, match[1], f"{where}.{name}")
    elif expected in TYPES:
        if not isinstance(value, dict):
            yield f"{where} is not a {expected}"
            return
        properties = TYPES[expected]["properties"]
        yield from (f"{where}.{name} is missing" for name in TYPES[expected]["required"] if name not in value)
        for name, item in value.items():
            if name not in properties:
                yield f"{where}.{name} is unknown"
            else:
                yield from type_errors(item, properties[name], f"{where}.{name}")
    elif expected in SCALARS and not isinstance(value, SCALARS[expected]):
        yield f"{where} is not a {expected}"


@pytest.fixture
def manifest() -> dict[str, Any]:
    loaded = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def test_manifest_has_the_types_of_a_pytorchjob(manifest: dict[str, Any]) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert list(type_errors(manifest, "KubeflowOrgV1PyTorchJob", "job")) == []
    # The operator also requires one container of this name, with a port of this name.
    for replica in manifest["spec"]["pytorchReplicaSpecs"].values():
        [container] = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]


def test_wrong_types_are_found(manifest: dict[str, Any]) -> None:
    container = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    container["comand"] = container.pop("command")
    container["env"][0]["value"] = 2
    del container["ports"][0]["containerPort"], manifest["spec"]["runPolicy"]
    found = set(type_errors(manifest, "KubeflowOrgV1PyTorchJob", "job"))
    place = "job.spec.pytorchReplicaSpecs.Worker.template.spec.containers[0]"
    expected = {
        "job.spec.runPolicy is missing", f"{place}.comand is unknown", f"{place}.env[0].value is not a str",
        f"{place}.ports[0].containerPort is missing",
    }  # fmt: skip
    assert {fault for fault in found if "Master" not in fault} == expected


def test_numbers_in_manifest_are_consistent(manifest: dict[str, Any]) -> None:
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    [container] = replicas["Worker"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["NNODES"] == str(sum(replica["replicas"] for replica in replicas.values()))
    assert variables["GPUS_PER_NODE"] == container["resources"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("operator", [{"RANK": "1"}, {"RANK": "8", "PET_NODE_RANK": "1"}])
def test_manifest_passes_the_host_rank_to_the_launcher(
    manifest: dict[str, Any], operator: dict[str, str], tmp_path: Path
) -> None:
    """Older operators set RANK to it; in later ones RANK can be the rank of a process."""
    [container] = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    write_launcher(tmp_path)
    result = subprocess.run(
        container["command"], cwd=tmp_path, env={"PATH": os.environ["PATH"], "NNODES": "2", **operator},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.startswith("host 1 of 2 at :, -m /data/Qwen-7B-Chat -d /data/train.jsonl -o ")
    assert (REPO / "finetune" / "finetune_ds.sh").is_file()


def write_launcher(folder: Path) -> None:
    """Write a launcher that prints its arguments and variables."""
    launcher = folder / "finetune" / "finetune_ds.sh"
    launcher.parent.mkdir()
    launcher.write_text('echo "host $NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT, $*"\n', encoding="utf-8")


def test_slurm_script_starts_the_launcher_on_every_host(tmp_path: Path) -> None:
    write_launcher(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    # The only option of srun here is one word, with its value after "=".
    simulated = {
        "scontrol": '[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"',
        "srun": "shift; for id in 0 1; do SLURM_NODEID=$id; export SLURM_NODEID; \"$@\"; done",
    }  # fmt: skip
    for name, text in simulated.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }  # fmt: skip
    result = subprocess.run(
        ["bash", str(REPO / "finetune" / "slurm.sbatch"), "finetune_ds.sh", "-m", "my model", "-d", "D"],
        cwd="/", env={"PATH": f"{tools}:{os.environ['PATH']}", **slurm}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.splitlines() == [f"host {number} of 2 at node7:23456, -m my model -d D" for number in range(2)]

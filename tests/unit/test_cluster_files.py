"""The files that start the launchers on a cluster: Kubernetes' manifest against its types, and Slurm's script.

Slurm's own commands are played by shell scripts.
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
# Those that the manifest uses, as the Python packages named in the file declare them.
TYPES = json.loads((REPO / "tests" / "references" / "pytorchjob_types.json").read_text(encoding="utf-8"))["types"]
SCALARS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "bool": bool}


def faults(value: Any, wanted: str, where: str) -> Iterator[str]:
    """Where a value is not of the type ``wanted``: ``str``, ``list[T]``, ``dict(str, T)`` or the name of an object."""
    if found := re.fullmatch(r"list\[(.+)\]", wanted):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for number, item in enumerate(value):
            yield from faults(item, found[1], f"{where}[{number}]")
    elif found := re.fullmatch(r"dict\(str, (.+)\)", wanted):
        if not isinstance(value, dict):
            yield f"{where} is no mapping"
            return
        for name, item in value.items():
            yield from faults(item, found[1], f"{where}.{name}")
    elif wanted in TYPES:
        if not isinstance(value, dict):
            yield f"{where} is no {wanted}"
            return
        properties = TYPES[wanted]["properties"]
        yield from (f"{where}.{name} is missing" for name in TYPES[wanted]["required"] if name not in value)
        for name, item in value.items():
            if name not in properties:
                yield f"{where}.{name} is unknown"
            else:
                yield from faults(item, properties[name], f"{where}.{name}")
    elif wanted in SCALARS and not isinstance(value, SCALARS[wanted]):
        yield f"{where} is no {wanted}"


@pytest.fixture
def manifest() -> dict[str, Any]:
    loaded = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def test_the_manifest_has_the_types_of_a_pytorchjob(manifest: dict[str, Any]) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert list(faults(manifest, "KubeflowOrgV1PyTorchJob", "job")) == []
    # What the operator's own checks ask beyond the types: one container of this name, with a port of this name.
    for replica in manifest["spec"]["pytorchReplicaSpecs"].values():
        [container] = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]


def test_the_types_find_faults(manifest: dict[str, Any]) -> None:
    container = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    container["comand"] = container.pop("command")
    container["env"][0]["value"] = 2
    del container["ports"][0]["containerPort"], manifest["spec"]["runPolicy"]
    found = set(faults(manifest, "KubeflowOrgV1PyTorchJob", "job"))
    place = "job.spec.pytorchReplicaSpecs.Worker.template.spec.containers[0]"
    expected = {
        "job.spec.runPolicy is missing", f"{place}.comand is unknown", f"{place}.env[0].value is no str",
        f"{place}.ports[0].containerPort is missing",
    }  # fmt: skip
    assert {fault for fault in found if "Master" not in fault} == expected


def test_the_manifests_numbers_fit_each_other(manifest: dict[str, Any]) -> None:
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    [container] = replicas["Worker"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["NNODES"] == str(sum(replica["replicas"] for replica in replicas.values()))
    assert variables["GPUS_PER_NODE"] == container["resources"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("operator", [{"RANK": "1"}, {"RANK": "8", "PET_NODE_RANK": "1"}])
def test_the_manifests_command_tells_the_launcher_which_host_it_is(
    manifest: dict[str, Any], operator: dict[str, str], tmp_path: Path
) -> None:
    """Older operators say it in RANK; for later ones that can be the rank of a process."""
    [container] = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    write_launcher(tmp_path)
    result = subprocess.run(
        container["command"], cwd=tmp_path, env={"PATH": os.environ["PATH"], "NNODES": "2", **operator},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.startswith("host 1 of 2 at :, -m /data/Qwen-7B-Chat -d /data/train.jsonl -o ")
    assert (REPO / "finetune" / "finetune_ds.sh").is_file()


def write_launcher(folder: Path) -> None:
    """A launcher that shows what it is given."""
    launcher = folder / "finetune" / "finetune_ds.sh"
    launcher.parent.mkdir()
    launcher.write_text('echo "host $NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT, $*"\n', encoding="utf-8")


def test_slurms_script_starts_the_launcher_on_every_host(tmp_path: Path) -> None:
    write_launcher(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    # srun's only option here has its value behind "=".
    played = {
        "scontrol": '[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"',
        "srun": "shift; for id in 0 1; do SLURM_NODEID=$id; export SLURM_NODEID; \"$@\"; done",
    }  # fmt: skip
    for name, text in played.items():
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

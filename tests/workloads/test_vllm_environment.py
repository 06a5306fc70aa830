"""The workloads run in vLLM's environment too, whose transformers and huggingface_hub are older than the trainer's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.workloads

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import importlib, pkgutil

import posttrain_workloads

for module in pkgutil.walk_packages(posttrain_workloads.__path__, "posttrain_workloads."):
    importlib.import_module(module.name)

from importlib.metadata import version
from posttrain_workloads import hub
from posttrain_workloads.problems import InvalidInputs

print(version("vllm"), version("transformers"), version("trl"))
try:
    hub.resolve_commit("org/name", "main", kind="model", path="spec.model")
except InvalidInputs as error:
    print(error.problems[0].reason)
"""


def test_every_module_imports_there_and_a_hub_that_does_not_answer_is_named(vllm_python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [vllm_python, "-c", PROGRAM],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("operator", "workloads")),
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    versions, reason = done.stdout.splitlines()[-2:]
    assert versions.split() == ["0.31.0+cpu", "5.17.0", "1.16.0"]
    assert reason == "HubUnreachable"

"""Real training in real pods, and something goes wrong once: the run ends right, and its status says what happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_training import START_SECONDS, run, tiny
from tests.support.cluster_runs import ClusterRun, reasons
from tests.support.release import NAMESPACE

__all__ = ["run"]
pytestmark = pytest.mark.e2e

STEPS = 20
_CODE = """\
import time

from transformers import TrainerCallback


class Slow(TrainerCallback):
    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


class Greedy(TrainerCallback):
    def __init__(self, step):
        self.step, self.kept = step, []

    def on_step_end(self, args, state, control, **kwargs):
        while state.global_step >= self.step:
            self.kept.append(b"x" * 2**27)
"""


def slow(callback: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return fields of a spec whose steps take a second, so that there is time to break something."""
    spec = tiny(code={"configMapName": "callbacks"})
    spec["sft"]["args"]["max_steps"] = STEPS
    spec["callbacks"] = [callback or {"function": "callbacks:Slow", "params": {"seconds": 1}}]
    return spec


def start(run: ClusterRun, spec: Mapping[str, Any]) -> None:
    """Apply a run with own code."""
    data = {"callbacks.py": _CODE}
    code = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "callbacks"}, "data": data}
    run.cluster.apply([code], namespace=run.namespace)
    run.apply(**spec)


def await_checkpoint(run: ClusterRun, *, attempt: int = 1) -> None:
    """Wait until an attempt has a checkpoint to go on from."""
    run.await_status(
        lambda s: s.get("attempt") == attempt and (s.get("checkpoints") or {}).get("latestStep"),
        what="a checkpoint",
        seconds=START_SECONDS,
    )


def await_end(run: ClusterRun) -> dict[str, Any]:
    """Wait for the run's end, and return its status."""
    return run.await_status(lambda s: s.get("completionTime"), what="the end", seconds=START_SECONDS)


def main_process(pod: Mapping[str, Any]) -> int:
    """Return the process on this host that is the main one of a pod's container."""
    uid = pod["metadata"]["uid"]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, groups = (folder / "cmdline").read_bytes(), (folder / "cgroup").read_text()
        except OSError:
            continue
        if uid in groups and b"posttrain_workloads.launch" in command:
            return int(folder.name)
    raise AssertionError(f"no process of {pod['metadata']['name']} is found")


def test_a_deleted_pod_costs_one_restart_from_the_checkpoint(run: ClusterRun) -> None:
    start(run, slow())
    await_checkpoint(run)

    run.kubectl("delete", "pod", run.pods(attempt=1)[1]["metadata"]["name"], "--wait=false")

    ended = await_end(run)
    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    assert (ended["attempt"], ended["restarts"]["infrastructure"]) == (2, 1)
    assert ended["progress"]["step"] == STEPS


def test_a_killed_container_costs_one_restart_from_the_checkpoint(run: ClusterRun) -> None:
    start(run, slow())
    await_checkpoint(run)

    os.kill(main_process(run.pods(attempt=1)[1]), signal.SIGKILL)

    ended = await_end(run)
    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    assert (ended["attempt"], ended["restarts"]["infrastructure"]) == (2, 1)


def test_a_rank_over_its_memory_is_named_with_advice(run: ClusterRun) -> None:
    start(run, slow({"function": "callbacks:Greedy", "params": {"step": 2}}))

    ended = await_end(run)

    assert reasons(ended)["Succeeded"] == ("False", "HostOutOfMemory")
    assert "spec.resources.memory" in ended["failure"]["advice"]


def test_a_suspended_run_goes_on_where_it_was(run: ClusterRun) -> None:
    start(run, slow())
    await_checkpoint(run)

    run.patch({"suspend": True})
    suspended = run.await_stage("Suspended", seconds=START_SECONDS)
    run.patch({"suspend": False})

    ended = await_end(run)
    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    assert not (ended.get("restarts") or {}).get("infrastructure")
    assert suspended["checkpoints"]["latestStep"] > 0


def test_a_run_does_not_notice_that_the_operator_is_replaced(run: ClusterRun) -> None:
    start(run, slow())
    await_checkpoint(run)
    before = {pod["metadata"]["uid"] for pod in run.pods(attempt=1)}

    run.cluster.kubectl("delete", "pod", "--all", "--namespace", NAMESPACE)

    ended = await_end(run)
    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    assert (ended["attempt"], ended["progress"]["step"]) == (1, STEPS)
    assert {pod["metadata"]["uid"] for pod in run.pods(attempt=1)} <= before

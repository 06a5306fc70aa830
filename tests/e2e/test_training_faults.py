"""Real training in real pods, and something goes wrong once: the run ends right, and its status says what happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.cluster.images import REGISTRY
from tests.e2e.test_training import START_SECONDS, run
from tests.support.cluster_runs import ClusterRun, message_of, reasons, tiny
from tests.support.processes import main_process
from tests.support.release import NAMESPACE, PROFILE, Release

__all__ = ["run"]
pytestmark = pytest.mark.e2e

STEPS = 20
HELD_AT = 4
NEVER_PULLED = f"{REGISTRY}/trainer@sha256:{'0' * 64}"
"""A trainer image that no node has: a pod that is told to run it does not."""
_CODE = """\
import os
import time
from pathlib import Path

from transformers import TrainerCallback


class Slow(TrainerCallback):
    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


class Held(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        while state.global_step == self.step and not Path(os.environ["POSTTRAIN_STORAGE"], "go-on").exists():
            time.sleep(0.1)


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


def start_held(run: ClusterRun) -> None:
    """Apply a run that trains to its checkpoint at step 3, and a step further only when it is let go on."""
    spec = slow({"function": "callbacks:Held", "params": {"step": HELD_AT}})
    spec["sft"]["args"]["max_steps"] = 6
    start(run, {**spec, "prepare": {"enabled": False}})
    await_checkpoint(run)


def let_go_on(run: ClusterRun) -> None:
    """Let a held run go on."""
    (run.cluster.folder / "volumes" / run.namespace / "shared" / run.name / "go-on").touch()


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


def story(run: ClusterRun, *, end: str) -> list[str]:
    """Return what its events tell, in their order, once the last one is there."""
    run.await_event(end)
    return [reason for _, reason in run.events()]


def restarts(pod: Mapping[str, Any]) -> int:
    """Return how often a pod's containers were started again."""
    return sum(container["restartCount"] for container in pod["status"]["containerStatuses"])


def master(run: ClusterRun, *, attempt: int) -> dict[str, Any]:
    """Return the pod spec that an attempt's job has for its Master."""
    job = run.cluster.get("pytorchjob", f"{run.name}-a{attempt}", "--namespace", run.namespace)
    return dict(job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"])


def test_a_deleted_pod_costs_one_restart_from_the_checkpoint(run: ClusterRun) -> None:
    start(run, slow())
    await_checkpoint(run)

    name = run.pods(attempt=1)[1]["metadata"]["name"]
    run.kubectl("delete", "pod", name, "--wait=false")

    ended = await_end(run)
    assert ended["failure"]["reason"] == "PodDeleted"
    assert name in ended["failure"]["message"]
    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    assert (ended["attempt"], ended["restarts"]["infrastructure"]) == (2, 1)
    assert ended["progress"]["step"] == STEPS
    told = ["Accepted", "Prepared", "AllPodsRunning", "PodDeleted", "AllPodsRunning", "Completed"]
    assert story(run, end="Completed") == told


def test_a_killed_container_costs_one_restart_from_the_checkpoint(run: ClusterRun) -> None:
    start(run, slow())
    await_checkpoint(run)

    os.kill(main_process(run.pods(attempt=1)[1]), signal.SIGKILL)

    ended = await_end(run)
    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    assert (ended["attempt"], ended["restarts"]["infrastructure"]) == (2, 1)
    assert ended["failure"]["reason"] == "RankKilled"
    told = ["Accepted", "Prepared", "AllPodsRunning", "RankKilled", "AllPodsRunning", "Completed"]
    assert story(run, end="Completed") == told


def test_a_rank_over_its_memory_is_named_with_advice(run: ClusterRun) -> None:
    start(run, slow({"function": "callbacks:Greedy", "params": {"step": 2}}))

    ended = await_end(run)

    assert reasons(ended)["Succeeded"] == ("False", "HostOutOfMemory")
    assert "spec.resources.memory" in ended["failure"]["advice"]
    told = ["Accepted", "Prepared", "AllPodsRunning", "HostOutOfMemory"]
    assert story(run, end="HostOutOfMemory") == told


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
    told = ["Accepted", "Prepared", "AllPodsRunning", "Suspended", "AllPodsRunning", "Completed"]
    assert story(run, end="Completed") == told


def test_a_run_does_not_notice_that_the_operator_is_replaced(run: ClusterRun) -> None:
    start(run, slow())
    await_checkpoint(run)
    before = {pod["metadata"]["uid"] for pod in run.pods(attempt=1)}

    run.cluster.kubectl("delete", "pod", "--all", "--namespace", NAMESPACE)

    ended = await_end(run)
    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    assert (ended["attempt"], ended["progress"]["step"]) == (1, STEPS)
    assert {pod["metadata"]["uid"] for pod in run.pods(attempt=1)} <= before
    assert story(run, end="Completed") == ["Accepted", "Prepared", "AllPodsRunning", "Completed"]


def test_an_edited_job_is_what_it_was_made_as_again_and_its_pods_train_on(run: ClusterRun) -> None:
    start_held(run)
    before, made = run.pods(attempt=1), run.cluster.get("pytorchjob", "demo-a1", "--namespace", run.namespace)["spec"]

    run.kubectl("patch", "pytorchjob", "demo-a1", "--type=merge", "--patch", '{"spec": {"nprocPerNode": "7"}}')

    run.cluster.await_json(
        *("pytorchjob", "demo-a1", "--namespace", run.namespace),
        until=lambda job: job["metadata"]["generation"] > 2 and job["spec"] == made,
        what="the repair",
    )
    after = run.pods(attempt=1)
    assert [pod["metadata"]["uid"] for pod in after] == [pod["metadata"]["uid"] for pod in before]
    assert [restarts(pod) for pod in after] == [0, 0]
    let_go_on(run)
    ended = await_end(run)
    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    assert (ended["attempt"], ended["progress"]["step"]) == (1, 6)
    assert story(run, end="Completed") == ["Accepted", "AllPodsRunning", "Completed"]


def test_a_run_sits_out_a_kubelet_that_is_stopped_for_a_minute(run: ClusterRun) -> None:
    start_held(run)
    before = {pod["metadata"]["uid"] for pod in run.pods(attempt=1)}
    kubelet = run.cluster.node.kubelet

    kubelet.stop()
    try:
        unseen = run.await_status(
            lambda s: reasons(s)["PodsReady"] == ("Unknown", "NodeUnreachable"), what="the silence", seconds=180
        )
    finally:
        kubelet.start()

    assert (unseen["stage"], unseen["attempt"]) == ("Training", 1)
    assert "node node-1 does not answer" in message_of(unseen, "Succeeded")
    run.await_status(lambda s: reasons(s)["PodsReady"] == ("True", "AllPodsRunning"), what="its end", seconds=180)
    let_go_on(run)
    ended = await_end(run)
    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    assert (ended["attempt"], ended["progress"]["step"]) == (1, 6)
    assert {pod["metadata"]["uid"] for pod in run.pods(attempt=1)} <= before
    told = ["Accepted", "AllPodsRunning", "NodeUnreachable", "AllPodsRunning", "Completed"]
    assert story(run, end="Completed") == told


@pytest.fixture
def upgrades(release: Release) -> Iterator[Release]:
    """The release, to be upgraded by the test, and put back as it was."""
    yield release
    release.upgrade()


def test_an_upgrade_touches_no_attempt_that_lives_and_the_next_one_runs_what_was_pinned(
    run: ClusterRun, upgrades: Release
) -> None:
    start_held(run)
    pinned = run.status()["provenance"]["imageDigests"]["trainer"]
    before, template = run.pods(attempt=1), master(run, attempt=1)
    assert pinned.startswith(f"{REGISTRY}/trainer@sha256:")

    upgrades.upgrade(
        images={"trainer": NEVER_PULLED},
        profiles={"default": {**PROFILE, "env": {"OF_THE_UPGRADE": "yes"}}},
        terminationGraceSeconds=31,
    )
    canary = ClusterRun(run.cluster, run.namespace, "canary")
    canary.apply(**tiny(prepare={"enabled": False}))
    canary.await_status(lambda s: s.get("attemptCreatedTime"), what="an attempt of the new operator")

    new = master(canary, attempt=1)
    assert (new["containers"][0]["image"], new["terminationGracePeriodSeconds"]) == (NEVER_PULLED, 31)
    canary.kubectl("delete", "trainingrun", canary.name)
    after = run.pods(attempt=1)
    assert [pod["metadata"]["uid"] for pod in after] == [pod["metadata"]["uid"] for pod in before]
    assert [restarts(pod) for pod in after] == [0, 0]
    assert master(run, attempt=1) == template

    os.kill(main_process(after[1]), signal.SIGKILL)
    let_go_on(run)
    ended = await_end(run)

    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    assert (ended["attempt"], ended["restarts"]["infrastructure"]) == (2, 1)
    assert ended["provenance"]["imageDigests"]["trainer"] == pinned
    (container,) = master(run, attempt=2)["containers"]
    assert container["image"] == pinned
    assert "OF_THE_UPGRADE" not in {variable["name"] for variable in container["env"]}
    told = ["Accepted", "AllPodsRunning", "RankKilled", "AllPodsRunning", "Completed"]
    assert story(run, end="Completed") == told

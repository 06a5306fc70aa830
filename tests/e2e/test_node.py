"""The real node: pods run, find each other and are killed for their memory, and nothing changes on this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.local.shim import descendants
from tests.cluster.cluster import TestCluster
from tests.cluster.errors import ClusterError
from tests.cluster.images import BUSYBOX, REGISTRY, build_base_images, build_image
from tests.cluster.machine import Machine, remove_stale_cgroups
from tests.support.host import observe_host
from tests.support.processes import await_gone, is_alive, wait_for

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
FOREVER = "sleep 3600"


def build_pod(name: str, script: str, *, image: str = BUSYBOX, memory: str = "64Mi") -> dict[str, Any]:
    container = {
        "name": "main",
        "image": image,
        "command": ["sh", "-c", script],
        "resources": {"limits": {"memory": memory}},
    }
    spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def await_phase(cluster: TestCluster, namespace: str, pod: str, phase: str) -> dict[str, Any]:
    """Wait until a pod is in a phase; return it."""

    def look() -> dict[str, Any] | None:
        found = cluster.get("pod", pod, "--namespace", namespace)
        return found if found["status"]["phase"] == phase else None

    return wait_for(look, what=f"{pod} to be {phase}", seconds=60) or {}


def ended(pod: dict[str, Any]) -> tuple[int, str, str]:
    """Return exit code, reason and termination message of a pod's container."""
    state = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    return state["exitCode"], state["reason"], state.get("message", "")


def test_a_container_leaves_its_exit_code_its_message_and_its_log(
    node_cluster: TestCluster, node_namespace: str
) -> None:
    script = "echo training; echo 'step=7' > /dev/termination-log; exit 3"
    node_cluster.apply([build_pod("fails", script)], namespace=node_namespace)

    pod = await_phase(node_cluster, node_namespace, "fails", "Failed")

    assert ended(pod) == (3, "Error", "step=7\n")
    assert node_cluster.kubectl("logs", "fails", "--namespace", node_namespace) == "training\n"


def test_a_container_over_its_memory_limit_is_oom_killed(node_cluster: TestCluster, node_namespace: str) -> None:
    # A line without an end.
    node_cluster.apply([build_pod("greedy", "exec tail /dev/zero", memory="32Mi")], namespace=node_namespace)

    pod = await_phase(node_cluster, node_namespace, "greedy", "Failed")

    assert ended(pod) == (137, "OOMKilled", "")


def test_the_pods_of_a_job_reach_each_other_by_name_and_succeed(node_cluster: TestCluster, node_namespace: str) -> None:
    scripts = {
        "Master": "echo hello from $RANK of $WORLD_SIZE | nc -l -p $MASTER_PORT",
        "Worker": "until nc -w 2 $MASTER_ADDR $MASTER_PORT < /dev/null > /tmp/said && grep hello /tmp/said; do :; done",
    }
    replicas = {}
    for role, script in scripts.items():
        template = build_pod(role, script)["spec"]
        template["containers"][0]["name"] = "pytorch"
        replicas[role] = {"replicas": 1, "restartPolicy": "Never", "template": {"spec": template}}
    spec = {"runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": replicas}
    job = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "meets"}, "spec": spec}
    node_cluster.apply([job], namespace=node_namespace)

    def succeeded() -> bool:
        status = node_cluster.get("pytorchjob", "meets", "--namespace", node_namespace).get("status", {})
        return "Succeeded" in {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}

    wait_for(succeeded, what="the job to succeed", seconds=90)
    said = node_cluster.kubectl("logs", "meets-worker-0", "--container", "pytorch", "--namespace", node_namespace)
    assert said == "hello from 0 of 2\n"


def test_a_pod_reaches_the_api_server_by_its_service(node_cluster: TestCluster, node_namespace: str) -> None:
    script = (
        "nslookup kubernetes.default.svc.cluster.local | grep -A1 ^Name: && "
        "nc -w 5 kubernetes.default.svc.cluster.local 443 < /dev/null && "
        "ls /var/run/secrets/kubernetes.io/serviceaccount"
    )
    node_cluster.apply([build_pod("asks", script)], namespace=node_namespace)

    await_phase(node_cluster, node_namespace, "asks", "Succeeded")

    lines = node_cluster.kubectl("logs", "asks", "--namespace", node_namespace).splitlines()
    assert lines == [
        "Name:\tkubernetes.default.svc.cluster.local",
        "Address: 10.96.0.1",
        "ca.crt",
        "namespace",
        "token",
    ]


def test_a_command_runs_in_a_container_that_outlives_its_kubelet(
    node_cluster: TestCluster, node_namespace: str
) -> None:
    node_cluster.apply([build_pod("stays", FOREVER)], namespace=node_namespace)
    before = await_phase(node_cluster, node_namespace, "stays", "Running")

    node_cluster.node.kubelet.restart()

    def said() -> str:
        try:
            return node_cluster.kubectl("exec", "stays", "--namespace", node_namespace, "--", "cat", "/proc/1/cmdline")
        except ClusterError:  # the kubelet does not know its pods yet
            return ""

    assert wait_for(said, what="the kubelet to answer").split("\0") == ["sleep", "3600", ""]
    after = node_cluster.get("pod", "stays", "--namespace", node_namespace)
    assert [c["containerID"] for c in after["status"]["containerStatuses"]] == [
        c["containerID"] for c in before["status"]["containerStatuses"]
    ]


def test_an_image_is_built_once_and_runs(
    node_cluster: TestCluster, node_namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    _, busybox = build_base_images()
    context = tmp_path / "context"
    context.mkdir()
    (context / "greeting").write_text("hello\n")
    (context / "Dockerfile").write_text(f"FROM {BUSYBOX}\nCOPY greeting /greeting\n")
    tag = f"{REGISTRY}/greeting:1"

    archive = build_image(context, tag, bases=[busybox])

    built_at = archive.stat().st_mtime_ns
    assert build_image(context, tag, bases=[busybox]) == archive
    assert archive.stat().st_mtime_ns == built_at
    (context / "greeting").write_text("bye\n")
    assert build_image(context, tag, bases=[busybox]) != archive

    node_cluster.node.load_image(archive)
    node_cluster.apply([build_pod("greets", "cat /greeting", image=tag)], namespace=node_namespace)
    await_phase(node_cluster, node_namespace, "greets", "Succeeded")
    assert node_cluster.kubectl("logs", "greets", "--namespace", node_namespace) == "hello\n"


def test_a_file_that_makes_no_image_says_why(node_cluster: TestCluster, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {REGISTRY}/nowhere:1\n")

    with pytest.raises(ClusterError, match="nowhere"):
        build_image(tmp_path, f"{REGISTRY}/broken:1")


def test_a_node_can_have_resources_that_it_only_says_it_has(node_cluster: TestCluster, node_namespace: str) -> None:
    node_cluster.node.advertise({"nvidia.com/gpu": 2})
    pod = build_pod("computes", "true")
    pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = "2"

    node_cluster.apply([pod], namespace=node_namespace)

    await_phase(node_cluster, node_namespace, "computes", "Succeeded")


def test_a_node_changes_nothing_on_this_host(
    node_cluster: TestCluster, node_namespace: str, host_before: dict[str, Any]
) -> None:
    node_cluster.apply([build_pod("runs", FOREVER)], namespace=node_namespace)
    await_phase(node_cluster, node_namespace, "runs", "Running")

    assert observe_host() == host_before
    assert str(node_cluster.folder) not in Path("/proc/mounts").read_text()
    assert str(node_cluster.folder) in node_cluster.node.machine.run("cat", "/proc/mounts")
    rules = node_cluster.node.machine.run("nft", "list", "tables").splitlines()
    assert "table ip kube-proxy" in rules
    assert node_cluster.node.machine.run("cat", "/proc/sys/vm/overcommit_memory") == "1\n"


def test_two_nodes_can_be_on_one_host(node_cluster: TestCluster, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine", hostname="other")
    try:
        machine.start()
        assert machine.run("hostname") == "other\n"
        assert machine.pod_network != node_cluster.node.machine.pod_network
        assert "pods" not in machine.run("ip", "-brief", "link")
    finally:
        machine.close()


START_AND_WAIT = """
import signal, sys
from pathlib import Path
from tests.cluster.machine import Machine

machine = Machine(Path(sys.argv[1]), hostname="node-1")
machine.start()
join = f"for group in /sys/fs/cgroup/*/{machine.cgroup}; do echo $$ > $group/cgroup.procs; done 2>/dev/null;"
sleeper = machine.process("sleeper", ["sh", "-c", join + "setsid sleep 3600 & exec sleep 3600"])
sleeper.start()
print(machine.init.pid, sleeper.pid, machine.cgroup, machine.pod_network, flush=True)
signal.pause()
"""


def test_a_machine_ends_with_whoever_started_it(host_before: dict[str, Any], tmp_path: Path) -> None:
    starting = subprocess.Popen(
        [sys.executable, "-c", START_AND_WAIT, tmp_path / "machine"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert starting.stdout is not None
    init, sleeper, cgroup, network = starting.stdout.readline().split()
    pids = [int(init), *descendants(int(init)), int(sleeper)]

    def groups() -> list[Path]:
        return list(Path("/sys/fs/cgroup").glob(f"**/{cgroup}"))

    def has_route() -> bool:
        return network in subprocess.run(["ip", "route"], check=True, capture_output=True, text=True).stdout

    assert all(map(is_alive, pids))
    assert groups()
    assert has_route()

    os.kill(starting.pid, signal.SIGKILL)
    starting.communicate()

    await_gone(pids, seconds=30)
    wait_for(lambda: not has_route(), what="the link to go")
    remove_stale_cgroups()
    assert groups() == []

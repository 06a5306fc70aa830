"""What the operator costs for many runs at once, beside what the training operator costs for the same jobs.

    .venv/bin/python benchmarks/operator_scale.py [--runs 300] [--steady 100]

On one control plane with fake nodes, one after the other: so many PyTorchJobs of two pods each given to the training
operator alone, with its defaults and with 4 threads and 100 requests a second, and as many TrainingRuns, whose jobs the
tuned training operator makes pods of. Then `steady` runs at 20 a second, a restart of the operator with all of them
alive, and a minute of watching. CPU is user and system time of the process; writes are counted in the audit log.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cluster.cluster import TestCluster  # noqa: E402 - the tests' packages lie beside this folder
from tests.cluster.kwok import NODE_SELECTOR, TOLERATION  # noqa: E402
from tests.cluster.training_operator import TUNED, TrainingOperatorOptions  # noqa: E402
from tests.support.builders import build_spec  # noqa: E402
from tests.support.operator_process import NAMESPACE, OperatorProcess, add_claim  # noqa: E402

PODS = 2
PODS_PER_NODE = 100
WAIT_SECONDS = 900.0
AGENT = "posttrain-operator"


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--steady", type=int, default=100, help="runs that come at 20 a second")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ptb") as folder:
        defaults = measure_jobs(Path(folder) / "defaults", options.runs, TrainingOperatorOptions())
        with cluster_for(Path(folder) / "tuned", options.runs + options.steady, TUNED) as cluster:
            tuned = time_jobs(cluster, options.runs)
            ours = time_runs(cluster, Path(folder), options.runs, options.steady)
    print(
        f"operator_scale: {options.runs} runs: every child after {ours['children']:.1f} s "
        f"({ours['children'] / defaults['pods']:.2f}x of the training operator's pods with its defaults, "
        f"{ours['children'] / tuned['pods']:.2f}x tuned), every pod after {ours['pods']:.1f} s "
        f"(it alone: {defaults['pods']:.1f} s, tuned {tuned['pods']:.1f} s); CPU a run {ours['cpu'] * 1000:.1f} ms "
        f"({ours['cpu'] / defaults['cpu']:.2f}x of its {defaults['cpu'] * 1000:.1f} ms a job, "
        f"{ours['cpu'] / tuned['cpu']:.2f}x of its {tuned['cpu'] * 1000:.1f} ms tuned); "
        f"{ours['writes']:.1f} writes a run; create to child at 20/s p99 {ours['p99']:.2f} s; "
        f"status writes per live run and minute {ours['status_rate']:.2f}; restart with all alive: "
        f"{ours['restart_writes']:.0f} writes; RSS {ours['rss_empty']:.0f} MiB empty, {ours['rss']:.0f} MiB then"
    )


class cluster_for:
    """A control plane with room for that many jobs."""

    def __init__(self, folder: Path, jobs: int, options: TrainingOperatorOptions) -> None:
        self._folder, self._nodes, self._options = folder, -(-jobs * PODS // PODS_PER_NODE), options

    def __enter__(self) -> TestCluster:
        self._cluster = TestCluster.start(self._folder, training_operator=self._options)
        self._cluster.add_fake_nodes(self._nodes, cpu=1000)
        return self._cluster

    def __exit__(self, *_: object) -> None:
        self._cluster.close()


def measure_jobs(folder: Path, count: int, options: TrainingOperatorOptions) -> dict[str, float]:
    """Return the figures of the training operator alone, in a cluster of its own."""
    with cluster_for(folder, count, options) as cluster:
        return time_jobs(cluster, count)


def time_jobs(cluster: TestCluster, count: int) -> dict[str, float]:
    """Create so many PyTorchJobs at once; return seconds until every pod exists, and CPU seconds a job."""
    cluster.create_namespace("jobs")
    pid = cluster.training_operator.pid
    before = cpu_seconds(pid)
    started = time.monotonic()
    create_all(cluster, "jobs", [build_job(f"j{i}") for i in range(count)])
    pods = await_count(cluster, "jobs", "pods", PODS * count) - started
    cpu = settled_cpu(pid) - before
    cluster.kubectl("delete", "namespace", "jobs")
    return {"pods": pods, "cpu": cpu / count}


def time_runs(cluster: TestCluster, folder: Path, count: int, steady: int) -> dict[str, float]:
    """Create so many TrainingRuns at once, then some at 20 a second; return the operator's figures."""
    cluster.apply((ROOT / "crds" / "posttrain.dev_trainingruns.yaml").read_text())
    cluster.create_namespace(NAMESPACE)
    cluster.create_namespace("runs")
    for claim in ("inputs", "shared"):
        add_claim(cluster, "runs", claim)
    operator = OperatorProcess(cluster, folder / "operator", python=Path(sys.executable))
    try:
        operator.process.start()
        pid = operator.process.pid
        figures = {"rss_empty": rss_mib(pid)}
        before, started = cpu_seconds(pid), time.monotonic()
        create_all(cluster, "runs", [build_run(f"r{i}") for i in range(count)])
        figures["children"] = await_count(cluster, "runs", "pytorchjobs", count) - started
        figures["pods"] = await_count(cluster, "runs", "pods", PODS * count) - started
        figures["cpu"] = (settled_cpu(pid) - before) / count
        figures["writes"] = len(list(writes(cluster))) / count
        figures["rss"] = rss_mib(pid)
        figures["p99"] = time_steady(cluster, steady)
        settled_cpu(pid)
        before_minute = len(list(writes(cluster, "trainingruns")))
        pause(60)
        figures["status_rate"] = (len(list(writes(cluster, "trainingruns"))) - before_minute) / (count + steady)
        before_restart = len(list(writes(cluster)))
        operator.process.restart()
        settled_cpu(operator.process.pid)
        figures["restart_writes"] = len(list(writes(cluster))) - before_restart
        return figures
    finally:
        operator.close()


def time_steady(cluster: TestCluster, count: int) -> float:
    """Create runs at 20 a second; return the 99th percentile of the seconds from a run's creation to its job's."""
    for i in range(count):
        create_all(cluster, "runs", [build_run(f"s{i}")])
        pause(0.05)
    await_count(cluster, "runs", "pytorchjobs", count, prefix="s")
    made = {item["metadata"]["name"]: created(item) for item in items(cluster, "runs", "pytorchjobs")}
    waits = [
        (made[f"{item['metadata']['name']}-a1"] - created(item)).total_seconds()
        for item in items(cluster, "runs", "trainingruns")
        if item["metadata"]["name"].startswith("s")
    ]
    # The API server stamps whole seconds: of a wait of two, one second may be the stamp's.
    return statistics.quantiles(waits, n=100)[98]


# --- What is created -------------------------------------------------------------------------------------------------


def build_job(name: str) -> dict[str, Any]:
    """Return a PyTorchJob as plain as it gets."""
    container = {"name": "pytorch", "image": "x", "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}}}
    pod = {"containers": [container], "nodeSelector": NODE_SELECTOR, "tolerations": [TOLERATION]}
    replica = {"replicas": 1, "restartPolicy": "Never", "template": {"spec": pod}}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"pytorchReplicaSpecs": {"Master": replica, "Worker": replica}},
    }


def build_run(name: str) -> dict[str, Any]:
    """Return a TrainingRun of two pods that needs no prepare."""
    spec = build_spec(
        resources={"numNodes": PODS, "gpusPerNode": 0, "cpu": "100m", "memory": "64Mi"},
        prepare={"enabled": False},
        checkpoints={"storage": {"claimName": "shared"}, "everySteps": 5},
    )
    return {
        "apiVersion": "posttrain.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name},
        "spec": spec,
    }


def create_all(cluster: TestCluster, namespace: str, objects: list[dict[str, Any]]) -> None:
    """Create the objects through the API, eight at a time."""
    import http.client
    import ssl
    import urllib.parse

    import yaml

    kubeconfig = yaml.safe_load(cluster.kubeconfig.read_text())
    token = kubeconfig["users"][0]["user"]["token"]
    address = urllib.parse.urlsplit(cluster.url)
    context = ssl._create_unverified_context()  # this machine's own server
    local = threading.local()

    def create(manifest: dict[str, Any]) -> None:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPSConnection(address.netloc, context=context, timeout=60)
        plural = manifest["kind"].lower() + "s"
        path = f"/apis/{manifest['apiVersion']}/namespaces/{namespace}/{plural}"
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        local.connection.request("POST", path, json.dumps(manifest), headers)
        answer = local.connection.getresponse()
        body = answer.read()
        if answer.status != 201:
            raise SystemExit(f"{path}: {answer.status} {body[:500]!r}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, objects))


# --- What is measured ------------------------------------------------------------------------------------------------


def items(cluster: TestCluster, namespace: str, plural: str) -> list[dict[str, Any]]:
    """Return the objects of a kind."""
    found: list[dict[str, Any]] = cluster.get(plural, "--namespace", namespace)["items"]
    return found


def await_count(cluster: TestCluster, namespace: str, plural: str, count: int, *, prefix: str = "") -> float:
    """Wait until so many exist; return the moment."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        listed = cluster.kubectl("get", plural, "--namespace", namespace, "--output", "name", "--ignore-not-found")
        now = time.monotonic()
        found = [name for name in listed.split() if name.partition("/")[2].startswith(prefix)]
        if len(found) >= count:
            return now
        if now > deadline:
            raise SystemExit(f"only {len(found)} of {count} {plural} after {WAIT_SECONDS:.0f} s")
        pause(0.2)


def writes(cluster: TestCluster, resource: str = "") -> Iterator[dict[str, Any]]:
    """Yield the operator's mutating requests so far, but for those of its lease."""
    for event in cluster.audit():
        if not event.get("userAgent", "").startswith(AGENT) or event["verb"] in ("get", "list", "watch"):
            continue
        about = (event.get("objectRef") or {}).get("resource")
        if about != "leases" and resource in ("", about):
            yield event


def settled_cpu(pid: int) -> float:
    """Return the CPU seconds of a process once it rests."""
    last = cpu_seconds(pid)
    while True:
        pause(3)
        now = cpu_seconds(pid)
        if now - last < 0.15:
            return now
        last = now


def cpu_seconds(pid: int) -> float:
    """Return user and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def created(manifest: dict[str, Any]) -> datetime:
    """Return when an object was made."""
    return datetime.fromisoformat(manifest["metadata"]["creationTimestamp"])


pause: Callable[[float], None] = time.sleep


if __name__ == "__main__":
    main()

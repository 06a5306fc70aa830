"""What the operator costs for many runs at once, beside what the training operator costs for the same jobs.

    .venv/bin/python benchmarks/operator_scale.py [--runs 300] [--steady 100] [--python INTERPRETER]

On a control plane with fake nodes, one after the other: so many PyTorchJobs of two pods each given to the training
operator alone, with its defaults and with 4 threads and 100 requests a second; as many TrainingRuns given to
posttrain's alone, whose jobs nobody makes pods of; and as many beside the tuned training operator, which does. Then,
beside that one, `steady` runs at 20 a second, two minutes in which every pod reports, and a restart of the operator
with all of them alive. CPU is user and system time of the process; writes are counted in the audit log. An interpreter
that was built with its optimizations, as that of the image, takes a fifth less CPU than one without.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from load import (
    PODS,
    RUNS,
    Client,
    ReportingPods,
    await_count,
    build_run,
    cpu_seconds,
    create_all,
    items,
    pause,
    rss_mib,
    settled_cpu,
    start_operator,
    writes,
)

from tests.cluster.cluster import TestCluster
from tests.cluster.kwok import NODE_SELECTOR, TOLERATION
from tests.cluster.training_operator import TUNED, TrainingOperatorOptions

PODS_PER_NODE = 100
JOBS = "jobs"


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--steady", type=int, default=100, help="runs that come at 20 a second")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="what the operator runs in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ptb") as folder:
        with cluster_for(Path(folder) / "defaults", options.runs, TrainingOperatorOptions()) as cluster:
            defaults = time_jobs(cluster, options.runs)
            alone = time_children(cluster, Path(folder), options)
        with cluster_for(Path(folder) / "tuned", options.runs + options.steady, TUNED) as cluster:
            tuned = time_jobs(cluster, options.runs)
            ours = time_runs(cluster, Path(folder), options)
    print(
        f"operator_scale: {options.runs} runs (load {os.getloadavg()[1]:.0f}): every child after "
        f"{alone:.1f} s alone ({alone / defaults['pods']:.2f}x of the {defaults['pods']:.1f} s that the training "
        f"operator takes for its pods with its defaults, {alone / tuned['pods']:.2f}x of its {tuned['pods']:.1f} s "
        f"tuned), after {ours['children']:.1f} s beside the tuned one, every pod then after {ours['pods']:.1f} s; "
        f"CPU a run {ours['cpu'] * 1000:.1f} ms "
        f"({ours['cpu'] / defaults['cpu']:.2f}x of its {defaults['cpu'] * 1000:.1f} ms a job, "
        f"{ours['cpu'] / tuned['cpu']:.2f}x of its {tuned['cpu'] * 1000:.1f} ms tuned, "
        f"{ours['cpu'] / ours['training_operator']:.2f}x of the {ours['training_operator'] * 1000:.1f} ms that it took "
        f"beside ours); {ours['writes']:.1f} writes a run; create to child at 20/s p99 {ours['p99']:.2f} s; "
        f"status writes per reporting run and minute {ours['status_rate']:.2f}; restart with all alive: "
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


def time_jobs(cluster: TestCluster, count: int) -> dict[str, float]:
    """Create so many PyTorchJobs at once; return seconds until every pod exists, and CPU seconds a job."""
    cluster.create_namespace(JOBS)
    pid = cluster.training_operator.pid
    before = cpu_seconds(pid)
    started = time.monotonic()
    client = Client.of(cluster)
    create_all(client, JOBS, [build_job(f"j{i}") for i in range(count)])
    pods = await_count(client, JOBS, "pods", PODS * count) - started
    await_running(cluster, JOBS, count)
    cpu = settled_cpu(pid) - before
    cluster.kubectl("delete", "namespace", JOBS)
    return {"pods": pods, "cpu": cpu / count}


def time_children(cluster: TestCluster, folder: Path, options: argparse.Namespace) -> float:
    """Create so many TrainingRuns at once where nobody acts on their jobs; return seconds until all children exist."""
    cluster.training_operator.stop()
    cluster.kubectl("delete", "validatingwebhookconfigurations", "--all")  # its own are asked about each job
    operator = start_operator(cluster, folder / "first-operator", python=options.python)
    try:
        settled_cpu(operator.process.pid)
        started = time.monotonic()
        return create_runs(Client.of(cluster), options.runs) - started
    finally:
        operator.close()


def create_runs(client: Client, count: int) -> float:
    """Create so many TrainingRuns at once; return the moment when the last child of ours exists."""
    create_all(client, RUNS, [build_run(f"r{i}") for i in range(count)])
    return await_count(client, RUNS, "pytorchjobs", count)


def time_runs(cluster: TestCluster, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Create so many TrainingRuns at once, then some at 20 a second; return the operator's figures."""
    count, client = options.runs, Client.of(cluster)
    operator = start_operator(cluster, folder / "operator", python=options.python)
    try:
        pid, other = operator.process.pid, cluster.training_operator.pid
        figures = {"rss_empty": rss_mib(pid)}
        before, other_before, started = settled_cpu(pid), settled_cpu(other), time.monotonic()
        figures["children"] = create_runs(client, count) - started
        figures["pods"] = await_count(client, RUNS, "pods", PODS * count) - started
        await_running(cluster, RUNS, count)
        figures["cpu"] = (settled_cpu(pid) - before) / count
        figures["training_operator"] = (settled_cpu(other) - other_before) / count
        figures["writes"] = len(list(writes(cluster))) / count
        figures["rss"] = rss_mib(pid)
        figures["p99"] = time_steady(cluster, client, options.steady, others=count)
        await_running(cluster, RUNS, count + options.steady)
        settled_cpu(pid)
        pods = ReportingPods(cluster, operator)
        await_training(cluster, pods, count + options.steady)
        before_minute = len(list(writes(cluster, "trainingruns")))
        pods.report(seconds=60)
        written = len(list(writes(cluster, "trainingruns"))) - before_minute
        figures["status_rate"] = written / (count + options.steady)
        settled_cpu(pid)
        operator.process.stop()
        before_restart = len(list(writes(cluster)))
        operator.process.start()
        settled_cpu(operator.process.pid)
        figures["restart_writes"] = len(list(writes(cluster))) - before_restart
        return figures
    finally:
        operator.close()


def time_steady(cluster: TestCluster, client: Client, count: int, *, others: int) -> float:
    """Create runs at 20 a second; return the 99th percentile of the seconds from a run's creation to its job's."""
    for i in range(count):
        create_all(client, RUNS, [build_run(f"s{i}")])
        pause(0.05)
    await_count(client, RUNS, "pytorchjobs", others + count)
    made = {item["metadata"]["name"]: created(item) for item in items(cluster, "pytorchjobs")}
    waits = [
        (made[f"{item['metadata']['name']}-a1"] - created(item)).total_seconds()
        for item in items(cluster, "trainingruns")
        if item["metadata"]["name"].startswith("s")
    ]
    # The API server stamps whole seconds: of a wait of two, one second may be the stamp's.
    return statistics.quantiles(waits, n=100)[98]


def await_running(cluster: TestCluster, namespace: str, count: int) -> None:
    """Wait until every job says that it runs: only then has the training operator done its part."""
    expression = 'jsonpath={range .items[*]}{.status.conditions[?(@.type=="Running")].status}{"\\n"}{end}'
    while True:
        listed = cluster.kubectl("get", "pytorchjobs", "--namespace", namespace, "--output", expression)
        if listed.split().count("True") >= count:
            return
        pause(3)


def await_training(cluster: TestCluster, pods: ReportingPods, count: int) -> None:
    """Let the pods report until every run is seen to train: how it got there is not what a minute of training costs."""
    expression = 'jsonpath={range .items[*]}{.status.stage}{"\\n"}{end}'
    while True:
        pods.report(seconds=60)
        stages = cluster.kubectl("get", "trainingruns", "--namespace", RUNS, "--output", expression).split()
        if stages.count("Training") >= count:
            return


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


def created(manifest: dict[str, Any]) -> datetime:
    """Return when an object was made."""
    return datetime.fromisoformat(manifest["metadata"]["creationTimestamp"])


if __name__ == "__main__":
    main()

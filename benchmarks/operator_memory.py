"""What the operator's memory holds: nothing, live runs, and beside them many more that have finished.

    .venv/bin/python benchmarks/operator_memory.py [--live 1000] [--finished 5000] [--python INTERPRETER]

On one control plane with fake nodes. Live runs have their jobs and two pods each, made by both operators. The finished
ones are written as such: they have a service account and a network policy each, no job, and the status that a run ends
with, its curve among it. In the end the operator is started anew with all of them there, and its writes are counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from load import (
    PODS,
    RUNS,
    Client,
    await_count,
    build_run,
    create_all,
    items,
    rss_mib,
    settled_cpu,
    start_operator,
    writes,
)

from tests.cluster.cluster import TestCluster
from tests.cluster.training_operator import TUNED

PODS_PER_NODE = 100
POINTS = 100
GOAL_EMPTY_MB, GOAL_PER_THOUSAND_MB = 100.0, 15.0
_MB_PER_MIB = 1.048576


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=int, default=1000)
    parser.add_argument("--finished", type=int, default=5000)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="what the operator runs in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ptb") as folder:
        cluster = TestCluster.start(Path(folder) / "cluster", training_operator=TUNED)
        try:
            cluster.add_fake_nodes(-(-options.live * PODS // PODS_PER_NODE), cpu=1000)
            found = measure(cluster, Path(folder) / "operator", options)
        finally:
            cluster.close()
    allowed = GOAL_EMPTY_MB + GOAL_PER_THOUSAND_MB * options.live / 1000
    print(
        f"operator_memory: RSS {found['empty']:.0f} MB empty, {found['live']:.0f} MB with {options.live} live runs "
        f"({(found['live'] - found['empty']) / options.live * 1000:.1f} MB per 1,000; allowed {allowed:.0f} MB, "
        f"{found['live'] / allowed:.2f}x), {found['finished']:.0f} MB with {options.finished} finished too "
        f"({(found['finished'] - found['live']) / options.finished * 1000:.1f} MB per 1,000); started anew with all of "
        f"them: {found['again']:.0f} MB, {found['writes']:.0f} writes"
    )


def measure(cluster: TestCluster, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the resident MB of the operator at each point."""
    client = Client.of(cluster)
    operator = start_operator(cluster, folder, python=options.python)
    try:
        found = {"empty": rest(operator.process.pid)}
        create_all(client, RUNS, [build_run(f"live{i}") for i in range(options.live)])
        await_count(client, RUNS, "pods", PODS * options.live)
        found["live"] = rest(operator.process.pid)
        status = finished_status(items(cluster, "trainingruns")[0])
        create_finished(client, status, count=options.finished)
        found["finished"] = rest(operator.process.pid)
        operator.process.stop()
        before = len(list(writes(cluster)))
        operator.process.start()
        found["again"] = rest(operator.process.pid)
        found["writes"] = len(list(writes(cluster))) - before
        return found
    finally:
        operator.close()


def rest(pid: int) -> float:
    """Return the resident memory in MB once the process rests."""
    settled_cpu(pid)
    return rss_mib(pid) * _MB_PER_MIB


def finished_status(live: dict[str, Any]) -> dict[str, Any]:
    """Return the status of a live run as it would be at its end."""
    status = live["status"]
    ended = status["conditions"][0]["lastTransitionTime"]
    settled = {"status": "True", "reason": "Completed", "message": "The run is complete."}
    conditions = [
        {**condition, **(settled if condition["type"] in ("Succeeded", "Finished", "Ready") else {})}
        for condition in status["conditions"]
    ]
    progress = {
        "attempt": 1,
        "step": POINTS,
        "maxSteps": POINTS,
        "lastBeatTime": ended,
        "history": [{"step": step, "loss": f"{2 / (step + 1):.4f}"} for step in range(POINTS)],
        "acknowledged": [{"attempt": 1, "source": "rank-0", "seq": POINTS}],
    }
    return {**status, "stage": "Succeeded", "completionTime": ended, "conditions": conditions, "progress": progress}


def create_finished(client: Client, status: dict[str, Any], *, count: int) -> None:
    """Create so many runs, each suspended until its status says that it has ended: no job is ever made of it."""
    path = f"/apis/posttrain.dev/v1alpha1/namespaces/{RUNS}/trainingruns"

    def create(number: int) -> None:
        run = build_run(f"done{number}")
        run["spec"]["suspend"] = True
        client.request("POST", path, run)
        url = f"{path}/done{number}/status"
        client.request("PATCH", url, {"status": status}, content_type="application/merge-patch+json")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(count)))


if __name__ == "__main__":
    main()

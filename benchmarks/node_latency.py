"""How long a TrainingRun takes to its first step, and back to one after a lost pod, beside the same job without us.

    .venv/bin/python benchmarks/node_latency.py [--pairs 3]

On one real node, with the operator of the chart, in pairs: a PyTorchJob by hand (the job, the config and the command of
a run's own first attempt, under another name and nobody's), and a TrainingRun; both train a tiny model in two pods.
Every rank 0 writes down when its steps end. When the run has a checkpoint, its worker's process is killed. What the run
takes longer than the job is ours; of a restart, what it takes longer than the job from nothing. Run as root.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.local.environments import cache_root, ensure_environment

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cluster.cluster import TestCluster  # noqa: E402 - the tests' packages lie beside this folder
from tests.cluster.components import KUBERNETES, program  # noqa: E402
from tests.cluster.processes import poll  # noqa: E402
from tests.support.cluster_runs import ClusterRun, tiny  # noqa: E402
from tests.support.processes import main_process  # noqa: E402
from tests.support.release import Release, add_storage, start_node  # noqa: E402
from tests.workloads.conftest import ensure_quickstart_inputs, ensure_tiny_model  # noqa: E402

NAMESPACE = "latency"
WAIT_SECONDS = 300.0
PATTERN = "pattern"
"""Name of the run that the jobs are made after."""
CODE = """\\
import json
import os
import time
from pathlib import Path

from transformers import TrainerCallback


class Stamp(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            attempt = json.loads(Path(os.environ["POSTTRAIN_CONFIG"]).read_text())["attempt"]
            with Path(os.environ["POSTTRAIN_STORAGE"], "steps.jsonl").open("a") as steps:
                steps.write(json.dumps([attempt, state.global_step, time.time()]) + "\\n")
        time.sleep(1)
"""
"""A run whose steps take a second, and say when they ended."""
PARTS = ("accepted", "prepared", "pods ready", "started", "first step")
"""What a run passes on its way to its first step."""
RESTART_PARTS = ("noticed", "pods gone", "pods ready", "started", "first step")


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ptl") as folder, start_node(Path(folder) / "cluster") as cluster:
        Release.install(cluster)
        cluster.create_namespace(NAMESPACE)
        add_inputs(cluster)
        pattern = take_pattern(cluster)
        jobs, starts, restarts = [], [], []
        for number in range(options.pairs):
            jobs.append(time_job(cluster, pattern, f"job{number}"))
            with watched(cluster, f"run{number}") as run:
                starts.append(time_start(run))
                restarts.append(time_restart(run))
            print(f"{number}: job {jobs[-1]:.1f} s, run {starts[-1]}, restart {restarts[-1]}", file=sys.stderr)
    more = statistics.median(sum(run.values()) - job for run, job in zip(starts, jobs, strict=True))
    own = statistics.median(sum(again.values()) - job for again, job in zip(restarts, jobs, strict=True))
    print(
        f"node_latency: apply to first step {total(starts):.1f} s ({parts(starts, PARTS)}), the same PyTorchJob by "
        f"hand {statistics.median(jobs):.1f} s: {more:.1f} s more; a killed pod to the first new step "
        f"{total(restarts):.1f} s ({parts(restarts, RESTART_PARTS)}), our own share {own:.1f} s "
        f"(medians of {options.pairs} pairs)"
    )


def total(measured: Sequence[Mapping[str, float]]) -> float:
    """Return the median of the sums."""
    return statistics.median(sum(one.values()) for one in measured)


def parts(measured: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    """Return the median of each part."""
    return ", ".join(f"{name} {statistics.median(one[name] for one in measured):+.1f}" for name in names)


# --- What is measured ------------------------------------------------------------------------------------------------


def time_job(cluster: TestCluster, pattern: Sequence[Mapping[str, Any]], name: str) -> float:
    """Apply a job by hand; return the seconds to its first step."""
    text = json.dumps(pattern).replace(PATTERN, name)
    began = time.time()
    cluster.apply(json.loads(text), namespace=NAMESPACE)
    seconds = await_step(cluster, name) - began
    cluster.kubectl("delete", "pytorchjob", f"{name}-a1", "--namespace", NAMESPACE)
    await_no_pods(cluster)
    return seconds


def time_start(run: WatchedRun) -> dict[str, float]:
    """Apply a run; return the seconds that it spent on each part of the way to its first step."""
    began = time.time()
    run.apply(**build_fields())
    passed = [
        run.when(lambda s: condition(s, "Accepted") == "True"),
        run.when(lambda s: s.get("attempt") == 1),
        run.when(lambda s: s.get("attemptRunningTime")),
        run.when(lambda s: s.get("stage") == "Training"),
        await_step(run.cluster, run.name),
    ]
    return dict(zip(PARTS, differences(began, passed), strict=True))


def time_restart(run: WatchedRun) -> dict[str, float]:
    """Kill the worker's process once there is a checkpoint; return the seconds of each part of the way back."""
    run.when(lambda s: (s.get("checkpoints") or {}).get("latestStep"))
    (worker,) = [pod for pod in run.pods(attempt=1) if "worker" in pod["metadata"]["name"]]
    process = main_process(worker)
    began = time.time()
    os.kill(process, signal.SIGKILL)
    passed = [
        run.when(lambda s: s.get("attempt") == 2),
        run.when(lambda s: s.get("attempt") == 2 and s.get("attemptCreatedTime")),
        run.when(lambda s: s.get("attempt") == 2 and s.get("attemptRunningTime")),
        run.when(lambda s: s.get("attempt") == 2 and s.get("stage") == "Training"),
        await_step(run.cluster, run.name, attempt=2),
    ]
    return dict(zip(RESTART_PARTS, differences(began, passed), strict=True))


def differences(began: float, passed: Sequence[float]) -> Iterator[float]:
    """Yield how long each part took."""
    for before, after in zip((began, *passed), passed, strict=False):
        yield after - before


class WatchedRun(ClusterRun):
    """A run whose status is followed as it changes, with the time of each change."""

    def __init__(self, cluster: TestCluster, name: str, *, lines: Iterable[str]) -> None:
        super().__init__(cluster, NAMESPACE, name)
        self._seen: list[tuple[float, dict[str, Any]]] = []
        self._lines = lines
        self.follower = threading.Thread(target=self._follow, daemon=True)
        self.follower.start()

    def _follow(self) -> None:
        for line in self._lines:
            self._seen.append((time.time(), json.loads(line.strip() or "{}")))

    def when(self, reached: Callable[[dict[str, Any]], Any]) -> float:
        """Wait until the status is as it is asked for; return since when it is."""

        def look() -> float | None:
            return next((moment for moment, status in self._seen if reached(status)), None)

        return poll(look, what=f"news of {self.name}", seconds=WAIT_SECONDS) or 0.0


@contextmanager
def watched(cluster: TestCluster, name: str) -> Iterator[WatchedRun]:
    """Follow a run that is not made yet; at the end it is deleted, and its pods are gone."""
    command = ["get", "trainingruns", f"--field-selector=metadata.name={name}", "--watch", "--namespace", NAMESPACE]
    argv = [program(KUBERNETES, "kubectl"), f"--kubeconfig={cluster.kubeconfig}", *command]
    with subprocess.Popen([*argv, r"--output=jsonpath={.status}{'\n'}"], stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        run = WatchedRun(cluster, name, lines=watch.stdout)
        try:
            yield run
        finally:
            watch.terminate()
            run.follower.join()
    cluster.kubectl("delete", "trainingrun", name, "--namespace", NAMESPACE)
    await_no_pods(cluster)


def condition(status: Mapping[str, Any], type_: str) -> str | None:
    """Return what a condition says, or None before it is there."""
    return next((str(c["status"]) for c in status.get("conditions") or () if c["type"] == type_), None)


def await_step(cluster: TestCluster, name: str, *, attempt: int = 1) -> float:
    """Wait until an attempt has done a step; return when it ended."""
    file = storage(cluster) / name / "steps.jsonl"

    def look() -> float | None:
        steps = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return next((moment for of, _, moment in steps if of == attempt), None)

    return poll(look, what=f"a step of {name}", seconds=WAIT_SECONDS) or 0.0


def await_no_pods(cluster: TestCluster) -> None:
    """Wait until nothing competes with what comes next."""
    poll(lambda: not cluster.get("pods", "--namespace", NAMESPACE)["items"], what="no pods", seconds=WAIT_SECONDS)


# --- What is made ----------------------------------------------------------------------------------------------------


def add_inputs(cluster: TestCluster) -> None:
    """Make the claims and the code that all of them use."""
    real = ensure_quickstart_inputs()
    python = ensure_environment("trainer", cache=cache_root(), report=print)
    copies = {"model": ensure_tiny_model(python, real=real / "model"), "train.jsonl": real / "train.jsonl"}
    add_storage(cluster, NAMESPACE, "inputs", copies=copies)
    add_storage(cluster, NAMESPACE, "shared")
    code = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "stamp"}, "data": {"stamp.py": CODE}}
    cluster.apply([code], namespace=NAMESPACE)


def storage(cluster: TestCluster) -> Path:
    """Return the folder of the claim that results go to."""
    return cluster.folder / "volumes" / NAMESPACE / "shared"


def build_fields() -> dict[str, Any]:
    """Return the fields of a run of two pods that goes on until it is deleted."""
    fields = tiny(code={"configMapName": "stamp"}, callbacks=[{"function": "stamp:Stamp"}])
    fields["sft"]["args"]["max_steps"] = 600
    return fields


def take_pattern(cluster: TestCluster) -> list[dict[str, Any]]:
    """Train once, and return what the first attempt's pods are made of, as nobody's; it warms the caches, too."""
    with watched(cluster, PATTERN) as run:
        run.apply(**build_fields())
        await_step(cluster, PATTERN)
        kinds = {"configmap": ("a1", "code"), "pytorchjob": ("a1",)}
        found = [find(cluster, kind, f"{PATTERN}-{part}") for kind, parts in kinds.items() for part in parts]
        found.append(find(cluster, "serviceaccount", PATTERN))
    return [strip(item) for item in found]


def find(cluster: TestCluster, kind: str, name: str) -> dict[str, Any]:
    """Return an object."""
    found: dict[str, Any] = cluster.get(kind, name, "--namespace", NAMESPACE)
    return found


def strip(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object as a person would write it, with nothing by which the operator knows it."""
    kept = {name: value for name, value in item.items() if name not in ("status", "metadata", "secrets")}
    for replicas in kept.get("spec", {}).get("pytorchReplicaSpecs", {}).values():
        del replicas["template"]["metadata"]["labels"]
    return {**kept, "metadata": {"name": item["metadata"]["name"]}}


if __name__ == "__main__":
    main()

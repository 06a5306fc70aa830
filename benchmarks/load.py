"""What the benchmarks on a control plane share: many requests at once, pods that report, and what a process takes.

It owns how load is made and measured; it must not know what a benchmark claims.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import ssl
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from posttrain.contract.facts import Fact, FactsReport, Logged, Started  # noqa: E402 - beside the next two
from posttrain.plan.names import resource_path  # noqa: E402
from tests.cluster.cluster import TestCluster  # noqa: E402 - the tests' packages lie beside this folder
from tests.support.builders import build_spec  # noqa: E402
from tests.support.operator_process import NAMESPACE, OperatorProcess, add_claim  # noqa: E402

PODS = 2
RUNS = "runs"
"""The namespace of the runs."""
BEAT_SECONDS = 10.0
"""As workloads do."""
_AGENT = "posttrain-operator"
_WAIT_SECONDS = 1800.0
_THREADS = 8
_ADDRESSES = 32
"""That pods report from: with 1,000 runs each has about seventy tokens."""
_GROUPS = {"pods": "/api/v1", "pytorchjobs": "/apis/kubeflow.org/v1"}

pause: Callable[[float], None] = time.sleep


class Client:
    """Requests over connections that stay open, one a thread; each comes from the next of some addresses."""

    def __init__(self, url: str, *, token: str = "", addresses: Iterable[str] = ("",)) -> None:
        self._address = urllib.parse.urlsplit(url).netloc
        self._token = token
        self._context = ssl._create_unverified_context()  # this machine's own server
        self._addresses = itertools.cycle(addresses)
        self._local = threading.local()

    @classmethod
    def of(cls, cluster: TestCluster) -> Client:
        """Return one of the cluster's administrator."""
        kubeconfig = yaml.safe_load(cluster.kubeconfig.read_text())
        return cls(cluster.url, token=kubeconfig["users"][0]["user"]["token"])

    def request(
        self, method: str, path: str, body: Any = None, *, token: str = "", content_type: str = "application/json"
    ) -> Any:
        """Send a body, if there is one, as JSON and return the answer's."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = http.client.HTTPSConnection(
                self._address, context=self._context, timeout=60, source_address=(next(self._addresses), 0)
            )
            self._local.connection = connection
        headers = {"Authorization": f"Bearer {token or self._token}", "Content-Type": content_type}
        text = json.dumps(body) if body is not None and not isinstance(body, str) else body
        connection.request(method, path, text, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise SystemExit(f"{method} {path}: {answer.status} {content[:500]!r}")
        return json.loads(content)


def start_operator(cluster: TestCluster, folder: Path, *, python: Path) -> OperatorProcess:
    """Start the operator on a cluster that has never had one, with what runs need beside it."""
    cluster.apply((ROOT / "crds" / "posttrain.dev_trainingruns.yaml").read_text())
    cluster.create_namespace(NAMESPACE)
    cluster.create_namespace(RUNS)
    for claim in ("inputs", "shared"):
        add_claim(cluster, RUNS, claim)
    operator = OperatorProcess(cluster, folder, python=python)
    operator.process.start()
    return operator


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


def create_all(client: Client, namespace: str, objects: list[dict[str, Any]]) -> None:
    """Create the objects, eight at a time."""

    def create(manifest: dict[str, Any]) -> None:
        plural = manifest["kind"].lower() + "s"
        client.request("POST", f"/apis/{manifest['apiVersion']}/namespaces/{namespace}/{plural}", manifest)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(create, objects))


def await_count(client: Client, namespace: str, plural: str, count: int) -> float:
    """Wait until so many exist; return the moment. The API server counts: a list of them all would keep it busy."""
    deadline = time.monotonic() + _WAIT_SECONDS
    path = f"{_GROUPS[plural]}/namespaces/{namespace}/{plural}?limit=1"
    while True:
        listed = client.request("GET", path)
        now = time.monotonic()
        found = len(listed["items"]) + listed["metadata"].get("remainingItemCount", 0)
        if found >= count:
            return now
        if now > deadline:
            raise SystemExit(f"only {found} of {count} {plural} after {_WAIT_SECONDS:.0f} s")
        pause(0.2)


def items(cluster: TestCluster, plural: str) -> list[dict[str, Any]]:
    """Return the objects of a kind in the namespace of the runs."""
    found: list[dict[str, Any]] = cluster.get(plural, "--namespace", RUNS)["items"]
    return found


# --- Pods that report ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Pod:
    path: str
    token: str
    source: str
    leads: bool


class ReportingPods:
    """The pods of every run, which report as workloads do: a beat each ten seconds, and the first one the step.

    The operator takes so many new tokens from one address, so they speak from several, as pods do.
    """

    def __init__(self, cluster: TestCluster, operator: OperatorProcess) -> None:
        self._server = Client(operator.url, addresses=[f"127.0.1.{i}" for i in range(_ADDRESSES)])
        api = Client.of(cluster)
        with ThreadPoolExecutor(_THREADS) as pool:
            self._pods = list(pool.map(lambda pod: _with_token(api, pod), items(cluster, "pods")))
        self._rounds = 0

    def report(self, *, seconds: float) -> None:
        """Report for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began, self._rounds = time.monotonic(), self._rounds + 1
            with ThreadPoolExecutor(_ADDRESSES) as pool:  # the operator closes connections that are idle for a beat
                list(pool.map(self._post, self._pods))
            pause(max(min(began + BEAT_SECONDS, until) - time.monotonic(), 0))

    def _post(self, pod: _Pod) -> None:
        step = self._rounds - 1
        body = Logged(step=step, metrics={"loss": "1.5"}) if step else _STARTED
        fact = Fact(attempt=1, source=pod.source, seq=self._rounds, time=datetime.now(UTC), body=body)
        facts = (fact,) if pod.leads else ()
        report = FactsReport(attempt=1, source=pod.source, phase="training", step=step, facts=facts)
        self._server.request("POST", f"/{pod.path}/facts", report.model_dump_json(), token=pod.token)


_STARTED = Started(world_size=PODS, max_steps=100_000, resumed_from_step=0)


def _with_token(api: Client, pod: dict[str, Any]) -> _Pod:
    metadata = pod["metadata"]
    path = resource_path(namespace=RUNS, run=metadata["labels"]["posttrain.dev/run"])
    bound = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
    answer = api.request(
        "POST",
        f"/api/v1/namespaces/{RUNS}/serviceaccounts/{pod['spec']['serviceAccountName']}/token",
        {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": [path], "boundObjectRef": bound, "expirationSeconds": 3600},
        },
    )
    leads = "-master-" in metadata["name"]
    return _Pod(path=path, token=answer["status"]["token"], source="rank-0" if leads else "rank-1", leads=leads)


# --- What is measured ------------------------------------------------------------------------------------------------


def writes(cluster: TestCluster, resource: str = "") -> Iterator[dict[str, Any]]:
    """Yield the operator's mutating requests so far, but for those of its lease and of who asks whom it talks to."""
    for event in cluster.audit():
        if not event.get("userAgent", "").startswith(_AGENT) or event["verb"] in ("get", "list", "watch"):
            continue
        about = (event.get("objectRef") or {}).get("resource")
        if about not in ("leases", "tokenreviews") and resource in ("", about):
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

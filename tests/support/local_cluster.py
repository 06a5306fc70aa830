"""A LocalCluster on a temporary folder, and manifests as small as a plan's are large."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain.local.cluster import LocalCluster
from posttrain.local.pod_process import Site
from posttrain.local.state import RunFolder
from posttrain.local.store import RunStore, accept_run
from posttrain.plan.types import Manifest, ObjectRef, Observed
from tests.support.builders import build_run
from tests.support.processes import wait_for

PLANNED_SERVER = "https://posttrain-progress.posttrain-system.svc:8443"
LOCAL_SERVER = "http://127.0.0.1:1"
IMAGES = (
    "",
    *(f"ghcr.io/posttrain/{name}" for name in ("sandbox", "trainer", "vllm")),
    "registry.example.com/trainer",
)
"""Of the golden plans, and of the pods here, which have none."""
PYTORCHJOB = ObjectRef("kubeflow.org/v1", "PyTorchJob", "demo-a1")
JOB = ObjectRef("batch/v1", "Job", "demo-prepare")


def now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


class FakeTokens:
    """Remembers which tokens are valid."""

    def __init__(self) -> None:
        self.issued: list[int] = []
        self.valid: set[str] = set()

    def issue(self, *, attempt: int) -> str:
        """Return a new token."""
        self.issued.append(attempt)
        token = f"token-{len(self.issued)}"
        self.valid.add(token)
        return token

    def revoke(self, token: str) -> None:
        """Forget it."""
        self.valid.discard(token)


def build_site(folder: Path, **changes: Any) -> Site:
    """Return a machine without GPUs whose environment is this test's own."""
    values: dict[str, Any] = {
        "interpreters": dict.fromkeys(IMAGES, Path(sys.executable)),
        "packages": folder / "packages",
        "machine": {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "SECRET": "of this shell"},
        "planned_server": PLANNED_SERVER,
        "server": LOCAL_SERVER,
        "node_name": "laptop",
        "gpu_resource": "nvidia.com/gpu",
        "gpus": (),
    }
    return Site(**{**values, **changes})


def env(pids: Path, **more: str) -> list[dict[str, str]]:
    """Return variables of a container whose program tells its process id."""
    return [{"name": name, "value": value} for name, value in {"PIDS": str(pids), **more}.items()]


def open_cluster(
    folder: Path,
    *,
    tokens: FakeTokens | None = None,
    clock: Callable[[], datetime] = now,
    claims: dict[str, Path] | None = None,
    **site: Any,
) -> LocalCluster:
    """Return a cluster for the run `demo` in that folder; `site` changes fields of its machine."""
    run_folder = RunFolder(folder)
    run_folder.path.mkdir(parents=True, exist_ok=True)
    return LocalCluster(
        run_folder,
        store=RunStore(run_folder, accept_run(build_run(), stored=run_folder.read_run(), now=now())),
        site=build_site(folder, **site),
        claims=claims or {},
        config_maps={},
        runs={},
        tokens=tokens or FakeTokens(),
        notify=lambda: None,
        clock=clock,
    )


def build_pod_template(program: str, *, grace_seconds: int = 30, **container: Any) -> dict[str, Any]:
    """Return a pod template that runs a Python program."""
    return {
        "metadata": {"labels": {"posttrain.dev/run": "demo", "posttrain.dev/attempt": "1"}},
        "spec": {
            "terminationGracePeriodSeconds": grace_seconds,
            "containers": [{"name": "pytorch", "command": ["python", "-c", program], **container}],
        },
    }


def build_job(program: str, *, workers: int = 0, **template: Any) -> Manifest:
    """Return a PyTorchJob whose pods all run a Python program."""
    pod = build_pod_template(program, **template)
    specs = {"Master": {"replicas": 1, "restartPolicy": "Never", "template": pod}}
    if workers:
        specs["Worker"] = {"replicas": workers, "restartPolicy": "Never", "template": pod}
    return {
        "apiVersion": PYTORCHJOB.api_version,
        "kind": PYTORCHJOB.kind,
        "metadata": {"name": PYTORCHJOB.name, "namespace": "team"},
        "spec": {
            "nprocPerNode": "2",
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": specs,
        },
    }


def build_batch_job(program: str, *, backoff_limit: int = 2) -> Manifest:
    """Return a Job as prepare's is: exit code 2 fails it at once, a disruption costs no try."""
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "pytorch", "operator": "In", "values": [2]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "apiVersion": JOB.api_version,
        "kind": JOB.kind,
        "metadata": {"name": JOB.name, "namespace": "team"},
        "spec": {
            "backoffLimit": backoff_limit,
            "podFailurePolicy": {"rules": rules},
            "template": build_pod_template(program),
        },
    }


def await_observed(cluster: LocalCluster, look: Callable[[Observed], bool], *, what: str) -> Observed:
    """Observe until what is observed satisfies `look`."""

    def observe() -> Observed | None:
        observed = cluster.observe()
        return observed if look(observed) else None

    found = wait_for(observe, what=what)
    assert found is not None
    return found


def has_condition(observed: Observed, ref: ObjectRef, type_: str) -> bool:
    """Return whether an object's condition is True."""
    status = observed.objects[ref].get("status", {}) if ref in observed.objects else {}
    return any(c["type"] == type_ and c["status"] == "True" for c in status.get("conditions", ()))


def phases(observed: Observed) -> dict[str, str]:
    """Return the phase of each pod."""
    return {pod["metadata"]["name"]: pod["status"]["phase"] for pod in observed.pods}


def terminated(observed: Observed, pod: str) -> dict[str, Any]:
    """Return how the container of a pod ended."""
    found = next(p for p in observed.pods if p["metadata"]["name"] == pod)
    state: dict[str, Any] = found["status"]["containerStatuses"][0]["state"]["terminated"]
    return state


SERVER = """
import http.server, os, pathlib, sys
pathlib.Path(os.environ['PIDS'], str(os.getpid())).touch()
host, port = os.environ['POSTTRAIN_LISTEN'].split(':')

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == '/end':
            print('told to end', flush=True)
            os._exit(3)
        self.send_response(503 if pathlib.Path(os.environ['PIDS'], 'busy').exists() else 200)
        self.end_headers()
        self.wfile.write(os.environ['POSTTRAIN_POD_NAME'].encode())

http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""
"""A program that serves: its pod's name on any path, 503 while a file `busy` lies beside its id, its end on /end."""


def build_service(
    name: str, program: str = SERVER, *, kind: str = "Deployment", replicas: int = 1, **container: Any
) -> list[Manifest]:
    """Return a Service and what stands behind it: a Deployment, or a StatefulSet with a headless Service."""
    labels = {"posttrain.dev/run": "demo", "posttrain.dev/role": name}
    template = build_pod_template(program, **container)
    (own,) = template["spec"]["containers"]
    own["readinessProbe"] = {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 0.02}
    own["env"] = [
        *own.get("env", ()),
        {"name": "POSTTRAIN_LISTEN", "value": "0.0.0.0:8000"},
        {"name": "POSTTRAIN_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]
    template["metadata"] = {"labels": labels}
    stateful = kind == "StatefulSet"
    metadata = {"name": name, "namespace": "team"}
    spec = {"selector": labels, "ports": [{"port": 8000}], **({"clusterIP": "None"} if stateful else {})}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec},
        {
            "apiVersion": "apps/v1",
            "kind": kind,
            "metadata": metadata,
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": labels},
                "template": template,
                **({"serviceName": name, "podManagementPolicy": "Parallel"} if stateful else {}),
            },
        },
    ]

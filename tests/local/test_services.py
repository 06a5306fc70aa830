"""LocalCluster runs services as Kubernetes runs Deployments and StatefulSets, with real processes."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import subprocess
import sys
import urllib.request
from contextlib import closing, suppress
from datetime import timedelta
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any

from posttrain.local.cluster import LocalCluster
from posttrain.local.shim import ORPHAN_GRACE_SECONDS
from posttrain.plan.types import Manifest, ObjectRef, Observed
from tests.support.local_cluster import (
    PYTORCHJOB,
    await_observed,
    build_job,
    build_service,
    env,
    has_condition,
    now,
    open_cluster,
    phases,
)
from tests.support.processes import await_gone, await_pids, read_pids, wait_for

SANDBOX = ObjectRef("apps/v1", "Deployment", "demo-sandbox")
SERVERS = ObjectRef("apps/v1", "StatefulSet", "demo-server")


def apply(cluster: LocalCluster, manifests: list[Manifest]) -> None:
    for manifest in manifests:
        cluster.apply(manifest)


def ready_replicas(observed: Observed, ref: ObjectRef) -> int:
    return int(observed.objects[ref].get("status", {}).get("readyReplicas", 0))


def container_status(observed: Observed, pod: str) -> dict[str, Any]:
    found = next(p for p in observed.pods if p["metadata"]["name"] == pod)
    (container,) = found["status"]["containerStatuses"]
    return dict(container)


def test_a_deployment_is_ready_when_its_pod_answers_and_no_more_when_it_does_not(
    cluster: LocalCluster, pids: Path
) -> None:
    (pids / "busy").touch()
    apply(cluster, build_service("demo-sandbox", env=env(pids)))
    cluster.observe()
    await_pids(pids, count=1)
    started = cluster.observe()
    assert phases(started) == {"demo-sandbox-0": "Running"}
    assert started.objects[SANDBOX]["status"] == {"observedGeneration": 1, "replicas": 1}

    (pids / "busy").unlink()
    ready = await_observed(cluster, lambda o: ready_replicas(o, SANDBOX) == 1, what="the pod's answer")
    assert container_status(ready, "demo-sandbox-0")["ready"]
    (pids / "busy").touch()
    await_observed(cluster, lambda o: ready_replicas(o, SANDBOX) == 0, what="the pod's refusals")


def test_the_addresses_in_any_pods_variables_lead_to_the_pods_that_they_name(cluster: LocalCluster, pids: Path) -> None:
    apply(cluster, build_service("demo-sandbox", env=env(pids)))
    apply(cluster, build_service("demo-server", kind="StatefulSet", replicas=2, env=env(pids)))
    ask = """
import os, urllib.request
for url in [os.environ['SANDBOX'], *os.environ['SERVERS'].split(',')]:
    print(urllib.request.urlopen(url).read().decode())
"""
    servers = ",".join(f"http://demo-server-{index}.demo-server:8000" for index in range(2))
    addresses = env(pids, SANDBOX="http://demo-sandbox:8000/x", SERVERS=servers)
    await_observed(
        cluster,
        lambda o: (ready_replicas(o, SANDBOX), ready_replicas(o, SERVERS)) == (1, 2),
        what="the services' answers",
    )

    cluster.apply(build_job(ask, env=addresses))

    await_observed(cluster, lambda o: has_condition(o, PYTORCHJOB, "Succeeded"), what="the end")
    (log,) = pids.parent.rglob("demo-a1-master-0.log")
    assert log.read_text().split() == ["demo-sandbox-0", "demo-server-0", "demo-server-1"]


def test_a_container_that_ends_is_started_again_and_its_last_words_are_kept(cluster: LocalCluster, pids: Path) -> None:
    policy = "FallbackToLogsOnError"
    apply(cluster, build_service("demo-sandbox", env=env(pids), terminationMessagePolicy=policy))
    await_observed(cluster, lambda o: ready_replicas(o, SANDBOX) == 1, what="the pod's answer")
    (first,) = read_pids(pids)
    port = listening_port(cluster, pids)

    with suppress(RemoteDisconnected, ConnectionResetError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/end")

    def has_restarted(observed: Observed) -> bool:
        return container_status(observed, "demo-sandbox-0")["restartCount"] == 1

    await_observed(cluster, has_restarted, what="the restart")
    again = await_observed(cluster, lambda o: ready_replicas(o, SANDBOX) == 1, what="the pod's answer")
    container = container_status(again, "demo-sandbox-0")
    last = container["lastState"]["terminated"]
    assert (last["exitCode"], last["reason"], last["message"].splitlines()[-1]) == (3, "Error", "told to end")
    assert "running" in container["state"]
    assert listening_port(cluster, pids) == port
    assert {first} < set(read_pids(pids))


def listening_port(cluster: LocalCluster, pids: Path) -> int:
    """Return the port that the newest process of the sandbox has in its environment."""
    pod = cluster.get(ObjectRef("v1", "Pod", "demo-sandbox-0"))
    assert pod is not None
    _, (main, _) = json.loads(pod["metadata"]["annotations"]["posttrain.dev/process"])
    variables = Path(f"/proc/{main}/environ").read_text().split("\0")
    return int(next(text for text in variables if text.startswith("POSTTRAIN_LISTEN=")).rpartition(":")[2])


def test_a_container_that_goes_on_ending_waits_before_it_is_started_again(cluster: LocalCluster, pids: Path) -> None:
    apply(cluster, build_service("demo-sandbox", "raise SystemExit(4)", env=env(pids)))

    waiting = await_observed(
        cluster,
        lambda o: bool(o.pods) and "waiting" in container_status(o, "demo-sandbox-0")["state"] and ended_twice(o),
        what="the second end",
    )

    container = container_status(waiting, "demo-sandbox-0")
    assert container["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    assert phases(waiting) == {"demo-sandbox-0": "Running"}
    assert cluster.retry_at is not None
    assert timedelta(seconds=5) < cluster.retry_at - now() < timedelta(seconds=10)


def ended_twice(observed: Observed) -> bool:
    return bool(container_status(observed, "demo-sandbox-0")["restartCount"] == 1)


def test_a_deleted_service_ends_with_its_pods_and_another_of_its_name_begins_after_them(
    cluster: LocalCluster, pids: Path
) -> None:
    manifests = build_service("demo-server", kind="StatefulSet", replicas=2, env=env(pids))
    apply(cluster, manifests)
    cluster.observe()
    old = await_pids(pids, count=2)

    cluster.delete(SERVERS)
    apply(cluster, manifests)

    await_observed(cluster, lambda o: ready_replicas(o, SERVERS) == 2, what="the new pods' answers")
    await_gone(old, seconds=0.1)


def test_a_service_does_not_keep_a_run_from_its_end_and_does_not_come_back_after_a_kill(
    cluster: LocalCluster, pids: Path
) -> None:
    apply(cluster, build_service("demo-sandbox", env=env(pids)))
    cluster.observe()
    await_pids(pids, count=1)
    assert not cluster.has_live_pods

    cluster.kill()

    def is_waiting(observed: Observed) -> bool:
        return "waiting" in container_status(observed, "demo-sandbox-0")["state"]

    await_observed(cluster, is_waiting, what="the end")
    assert is_waiting(cluster.observe())
    await_gone(read_pids(pids), seconds=0.1)


def test_a_pod_takes_a_variable_from_a_secret_of_the_plan_which_only_this_user_can_read(
    tmp_path: Path, cluster: LocalCluster
) -> None:
    key = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "demo-key", "key": "key"}}}
    data = {"key": base64.b64encode(b"s3cret").decode()}
    cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "demo-key"}, "data": data})
    cluster.apply(build_job("import os; print(os.environ['KEY'])", env=[key]))

    await_observed(cluster, lambda o: has_condition(o, PYTORCHJOB, "Succeeded"), what="the end")

    assert (tmp_path / "demo" / "logs" / "demo-a1-master-0.log").read_text() == "s3cret\n"
    assert stat.S_IMODE((tmp_path / "demo" / "objects" / "Secret-demo-key.json").stat().st_mode) == 0o600


def test_a_service_and_a_gang_have_gpus_of_their_own(tmp_path: Path, pids: Path) -> None:
    def resources(gpus: int) -> dict[str, Any]:
        return {"limits": {"nvidia.com/gpu": str(gpus)}}

    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    with closing(open_cluster(tmp_path / "demo", gpus=("GPU-a", "GPU-b", "GPU-c"))) as cluster:
        apply(cluster, build_service("demo-server", show, kind="StatefulSet", env=env(pids), resources=resources(2)))
        cluster.observe()
        cluster.apply(build_job(show, resources=resources(1)))
        await_observed(cluster, lambda o: has_condition(o, PYTORCHJOB, "Succeeded"), what="the end")

    logs = {file.stem: file.read_text().splitlines()[0] for file in (tmp_path / "demo" / "logs").iterdir()}
    assert logs == {"demo-server-0": "GPU-a,GPU-b", "demo-a1-master-0": "GPU-c"}


# --- After a crash ---------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from tests.support.local_cluster import build_service, open_cluster
from tests.support.processes import await_pids

folder, pids = map(Path, sys.argv[1:])
cluster = open_cluster(folder)
for manifest in build_service("demo-sandbox", env=[{"name": "PIDS", "value": str(pids)}]):
    cluster.apply(manifest)
cluster.observe()
await_pids(pids, count=1)
os.kill(os.getpid(), 9)
"""


def test_nothing_of_a_service_outlives_a_killed_command_and_the_next_one_starts_it_anew(
    tmp_path: Path, pids: Path
) -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "demo", pids], env=environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    old = read_pids(pids)
    await_gone(old, seconds=ORPHAN_GRACE_SECONDS + 5)

    with closing(open_cluster(tmp_path / "demo")) as cluster:
        assert cluster.list("Pod") == []
        again = await_observed(cluster, lambda o: ready_replicas(o, SANDBOX) == 1, what="the pod's answer")

    assert container_status(again, "demo-sandbox-0")["restartCount"] == 0
    wait_for(lambda: set(read_pids(pids)) > set(old), what="another process")
    await_gone(read_pids(pids), seconds=0.1)

"""Runs with pods that may report, as a cluster holds them once both operators did their part."""

from __future__ import annotations

from typing import Any

from posttrain.api.training_run_status import Progress
from posttrain.control.kinds import JOB, POD, PYTORCHJOB, TRAINING_RUN, Kind
from posttrain.control.port import ObjectKey
from posttrain.control.progress import RunIdentity
from posttrain.plan import names
from posttrain.plan.types import Manifest
from tests.support.builders import build_pod, build_run
from tests.support.fake_cluster import FakeCluster

NAMESPACE = "team"


def reference(owner: Manifest) -> dict[str, Any]:
    """Return the controller reference to an object."""
    named = {key: owner["metadata"][key] for key in ("name", "uid")}
    return {"apiVersion": owner["apiVersion"], "kind": owner["kind"], **named, "controller": True}


def add_run(cluster: FakeCluster, *, name: str = "demo", attempt: int | None = 1) -> RunIdentity:
    """Put a run whose current attempt is the given one."""
    manifest = build_run(name=name).model_dump(mode="json", by_alias=True, exclude_none=True)
    del manifest["metadata"]["uid"]
    made = cluster.put({**manifest, "status": {} if attempt is None else {"attempt": attempt}})
    return RunIdentity(NAMESPACE, name, made["metadata"]["uid"])


def add_job(cluster: FakeCluster, owner: Manifest | None, *, kind: Kind, name: str) -> Manifest:
    """Put a job, controlled by the run."""
    metadata: dict[str, Any] = {"name": name, "namespace": NAMESPACE}
    if owner is not None:
        metadata["ownerReferences"] = [reference(owner)]
    return cluster.put({"apiVersion": kind[0], "kind": kind[1], "metadata": metadata})


def add_pod(cluster: FakeCluster, job: Manifest | None, *, run: str = "demo", attempt: int = 1) -> Manifest:
    """Put a pod with a run's labels, controlled by the job."""
    pod = build_pod(run, attempt=attempt)
    metadata = {**pod["metadata"], "namespace": NAMESPACE}
    if job is not None:
        metadata["ownerReferences"] = [reference(job)]
    return cluster.put({**pod, "apiVersion": POD[0], "kind": POD[1], "metadata": metadata})


def add_sender(cluster: FakeCluster, run: RunIdentity, token: str, *, attempt: int = 1) -> Manifest:
    """Put a job and a pod of an attempt (0: prepare), and know the pod's token."""
    owner = next(r for r in cluster.objects(TRAINING_RUN) if r["metadata"]["uid"] == run.uid)
    kind = PYTORCHJOB if attempt else JOB
    name = names.attempt_name(run.name, attempt=attempt) if attempt else names.prepare_name(run.name)
    pod = add_pod(cluster, add_job(cluster, owner, kind=kind, name=name), run=run.name, attempt=attempt)
    cluster.add_token(token, pod=pod, audience=names.resource_path(namespace=NAMESPACE, run=run.name))
    return pod


def progress_of(cluster: FakeCluster, run: RunIdentity) -> Progress | None:
    """Return what status has."""
    found = next(r for r in cluster.objects(TRAINING_RUN) if ObjectKey.of(r) == run.key)
    progress = (found.get("status") or {}).get("progress")
    return None if progress is None else Progress.model_validate(progress)

"""Which Events are read about a run that waits, of what makes no pods and of pods that do not start.

It owns about which objects they are read, and how soon; it must not judge what they say. Nobody watches Events: of a
cluster's hardly one is about a run that waits.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from posttrain.api.training_run import TrainingRun
from posttrain.control.kinds import EVENT
from posttrain.control.observe import Belongings
from posttrain.control.obstacles import unless_it_fails
from posttrain.control.port import Cluster
from posttrain.plan import labels
from posttrain.plan.manifests import (
    is_being_set_up,
    is_of_attempt,
    parse_time,
    pod_phase,
    pods_of_role,
    scheduled_time,
)
from posttrain.plan.prepare_job import parse_prepare_state, prepare_ref
from posttrain.plan.pytorchjob import job_ref, parse_job_state
from posttrain.plan.rollout_servers import find_servers, servers_ref
from posttrain.plan.types import Manifest

PATIENCE = timedelta(seconds=30)
"""How long a job or a StatefulSet may take to make its pods, and a node to set one up, before events are asked why."""
_EXPLAINED_PODS = 4
"""Of those that are not set up, at one look: in one gang they mostly wait for the same thing."""


async def read_creation_events(
    cluster: Cluster, run: TrainingRun, belongings: Belongings, *, now: datetime
) -> tuple[Manifest, ...]:
    """Return the events of what does not make its pods: only there does its controller say why."""
    maker = _maker_without_pods(run, belongings)
    if maker is None or now - _created(maker) < PATIENCE:
        return ()
    return await _read_events(cluster, maker, namespace=run.metadata.namespace) or ()


async def read_pod_events(
    cluster: Cluster, run: TrainingRun, belongings: Belongings, *, now: datetime
) -> tuple[Manifest, ...]:
    """Return the events of pods that their nodes do not set up: only there does a kubelet speak of volumes."""
    late = [pod for pod in _pods_being_set_up(run, belongings) if now - _bound(pod) >= PATIENCE]
    found: list[Manifest] = []
    for pod in sorted(late, key=_bound)[:_EXPLAINED_PODS]:
        told = await _read_events(cluster, pod, namespace=run.metadata.namespace)
        if told is None:
            break
        found += told
    return tuple(found)


def needs_events(run: TrainingRun, belongings: Belongings) -> bool:
    """Return whether events of something may have to be read, of which no watch tells: look again after PATIENCE."""
    return _maker_without_pods(run, belongings) is not None or bool(_pods_being_set_up(run, belongings))


async def _read_events(cluster: Cluster, about: Manifest, *, namespace: str) -> tuple[Manifest, ...] | None:
    """Return the events of an object; None where they cannot be read: they explain, and nothing is decided by them."""
    selector = f"involvedObject.uid={about['metadata']['uid']}"
    request = cluster.list(*EVENT, namespace=namespace, field_selector=selector)
    found = await unless_it_fails(request, what=f"events of {about['kind']} {namespace}/{about['metadata']['name']}")
    return tuple(found.items) if found is not None else None


def _pods_being_set_up(run: TrainingRun, belongings: Belongings) -> list[Manifest]:
    ended = run.status.completion_time is not None
    return [] if ended else [pod for pod in belongings.pods if is_being_set_up(pod)]


def _bound(pod: Manifest) -> datetime:
    return scheduled_time(pod) or datetime.now(UTC)


def _maker_without_pods(run: TrainingRun, belongings: Belongings) -> Manifest | None:
    """Return prepare's job, the current attempt's, or the rollout servers, where not all of its pods are there."""
    attempt = run.status.attempt or 0
    prepare = belongings.objects.get(prepare_ref(run.metadata.name)) if not attempt else None
    if prepare is not None:
        alive = (pod for pod in pods_of_role(belongings.pods, labels.ROLE_PREPARE) if pod_phase(pod) != "Failed")
        return prepare if parse_prepare_state(prepare).phase == "Pending" and not any(alive) else None
    job = belongings.objects.get(job_ref(run.metadata.name, attempt=attempt))
    pods = sum(1 for pod in belongings.pods if is_of_attempt(pod, attempt))
    if job is not None and pods < run.spec.resources.num_nodes and parse_job_state(job).phase == "Pending":
        return job
    servers, wanted = belongings.objects.get(servers_ref(run.metadata.name)), run.spec.rollout_servers
    if servers is None or wanted is None or len(find_servers(run, belongings.pods)) >= wanted.pods:
        return None
    return servers


def _created(manifest: Manifest) -> datetime:
    return parse_time(manifest["metadata"].get("creationTimestamp")) or datetime.now(UTC)

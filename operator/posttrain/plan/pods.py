"""Whether a gang's pods all run, or why not yet, as a condition tells it; and what keeps others from serving.

It owns the reading of pods that wait or run; it must not decide what follows from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.contract.result import ExitCode
from posttrain.plan import names
from posttrain.plan.attempts import Gang
from posttrain.plan.manifests import (
    container_status,
    is_being_set_up,
    is_out_of_sight,
    node_name,
    pod_condition,
    pod_phase,
)
from posttrain.plan.status import Says
from posttrain.plan.types import Manifest

_PULL_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
_START_REASONS = frozenset(
    {
        "CreateContainerConfigError",
        "CreateContainerError",
        "PreCreateHookError",
        "PreStartHookError",
        "RunContainerError",
    }
)
"""With these and those above a kubelet says why a container waits (k8s.io/kubernetes, pkg/kubelet)."""
_VOLUME_EVENTS = frozenset({"FailedMount", "FailedAttachVolume", "FailedMapVolume"})
_SANDBOX_EVENT = "FailedCreatePodSandBox"
_VOLUME_WORDS = ("PersistentVolumeClaim", "persistentvolumeclaim", "volume node affinity", "volume")
_NOT_CREATED = "FailedCreate"
"""Beginning of the reasons with which the training operator, and the StatefulSet controller, say that they could not
create a pod or its service."""
_REFUSED = re.compile(r"^(?:Error creating: |Create Pod \S+ in StatefulSet \S+ failed error: )")
"""What they put before the API server's own words."""
_OVER_QUOTA = "exceeded quota"
"""In every refusal by a ResourceQuota (k8s.io/apiserver, admission/plugin/resourcequota)."""
_SHOWN_LINES = 5
"""Of what a container said before it ended."""


def explain_running(gang: Gang) -> Says:
    """Return that every pod of the gang runs, or that this cannot be known: of a silent node nobody hears of an end."""
    unseen = [pod for pod in gang.pods if is_out_of_sight(pod)]
    if not unseen:
        return Says("True", "AllPodsRunning")
    pods = ", ".join(pod["metadata"]["name"] for pod in unseen)
    nodes = ", ".join(sorted({node_name(pod) or "" for pod in unseen}))
    message = f"node {nodes} does not answer: whether {pods} still runs is not known, and is waited for"
    return Says("Unknown", "NodeUnreachable", message)


def explain_waiting(
    gang: Gang, *, creation_events: Iterable[Manifest] = (), pod_events: Iterable[Manifest] = ()
) -> Says:
    """Return why not every pod of the gang runs: the first obstacle found, else how many run."""
    job = names.attempt_name(gang.run, attempt=gang.attempt)
    refused = find_refusal(creation_events, of=job, missing=gang.size - len(gang.pods), size=gang.size)
    if refused is not None:
        return refused
    obstacle = find_obstacle(gang.pods, events=pod_events)
    if obstacle is not None:
        return obstacle
    ready = sum(1 for pod in gang.pods if pod_phase(pod) == "Running")
    return Says("False", "PodsStarting", f"{ready} of {gang.size} pods run")


def find_obstacle(pods: Iterable[Manifest], *, events: Iterable[Manifest] = ()) -> Says | None:
    """Return what keeps the first of the pods that is kept from it from starting; `events` may be about any pods."""
    known = tuple(events)
    found = (_unscheduled(pod) or _unstarted(pod) or _unset(pod, known) for pod in pods)
    return next((obstacle for obstacle in found if obstacle is not None), None)


def find_end(pods: Iterable[Manifest], *, container: str, asked: bool = True) -> str | None:
    """Return how a container ended that is to serve and does not: it waits for its next start, or loads again.

    With its last words. It is the first of those that ended by themselves, if any did; then, unless `asked` is False,
    of those that were asked to.
    """
    ends = [(pod, end) for pod in pods if (end := _end_of(pod, container)) is not None]
    by_themselves = [one for one in ends if one[1].get("exitCode") != ExitCode.TERMINATED]
    pod, end = next(iter(by_themselves or (ends if asked else ())), (None, None))
    if pod is None or end is None:
        return None
    words = str(end.get("message") or end.get("reason") or "no message").strip().splitlines()
    said = "\n".join(words[-_SHOWN_LINES:])
    return f"pod {pod['metadata']['name']} ends with exit code {end.get('exitCode')}: {said}"


def _end_of(pod: Manifest, container: str) -> Mapping[str, Any] | None:
    status = container_status(pod, container)
    ends = (status.get("state") or {}).get("terminated"), (status.get("lastState") or {}).get("terminated")
    return next((end for end in ends if end), None) if not status.get("ready") else None


def how_to_release(pod: Manifest) -> str:
    """Return how a person frees the name of a pod that was deleted, and whose node does not say that it has ended."""
    metadata = pod["metadata"]
    return (
        f"When that node is surely off, delete its Node object, or the pod by: kubectl delete pod {metadata['name']} "
        f"-n {metadata['namespace']} --force"
    )


def find_refusal(events: Iterable[Manifest], *, of: str, missing: int, size: int) -> Says | None:
    """Return why pods are missing: only an Event about `of`, which makes them, tells of one that was refused."""
    about = [event for event in events if (event.get("involvedObject") or {}).get("name") == of]
    refusals = [event for event in about if str(event.get("reason") or "").startswith(_NOT_CREATED)]
    if not missing or not refusals:
        return None
    message = _REFUSED.sub("", str(max(refusals, key=_last_seen).get("message") or ""))
    told = f"{missing} of {size} pods cannot be created: {message}"
    return Says("False", "QuotaExceeded" if _OVER_QUOTA in message else "PodsNotCreated", told)


def _last_seen(event: Mapping[str, Any]) -> str:
    """Return when an event was last seen; RFC 3339 in UTC, so that the texts are in the order of the times."""
    series = event.get("series") or {}
    seen = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return str(seen or event["metadata"].get("creationTimestamp") or "")


def _unscheduled(pod: Manifest) -> Says | None:
    scheduled = pod_condition(pod, "PodScheduled")
    if scheduled is None or scheduled.get("status") != "False":
        return None
    message = f"pod {pod['metadata']['name']}: {scheduled.get('message') or scheduled.get('reason') or ''}"
    waits_for_volume = any(word in message for word in _VOLUME_WORDS)
    return Says("False", "VolumePending" if waits_for_volume else "Unschedulable", message)


def _unstarted(pod: Manifest) -> Says | None:
    status = pod.get("status") or {}
    for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason")
        if reason in _PULL_REASONS or reason in _START_REASONS:
            message = f"pod {pod['metadata']['name']}: {waiting.get('message') or reason}"
            return Says("False", "ImagePullFailed" if reason in _PULL_REASONS else "ContainerNotStarted", message)
    return None


def _unset(pod: Manifest, events: Iterable[Manifest]) -> Says | None:
    """Return why a pod's node is not done with what its containers need: its last event decides, as others are past."""
    uid = pod["metadata"].get("uid")
    about = [event for event in events if uid and (event.get("involvedObject") or {}).get("uid") == uid]
    if not about or not is_being_set_up(pod):
        return None
    last = max(about, key=_last_seen)
    reason, message = last.get("reason"), f"pod {pod['metadata']['name']}: {last.get('message') or last.get('reason')}"
    if reason in _VOLUME_EVENTS:
        return Says("False", "VolumePending", message)
    return Says("False", "ContainerNotStarted", message) if reason == _SANDBOX_EVENT else None

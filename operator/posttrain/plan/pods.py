"""Why a gang's pods do not all run yet, as a condition tells it.

It owns the reading of waiting pods; it must not decide what follows from the wait.
"""

from __future__ import annotations

from posttrain.plan.attempts import Gang
from posttrain.plan.manifests import pod_condition, pod_phase
from posttrain.plan.status import Says
from posttrain.plan.types import Manifest

_PULL_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
_VOLUME_WORDS = ("PersistentVolumeClaim", "persistentvolumeclaim", "volume node affinity", "volume")


def explain_waiting(gang: Gang) -> Says:
    """Return why not every pod of the gang runs: the first obstacle found, else how many run."""
    for pod in gang.pods:
        obstacle = _unscheduled(pod) or _unpulled(pod)
        if obstacle is not None:
            return obstacle
    ready = sum(1 for pod in gang.pods if pod_phase(pod) == "Running")
    return Says("False", "PodsStarting", f"{ready} of {gang.size} pods run")


def _unscheduled(pod: Manifest) -> Says | None:
    scheduled = pod_condition(pod, "PodScheduled")
    if scheduled is None or scheduled.get("status") != "False":
        return None
    message = f"pod {pod['metadata']['name']}: {scheduled.get('message') or scheduled.get('reason') or ''}"
    waits_for_volume = any(word in message for word in _VOLUME_WORDS)
    return Says("False", "VolumePending" if waits_for_volume else "Unschedulable", message)


def _unpulled(pod: Manifest) -> Says | None:
    status = pod.get("status") or {}
    for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in _PULL_REASONS:
            message = f"pod {pod['metadata']['name']}: {waiting.get('message') or waiting['reason']}"
            return Says("False", "ImagePullFailed", message)
    return None

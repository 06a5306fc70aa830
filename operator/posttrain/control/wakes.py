"""Which changes of an object set a plan in motion, and how soon.

It owns what of each kind a plan acts upon, and what of that can wait; it must not judge it. What is left out is read
all the same when the run is looked at for another reason: a beat of a run that trains, or a pod's address, is none.
"""

from __future__ import annotations

from typing import Any

import orjson

from posttrain.control.kinds import (
    CLAIM,
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    NETWORK_POLICY,
    POD,
    PYTORCHJOB,
    SERVICE,
    SERVICE_ACCOUNT,
    STATEFUL_SET,
    TRAINING_RUN,
)
from posttrain.plan.manifests import is_out_of_sight
from posttrain.plan.types import Manifest

_METADATA = ("generation", "deletionTimestamp", "labels", "ownerReferences")
_SILENT_PROGRESS = frozenset(
    {
        "step",
        "percentage",
        "etaSeconds",
        "eta",
        "metric",
        "epoch",
        "metrics",
        "history",
        "phase",
        "lastUpdatedTime",
        "lastBeatTime",
        "acknowledged",
    }
)
"""The stall check reads the beat when its own time has come."""
_POD_CONDITIONS = frozenset({"PodScheduled", "DisruptionTarget"})
_POD_STATUS = ("phase", "reason", "message", "startTime")

PROMPT_SECONDS = 0.1
"""What happens comes in bursts: one look at the end of one sees all of it."""
_STARTING_SECONDS = 2.0
"""A gang that starts changes a dozen times on its way, and nothing is to be done about it."""
_RUNNING_SECONDS = 1.0
_JOB_ENDS = frozenset({"Succeeded", "Failed", "Complete"})
_MADE_BY_PLANS = frozenset(
    {SERVICE_ACCOUNT, NETWORK_POLICY, CONFIG_MAP, CLAIM, SERVICE, DEPLOYMENT, STATEFUL_SET, JOB, PYTORCHJOB}
)
MADE_SECONDS = 10.0
"""After something was made for a run: pods that come of it tell of themselves, long before that on a cluster that has
time."""


def fingerprint(manifest: Manifest) -> int:
    """Return a number that changes when a plan may have to act."""
    metadata = manifest["metadata"]
    about = [[metadata.get(part) for part in _METADATA], _content(manifest)]
    return hash(orjson.dumps(about, option=orjson.OPT_SORT_KEYS))


def _content(manifest: Manifest) -> Any:
    status = manifest.get("status") or {}
    kind = (manifest["apiVersion"], manifest["kind"])
    if kind == TRAINING_RUN:
        progress = status.get("progress") or {}
        return {name: value for name, value in progress.items() if name not in _SILENT_PROGRESS}
    if kind == POD:
        return _pod(manifest, status)
    if kind in (PYTORCHJOB, JOB):
        return sorted(_ends(status))
    if "generation" in manifest["metadata"]:
        return status
    # A kind whose changes nobody counts.
    return {name: value for name, value in manifest.items() if name != "metadata"}


def _pod(manifest: Manifest, status: dict[str, Any]) -> list[Any]:
    containers = (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))
    return [
        (manifest.get("spec") or {}).get("nodeName"),
        [status.get(part) for part in _POD_STATUS],
        is_out_of_sight(manifest),
        [
            [condition.get(part) for part in ("type", "status", "reason", "message")]
            for condition in status.get("conditions") or ()
            if condition.get("type") in _POD_CONDITIONS
        ],
        [
            # A gang's container is ready as soon as it runs; a server's when it answers, for which a gang may wait.
            [
                container.get("name"),
                container.get("imageID"),
                container.get("ready"),
                _state(container.get("state") or {}),
            ]
            for container in containers
        ],
    ]


def _state(state: dict[str, Any]) -> list[Any]:
    return [state.get("waiting"), state.get("terminated")]


def _ends(status: dict[str, Any]) -> set[str]:
    """Return how a job ended: of its way there its pods tell."""
    true = {condition.get("type") for condition in status.get("conditions") or () if condition.get("status") == "True"}
    return true & _JOB_ENDS


def patience_seconds(manifest: Manifest, *, is_new: bool) -> float:
    """Return for how long a change to this state may wait for others; what has ended or is to go waits for nothing.

    `is_new`: nothing was known of the object. A new child is mostly our own, whose watch told of it before the API
    server's answer came.
    """
    status, kind = manifest.get("status") or {}, (manifest["apiVersion"], manifest["kind"])
    if manifest["metadata"].get("deletionTimestamp") is not None:
        return PROMPT_SECONDS
    if kind == POD:
        if _has_ended_in_part(status):
            return PROMPT_SECONDS
        return {"Pending": _STARTING_SECONDS, "Running": _RUNNING_SECONDS}.get(status.get("phase", ""), PROMPT_SECONDS)
    if is_new and kind in _MADE_BY_PLANS and not _ends(status):
        return MADE_SECONDS
    return _STARTING_SECONDS if kind in (PYTORCHJOB, JOB) and not _ends(status) else PROMPT_SECONDS


def _has_ended_in_part(status: dict[str, Any]) -> bool:
    disrupted = any(condition.get("type") == "DisruptionTarget" for condition in status.get("conditions") or ())
    ended = any("terminated" in (one.get("state") or {}) for one in status.get("containerStatuses") or ())
    return disrupted or ended

"""Kubernetes events of a run, as `kubectl describe` shows them.

It owns how an event is written; it must not decide which are due.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from posttrain.plan.types import Event, Manifest

_MESSAGE_MAX_LENGTH = 1024
"""The API server refuses a longer one."""
_COMPONENT = "posttrain"


def build_event(run: Manifest, event: Event, *, now: datetime) -> Manifest:
    """Return the event's object; the same event at the same moment has the same name, so it is told once."""
    metadata = run["metadata"]
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    told = f"{metadata['uid']} {event.type} {event.reason} {event.message} {time}"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name']}.{hashlib.sha256(told.encode()).hexdigest()[:16]}",
            "namespace": metadata["namespace"],
        },
        "involvedObject": {
            "apiVersion": run["apiVersion"],
            "kind": run["kind"],
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:_MESSAGE_MAX_LENGTH],
        "source": {"component": _COMPONENT},
        "reportingComponent": _COMPONENT,
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }

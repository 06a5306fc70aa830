"""What a plan is made from and what it consists of.

It owns the shapes between the pure decisions and those who carry them out; it must not decide anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.api.training_run_status import TrainingRunStatus

Manifest = dict[str, Any]
"""A complete Kubernetes object as JSON data."""


@dataclass(frozen=True, order=True)
class ObjectRef:
    """Names an object in the run's namespace."""

    api_version: str
    kind: str
    name: str

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> ObjectRef:
        """Return the reference to a manifest's object."""
        return cls(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])


@dataclass(frozen=True, kw_only=True)
class Event:
    """A Kubernetes event about the run."""

    type: str
    """Normal or Warning."""
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class StatusPatch:
    """A write to the status of a child that belongs to another controller: the only fields of it that are patched."""

    ref: ObjectRef
    uid: str
    resource_version: str
    """Of the object that the patch was computed from: where it has changed since, the plan is made anew.

    This alone guards the write: no other object ever had that version, and for a status the API server ignores the uid.
    """
    body: Mapping[str, Any]
    """`{"status": {…}}`, a JSON merge patch (RFC 7386): lists are replaced as a whole, null removes."""
    subresource: str = "status"

    @property
    def payload(self) -> Manifest:
        """What is sent: the body, which the API server refuses (409) for any other version of the object."""
        return {"metadata": {"uid": self.uid, "resourceVersion": self.resource_version}, **self.body}


@dataclass(frozen=True, kw_only=True)
class Observed:
    """The facts of the cluster that a plan needs, as they were read."""

    objects: Mapping[ObjectRef, Manifest] = field(default_factory=dict)
    """Children of the run (by controller ownerReference, or the run's own claim by its label), with their status."""
    pods: tuple[Manifest, ...] = ()
    """Pods of the run's jobs, whatever their phase."""
    departed: tuple[Manifest, ...] = ()
    """Last states of pods that the cluster took, those of lost nodes among them, as far as they were seen."""
    foreign: frozenset[ObjectRef] = frozenset()
    """Objects that bear a child's name and are not the run's."""
    predecessors: tuple[Manifest, ...] = ()
    """Children and pods that an earlier run of the same name has left."""
    rejected: Mapping[ObjectRef, str] = field(default_factory=dict)
    """Children that the API server refused to take, with its words."""
    unread: Mapping[ObjectRef, str] = field(default_factory=dict)
    """What the run refers to and the API server does not show, with its words: whether it is there is not known."""
    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Data of ConfigMaps that the spec refers to (own code)."""
    runs: Mapping[str, Manifest] = field(default_factory=dict)
    """Runs that the spec refers to, by name, as far as they are there."""
    referrers: tuple[str, ...] = ()
    """Names of the runs that have not ended and refer to this one."""
    creation_events: tuple[Manifest, ...] = ()
    """Events (core/v1) about what has not made all its pods: prepare's job, the attempt's, or the rollout servers."""
    pod_events: tuple[Manifest, ...] = ()
    """Events (core/v1) about pods that are bound to a node and whose containers are not created for long."""
    server_key: str = ""
    """A new random key, for rollout servers that are made now."""
    kueue: bool = False
    """Whether the cluster serves Kueue's Workloads."""
    flavors: Mapping[str, Manifest] = field(default_factory=dict)
    """Kueue's ResourceFlavors, by name."""
    priorities: Mapping[str, int] = field(default_factory=dict)
    """Values of Kueue's WorkloadPriorityClasses, by name."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ought to be, and when to look again."""

    objects: tuple[Manifest, ...] = ()
    """Complete desired children, in apply order."""
    deletes: tuple[ObjectRef, ...] = ()
    """Children to delete, before anything is patched or applied; only such whose controller is this run."""
    patches: tuple[StatusPatch, ...] = ()
    """Writes to the status of children, after the deletes and before anything is applied."""
    delete_run: bool = False
    """The TTL has passed: delete the resource itself."""
    status: TrainingRunStatus | None = None
    """Every field that the operator owns (`progress` is left out: the progress server's)."""
    status_first: bool = False
    """The status counts something, an attempt or an end: nothing else is written before it, only after it all the rest.

    Else it is written last: what it says of the children then holds. Where the server fails at one of them it is
    written all the same, since what was observed is no less true.
    """
    requeue_after: float | None = None
    """Seconds until the next deadline, TTL or stall check; None: wait for events; 0: at once."""
    events: tuple[Event, ...] = ()
    """Emitted only after the status write went through."""

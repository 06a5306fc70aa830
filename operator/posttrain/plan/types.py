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
class Observed:
    """The facts of the cluster that a plan needs, as they were read."""

    objects: Mapping[ObjectRef, Manifest] = field(default_factory=dict)
    """Children of the run (by controller ownerReference, or the run's own claim by its label), with their status."""
    pods: tuple[Manifest, ...] = ()
    """Pods of the run's jobs, whatever their phase."""
    foreign: frozenset[ObjectRef] = frozenset()
    """Objects that bear a child's name and are not the run's."""
    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Data of ConfigMaps that the spec refers to (own code)."""
    job_events: tuple[Manifest, ...] = ()
    """Events (core/v1) about the current attempt's job; they matter only while pods of its gang are missing."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ought to be, and when to look again."""

    objects: tuple[Manifest, ...] = ()
    """Complete desired children, in apply order."""
    deletes: tuple[ObjectRef, ...] = ()
    """Children to delete, before anything is applied; only such whose controller is this run."""
    delete_run: bool = False
    """The TTL has passed: delete the resource itself."""
    status: TrainingRunStatus | None = None
    """Every field that the operator owns (`progress` is left out: the progress server's)."""
    requeue_after: float | None = None
    """Seconds until the next deadline, TTL or stall check; None: wait for events; 0: at once."""
    events: tuple[Event, ...] = ()
    """Emitted only after the status write went through."""

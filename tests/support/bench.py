"""A bench for the operator's core: a cluster in memory, the cache, the reconciler, and a clock that a test moves.

It owns how these are put together and taken apart, crashes among it; it must not judge anything.
"""

from __future__ import annotations

import asyncio
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any

from posttrain.api.conditions import Condition, find_condition
from posttrain.api.training_run_status import TrainingRunStatus
from posttrain.control.authority import Authority
from posttrain.control.cache import Cache, RunKey
from posttrain.control.kinds import CHILDREN, EVENT, TRAINING_RUN, Kind
from posttrain.control.port import ObjectKey, WatchEvent
from posttrain.control.queues import QueueSetup
from posttrain.control.reconciler import Reconciler
from posttrain.plan import labels
from posttrain.plan.types import Manifest
from posttrain.settings import Settings
from tests.support.builders import T0, build_spec
from tests.support.controllers import Controllers
from tests.support.fake_cluster import FakeCluster
from tests.support.faults import FaultyCluster

RUN: RunKey = ("team", "demo")
RUN_KEY = ObjectKey(*TRAINING_RUN, *RUN)
SOON_SECONDS = 3.0
"""The operator looks again this soon where it knows already that it is not done."""
KINDS: tuple[Kind, ...] = (TRAINING_RUN, *CHILDREN)
SELECTOR = f"{labels.MANAGED_BY}={labels.MANAGER},{labels.RUN}"
"""With which the operator follows its children."""


class Bench:
    """One run and its operator."""

    def __init__(self, *, settings: Settings | None = None, missing_kinds: frozenset[Kind] = frozenset()) -> None:
        self.now: datetime = T0
        self.settings = settings or Settings()
        self.cluster = FakeCluster(clock=self.clock, missing_kinds=missing_kinds)
        self.port = FaultyCluster(self.cluster)
        """The operator's way to the cluster."""
        self.others = Controllers(self.cluster, clock=self.clock, namespace=RUN[0], run=RUN[1])
        self.rung: list[RunKey] = []
        self.start()

    def clock(self) -> datetime:
        return self.now

    def _monotonic(self) -> float:
        return self.now.timestamp()

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)

    def start(self) -> None:
        """Begin with nothing in memory, as after a crash, and list everything."""
        self.cache = Cache(on_change=lambda run, _: self.rung.append(run))
        self.reconciler = Reconciler(
            self.port,
            self.cache,
            settings=self.settings,
            # Of their requests there are tests of their own: here they are neither counted nor made to fail.
            authority=Authority(FakeCluster(), self.settings.progress_server, read_authority=lambda: "an authority"),
            queues=QueueSetup(self.port, monotonic=self._monotonic),
            clock=self.clock,
        )
        self._seen: dict[Kind, int] = {}
        for kind in KINDS:
            self._list(kind)

    def _list(self, kind: Kind) -> None:
        if kind in self.cluster.missing_kinds:
            self.cache.retain(kind, (), version=None)
            self._seen[kind] = 0
            return
        selector = "" if kind == TRAINING_RUN else SELECTOR
        listed = self.cluster.read(kind, label_selector=selector)
        for manifest in listed.items:
            self.cache.put(manifest)
        uids = {manifest["metadata"]["uid"] for manifest in listed.items}
        self.cache.retain(kind, uids, version=listed.resource_version)
        self._seen[kind] = int(listed.resource_version)

    def see(self, *kinds: Kind, limit: int | None = None) -> None:
        """Let the watches of these kinds, or of all, deliver what happened: all of it, or the first events."""
        for kind in kinds or KINDS:
            selector = "" if kind == TRAINING_RUN else SELECTOR
            events: list[WatchEvent] = self.cluster.events(kind, after=self._seen[kind], label_selector=selector)
            for event in events[:limit]:
                self._seen[kind] = int(event.object["metadata"]["resourceVersion"])
                if event.type == "DELETED":
                    self.cache.drop(event.object)
                else:
                    self.cache.put(event.object)

    def reconcile(self) -> float | None:
        """Reconcile once, from what was seen so far."""
        return asyncio.run(self.reconciler.reconcile(RUN))

    def look(self) -> float | None:
        """See what happened, and reconcile once."""
        self.see()
        return self.reconcile()

    def settle(self, *, limit: int = 12) -> float | None:
        """Reconcile until that writes nothing more; return when the operator wants to look again."""
        for _ in range(limit):
            before = len(self.port.writes())
            again = self.look()
            if len(self.port.writes()) == before and (again is None or again > SOON_SECONDS):
                return again
        raise AssertionError(f"no fixed point after {limit} looks; the last writes: {self.port.writes()[-12:]}")

    # --- The run -----------------------------------------------------------------------------------------------------

    def submit(self, *, uid: str | None = None, status: dict[str, Any] | None = None, **spec: Any) -> Manifest:
        """Store the run, as a user applies it."""
        metadata: dict[str, Any] = {"name": RUN[1], "namespace": RUN[0]}
        if uid is not None:
            metadata["uid"] = uid
        run: Manifest = {"apiVersion": TRAINING_RUN[0], "kind": TRAINING_RUN[1], "metadata": metadata}
        run["spec"] = deepcopy(build_spec(**{"prepare": {"enabled": False}, **spec}))
        return self.cluster.put(run if status is None else {**run, "status": status})

    @property
    def run(self) -> Manifest:
        """The run as it stands in the cluster."""
        run = self.others.find(TRAINING_RUN, RUN[1])
        assert run is not None, "the run is there"
        return run

    @property
    def status(self) -> TrainingRunStatus:
        """The run's status as it stands in the cluster."""
        return TrainingRunStatus.model_validate(self.run.get("status") or {})

    def condition(self, type_: str) -> Condition:
        """Return a condition of the run."""
        condition = find_condition(self.status.conditions, type_)
        assert condition is not None, f"the run has the condition {type_}"
        return condition

    def says(self, type_: str) -> tuple[str, str]:
        """Return what a condition says: its status and its reason."""
        condition = self.condition(type_)
        return condition.status, condition.reason

    def events(self) -> list[str]:
        """Return the events told of the run, as `reason: message`, in the order in which they were written."""
        told = sorted(self.cluster.objects(EVENT), key=lambda event: int(event["metadata"]["resourceVersion"]))
        return [f"{event['reason']}: {event['message']}" for event in told]

    def names(self, *kinds: Kind) -> list[str]:
        """Return `Kind name` of every object of these kinds, or of all that a run has but its pods."""
        chosen = kinds or tuple(kind for kind in CHILDREN if kind[1] != "Pod")
        return [f"{kind[1]} {item['metadata']['name']}" for kind in chosen for item in self.cluster.objects(kind)]


def wait_out_pending_deadline(bench: Bench, *, seconds: float) -> None:
    """See that a run that waits still does so after half of its `pendingDeadlineSeconds`, and fails after all of it."""
    bench.wait(seconds / 2)
    bench.settle()
    assert bench.says("Succeeded") == ("False", "InProgress")
    bench.wait(seconds / 2)
    bench.settle()
    assert bench.says("Succeeded") == ("False", "PendingDeadlineExceeded")

"""The operator's leading work: follow the cluster, look at every run that changed, make it so.

It owns which tasks that takes and how they end together; it must not know how a leader is chosen, nor import kopf: the
edge that reports runs is given to it.
"""

from __future__ import annotations

import asyncio
import random
import time
from datetime import UTC, datetime
from typing import Protocol

import structlog

from posttrain.control.authority import Authority
from posttrain.control.cache import Cache, RunKey
from posttrain.control.kinds import CHILDREN, TRAINING_RUN, Kind
from posttrain.control.port import Cluster, ClusterError, Unavailable
from posttrain.control.queue import LoopClock, WorkQueue
from posttrain.control.queues import QueueSetup
from posttrain.control.reconciler import Reconciler
from posttrain.control.reflector import Reflector, list_into
from posttrain.plan import labels
from posttrain.settings import Settings

_POLL_SECONDS = 0.05
_LIST_BACKOFF_SECONDS = 2.0

log = structlog.get_logger(__name__)


class Edge(Protocol):
    """Who reports runs as they change."""

    @property
    def trouble(self) -> str | None:
        """Why it does not watch; None while it does."""

    async def run(self, cache: Cache) -> None:
        """Put every run that changed into the cache, until cancelled."""


class Operator:
    """The leading work of one replica."""

    def __init__(self, cluster: Cluster, *, settings: Settings, edge: Edge, authority: Authority) -> None:
        self._cluster = cluster
        self._settings = settings
        self._edge = edge
        self.queue: WorkQueue[RunKey] = WorkQueue(clock=LoopClock())
        self.cache = Cache(on_change=self.queue.add_after)
        self._reconciler = Reconciler(
            cluster,
            self.cache,
            settings=settings,
            authority=authority,
            queues=QueueSetup(cluster, monotonic=time.monotonic),
            clock=lambda: datetime.now(UTC),
        )

    def unready(self) -> list[str]:
        """Return what keeps it from its work."""
        trouble = self._edge.trouble
        return self._missing() + ([f"edge: {trouble}"] if trouble is not None else [])

    def _missing(self) -> list[str]:
        kinds = [kind for kind in (TRAINING_RUN, *CHILDREN) if not self.cache.is_listed(kind)]
        return [f"cache: {kind[1]} not listed yet" for kind in kinds]

    def close(self) -> None:
        """Forget what was due later: after `run` ended, nobody would do it."""
        self.queue.close()

    async def run(self) -> None:
        """Work until cancelled; a task that ends by an error ends all of them."""
        async with asyncio.TaskGroup() as tasks:
            for kind in CHILDREN:
                tasks.create_task(self._reflector(kind).run(time=time.monotonic), name=f"reflector-{kind[1]}")
            tasks.create_task(self._list_runs(), name="resync")
            tasks.create_task(self._edge.run(self.cache), name="edge")
            # Until everything was listed once, a child that exists looks like one that does not.
            while self._missing():
                await asyncio.sleep(_POLL_SECONDS)
            log.info("everything is listed", runs=self.cache.count(TRAINING_RUN))
            for number in range(self._settings.operator.workers):
                tasks.create_task(self._work(), name=f"worker-{number}")

    def _reflector(self, kind: Kind) -> Reflector:
        return Reflector(
            self._cluster,
            self.cache,
            kind,
            label_selector=f"{labels.MANAGED_BY}={labels.MANAGER},{labels.RUN}",
            resync_seconds=self._settings.operator.resync_seconds * random.uniform(0.9, 1.1),
        )

    async def _list_runs(self) -> None:
        """List the runs again and again: the edge never reports one that was deleted while its watch was down."""
        while True:
            try:
                await list_into(self.cache, self._cluster, TRAINING_RUN)
            except ClusterError as error:
                log.warning("the runs cannot be listed", error=str(error))
                await asyncio.sleep(_LIST_BACKOFF_SECONDS * random.uniform(0.75, 1.25))
                continue
            for run in self.cache.runs():
                self.queue.add(run)
            await asyncio.sleep(self._settings.operator.resync_seconds)

    async def _work(self) -> None:
        while True:
            run = await self.queue.get()
            try:
                seconds = await self._reconciler.reconcile(run)
            except Unavailable as error:
                delay = self.queue.retry(run, at_least=error.retry_after or 0.0)
                log.warning("will try again", run="/".join(run), error=str(error), seconds=round(delay, 1))
            except ClusterError as error:
                delay = self.queue.retry(run)
                log.warning("will try again", run="/".join(run), error=str(error), seconds=round(delay, 1))
            except Exception:  # a bug that one run meets must not keep the others waiting
                delay = self.queue.retry(run)
                log.exception("a bug: this run is not looked after", run="/".join(run), seconds=round(delay, 1))
            else:
                self.queue.succeed(run)
                if seconds is not None:
                    self.queue.add_after(run, seconds)
            finally:
                self.queue.done(run)

"""Leader election on a Lease: one replica reconciles, the others wait.

It owns when this replica leads; it must not know what leading means. The rules are client-go's, on this side's terms: a
lease expires by this process' own clock after the record was last seen to change, never by a remote one's; a renewal
that got no answer is none; and who cannot renew within the deadline stops long before another may take over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from posttrain.control.kinds import LEASE
from posttrain.control.port import AlreadyExists, Cluster, ClusterError, NotFound, ObjectKey
from posttrain.plan.types import Manifest

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class LeaseTimes:
    """Seconds. `renew_deadline` leaves room, before `duration` is over, for the leading work to stop."""

    duration: float = 12.0
    renew_deadline: float = 8.0
    period: float = 2.0


class Lost(Exception):
    """This replica does not lead any more."""


class Election:
    """One replica's part in the election."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        namespace: str,
        name: str,
        identity: str,
        times: LeaseTimes,
        monotonic: Callable[[], float],
    ) -> None:
        self._cluster = cluster
        self._key = ObjectKey(*LEASE, namespace, name)
        self._identity = identity
        self._times = times
        self._monotonic = monotonic
        self._seen: tuple[str, float] | None = None
        """The record's version, and when it was first seen."""
        self._renewed: float | None = None
        """When the request was sent that renewed the lease last; None while another leads."""
        self.holder: str | None = None
        """Who holds the lease, as last read; None before the first answer."""
        self.problem: str | None = None
        """Why the lease could be neither held nor read when it was last tried; None if it could."""

    async def acquire(self) -> None:
        """Return when this replica holds the lease."""
        while True:
            try:
                started = self._monotonic()
                held = await self._try()
            except ClusterError as error:
                self.problem = str(error)
                log.warning("the lease cannot be read or written", error=self.problem)
            else:
                self.problem = None
                if held:
                    self._renewed = started
                    log.info("leading", identity=self._identity)
                    return
            await asyncio.sleep(self._times.period)

    async def hold(self) -> None:
        """Renew the lease for as long as that goes well.

        Raises:
            Lost: another holds it, or it was not renewed within the deadline.
        """
        while True:
            await asyncio.sleep(self._times.period)
            left = self._seconds_left()
            started = self._monotonic()
            try:
                async with asyncio.timeout(max(left, 0)):
                    held = await self._try()
            except (TimeoutError, ClusterError) as error:
                if self._seconds_left() <= 0:
                    self._renewed = None
                    self.problem = f"not renewed for {self._times.renew_deadline} s: {_describe(error)}"
                    raise Lost(self.problem) from error
                log.warning("the lease was not renewed", error=_describe(error))
                continue
            if not held:
                self._renewed = None
                raise Lost(f"{self.holder} holds the lease")
            # From when the request was sent: the others may count from then.
            self._renewed = started

    def holds(self) -> bool:
        """Return whether this replica may write: also a process that was stopped for a while asks before it does."""
        return self._seconds_left() > 0

    def _seconds_left(self) -> float:
        if self._renewed is None:
            return 0.0
        return self._renewed + self._times.renew_deadline - self._monotonic()

    async def release(self) -> None:
        """Let another replica take over at once. What cannot be written now expires by itself."""
        self._renewed = None
        try:
            lease = await self._cluster.get(self._key)
            if lease["spec"].get("holderIdentity") != self._identity:
                return
            await self._write(lease, {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()})
        except ClusterError as error:
            log.warning("the lease was not released", error=str(error))

    async def _try(self) -> bool:
        """Take or renew the lease where that is ours to do; return whether this replica holds it.

        Raises:
            ClusterError: nothing was written; a conflict among them says nothing yet of who holds it.
        """
        try:
            lease = await self._cluster.get(self._key)
        except NotFound:
            return await self._make()
        spec = lease.get("spec") or {}
        holder, version = spec.get("holderIdentity") or "", lease["metadata"]["resourceVersion"]
        self.holder = holder
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, self._monotonic())
        if holder not in ("", self._identity) and not self._is_expired(spec):
            return False
        changes: dict[str, Any] = {"renewTime": _now(), "leaseDurationSeconds": round(self._times.duration)}
        if holder != self._identity:
            changes |= {
                "holderIdentity": self._identity,
                "acquireTime": changes["renewTime"],
                "leaseTransitions": (spec.get("leaseTransitions") or 0) + 1,
            }
        await self._write(lease, changes)
        self.holder = self._identity
        return True

    def _is_expired(self, spec: dict[str, Any]) -> bool:
        since = self._seen[1] if self._seen else self._monotonic()
        return self._monotonic() - since >= float(spec.get("leaseDurationSeconds") or self._times.duration)

    async def _make(self) -> bool:
        now = _now()
        lease = {
            "apiVersion": self._key.api_version,
            "kind": self._key.kind,
            "metadata": {"name": self._key.name, "namespace": self._key.namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": round(self._times.duration),
                "acquireTime": now,
                "renewTime": now,
                "leaseTransitions": 0,
            },
        }
        try:
            await self._cluster.create(lease)
        except AlreadyExists:
            return False
        self.holder = self._identity
        return True

    async def _write(self, lease: Manifest, changes: dict[str, Any]) -> None:
        metadata = {"resourceVersion": lease["metadata"]["resourceVersion"], "uid": lease["metadata"]["uid"]}
        await self._cluster.patch(self._key, {"metadata": metadata, "spec": changes})


def _describe(error: Exception) -> str:
    return str(error) or "no answer"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

"""What Kueue's administrators have set up: flavors and priorities, read when a run needs them.

It owns how long a reading is believed; it must not know what a run does with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from posttrain.control.kinds import RESOURCE_FLAVOR, WORKLOAD_PRIORITY_CLASS, Kind
from posttrain.control.port import Cluster, InternalError, NotFound, Rejected
from posttrain.plan.types import Manifest

_BELIEVED_SECONDS = 60.0
_MISSED_SECONDS = 5.0
"""After which a name that was not there is looked for again, and anything where the server failed."""


@dataclass
class _Reading:
    objects: dict[str, Manifest] = field(default_factory=dict)
    asked_at: float = float("-inf")
    error: Rejected | InternalError | None = None
    """Why nothing came of it when it was read last; what was known before is believed."""


class QueueSetup:
    """Cluster-scoped objects of Kueue, by name."""

    def __init__(self, cluster: Cluster, *, monotonic: Callable[[], float]) -> None:
        self._cluster = cluster
        self._monotonic = monotonic
        self._readings: dict[Kind, _Reading] = {}

    async def flavors(self, needed: Collection[str]) -> dict[str, Manifest]:
        """Return the ResourceFlavors, read anew where one that is needed is not known.

        Raises:
            ClusterError: one that is needed is not known, and they cannot be read.
        """
        return await self._read(RESOURCE_FLAVOR, needed)

    async def priorities(self, needed: Collection[str]) -> dict[str, int]:
        """Return the values of the WorkloadPriorityClasses, read anew where one that is needed is not known.

        Raises:
            ClusterError: one that is needed is not known, and they cannot be read.
        """
        found = await self._read(WORKLOAD_PRIORITY_CLASS, needed)
        return {name: int(manifest.get("value", 0)) for name, manifest in found.items()}

    async def _read(self, kind: Kind, needed: Collection[str]) -> dict[str, Manifest]:
        reading = self._readings.setdefault(kind, _Reading())
        age = self._monotonic() - reading.asked_at
        doubtful = reading.error is not None or _misses(reading, needed)
        if needed and age >= (_MISSED_SECONDS if doubtful else _BELIEVED_SECONDS):
            await self._ask(kind, reading)
        if reading.error is not None and _misses(reading, needed):
            raise reading.error.with_traceback(None)
        return reading.objects

    async def _ask(self, kind: Kind, reading: _Reading) -> None:
        reading.error, found = None, []
        try:
            found = (await self._cluster.list(*kind)).items
        except NotFound:
            pass  # without Kueue there is none
        except (Rejected, InternalError) as error:
            reading.error = error
        if reading.error is None:
            reading.objects = {manifest["metadata"]["name"]: manifest for manifest in found}
        reading.asked_at = self._monotonic()


def _misses(reading: _Reading, needed: Collection[str]) -> bool:
    return any(name not in reading.objects for name in needed)

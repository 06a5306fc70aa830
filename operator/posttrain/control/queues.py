"""What Kueue's administrators have set up: flavors and priorities, read when a run needs them.

It owns how long a reading is believed; it must not know what a run does with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from posttrain.control.kinds import RESOURCE_FLAVOR, WORKLOAD_PRIORITY_CLASS, Kind
from posttrain.control.port import Cluster, NotFound
from posttrain.plan.types import Manifest

_BELIEVED_SECONDS = 60.0
_MISSED_SECONDS = 5.0
"""A name that was not there is looked for again after this."""


@dataclass
class _Reading:
    objects: dict[str, Manifest] = field(default_factory=dict)
    read_at: float = float("-inf")


class QueueSetup:
    """Cluster-scoped objects of Kueue, by name."""

    def __init__(self, cluster: Cluster, *, monotonic: Callable[[], float]) -> None:
        self._cluster = cluster
        self._monotonic = monotonic
        self._readings: dict[Kind, _Reading] = {}

    async def flavors(self, needed: Collection[str]) -> dict[str, Manifest]:
        """Return the ResourceFlavors, read anew where one that is needed is not known."""
        return await self._read(RESOURCE_FLAVOR, needed)

    async def priorities(self, needed: Collection[str]) -> dict[str, int]:
        """Return the values of the WorkloadPriorityClasses, read anew where one that is needed is not known."""
        found = await self._read(WORKLOAD_PRIORITY_CLASS, needed)
        return {name: int(manifest.get("value", 0)) for name, manifest in found.items()}

    async def _read(self, kind: Kind, needed: Collection[str]) -> dict[str, Manifest]:
        reading = self._readings.setdefault(kind, _Reading())
        age = self._monotonic() - reading.read_at
        missed = any(name not in reading.objects for name in needed)
        if needed and age >= (_MISSED_SECONDS if missed else _BELIEVED_SECONDS):
            try:
                found = (await self._cluster.list(*kind)).items
            except NotFound:
                found = []
            reading.objects = {manifest["metadata"]["name"]: manifest for manifest in found}
            reading.read_at = self._monotonic()
        return reading.objects

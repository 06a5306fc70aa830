"""A cluster that takes writes from the leader only.

It owns that check before every write; it must not know how the leader is chosen.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from posttrain.control.port import Cluster, ObjectKey, ObjectList, Unavailable, WatchEvent
from posttrain.plan.types import Manifest


class FencedCluster:
    """The port; a write by who does not lead any more raises `Unavailable` and is not sent."""

    def __init__(self, cluster: Cluster, *, holds: Callable[[], bool]) -> None:
        self._cluster = cluster
        self._holds = holds

    def _check(self) -> None:
        if not self._holds():
            raise Unavailable("this replica does not lead any more: nothing is written")

    async def create(self, manifest: Manifest) -> Manifest:
        """Create an object."""
        self._check()
        return await self._cluster.create(manifest)

    async def apply(self, manifest: Manifest, *, uid: str) -> Manifest:
        """Apply an object."""
        self._check()
        return await self._cluster.apply(manifest, uid=uid)

    async def apply_status(self, manifest: Manifest, *, manager: str) -> Manifest:
        """Apply a part of a status."""
        self._check()
        return await self._cluster.apply_status(manifest, manager=manager)

    async def patch(self, key: ObjectKey, body: Mapping[str, Any], *, subresource: str = "") -> Manifest:
        """Merge-patch an object."""
        self._check()
        return await self._cluster.patch(key, body, subresource=subresource)

    async def delete(self, key: ObjectKey, *, uid: str) -> None:
        """Delete an object."""
        self._check()
        await self._cluster.delete(key, uid=uid)

    async def get(self, key: ObjectKey) -> Manifest:
        """Return an object."""
        return await self._cluster.get(key)

    async def list(
        self, api_version: str, kind: str, *, namespace: str = "", label_selector: str = "", field_selector: str = ""
    ) -> ObjectList:
        """Return the objects of a kind."""
        return await self._cluster.list(
            api_version, kind, namespace=namespace, label_selector=label_selector, field_selector=field_selector
        )

    def pages(self, api_version: str, kind: str, *, label_selector: str = "") -> AsyncIterator[ObjectList]:
        """Yield the objects of a kind part by part."""
        return self._cluster.pages(api_version, kind, label_selector=label_selector)

    def watch(
        self, api_version: str, kind: str, *, resource_version: str, label_selector: str = ""
    ) -> AsyncIterator[WatchEvent]:
        """Yield what happens after a version."""
        return self._cluster.watch(api_version, kind, resource_version=resource_version, label_selector=label_selector)

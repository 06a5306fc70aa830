"""Follows one kind: lists it, watches what happens after, and lists it anew when the watch cannot go on.

It owns the life of that loop: what an error means for it, how long it waits, when it lists although nothing is wrong.
It must not judge what it sees.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable

import structlog

from posttrain.control.cache import Cache
from posttrain.control.kinds import Kind
from posttrain.control.port import Cluster, ClusterError, Expired, NotFound
from posttrain.plan.types import Manifest

_BACKOFF_SECONDS = 0.5
_BACKOFF_MAX_SECONDS = 15.0
_UNKNOWN_KIND_SECONDS = 60.0
_SOUND_SECONDS = 15.0
"""A watch that lasted so long was sound: what ends it is no failure of the attempt to watch."""

log = structlog.get_logger(__name__)


async def list_into(cache: Cache, cluster: Cluster, kind: Kind, *, label_selector: str = "") -> str:
    """Take the whole of a kind into the cache, page by page; return the version that a watch goes on from."""
    uids: set[str] = set()
    version = ""
    async for page in cluster.pages(*kind, label_selector=label_selector):
        uids |= _put_all(cache, page.items)
        version = page.resource_version
        del page  # before the next one comes
    cache.retain(kind, uids, version=version)
    return version


def _put_all(cache: Cache, manifests: Iterable[Manifest]) -> set[str]:
    """Put the objects and return their uids."""
    uids = set()
    for manifest in manifests:
        cache.put(manifest)
        uids.add(manifest["metadata"]["uid"])
    return uids


class Reflector:
    """Keeps the cache of one kind true."""

    def __init__(
        self, cluster: Cluster, cache: Cache, kind: Kind, *, label_selector: str, resync_seconds: float
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._kind = kind
        self._selector = label_selector
        self._resync_seconds = resync_seconds
        self._failures = 0

    async def run(self, *, time: Callable[[], float]) -> None:
        """Follow the kind until cancelled."""
        while True:
            try:
                version = await list_into(self._cache, self._cluster, self._kind, label_selector=self._selector)
                until = time() + self._resync_seconds
                while time() < until:
                    # A watch that hangs in silence must not outlive the resync.
                    version = await self._watch(version, until=until, time=time)
                    if self._failures:
                        await asyncio.sleep(self._delay())
            except Expired as error:
                log.info("listing anew", kind=self._kind[1], because=str(error))
                self._failures += 1
                await asyncio.sleep(self._delay())
            except NotFound:
                # A kind whose CRD is not installed: nothing of it can exist.
                self._cache.retain(self._kind, (), version=None)
                await asyncio.sleep(_UNKNOWN_KIND_SECONDS)
            except ClusterError as error:
                self._failures += 1
                seconds = self._delay()
                log.warning(
                    "the watch failed", kind=self._kind[1], error=str(error), again_in_seconds=round(seconds, 1)
                )
                await asyncio.sleep(seconds)

    async def _watch(self, version: str, *, until: float, time: Callable[[], float]) -> str:
        """Take the events after a version until the watch ends or the time is up; return the newest version."""
        began = time()
        events = self._cluster.watch(*self._kind, resource_version=version, label_selector=self._selector)
        try:
            async with asyncio.timeout(max(until - began, 0)):
                async for event in events:
                    version = event.object["metadata"]["resourceVersion"]
                    if event.type == "DELETED":
                        self._cache.drop(event.object)
                    elif event.type != "BOOKMARK":
                        self._cache.put(event.object)
            # Also an end without an error is a failure when it comes at once.
            self._failures += 1
        except TimeoutError:
            pass
        finally:
            if time() - began >= _SOUND_SECONDS:
                self._failures = 0
        return version

    def _delay(self) -> float:
        delay = min(_BACKOFF_SECONDS * 2.0 ** min(self._failures - 1, 10), _BACKOFF_MAX_SECONDS)
        return delay * random.uniform(0.75, 1.25)

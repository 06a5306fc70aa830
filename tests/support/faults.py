"""`FaultyCluster`: a way to a cluster on which calls go wrong, and that remembers what was asked and sent.

It owns where a call breaks: before the cluster did anything, or after, with the answer lost. It must not change what
the cluster does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from posttrain.control.kinds import Kind
from posttrain.control.port import Cluster, ObjectKey, ObjectList, WatchEvent
from posttrain.plan.types import Manifest

T = TypeVar("T")
READS = frozenset({"get", "list", "watch"})


class Crash(BaseException):
    """The process is gone: nobody catches it, and nothing in memory is left."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with a call."""

    when: Literal["before", "after"]
    error: BaseException


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the port; `body` is what was sent."""

    method: str
    kind: Kind
    name: str
    body: Any = None

    @property
    def text(self) -> str:
        """The call in three words, as tests compare it."""
        return f"{self.method} {self.kind[1]} {self.name}".rstrip()


class FaultyCluster:
    """The port."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.calls: list[Call] = []
        self.faults: deque[Fault | None] = deque()
        """What becomes of the next calls; with none left, all goes well."""
        self.refuse: Callable[[Call], BaseException | None] = lambda call: None
        """Answers a call with an error, before the cluster did anything; None lets it through."""

    def writes(self) -> list[str]:
        """Return the calls that were no reads, events of people left out."""
        return [call.text for call in self.calls if call.method not in READS and call.kind[1] != "Event"]

    def sent(self, method: str) -> list[Any]:
        """Return the bodies of the calls of a method."""
        return [call.body for call in self.calls if call.method == method]

    def clear(self) -> None:
        """Forget the calls."""
        self.calls.clear()

    async def create(self, manifest: Manifest) -> Manifest:
        return await self._call("create", ObjectKey.of(manifest), manifest, lambda: self._cluster.create(manifest))

    async def apply(self, manifest: Manifest, *, uid: str) -> Manifest:
        body = {**manifest, "metadata": {**manifest["metadata"], "uid": uid}}
        return await self._call("apply", ObjectKey.of(manifest), body, lambda: self._cluster.apply(manifest, uid=uid))

    async def apply_status(self, manifest: Manifest, *, manager: str) -> Manifest:
        write = lambda: self._cluster.apply_status(manifest, manager=manager)  # noqa: E731
        return await self._call("apply_status", ObjectKey.of(manifest), manifest, write)

    async def patch(self, key: ObjectKey, body: Mapping[str, Any], *, subresource: str = "") -> Manifest:
        return await self._call("patch", key, body, lambda: self._cluster.patch(key, body, subresource=subresource))

    async def delete(self, key: ObjectKey, *, uid: str) -> None:
        await self._call("delete", key, {"uid": uid}, lambda: self._cluster.delete(key, uid=uid))

    async def get(self, key: ObjectKey) -> Manifest:
        return await self._call("get", key, None, lambda: self._cluster.get(key))

    async def list(
        self, api_version: str, kind: str, *, namespace: str = "", label_selector: str = "", field_selector: str = ""
    ) -> ObjectList:
        key = ObjectKey(api_version, kind, namespace, "")
        selectors = {"label_selector": label_selector, "field_selector": field_selector}
        read = lambda: self._cluster.list(api_version, kind, namespace=namespace, **selectors)  # noqa: E731
        return await self._call("list", key, selectors, read)

    def pages(self, api_version: str, kind: str, *, label_selector: str = "") -> AsyncIterator[ObjectList]:
        return self._cluster.pages(api_version, kind, label_selector=label_selector)

    def watch(
        self, api_version: str, kind: str, *, resource_version: str, label_selector: str = ""
    ) -> AsyncIterator[WatchEvent]:
        return self._cluster.watch(api_version, kind, resource_version=resource_version, label_selector=label_selector)

    async def _call(self, method: str, key: ObjectKey, body: Any, act: Callable[[], Awaitable[T]]) -> T:
        call = Call(method=method, kind=(key.api_version, key.kind), name=key.name, body=deepcopy(body))
        self.calls.append(call)
        refused = self.refuse(call)
        if refused is not None:
            raise refused
        fault = self.faults.popleft() if self.faults else None
        if fault is not None and fault.when == "before":
            raise fault.error
        answer = await act()
        if fault is not None:
            raise fault.error
        return answer

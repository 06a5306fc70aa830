"""The authority in the namespaces of runs: the ConfigMap that pods check the progress server's certificate against.

It owns that ConfigMap and no other; it must not touch one that somebody else made.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable

from posttrain.control.kinds import CONFIG_MAP
from posttrain.control.port import AlreadyExists, Cluster, Conflict, NotFound, ObjectKey, Unavailable
from posttrain.plan import labels
from posttrain.plan.types import Manifest
from posttrain.settings import ProgressServerSettings

AUTHORITY_KEY = "ca.crt"
_RECHECK_SECONDS = 600.0
_REREAD_SECONDS = 10.0
"""Every look at every run asks for the authority: so long its file is not read again."""
_TRIES_MAX = 3


class ForeignAuthority(Exception):
    """A ConfigMap of that name is somebody else's and holds another authority; the message says what to change."""


class Authority:
    """Keeps the authority in every namespace that a run is in."""

    def __init__(
        self,
        cluster: Cluster,
        settings: ProgressServerSettings,
        *,
        read_authority: Callable[[], str],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._name = settings.ca_config_map
        self._read_authority = read_authority
        self._monotonic = monotonic
        self._seen: dict[str, tuple[str, float]] = {}
        """By namespace: the authority that it was seen to hold, and until when that is believed."""
        self._text, self._reread_at = "", 0.0
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ensure(self, namespace: str) -> None:
        """Make sure that pods of the namespace find the authority; most calls ask nobody.

        Raises:
            ForeignAuthority: somebody else's ConfigMap is in the way.
            Rejected, Unavailable: the API server's answers.
            OSError: the authority's file cannot be read.
        """
        text = self._current_text()
        async with self._locks[namespace]:
            known, until = self._seen.get(namespace, ("", 0.0))
            if known == text and self._monotonic() < until:
                return
            await self._bring(namespace, text)
            self._seen[namespace] = (text, self._monotonic() + _RECHECK_SECONDS)

    def _current_text(self) -> str:
        now = self._monotonic()
        if now >= self._reread_at:
            self._text, self._reread_at = self._read_authority(), now + _REREAD_SECONDS
        return self._text

    async def _bring(self, namespace: str, text: str) -> None:
        wanted = build_authority(namespace, name=self._name, text=text)
        for _ in range(_TRIES_MAX):
            try:
                found = await self._cluster.get(ObjectKey(*CONFIG_MAP, namespace, self._name))
                if (found.get("data") or {}).get(AUTHORITY_KEY) == text:
                    return
                self._check_ours(found, namespace=namespace)
                await self._cluster.apply(wanted, uid=found["metadata"]["uid"])
                return
            except Conflict:
                continue  # replaced by another since it was read
            except NotFound:
                pass
            try:
                await self._cluster.create(wanted)
                return
            except AlreadyExists:
                continue
        raise Unavailable(f"ConfigMap {namespace}/{self._name} changed {_TRIES_MAX} times while it was written")

    def _check_ours(self, found: Manifest, *, namespace: str) -> None:
        own = found["metadata"].get("labels") or {}
        if own.get(labels.MANAGED_BY) != labels.MANAGER:
            raise ForeignAuthority(
                f"ConfigMap {namespace}/{self._name} is not posttrain's and does not hold the progress server's "
                f"authority under {AUTHORITY_KEY}: pods there cannot report. Delete it, or label it "
                f"{labels.MANAGED_BY}={labels.MANAGER}, or choose another name in progressServer.caConfigMap"
            )


def build_authority(namespace: str, *, name: str, text: str) -> Manifest:
    """Return the ConfigMap; it belongs to no run, since all runs of the namespace mount it."""
    return {
        "apiVersion": CONFIG_MAP[0],
        "kind": CONFIG_MAP[1],
        "metadata": {"name": name, "namespace": namespace, "labels": {labels.MANAGED_BY: labels.MANAGER}},
        "data": {AUTHORITY_KEY: text},
    }

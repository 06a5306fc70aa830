"""kopf in the operator's process: it watches whatever the process' user is."""

from __future__ import annotations

import asyncio
import pwd
from typing import Any, NoReturn

import pytest
from kubernetes.aio import client

from posttrain.control.app import KopfEdge
from posttrain.control.cache import Cache
from posttrain.control.cluster import Connection

WAIT_SECONDS = 20.0


async def watch_until_asked() -> None:
    """Let kopf watch an API server that is not there, until it asks for the way to it."""
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    class Nowhere(Connection):
        def to_kopf(self) -> dict[str, Any]:
            loop.call_soon_threadsafe(asked.set)
            return super().to_kopf()

    connection = Nowhere(configuration=client.Configuration(host="http://127.0.0.1:9"))
    edge = KopfEdge(connection)
    assert edge.trouble == "kopf has not started yet"
    watching = asyncio.create_task(edge.run(Cache(on_change=lambda _: None)))
    try:
        await asyncio.wait_for(asked.wait(), WAIT_SECONDS)
    finally:
        watching.cancel()
        await asyncio.wait((watching,))


def test_kopf_starts_for_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nobody(number: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    # As in the image, whose user is a number.
    monkeypatch.setattr(pwd, "getpwuid", find_nobody)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    asyncio.run(watch_until_asked())


class BrokenEdge(KopfEdge):
    """Its kopf ends as soon as it starts."""

    async def _watch(self, *args: Any, **options: Any) -> NoReturn:
        raise OSError("the token's file is gone")


def test_an_edge_whose_kopf_ended_says_why() -> None:
    async def watch_until_ended() -> str:
        edge = BrokenEdge(Connection(configuration=client.Configuration(host="http://127.0.0.1:9")))
        watching = asyncio.create_task(edge.run(Cache(on_change=lambda _: None)))
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while edge.trouble == "kopf has not started yet":
                    await asyncio.sleep(0.05)
            return edge.trouble or ""
        finally:
            watching.cancel()
            await asyncio.wait((watching,))

    assert asyncio.run(watch_until_ended()) == "kopf ended: the token's file is gone"

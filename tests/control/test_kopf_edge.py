"""kopf in the operator's process: it watches whatever the process' user is."""

from __future__ import annotations

import asyncio
import pwd
import threading
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
    watching = asyncio.create_task(edge.run(Cache(on_change=lambda *_: None)))
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
        watching = asyncio.create_task(edge.run(Cache(on_change=lambda *_: None)))
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while edge.trouble == "kopf has not started yet":
                    await asyncio.sleep(0.05)
            return edge.trouble or ""
        finally:
            watching.cancel()
            await asyncio.wait((watching,))

    assert asyncio.run(watch_until_ended()) == "kopf ended: the token's file is gone"


class HeldEdge(KopfEdge):
    """Its kopf ends when it is told to and is let."""

    def __init__(self) -> None:
        super().__init__(Connection(configuration=client.Configuration(host="http://127.0.0.1:9")))
        self.began, self.let = threading.Event(), threading.Event()

    async def _watch(self, *args: Any, stop: threading.Event, **options: Any) -> None:
        self.began.set()
        while not (stop.is_set() and self.let.is_set()):
            await asyncio.sleep(0.01)

    async def run_and_stop(self) -> None:
        """Run until kopf watches, and then no longer."""
        watching = asyncio.create_task(self.run(Cache(on_change=lambda *_: None)))
        await asyncio.to_thread(self.began.wait, WAIT_SECONDS)
        watching.cancel()
        await asyncio.wait((watching,))


def kopf_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kopf"]


def test_an_edge_ends_after_its_thread() -> None:
    edge = HeldEdge()
    edge.let.set()
    before = kopf_threads()

    asyncio.run(edge.run_and_stop())

    assert [thread for thread in kopf_threads() if thread not in before] == []


def test_a_kopf_that_ends_when_nobody_waits_for_it_any_more_ends_without_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    edge, before = HeldEdge(), kopf_threads()
    asyncio.run(edge.run_and_stop())
    (thread,) = [thread for thread in kopf_threads() if thread not in before]

    edge.let.set()
    thread.join(WAIT_SECONDS)

    assert (thread.is_alive(), errors) == (False, [])

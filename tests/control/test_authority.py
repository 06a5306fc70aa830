"""The authority in the namespaces of runs."""

from __future__ import annotations

import asyncio

import pytest

from posttrain.control.authority import Authority, ForeignAuthority, build_authority
from posttrain.control.kinds import CONFIG_MAP
from posttrain.control.port import AlreadyExists, Conflict, Unavailable
from posttrain.plan.types import Manifest
from posttrain.settings import ProgressServerSettings
from tests.support.clock import Clock
from tests.support.fake_cluster import FakeCluster

NAME = "posttrain-progress-ca"


class World:
    """A cluster, and an authority whose file a test writes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.cluster = FakeCluster()
        self.text = "ca-1"
        self.authority = Authority(
            self.cluster,
            ProgressServerSettings(),
            read_authority=lambda: self.text,
            monotonic=self.clock.monotonic,
        )

    def swap(self, text: str) -> None:
        """Write the file, and let the time pass for which it is not read again."""
        self.text = text
        self.clock.advance(10)

    def put_foreign(self, text: str) -> None:
        manifest = build_authority("team", name=NAME, text=text)
        self.cluster.put({**manifest, "metadata": {"name": NAME, "namespace": "team"}})

    @property
    def found(self) -> Manifest:
        (found,) = self.cluster.objects(CONFIG_MAP)
        return found


def test_it_is_made_where_it_is_missing_and_asked_for_once() -> None:
    async def scenario() -> None:
        world = World()
        await asyncio.gather(*(world.authority.ensure("team") for _ in range(5)))

        assert world.found["data"] == {"ca.crt": "ca-1"}
        assert world.found["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "posttrain"}
        assert [method for method, _ in world.cluster.requests] == ["get", "create"]

    asyncio.run(scenario())


def test_a_new_authority_is_applied_and_an_old_one_left() -> None:
    async def scenario() -> None:
        world = World()
        await world.authority.ensure("team")
        world.clock.advance(601)
        await world.authority.ensure("team")
        world.swap("ca-2")
        await world.authority.ensure("team")

        assert world.found["data"] == {"ca.crt": "ca-2"}
        assert [method for method, _ in world.cluster.requests] == ["get", "create", "get", "get", "apply"]

    asyncio.run(scenario())


def test_one_that_somebody_deleted_comes_back_after_ten_minutes() -> None:
    async def scenario() -> None:
        world = World()
        await world.authority.ensure("team")
        (key,) = {key for method, key in world.cluster.requests if method == "create"}
        await world.cluster.delete(key, uid=world.found["metadata"]["uid"])
        world.clock.advance(599)
        await world.authority.ensure("team")
        assert world.cluster.objects(CONFIG_MAP) == []
        world.clock.advance(2)
        await world.authority.ensure("team")
        assert world.found["data"] == {"ca.crt": "ca-1"}

    asyncio.run(scenario())


def test_somebody_elses_is_never_touched() -> None:
    async def scenario() -> None:
        world = World()
        world.put_foreign("another")
        for _ in range(2):
            with pytest.raises(ForeignAuthority, match=r"ConfigMap team/posttrain-progress-ca .*label it"):
                await world.authority.ensure("team")
        assert world.found["data"] == {"ca.crt": "another"}

    asyncio.run(scenario())


def test_somebody_elses_that_holds_the_right_authority_will_do() -> None:
    async def scenario() -> None:
        world = World()
        world.put_foreign("ca-1")
        await world.authority.ensure("team")
        assert [method for method, _ in world.cluster.requests] == ["get"]

    asyncio.run(scenario())


def test_one_that_another_replica_writes_at_the_same_time_is_looked_at_again() -> None:
    async def scenario() -> None:
        world = World()
        world.cluster.fail("create", AlreadyExists("there"))
        await world.authority.ensure("team")
        world.swap("ca-2")
        world.cluster.fail("apply", Conflict("another uid"))
        await world.authority.ensure("team")
        assert world.found["data"] == {"ca.crt": "ca-2"}

    asyncio.run(scenario())


def test_an_api_server_that_does_not_answer_is_asked_again_next_time() -> None:
    async def scenario() -> None:
        world = World()
        world.cluster.fail("get", Unavailable("down"))
        with pytest.raises(Unavailable):
            await world.authority.ensure("team")
        await world.authority.ensure("team")
        assert world.found["data"] == {"ca.crt": "ca-1"}

    asyncio.run(scenario())

"""A replica that loses the lead stops its work, stays alive, and competes again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from posttrain.control.authority import Authority
from posttrain.control.cache import Cache
from posttrain.control.fence import FencedCluster
from posttrain.control.kinds import CONFIG_MAP, LEASE, TRAINING_RUN
from posttrain.control.leadership import Leadership
from posttrain.control.lease import Election, LeaseTimes
from posttrain.control.operator import Operator
from posttrain.control.port import ObjectKey, Unavailable
from posttrain.plan.types import Manifest
from posttrain.settings import Settings
from tests.support.fake_cluster import FakeCluster
from tests.support.virtual_time import run_virtually

TIMES = LeaseTimes(duration=10.0, renew_deadline=6.0, period=2.0)
KEY = ObjectKey(*LEASE, "posttrain-system", "posttrain-operator")
DOWN = Unavailable("connection refused")
RUN: Manifest = {"apiVersion": TRAINING_RUN[0], "kind": TRAINING_RUN[1], "metadata": {"name": "demo"}}


class RecordingEdge:
    """Reports nothing by itself, and takes a while to stop."""

    trouble: str | None = None

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def run(self, cache: Cache) -> None:
        self._replica.caches.append(cache)
        self._replica.story.append("begins")
        try:
            await asyncio.Event().wait()
        finally:
            with suppress(Unavailable):
                await self._replica.fenced.create(build_config_map("late"))
                self._replica.story.append("wrote late")
            await asyncio.sleep(1)
            self._replica.story.append("ends" if not self._replica.election.holds() else "ends while leading")


class Replica:
    """A replica's leadership over a fake cluster, and what its terms did."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.election = Election(
            cluster,
            namespace=KEY.namespace,
            name=KEY.name,
            identity="one",
            times=TIMES,
            monotonic=asyncio.get_running_loop().time,
        )
        self.fenced = FencedCluster(cluster, holds=self.election.holds)
        self.story: list[str] = []
        self.caches: list[Cache] = []
        self.leadership = Leadership(self.election, build_operator=self._build)

    def _build(self) -> Operator:
        settings = Settings()
        authority = Authority(self.fenced, settings.progress_server, read_authority=lambda: "authority")
        return Operator(self.fenced, settings=settings, edge=RecordingEdge(self), authority=authority)


def build_config_map(name: str) -> Manifest:
    return {"apiVersion": CONFIG_MAP[0], "kind": CONFIG_MAP[1], "metadata": {"name": name, "namespace": "team"}}


def lead(scenario: Callable[[Replica], Awaitable[None]]) -> None:
    """Run a scenario beside a replica that leads."""

    async def both() -> None:
        replica = Replica(FakeCluster())
        leading = asyncio.create_task(replica.leadership.run())
        await asyncio.sleep(1)
        assert replica.story == ["begins"]
        await scenario(replica)
        assert not leading.done()
        leading.cancel()
        with suppress(asyncio.CancelledError):
            await leading

    run_virtually(both())


def test_after_an_outage_it_works_again_with_nothing_of_the_term_before() -> None:
    async def scenario(replica: Replica) -> None:
        replica.cluster.fail("get", *[DOWN] * 30)
        await asyncio.sleep(20)
        assert replica.story == ["begins", "ends"]
        await asyncio.sleep(60)

        assert replica.story == ["begins", "ends", "begins"]
        assert replica.election.holds()
        first, second = replica.caches
        assert first is not second

    lead(scenario)


def test_its_work_ends_before_another_may_take_over_and_writes_nothing_late() -> None:
    async def scenario(replica: Replica) -> None:
        replica.cluster.fail("patch", *[DOWN] * 1000)
        await asyncio.sleep(TIMES.duration - TIMES.period)

        assert replica.story == ["begins", "ends"]
        assert replica.cluster.objects(CONFIG_MAP) == []

    lead(scenario)


def test_it_does_not_compete_before_its_work_has_ended() -> None:
    async def scenario(replica: Replica) -> None:
        lease = replica.cluster.objects(LEASE)[0]
        replica.cluster.put({**lease, "spec": {**lease["spec"], "holderIdentity": "two"}})
        await asyncio.sleep(TIMES.period)
        lease = replica.cluster.objects(LEASE)[0]
        replica.cluster.put({**lease, "spec": {**lease["spec"], "holderIdentity": ""}})
        await asyncio.sleep(10)

        assert replica.story == ["begins", "ends", "begins"]

    lead(scenario)


def test_what_a_term_that_is_over_still_reports_is_not_heard() -> None:
    async def scenario(replica: Replica) -> None:
        replica.cluster.fail("get", *[DOWN] * 10)
        await asyncio.sleep(60)
        first, second = replica.caches
        stored = replica.cluster.put({**RUN, "metadata": {"name": "demo", "namespace": "team"}})
        first.put(stored)
        await asyncio.sleep(1)

        assert second.runs() == []

    lead(scenario)


def test_readiness_names_what_the_lease_waits_for() -> None:
    async def scenario(replica: Replica) -> None:
        assert replica.leadership.unready() == []
        replica.cluster.fail("get", *[DOWN] * 10)
        await asyncio.sleep(TIMES.renew_deadline - 0.5)
        assert replica.leadership.unready() == ["lease: not renewed for 6.0 s: no answer"]
        await asyncio.sleep(3)
        assert replica.leadership.unready() == ["lease: connection refused"]
        await asyncio.sleep(60)
        assert replica.leadership.unready() == []

    lead(scenario)


def test_before_the_first_answer_it_is_not_ready() -> None:
    async def scenario() -> None:
        assert Replica(FakeCluster()).leadership.unready() == ["lease: not read yet"]

    run_virtually(scenario())


def test_a_bug_in_the_work_ends_the_leadership() -> None:
    class Broken(FakeCluster):
        async def list(self, *_: object, **__: object) -> object:  # type: ignore[override]
            raise RuntimeError("a bug")

    async def scenario() -> None:
        with pytest.raises(ExceptionGroup) as raised:
            await Replica(Broken()).leadership.run()
        assert raised.group_contains(RuntimeError, match="a bug")

    run_virtually(scenario())

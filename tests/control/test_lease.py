"""At most one replica leads, whatever the API server, the network and the clocks do."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.control.fence import FencedCluster
from posttrain.control.kinds import CONFIG_MAP, LEASE
from posttrain.control.lease import Election, LeaseTimes, Lost
from posttrain.control.port import Cluster, Conflict, ObjectKey, Unavailable
from posttrain.plan.types import Manifest
from tests.support.fake_cluster import FakeCluster
from tests.support.virtual_time import jump, run_virtually

TIMES = LeaseTimes(duration=10.0, renew_deadline=6.0, period=2.0)
KEY = ObjectKey(*LEASE, "posttrain-system", "posttrain-operator")


def elect(cluster: Cluster, identity: str, *, monotonic: Callable[[], float] | None = None) -> Election:
    return Election(
        cluster,
        namespace=KEY.namespace,
        name=KEY.name,
        identity=identity,
        times=TIMES,
        monotonic=monotonic or asyncio.get_running_loop().time,
    )


def spec_of(cluster: FakeCluster) -> dict[str, Any]:
    return dict(cluster.objects(LEASE)[0]["spec"])


def put_lease(cluster: FakeCluster, **spec: Any) -> Manifest:
    known = {"holderIdentity": "other", "leaseDurationSeconds": 10, "renewTime": "2026-03-01T09:00:00.000000Z"}
    metadata = {"name": KEY.name, "namespace": KEY.namespace}
    return cluster.put({"apiVersion": LEASE[0], "kind": LEASE[1], "metadata": metadata, "spec": known | spec})


async def seconds_until(task: asyncio.Task[Any]) -> float:
    began = asyncio.get_running_loop().time()
    await asyncio.wait((task,))
    return asyncio.get_running_loop().time() - began


class Hanging(FakeCluster):
    """Answers until it hangs: then no call ever returns."""

    hangs = False

    async def _begin(self, method: str, key: ObjectKey) -> None:
        if self.hangs:
            await asyncio.sleep(1_000_000)
        await super()._begin(method, key)


# --- Becoming the leader ---------------------------------------------------------------------------------------------


def test_the_first_replica_makes_the_lease_and_leads() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        election = elect(cluster, "one")
        assert not election.holds()
        await election.acquire()

        assert election.holds()
        assert election.holder == "one"
        spec = spec_of(cluster)
        assert spec.pop("acquireTime") == spec.pop("renewTime")
        assert spec == {"holderIdentity": "one", "leaseDurationSeconds": 10, "leaseTransitions": 0}

    run_virtually(scenario())


def test_of_two_replicas_one_leads_for_as_long_as_it_renews() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        first, second = elect(cluster, "one"), elect(cluster, "two")
        waits = [asyncio.create_task(election.acquire()) for election in (first, second)]
        await asyncio.sleep(1)
        leader, waiting = (first, second) if first.holds() else (second, first)
        holding = asyncio.create_task(leader.hold())
        await asyncio.sleep(500)

        assert (leader.holds(), waiting.holds()) == (True, False)
        assert waiting.holder == spec_of(cluster)["holderIdentity"] == leader.holder
        assert spec_of(cluster)["leaseTransitions"] == 0
        for task in (*waits, holding):
            task.cancel()

    run_virtually(scenario())


def test_a_lease_that_nobody_renews_is_taken_over_only_after_its_duration_by_the_own_clock() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        put_lease(cluster, leaseTransitions=3)
        election = elect(cluster, "two")
        waited = await seconds_until(asyncio.create_task(election.acquire()))

        assert TIMES.duration <= waited <= TIMES.duration + TIMES.period
        spec = spec_of(cluster)
        assert spec.pop("acquireTime") == spec.pop("renewTime")
        assert spec == {"holderIdentity": "two", "leaseDurationSeconds": 10, "leaseTransitions": 4}

    run_virtually(scenario())


@pytest.mark.parametrize("renewed", ["1970-01-01T00:00:00.000000Z", "2999-01-01T00:00:00.000000Z", None])
def test_the_times_in_the_record_play_no_part(renewed: str | None) -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        put_lease(cluster, renewTime=renewed)
        waited = await seconds_until(asyncio.create_task(elect(cluster, "two").acquire()))

        assert TIMES.duration <= waited <= TIMES.duration + TIMES.period

    run_virtually(scenario())


def test_every_renewal_begins_the_wait_anew() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        put_lease(cluster)
        acquiring = asyncio.create_task(elect(cluster, "two").acquire())
        for second in range(30):
            await asyncio.sleep(3)
            put_lease(cluster, renewTime=f"2026-03-01T09:00:{second:02}.000000Z")
        assert not acquiring.done()
        waited = await seconds_until(acquiring)

        assert TIMES.duration <= waited <= TIMES.duration + 2 * TIMES.period

    run_virtually(scenario())


def test_the_duration_is_the_holders() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        put_lease(cluster, leaseDurationSeconds=60)
        waited = await seconds_until(asyncio.create_task(elect(cluster, "two").acquire()))

        assert 60 <= waited <= 60 + TIMES.period

    run_virtually(scenario())


def test_a_lease_without_a_spec_is_free() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        metadata = {"name": KEY.name, "namespace": KEY.namespace}
        cluster.put({"apiVersion": LEASE[0], "kind": LEASE[1], "metadata": metadata})
        election = elect(cluster, "two")

        assert await seconds_until(asyncio.create_task(election.acquire())) == 0
        assert election.holds()

    run_virtually(scenario())


def test_whoever_loses_the_race_for_a_free_lease_does_not_lead() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        put_lease(cluster, holderIdentity="")
        cluster.fail("patch", Conflict("the lease has been modified"))
        election = elect(cluster, "two")
        acquiring = asyncio.create_task(election.acquire())
        await asyncio.sleep(1)

        assert not election.holds()
        await acquiring
        assert election.holds()

    run_virtually(scenario())


def test_a_server_that_does_not_answer_is_asked_again_until_it_does() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        cluster.fail("get", *[Unavailable("connection refused")] * 3)
        election = elect(cluster, "one")
        waited = await seconds_until(asyncio.create_task(election.acquire()))

        assert waited == 3 * TIMES.period
        assert election.holds()

    run_virtually(scenario())


def test_an_acquisition_counts_from_its_request_not_from_its_answer() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        election = elect(cluster, "one")
        acquiring = asyncio.create_task(election.acquire())
        await asyncio.sleep(0)  # the request travels
        jump(TIMES.renew_deadline)
        await acquiring

        assert not election.holds()
        with pytest.raises(Lost):
            await election.hold()

    run_virtually(scenario())


# --- Staying and ceasing to be it ------------------------------------------------------------------------------------


def test_a_transport_error_is_no_renewal_and_one_that_passes_does_no_harm() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        election = elect(cluster, "one")
        await election.acquire()
        holding = asyncio.create_task(election.hold())
        for method in ("patch", "get") * 5:
            cluster.fail(method, Unavailable("reset by peer"))
            await asyncio.sleep(3 * TIMES.period)
            assert election.holds()
        holding.cancel()

    run_virtually(scenario())


@pytest.mark.parametrize("method", ["get", "patch"])
def test_the_lead_is_lost_when_nothing_was_renewed_within_the_deadline(method: str) -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        election = elect(cluster, "one")
        await election.acquire()
        cluster.fail(method, *[Unavailable("timeout")] * 100)
        holding = asyncio.create_task(election.hold())
        waited = await seconds_until(holding)

        assert waited == TIMES.renew_deadline
        with pytest.raises(Lost, match=r"not renewed for 6\.0 s"):
            await holding
        assert not election.holds()

    run_virtually(scenario())


def test_a_call_that_never_returns_loses_the_lead_within_the_deadline() -> None:
    async def scenario() -> None:
        cluster = Hanging()
        election = elect(cluster, "one")
        await election.acquire()
        holding = asyncio.create_task(election.hold())
        cluster.hangs = True

        assert await seconds_until(holding) == TIMES.renew_deadline
        with pytest.raises(Lost, match="no answer"):
            await holding
        assert not election.holds()

    run_virtually(scenario())


def test_whoever_finds_another_in_the_record_stops_at_once() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        election = elect(cluster, "one")
        await election.acquire()
        put_lease(cluster, holderIdentity="two")
        holding = asyncio.create_task(election.hold())

        assert await seconds_until(holding) == TIMES.period
        with pytest.raises(Lost, match="two holds the lease"):
            await holding
        assert not election.holds()

    run_virtually(scenario())


def test_a_conflict_is_no_renewal_and_no_loss() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        election = elect(cluster, "one")
        await election.acquire()
        cluster.fail("patch", Conflict("somebody annotated the lease"))
        holding = asyncio.create_task(election.hold())
        await asyncio.sleep(100)

        assert election.holds()
        holding.cancel()

    run_virtually(scenario())


def test_a_lease_that_was_deleted_is_made_again() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        election = elect(cluster, "one")
        await election.acquire()
        await cluster.delete(KEY, uid=cluster.objects(LEASE)[0]["metadata"]["uid"])
        holding = asyncio.create_task(election.hold())
        await asyncio.sleep(100)

        assert election.holds()
        assert spec_of(cluster)["holderIdentity"] == "one"
        holding.cancel()

    run_virtually(scenario())


def test_a_process_that_was_stopped_writes_nothing_when_it_wakes() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        election = elect(cluster, "one")
        fenced = FencedCluster(cluster, holds=election.holds)
        await election.acquire()
        written = {
            "apiVersion": CONFIG_MAP[0],
            "kind": CONFIG_MAP[1],
            "metadata": {"name": "demo", "namespace": "team"},
        }
        made = await fenced.create(written)
        uid, key = made["metadata"]["uid"], ObjectKey(*CONFIG_MAP, "team", "demo")
        before = len(cluster.requests)

        jump(TIMES.renew_deadline)
        assert not election.holds()
        for write in (
            fenced.create(written),
            fenced.apply(written, uid=uid),
            fenced.apply_status(made, manager="posttrain"),
            fenced.patch(key, {"data": {"a": "1"}}),
            fenced.delete(key, uid=uid),
        ):
            with pytest.raises(Unavailable, match="does not lead any more"):
                await write
        assert len(cluster.requests) == before
        assert await fenced.get(key) == made
        assert (await fenced.list(*CONFIG_MAP)).items == [made]

    run_virtually(scenario())


# --- Going -----------------------------------------------------------------------------------------------------------


def test_a_released_lease_is_taken_over_at_once() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        first, second = elect(cluster, "one"), elect(cluster, "two")
        await first.acquire()
        acquiring = asyncio.create_task(second.acquire())
        await asyncio.sleep(1)
        await first.release()

        assert not first.holds()
        assert await seconds_until(acquiring) <= TIMES.period
        assert second.holds()

    run_virtually(scenario())


def test_who_does_not_lead_releases_nothing() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        before = put_lease(cluster)
        await elect(cluster, "two").release()

        assert cluster.objects(LEASE) == [before]

    run_virtually(scenario())


def test_a_release_that_cannot_be_written_is_no_error() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        election = elect(cluster, "one")
        await election.acquire()
        cluster.fail("patch", Unavailable("connection refused"))
        await election.release()

        assert not election.holds()

    run_virtually(scenario())


# --- Never two -------------------------------------------------------------------------------------------------------


class Flaky:
    """One replica's way to the cluster: each call may fail before or after it did something, or take its time."""

    def __init__(self, cluster: FakeCluster, *, calls: list[tuple[str, float]]) -> None:
        self._cluster = cluster
        self._calls = iter(calls)

    async def _call(self, method: str, *args: Any, **options: Any) -> Any:
        what, seconds = next(self._calls, ("ok", 0.0))
        await asyncio.sleep(seconds)
        if what == "before":
            raise Unavailable("reset by peer")
        answer = await getattr(self._cluster, method)(*args, **options)
        if what == "after":
            await asyncio.sleep(seconds)
            raise Unavailable("the answer broke off")
        return answer

    async def get(self, key: ObjectKey) -> Manifest:
        return dict(await self._call("get", key))

    async def create(self, manifest: Manifest) -> Manifest:
        return dict(await self._call("create", manifest))

    async def patch(self, key: ObjectKey, body: Any, *, subresource: str = "") -> Manifest:
        return dict(await self._call("patch", key, body, subresource=subresource))


CALLS = st.lists(
    st.tuples(st.sampled_from(["ok", "ok", "ok", "before", "after"]), st.sampled_from([0.0, 0.0, 0.1, 1.5, 4.0, 7.0])),
    max_size=40,
)
TURNS = st.lists(st.tuples(st.sampled_from(["hold", "release", "stop"]), st.integers(1, 40)), max_size=6)
"""How a replica's times as the leader end: it holds for as long as it can, or lets go, or stops without a word."""


@settings(max_examples=40, deadline=None)
@given(calls=st.tuples(CALLS, CALLS), turns=st.tuples(TURNS, TURNS))
def test_there_are_never_two_leaders(
    calls: tuple[list[tuple[str, float]], ...], turns: tuple[list[tuple[str, int]], ...]
) -> None:
    async def live(cluster: Cluster, identity: str, turns: list[tuple[str, int]], elections: list[Election]) -> None:
        for number in itertools.count():
            how, seconds = turns[number] if number < len(turns) else ("hold", 0)
            # Who stopped without a word comes back as another process, under another name.
            election = elect(cluster, f"{identity}-{number}")
            elections.append(election)
            await election.acquire()
            with suppress(Lost, TimeoutError):
                async with asyncio.timeout(None if how == "hold" else seconds):
                    await election.hold()
            if how == "release" and election.holds():
                await election.release()
            if how == "stop":
                elections.remove(election)

    async def scenario() -> bool:
        cluster = FakeCluster()
        elections: list[Election] = []
        tasks = [
            asyncio.create_task(live(Flaky(cluster, calls=way), f"replica-{number}", turns[number], elections))  # type: ignore[arg-type]  # the calls that it makes
            for number, way in enumerate(calls)
        ]
        for _ in range(3000):
            await asyncio.sleep(0.25)
            assert sum(election.holds() for election in elections) <= 1
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        return any(election.holds() for election in elections)

    assert run_virtually(scenario()), "with every fault behind them, somebody leads"

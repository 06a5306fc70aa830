"""A reflector keeps the cache of its kind true, whatever becomes of its watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from posttrain.control.cache import Cache
from posttrain.control.kinds import CONFIG_MAP, PYTORCHJOB, Kind
from posttrain.control.port import Cluster, Expired, ObjectKey, ObjectList, Rejected, Unavailable, WatchEvent
from posttrain.control.reflector import Reflector
from posttrain.plan.types import Manifest
from tests.support.fake_cluster import FakeCluster
from tests.support.virtual_time import run_virtually

RESYNC = 600.0


def build(name: str = "demo-a1", *, run: str | None = "demo", kind: Kind = CONFIG_MAP, **fields: Any) -> Manifest:
    labels = {"posttrain.dev/run": run} if run else {}
    metadata = {"name": name, "namespace": "team", "labels": labels}
    return {"apiVersion": kind[0], "kind": kind[1], "metadata": metadata, **fields}


def key(name: str = "demo-a1", *, kind: Kind = CONFIG_MAP) -> ObjectKey:
    return ObjectKey(*kind, "team", name)


class Followed:
    """A cluster, the cache that a reflector fills from it, and what was told of."""

    def __init__(self, cluster: FakeCluster, *, seen_through: Cluster | None = None, kind: Kind = CONFIG_MAP) -> None:
        self.cluster = cluster
        self.rung: list[tuple[str, str]] = []
        self.cache = Cache(on_change=lambda run, _: self.rung.append(run))
        self._reflector = Reflector(
            seen_through or cluster, self.cache, kind, label_selector="posttrain.dev/run", resync_seconds=RESYNC
        )

    def names(self) -> list[str]:
        return [manifest["metadata"]["name"] for manifest in self.cache.children(("team", "demo"))]

    async def follow(self) -> None:
        await self._reflector.run(time=asyncio.get_running_loop().time)


def follow(followed: Followed, scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario while the reflector runs."""

    async def both() -> None:
        running = asyncio.create_task(followed.follow())
        await asyncio.sleep(0.1)
        await scenario()
        assert not running.done()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    run_virtually(both())


def test_what_is_there_is_listed_and_what_comes_after_is_watched() -> None:
    cluster = FakeCluster()
    cluster.put(build("demo-a1"))
    cluster.put(build("elsewhere", run=None))
    followed = Followed(cluster)

    async def scenario() -> None:
        assert followed.names() == ["demo-a1"]
        assert followed.cache.is_listed(CONFIG_MAP)
        made = await cluster.create(build("demo-a2", data={"a": "1"}))
        await cluster.patch(key("demo-a1"), {"data": {"a": "2"}})
        await asyncio.sleep(1)
        assert followed.names() == ["demo-a1", "demo-a2"]
        kept = followed.cache.get(key("demo-a2"))
        assert kept is not None
        assert (kept["metadata"]["uid"], kept["data"]) == (made["metadata"]["uid"], {"a": "1"})
        assert (followed.cache.get(key("demo-a1")) or {})["data"] == {"a": "2"}
        await cluster.delete(key("demo-a2"), uid=made["metadata"]["uid"])
        await asyncio.sleep(1)
        assert followed.names() == ["demo-a1"]

    follow(followed, scenario)
    assert (cluster.count("list"), cluster.count("watch")) == (1, 1)


def test_an_object_that_gets_or_loses_the_label_comes_and_goes() -> None:
    cluster = FakeCluster()
    cluster.put(build(run=None))
    followed = Followed(cluster)

    async def scenario() -> None:
        for label, names in (("demo", ["demo-a1"]), (None, []), ("demo", ["demo-a1"])):
            await cluster.patch(key(), {"metadata": {"labels": {"posttrain.dev/run": label}}})
            await asyncio.sleep(1)
            assert followed.names() == names

    follow(followed, scenario)


def test_a_watch_that_ends_goes_on_from_the_last_version_without_a_list() -> None:
    cluster = FakeCluster()
    followed = Followed(cluster)

    async def scenario() -> None:
        for number in range(1, 5):
            await asyncio.sleep(60)
            cluster.put(build(f"demo-a{number}"))
            await asyncio.sleep(1)
            cluster.cut_watches()
        await asyncio.sleep(20)
        assert followed.names() == ["demo-a1", "demo-a2", "demo-a3", "demo-a4"]

    follow(followed, scenario)
    assert (cluster.count("list"), cluster.count("watch")) == (1, 5)


def test_what_happens_between_two_watches_is_seen() -> None:
    cluster = FakeCluster()
    cluster.put(build("demo-a1"))
    followed = Followed(cluster)

    async def scenario() -> None:
        await asyncio.sleep(60)
        cluster.cut_watches()
        cluster.put(build("demo-a2"))
        await cluster.delete(key("demo-a1"), uid=cluster.objects(CONFIG_MAP)[0]["metadata"]["uid"])
        await asyncio.sleep(20)
        assert followed.names() == ["demo-a2"]

    follow(followed, scenario)
    assert cluster.count("list") == 1


def test_a_watch_that_follows_a_bookmark_is_not_too_old() -> None:
    cluster = FakeCluster()
    followed = Followed(cluster)

    async def scenario() -> None:
        cluster.put(build("elsewhere", run=None))
        cluster.send_bookmarks()
        await asyncio.sleep(60)
        cluster.expire_watches()
        cluster.cut_watches()
        await asyncio.sleep(20)

    follow(followed, scenario)
    assert (cluster.count("list"), cluster.count("watch")) == (1, 2)


class BrokenOff(FakeCluster):
    """Its lists have a first page only, for as long as that is so."""

    breaks_off = False

    async def pages(self, *kind: str, **options: Any) -> AsyncIterator[ObjectList]:  # type: ignore[override]
        async for page in super().pages(*kind, **options):
            yield page
            if self.breaks_off:
                raise Expired("the continue token is too old")


def test_a_list_that_breaks_off_between_two_pages_drops_nothing_and_is_begun_anew() -> None:
    cluster = BrokenOff()
    for i in range(1, 4):
        cluster.put(build(f"demo-a{i}"))
    followed = Followed(cluster)

    async def scenario() -> None:
        cluster.breaks_off = True
        cluster.remove(key("demo-a3"))
        cluster.expire_watches()
        await asyncio.sleep(5)
        assert followed.names() == ["demo-a1", "demo-a2", "demo-a3"]
        assert cluster.count("list") > 2
        cluster.breaks_off = False
        await asyncio.sleep(20)
        assert followed.names() == ["demo-a1", "demo-a2"]

    follow(followed, scenario)


def test_a_version_that_is_too_old_means_a_new_list_and_what_went_meanwhile_is_dropped() -> None:
    cluster = FakeCluster()
    cluster.put(build("demo-a1"))
    followed = Followed(cluster)

    async def scenario() -> None:
        await asyncio.sleep(60)
        cluster.cut_watches()
        await cluster.delete(key("demo-a1"), uid=cluster.objects(CONFIG_MAP)[0]["metadata"]["uid"])
        cluster.put(build("demo-a2"))
        cluster.expire_watches()
        await asyncio.sleep(30)
        assert followed.names() == ["demo-a2"]
        assert followed.rung == [("team", "demo")] * 3

    follow(followed, scenario)
    assert cluster.count("list") == 2


def test_a_deletion_while_the_connection_was_cut_is_seen() -> None:
    cluster = FakeCluster()
    cluster.put(build("demo-a1"))
    followed = Followed(cluster)

    async def scenario() -> None:
        cluster.fail("watch", *[Unavailable("connection refused")] * 5)
        cluster.fail("list", *[Unavailable("connection refused")] * 5)
        cluster.cut_watches()
        await cluster.delete(key("demo-a1"), uid=cluster.objects(CONFIG_MAP)[0]["metadata"]["uid"])
        cluster.expire_watches()
        await asyncio.sleep(120)
        assert followed.names() == []

    follow(followed, scenario)


def test_a_server_that_refuses_every_watch_is_asked_ever_more_seldom() -> None:
    cluster = FakeCluster()
    followed = Followed(cluster)
    cluster.fail("watch", *[Unavailable("etcdserver: leader changed (HTTP 500)")] * 1000)

    async def scenario() -> None:
        await asyncio.sleep(300)

    follow(followed, scenario)
    # 0.5 s doubled up to 15 s: 5 within the first 15 s, then one in 15 s.
    assert cluster.count("watch") == cluster.count("list")
    assert cluster.count("list") <= 30


def test_a_server_without_answers_is_asked_ever_more_seldom_and_one_that_recovers_is_followed() -> None:
    cluster = FakeCluster()
    cluster.put(build())
    followed = Followed(cluster)
    cluster.fail("list", *[Unavailable("timeout")] * 12)

    async def scenario() -> None:
        await asyncio.sleep(60)
        assert not followed.cache.is_listed(CONFIG_MAP)
        assert cluster.count("list") <= 12
        await asyncio.sleep(120)
        assert followed.names() == ["demo-a1"]

    follow(followed, scenario)


def test_a_missing_right_is_no_end_and_no_hot_loop() -> None:
    cluster = FakeCluster()
    followed = Followed(cluster)
    cluster.fail("list", *[Rejected("configmaps is forbidden")] * 1000)

    async def scenario() -> None:
        await asyncio.sleep(300)

    follow(followed, scenario)
    assert 10 <= cluster.count("list") <= 30


class Shortlived(FakeCluster):
    """Ends every watch as soon as it has said what happened: as a proxy does that allows none."""

    async def watch(self, *kind: str, **options: Any) -> AsyncIterator[WatchEvent]:  # type: ignore[override]
        events = super().watch(*kind, **options)
        asyncio.get_running_loop().call_later(0.01, self.cut_watches)
        async for event in events:
            yield event


def test_watches_that_end_at_once_make_no_hot_loop() -> None:
    cluster = Shortlived()
    followed = Followed(cluster)

    async def scenario() -> None:
        await asyncio.sleep(300)
        cluster.put(build())
        await asyncio.sleep(20)
        assert followed.names() == ["demo-a1"]

    follow(followed, scenario)
    assert cluster.count("watch") <= 40


def test_after_a_watch_that_went_well_an_error_is_the_first_again() -> None:
    cluster = FakeCluster()
    followed = Followed(cluster)

    async def scenario() -> None:
        for _ in range(6):
            await asyncio.sleep(60)
            before = cluster.count("list")
            cluster.fail("watch", Unavailable("reset by peer"))
            cluster.cut_watches()
            await asyncio.sleep(1)
            assert cluster.count("list") == before + 1, "it came back within a second"

    follow(followed, scenario)


def test_a_kind_that_is_not_installed_is_listed_empty_and_found_when_it_comes() -> None:
    cluster = FakeCluster(missing_kinds=frozenset({PYTORCHJOB}))
    followed = Followed(cluster, kind=PYTORCHJOB)

    async def scenario() -> None:
        assert followed.cache.is_listed(PYTORCHJOB)
        await asyncio.sleep(300)
        assert cluster.count("list") <= 6
        cluster.missing_kinds = frozenset()
        cluster.put(build(kind=PYTORCHJOB))
        await asyncio.sleep(70)
        assert followed.names() == ["demo-a1"]

    follow(followed, scenario)


def test_a_kind_that_is_uninstalled_leaves_nothing_behind() -> None:
    cluster = FakeCluster()
    cluster.put(build(kind=PYTORCHJOB))
    followed = Followed(cluster, kind=PYTORCHJOB)

    async def scenario() -> None:
        assert followed.names() == ["demo-a1"]
        cluster.missing_kinds = frozenset({PYTORCHJOB})
        cluster.cut_watches()
        await asyncio.sleep(30)
        assert followed.names() == []

    follow(followed, scenario)


class Deaf(FakeCluster):
    """Opens watches over which nothing ever comes, as over a connection that a firewall has forgotten."""

    async def watch(self, *kind: str, **options: Any) -> AsyncIterator[WatchEvent]:  # type: ignore[override]
        self.requests.append(("watch", ObjectKey(kind[0], kind[1], "", "")))
        await asyncio.Event().wait()
        yield WatchEvent(type="BOOKMARK", object={})


def test_a_watch_that_hangs_in_silence_is_cut_by_the_resync() -> None:
    cluster = Deaf()
    cluster.put(build("demo-a1"))
    followed = Followed(cluster)

    async def scenario() -> None:
        cluster.put(build("demo-a2"))
        await cluster.delete(key("demo-a1"), uid=cluster.objects(CONFIG_MAP)[0]["metadata"]["uid"])
        await asyncio.sleep(RESYNC - 1)
        assert followed.names() == ["demo-a1"]
        await asyncio.sleep(2)
        assert followed.names() == ["demo-a2"]

    follow(followed, scenario)
    assert (cluster.count("list"), cluster.count("watch")) == (2, 2)


def test_everything_is_listed_now_and_then_although_nothing_is_wrong() -> None:
    cluster = FakeCluster()
    followed = Followed(cluster)

    async def scenario() -> None:
        await asyncio.sleep(3 * RESYNC + 10)

    follow(followed, scenario)
    assert (cluster.count("list"), cluster.count("watch")) == (4, 4)

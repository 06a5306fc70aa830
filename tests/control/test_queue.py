"""The work queue keeps controller-runtime's promises."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.control.queue import BASE_SECONDS, MAX_SECONDS, LoopClock, WorkQueue
from tests.support.virtual_time import run_virtually


def middle() -> float:
    """Jitter that changes nothing."""
    return 0.5


def build_queue(jitter: Iterable[float] | None = None) -> WorkQueue[str]:
    return WorkQueue(clock=LoopClock(), jitter=iter(jitter).__next__ if jitter is not None else middle)


def now() -> float:
    return asyncio.get_running_loop().time()


async def take(queue: WorkQueue[str], count: int) -> list[tuple[str, float]]:
    """Return the next keys with the time at which each came; each is worked on for no time."""
    taken = []
    for _ in range(count):
        key = await queue.get()
        taken.append((key, round(now(), 6)))
        queue.done(key)
    return taken


def test_a_key_that_waits_is_not_queued_twice() -> None:
    async def scenario() -> None:
        queue = build_queue()
        for key in ("a", "b", "a", "a", "b"):
            queue.add(key)

        assert await take(queue, 2) == [("a", 0), ("b", 0)]
        assert len(queue) == 0

    run_virtually(scenario())


def test_a_key_is_worked_on_by_one_worker_and_comes_again_when_it_was_dirtied_meanwhile() -> None:
    async def scenario() -> None:
        queue = build_queue()
        queue.add("a")
        assert await queue.get() == "a"
        queue.add("a")
        queue.add("a")
        second = asyncio.create_task(queue.get())
        await asyncio.sleep(100)
        assert not second.done()

        queue.done("a")
        assert await second == "a"
        queue.done("a")
        assert len(queue) == 0

    run_virtually(scenario())


def test_a_key_that_nothing_dirtied_does_not_come_again() -> None:
    async def scenario() -> None:
        queue = build_queue()
        queue.add("a")
        queue.done(await queue.get())
        waiting = asyncio.create_task(queue.get())
        await asyncio.sleep(1000)
        assert not waiting.done()
        waiting.cancel()

    run_virtually(scenario())


def test_every_waiting_worker_gets_a_key_of_its_own() -> None:
    async def scenario() -> None:
        queue = build_queue()
        workers = [asyncio.create_task(queue.get()) for _ in range(3)]
        await asyncio.sleep(1)
        for key in "abc":
            queue.add(key)
        assert sorted(await asyncio.gather(*workers)) == ["a", "b", "c"]

    run_virtually(scenario())


def test_the_delay_doubles_with_each_failure_up_to_a_cap() -> None:
    async def scenario() -> None:
        queue = build_queue()
        delays = [queue.retry("a") for _ in range(20)]

        assert delays[:4] == [BASE_SECONDS, 2 * BASE_SECONDS, 4 * BASE_SECONDS, 8 * BASE_SECONDS]
        assert all(later == min(2 * delay, MAX_SECONDS) for delay, later in itertools.pairwise(delays))
        assert delays[-1] == MAX_SECONDS

    run_virtually(scenario())


def test_a_delay_is_spread_by_a_quarter_either_way() -> None:
    async def scenario() -> None:
        queue = build_queue(jitter=[0.0, 1.0])

        assert queue.retry("a") == 0.75 * BASE_SECONDS
        assert queue.retry("b") == 1.25 * BASE_SECONDS

    run_virtually(scenario())


def test_a_success_forgets_the_failures() -> None:
    async def scenario() -> None:
        queue = build_queue()
        for _ in range(5):
            queue.retry("a")
        queue.succeed("a")

        assert queue.retry("a") == BASE_SECONDS

    run_virtually(scenario())


def test_one_keys_failures_do_not_delay_another() -> None:
    async def scenario() -> None:
        queue = build_queue()
        for _ in range(5):
            queue.retry("a")

        assert queue.retry("b") == BASE_SECONDS

    run_virtually(scenario())


def test_a_key_that_failed_comes_back_after_its_delay() -> None:
    async def scenario() -> None:
        queue = build_queue()
        queue.retry("a")

        assert await take(queue, 1) == [("a", BASE_SECONDS)]

    run_virtually(scenario())


def test_a_server_that_asks_for_patience_gets_it() -> None:
    async def scenario() -> None:
        queue = build_queue()

        assert queue.retry("a", at_least=30) == 30
        assert await take(queue, 1) == [("a", 30)]

    run_virtually(scenario())


def test_of_several_times_the_earliest_counts() -> None:
    async def scenario() -> None:
        queue = build_queue()
        for seconds in (50.0, 20.0, 70.0):
            queue.add_after("a", seconds)
        rest = asyncio.create_task(take(queue, 2))
        await asyncio.sleep(200)

        assert not rest.done(), "the later times were dropped"
        queue.add("a")
        assert await rest == [("a", 20), ("a", 200)]

    run_virtually(scenario())


def test_no_delay_means_at_once() -> None:
    async def scenario() -> None:
        queue = build_queue()
        queue.add_after("a", 0)
        queue.add_after("b", -3)

        assert await take(queue, 2) == [("a", 0), ("b", 0)]

    run_virtually(scenario())


def test_what_is_due_while_a_worker_has_the_key_comes_afterwards() -> None:
    async def scenario() -> None:
        queue = build_queue()
        queue.add("a")
        await queue.get()
        queue.add_after("a", 5)
        await asyncio.sleep(10)
        assert len(queue) == 0
        queue.done("a")

        assert await take(queue, 1) == [("a", 10)]

    run_virtually(scenario())


KEYS = st.sampled_from("abcdef")


@settings(max_examples=80, deadline=None)
@given(
    additions=st.lists(st.tuples(KEYS, st.sampled_from([0.0, 0.1, 0.5, 3.0])), min_size=1, max_size=60),
    workers=st.integers(1, 4),
    work=st.lists(st.sampled_from([0.0, 0.2, 1.0]), min_size=1, max_size=7),
    failures=st.sets(st.integers(0, 40)),
)
def test_of_many_keys_and_workers_nothing_is_lost_and_no_key_is_worked_on_twice_at_a_time(
    additions: list[tuple[str, float]], workers: int, work: list[float], failures: set[int]
) -> None:
    async def scenario() -> None:
        queue = build_queue()
        owed_since: dict[str, float] = {}
        began: dict[str, list[float]] = {key: [] for key in "abcdef"}
        working: set[str] = set()
        count = itertools.count()

        async def work_on_keys() -> None:
            while True:
                key = await queue.get()
                assert key not in working
                working.add(key)
                number = next(count)
                began[key].append(now())
                await asyncio.sleep(work[number % len(work)])
                if number in failures:
                    owed_since[key] = now()
                    queue.retry(key)
                else:
                    queue.succeed(key)
                working.discard(key)
                queue.done(key)

        tasks = [asyncio.create_task(work_on_keys()) for _ in range(workers)]
        for key, seconds in additions:
            await asyncio.sleep(0.05)
            owed_since[key] = now()
            queue.add_after(key, seconds)
        await asyncio.sleep(10_000)
        for task in tasks:
            assert not task.done()
            task.cancel()

        assert len(queue) == 0
        assert not working
        # Of two times the earliest counts, so what is due later may be looked at earlier, but never not at all.
        assert all(began[key][-1] >= since for key, since in owed_since.items())

    run_virtually(scenario())

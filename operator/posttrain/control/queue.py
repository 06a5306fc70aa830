"""The work queue: which runs are to be looked at, each by one worker at a time.

It owns the rules of controller-runtime's queue: a key that waits is not queued twice, one that is dirtied while it is
worked on is queued again afterwards, one that failed comes back after an exponential delay with jitter. It must not
know what a key stands for.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

K = TypeVar("K")

BASE_SECONDS = 0.2
MAX_SECONDS = 300.0
_MAX_DOUBLINGS = 16


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None:
        """Do not make it."""

    def when(self) -> float:
        """Return when it is due, on the clock's scale."""


class Clock(Protocol):
    """What the queue needs of an event loop; a test gives another one."""

    def time(self) -> float:
        """Return the time in seconds."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call back after so many seconds."""


class LoopClock:
    """The running event loop's clock."""

    def time(self) -> float:
        """Return the loop's time."""
        return asyncio.get_running_loop().time()

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call back after so many seconds."""
        return asyncio.get_running_loop().call_later(delay, callback)


class WorkQueue(Generic[K]):
    """Keys to work on; all of it in one event loop."""

    def __init__(self, *, clock: Clock, jitter: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._jitter = jitter
        self._ready: deque[K] = deque()
        self._waiting: set[K] = set()
        """Keys in `_ready`, and keys to be queued again when their worker is done."""
        self._working: set[K] = set()
        self._timers: dict[K, Timer] = {}
        self._failures: dict[K, int] = {}
        self._wakeup = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, key: K) -> None:
        """Queue a key at once."""
        if key in self._waiting:
            return
        self._waiting.add(key)
        if key not in self._working:
            self._ready.append(key)
            self._wakeup.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Queue a key after so many seconds; of several such times the earliest counts."""
        if seconds <= 0:
            self.add(key)
            return
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= self._clock.time() + seconds:
                return
            timer.cancel()
        self._timers[key] = self._clock.call_later(seconds, lambda: self._due(key))

    def retry(self, key: K, *, at_least: float = 0.0) -> float:
        """Queue a key that failed, after a delay that doubles with each failure; return the delay in seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        doubled = BASE_SECONDS * 2.0 ** min(failures, _MAX_DOUBLINGS)
        delay = max(min(doubled, MAX_SECONDS) * (0.75 + 0.5 * self._jitter()), at_least)
        self.add_after(key, delay)
        return delay

    def succeed(self, key: K) -> None:
        """Forget a key's failures."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """Return the next key; it is this worker's until `done`."""
        while not self._ready:
            self._wakeup.clear()
            await self._wakeup.wait()
        key = self._ready.popleft()
        self._waiting.discard(key)
        self._working.add(key)
        return key

    def done(self, key: K) -> None:
        """Give a key back."""
        self._working.discard(key)
        if key in self._waiting:
            self._ready.append(key)
            self._wakeup.set()

    def close(self) -> None:
        """Let nothing come due any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _due(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)

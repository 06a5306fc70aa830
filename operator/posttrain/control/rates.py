"""How often each of many senders may come: a token bucket each.

It owns the counting; it must not know what is counted.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

_KEYS_MAX = 10_000


class RateLimit:
    """`burst` at once, and `per_second` from then on, for each key; the keys that came least recently are forgotten."""

    def __init__(
        self, *, per_second: float, burst: int, monotonic: Callable[[], float] = time.monotonic, keys: int = _KEYS_MAX
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._monotonic = monotonic
        self._keys = keys
        self._levels: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()
        """By key: what was left, and when."""

    def wait_seconds(self, key: Hashable) -> float:
        """Count one that comes, and return 0; or count nothing, and return how long it has to wait."""
        now = self._monotonic()
        left, since = self._levels.get(key, (float(self._burst), now))
        left = min(self._burst, left + (now - since) * self._per_second)
        admitted = left >= 1
        self._levels[key] = (left - admitted, now)
        self._levels.move_to_end(key)
        if len(self._levels) > self._keys:
            self._levels.popitem(last=False)
        return 0.0 if admitted else (1 - left) / self._per_second

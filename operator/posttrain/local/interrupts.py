"""Ctrl-C, `kill` and a closed terminal, counted instead of obeyed while a run is being executed.

It owns the process's signal handlers for as long as it is entered; it must not decide what a signal means.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 2


class Interrupts:
    """Counts signals while it is entered; before `deferred` is set, and after the second one, they interrupt at once.

    `notify` is called from a signal handler.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._previous: dict[signal.Signals, Any] = {}
        self.count = 0
        self.deferred = False
        """Whether somebody looks at `count`."""

    def __enter__(self) -> Self:
        """Take over the signals."""
        for number in _SIGNALS:
            # Under `nohup` a closed terminal means nothing to us either. An ignored SIGINT is only what a shell gives
            # to its background jobs, and whoever sends one to them means it.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if not self.deferred or self.count > _PATIENCE:
            raise KeyboardInterrupt
        self._notify()

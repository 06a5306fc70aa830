"""Programs sent to machines that a service lends: each machine runs one at a time, and another is lent where one fails.

It owns how often a program is tried, and that a failure of a machine is never taken for one of the program. It must not
know any service but by `Machine`.
"""

from __future__ import annotations

import atexit
import base64
import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from posttrain_workloads.rewards import errand
from posttrain_workloads.rewards.execution import Execution, ExecutionError, Program, parse_answer

_log = logging.getLogger(__name__)
_ERRAND = Path(errand.__file__).read_text(encoding="utf-8")
_ATTEMPTS = 3
_PAUSE_SECONDS = 2.0
_REST_SECONDS = 30.0
"""After a program for which no machine was to be had, the next ones are tried once, for so long."""
_ANSWER_SECONDS = 60.0
"""What an answer may take besides the program's own time."""
LENT_SECONDS = 3600
"""After so long a service takes its machine back, whatever became of us."""
_KEPT_SECONDS = 2400.0
"""After so long it is given back: what remains is more than any program takes."""


class Machine(Protocol):
    """A machine that a service has lent."""

    def execute(self, source: str, *, seconds: float) -> str:
        """Run Python code; return what it prints. Whatever it raises, the machine is given back."""
        ...

    def give_back(self) -> None:
        """End it."""
        ...


@dataclass
class _Lent:
    machine: Machine
    since: float


@dataclass
class RentedSandbox:
    """Machines of one service, as many as programs run at the same time; they are kept from one step to the next."""

    name: str
    """Of the service."""
    lend: Callable[[], Machine]
    parallel: int
    max_memory_bytes: int
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    _idle: list[_Lent] = field(init=False, default_factory=list)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _turns: threading.BoundedSemaphore = field(init=False)
    _hopeless_until: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        """Give the machines back when the process ends; if it is killed, the service takes them back."""
        self._turns = threading.BoundedSemaphore(self.parallel)
        atexit.register(self.close)

    def run(self, program: Program) -> Execution:
        """Return what the program did. Errors as in `Sandbox`."""
        memory = min(program.memory_bytes or self.max_memory_bytes, self.max_memory_bytes)
        request = {
            "language": program.language,
            "files": program.files,
            "stdin": program.stdin,
            "args": program.args,
            "run_seconds": program.run_seconds,
            "cpu_seconds": program.run_seconds if program.cpu_seconds is None else program.cpu_seconds,
            "compile_seconds": program.compile_seconds,
            "memory_bytes": memory,
        }
        seconds = program.run_seconds + program.compile_seconds + _ANSWER_SECONDS
        answer = self._ask(f"say(answer(json.loads({json.dumps(request)!r})))", seconds=seconds)
        if (message := json.loads(answer).get("message")) is not None:
            raise ExecutionError(f"{self.name}: {message}")
        return parse_answer(answer, url=self.name)

    def languages(self) -> dict[str, frozenset[str]]:
        """Return the languages of a machine, by the service's name.

        Raises:
            ExecutionError: none is to be had.
        """
        return {self.name: frozenset(json.loads(self._ask("say(languages())", seconds=_ANSWER_SECONDS)))}

    def close(self) -> None:
        """Give every machine back that is not at work."""
        with self._lock:
            idle, self._idle = self._idle, []
        for lent in idle:
            self._give_back(lent)

    def _ask(self, call: str, *, seconds: float) -> bytes:
        attempts = 1 if self.clock() < self._hopeless_until else _ATTEMPTS
        failure = ""
        with self._turns:
            for attempt in range(attempts):
                if attempt:
                    self.pause(_PAUSE_SECONDS * attempt)
                lent = None
                try:
                    lent = self._take()
                    answer = _find_answer(lent.machine.execute(f"{_ERRAND}\n{call}\n", seconds=seconds))
                except Exception as error:  # an SDK raises what it likes; none of it is the program's doing
                    failure = f"{type(error).__name__}: {error}"
                    _log.warning("%s: %s", self.name, failure)
                    if lent is not None:
                        self._give_back(lent)
                    continue
                self._hopeless_until = 0.0
                with self._lock:
                    self._idle.append(lent)
                return answer
        self._hopeless_until = self.clock() + _REST_SECONDS
        raise ExecutionError(f"no machine of {self.name} ran it in {attempts} attempts; the last time {failure}")

    def _take(self) -> _Lent:
        """Return a machine: one that has time left, or a new one."""
        while True:
            with self._lock:
                lent = self._idle.pop() if self._idle else None
            if lent is None:
                return _Lent(self.lend(), self.clock())
            if self.clock() - lent.since < _KEPT_SECONDS:
                return lent
            self._give_back(lent)

    def _give_back(self, lent: _Lent) -> None:
        with suppress(Exception):  # it may be gone already, and else the service takes it back
            lent.machine.give_back()


def _find_answer(printed: str) -> bytes:
    """Return the last answer among what a machine printed.

    Raises:
        ValueError: there is none.
    """
    _, begin, rest = printed.rpartition("<<")
    text, end, _ = rest.partition(">>")
    if not begin or not end:
        raise ValueError(f"no answer is in what it printed: {printed[-200:]!r}")
    return base64.b64decode(text, validate=True)


def open_machine(mode: str, *, api_key: str, template: str | None) -> Callable[[], Machine]:
    """Return what lends a machine of the service that a mode names."""
    from posttrain_workloads.rewards.machines import E2bMachine, MorphMachine

    def lend() -> Machine:
        kind: Any = {"E2B": E2bMachine, "Morph": MorphMachine}[mode]
        machine: Machine = kind(api_key=api_key, template=template, seconds=LENT_SECONDS)
        return machine

    return lend

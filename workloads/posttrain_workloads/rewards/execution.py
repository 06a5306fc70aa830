"""Programs sent to sandboxes that speak Piston's API: which sandbox gets one, how often it is tried, what came of it.

It owns that a failure of the sandbox is never taken for one of the program: whoever asks gets an `ExecutionError`. It
must not know what a program is run for.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

_API = "/api/v2"
_REST_SECONDS = 30.0
"""How long an endpoint that did not answer is left out."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 10.0
_WAIT_SECONDS = 120.0
"""What an answer may take besides the program's own time: to be sent, and to wait for its turn there."""
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""


class ExecutionError(Exception):
    """A program could not be run, or nobody knows what came of it; that is not the program's doing."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program, its input and its limits."""

    language: str
    """A language or an alias, as the sandbox calls it."""
    files: tuple[tuple[str, str], ...]
    """Names and contents; the first is the one that is run."""
    stdin: str = ""
    args: tuple[str, ...] = ()
    run_seconds: float
    """On the clock."""
    cpu_seconds: float | None = None
    """Of all its threads together; None: as on the clock."""
    compile_seconds: float = 30.0
    memory_bytes: int | None = None
    """None: what the sandbox gives."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What a program did."""

    stdout: str = ""
    stderr: str = ""
    code: int | None = None
    """None: a signal ended it, or it was not run."""
    compiled: bool = True
    """False: it did not compile, and was not run."""

    @property
    def succeeded(self) -> bool:
        """Whether it ran to its end, within its limits, and says that all is well."""
        return self.compiled and self.code == 0


class Sandbox(Protocol):
    """Runs programs, from whichever thread."""

    @property
    def parallel(self) -> int:
        """How many programs it takes at the same time."""
        ...

    def run(self, program: Program) -> Execution:
        """Return what the program did.

        Raises:
            ExecutionError: it could not be run.
        """
        ...


@dataclass
class _Endpoint:
    url: str
    running: int = 0
    rests_until: float = 0.0


@dataclass
class PistonSandbox:
    """One server or several that speak Piston's API and share the work; our own is one of them.

    An endpoint that does not answer is left out for a while; its program is tried elsewhere, or there again later.
    """

    urls: Sequence[str]
    """`http://host:port`, with or without `/api/v2` behind."""
    per_endpoint: int = 1
    """Programs that an endpoint gets at the same time."""
    attempts: int = 6
    max_memory_bytes: int | None = None
    """The most that the endpoints give a program: one that may have more gets this; None: every program's own."""
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    _endpoints: list[_Endpoint] = field(init=False)
    _changed: threading.Condition = field(init=False, default_factory=threading.Condition)
    _hopeless_until: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        """Refuse addresses that are none."""
        if not self.urls or self.per_endpoint < 1:
            raise ValueError("a sandbox needs an endpoint, and each endpoint at least one program at a time")
        self._endpoints = [_Endpoint(_base_url(url)) for url in self.urls]

    @property
    def parallel(self) -> int:
        """How many programs all endpoints together take at the same time."""
        return len(self._endpoints) * self.per_endpoint

    def run(self, program: Program) -> Execution:
        """Return what the program did, wherever that was. Errors as in `Sandbox`.

        When it was given up for one program, the next ones are tried once, until the pause of the endpoints is over.
        """
        body = json.dumps(self._request(program)).encode()
        seconds = program.run_seconds + program.compile_seconds + _WAIT_SECONDS
        attempts = 1 if self.clock() < self._hopeless_until else self.attempts
        failure = ""
        for attempt in range(attempts):
            if attempt:
                self.pause(_pause_seconds(attempt))
            with self._turn() as endpoint:
                try:
                    status, answer = _ask("POST", f"{endpoint.url}/execute", body, seconds=seconds)
                except (OSError, http.client.HTTPException) as error:
                    endpoint.rests_until = self.clock() + _REST_SECONDS
                    failure = f"{endpoint.url}: {type(error).__name__}: {error}"
                    continue
            endpoint.rests_until = 0.0
            if status == 200:
                self._hopeless_until = 0.0
                return parse_answer(answer, url=endpoint.url)
            failure = f"{endpoint.url}: status {status}: {_message(answer)}"
            if status not in _BUSY:
                raise ExecutionError(failure)
        self._hopeless_until = self.clock() + _REST_SECONDS
        raise ExecutionError(f"no sandbox ran it in {attempts} attempts; the last time {failure}")

    def languages(self, *, seconds: float = 10.0) -> dict[str, frozenset[str]]:
        """Return by endpoint the languages that it has, with their aliases.

        Raises:
            ExecutionError: one of them does not answer as Piston does.
        """
        found = {}
        for endpoint in self._endpoints:
            try:
                status, answer = _ask("GET", f"{endpoint.url}/runtimes", None, seconds=seconds)
                runtimes = json.loads(answer)
                names = [{runtime["language"], *runtime["aliases"]} for runtime in runtimes]
            except (OSError, http.client.HTTPException, ValueError, TypeError, KeyError) as error:
                raise ExecutionError(
                    f"the sandbox {endpoint.url} does not answer as Piston does ({type(error).__name__}: {error}): "
                    "check its address, that it runs, and that nothing keeps us from it"
                ) from error
            if status != 200:
                raise ExecutionError(f"the sandbox {endpoint.url} answers with status {status}: {_message(answer)}")
            found[endpoint.url] = frozenset().union(*names)
        return found

    @contextmanager
    def _turn(self) -> Iterator[_Endpoint]:
        """Wait for a free endpoint; those that rest are taken only where no other is there at all."""
        with self._changed:
            while (endpoint := self._free_endpoint()) is None:
                self._changed.wait()
            endpoint.running += 1
        try:
            yield endpoint
        finally:
            with self._changed:
                endpoint.running -= 1
                self._changed.notify_all()

    def _free_endpoint(self) -> _Endpoint | None:
        now = self.clock()
        awake = [endpoint for endpoint in self._endpoints if endpoint.rests_until <= now] or self._endpoints
        free = [endpoint for endpoint in awake if endpoint.running < self.per_endpoint]
        # The least busy one; of several equals any, so that the ranks do not all begin with the first.
        return min(free, key=lambda endpoint: (endpoint.running, random.random()), default=None)

    def _request(self, program: Program) -> dict[str, Any]:
        run, compiling = round(program.run_seconds * 1000), round(program.compile_seconds * 1000)
        request: dict[str, Any] = {
            "language": program.language,
            "version": "*",
            "files": [{"name": name, "content": content} for name, content in program.files],
            "stdin": program.stdin,
            "args": list(program.args),
            "run_timeout": run,
            "run_cpu_time": run if program.cpu_seconds is None else round(program.cpu_seconds * 1000),
            "compile_timeout": compiling,
            "compile_cpu_time": compiling,
        }
        limits = [limit for limit in (program.memory_bytes, self.max_memory_bytes) if limit is not None]
        if program.memory_bytes is not None:
            request["run_memory_limit"] = min(limits)
        return request


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a sandbox: write it as http://host:2000")
    base = url.rstrip("/")
    return base if base.endswith(_API) else base + _API


def _pause_seconds(attempt: int) -> float:
    """Return the pause before an attempt: twice as long each time, and never the same for two who began together."""
    return float(min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS) * random.uniform(0.9, 1.1))


def _ask(method: str, url: str, body: bytes | None, *, seconds: float) -> tuple[int, bytes]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=seconds)
    try:
        connection.request(method, parts.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _message(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["message"])[:1000]
    except (ValueError, TypeError, KeyError):
        return answer[:200].decode(errors="replace")


def parse_answer(answer: bytes, *, url: str) -> Execution:
    """Return what came of a program, from an answer in Piston's form of whoever is named.

    Raises:
        ExecutionError: it is none, or tells of a failure that is not the program's.
    """
    try:
        stages: Mapping[str, Any] = json.loads(answer)
        compiling = stages.get("compile")
        if compiling is not None:
            _check_own_failure(compiling, url=url)
            if compiling["code"] != 0:
                return Execution(compiled=False, stdout=compiling["stdout"], stderr=compiling["stderr"])
        run = stages["run"]
        _check_own_failure(run, url=url)
        # A program that was stopped at a limit has a signal and no code, whatever Piston's version.
        code = run["code"] if run.get("signal") is None else None
        return Execution(stdout=run["stdout"], stderr=run["stderr"], code=code)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExecutionError(f"{url}: this is no answer of Piston's ({type(error).__name__}: {error})") from error


def _check_own_failure(stage: Mapping[str, Any], *, url: str) -> None:
    if stage.get("status") == "XX":
        raise ExecutionError(f"{url}: {stage.get('message')}")

"""Programs sent to sandboxes: to whichever answers, again where that helps, and never a guess at what came of one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from posttrain_workloads.rewards.execution import Execution, ExecutionError, PistonSandbox, Program
from tests.support.processes import wait_for
from tests.support.sandbox import RunningSandbox

PROGRAM = Program(language="python", files=(("main.py", "print(1)"),), stdin="x", run_seconds=2.0)
RUN = {"stdout": "1\n", "stderr": "", "output": "1\n", "code": 0, "signal": None}


@dataclass
class FakePiston:
    """A server that answers each request with the next of its answers, and the last one for ever."""

    answers: list[tuple[int, Any]] = field(default_factory=lambda: [(200, {"run": RUN})])
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
            self.requests.append(request)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.gate.wait(20)
        with self._lock:
            self._running -= 1
        return answer


@contextmanager
def fake_piston(*answers: tuple[int, Any], open_gate: bool = True, port: int = 0) -> Iterator[FakePiston]:
    fake = FakePiston(list(answers)) if answers else FakePiston()
    if open_gate:
        fake.gate.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/api/v2/execute"
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = fake.answer(request)
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        fake.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


def dead_url() -> str:
    with fake_piston() as fake:
        return fake.url


@dataclass
class Clock:
    now: float = 1000.0
    pauses: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def sandbox_of(*urls: str, clock: Clock, **fields: Any) -> PistonSandbox:
    return PistonSandbox(urls, clock=clock, pause=clock.pause, **fields)


def test_a_program_is_sent_as_piston_wants_it() -> None:
    with fake_piston() as fake:
        sandbox = PistonSandbox([f"{fake.url}/api/v2/"], max_memory_bytes=1 << 29)
        assert sandbox.run(PROGRAM) == Execution(stdout="1\n", code=0)
        sandbox.run(Program(language="c++", files=(("a.cpp", ""),), run_seconds=3, cpu_seconds=1, memory_bytes=1 << 30))

    assert fake.requests[0] == {
        "language": "python",
        "version": "*",
        "files": [{"name": "main.py", "content": "print(1)"}],
        "stdin": "x",
        "args": [],
        "run_timeout": 2000,
        "run_cpu_time": 2000,
        "compile_timeout": 30000,
        "compile_cpu_time": 30000,
    }
    assert (fake.requests[1]["run_cpu_time"], fake.requests[1]["run_memory_limit"]) == (1000, 1 << 29)


@pytest.mark.parametrize(
    ("answer", "execution"),
    [
        ({"run": {**RUN, "code": 3, "stderr": "no"}}, Execution(stdout="1\n", stderr="no", code=3)),
        ({"run": {**RUN, "code": None, "signal": "SIGKILL", "status": "TO"}}, Execution(stdout="1\n")),
        ({"run": {**RUN, "code": 0, "signal": "SIGKILL"}}, Execution(stdout="1\n")),
        ({"compile": {**RUN, "code": 1, "stdout": "", "stderr": "error"}}, Execution(stderr="error", compiled=False)),
        ({"compile": {**RUN, "code": None, "signal": "SIGKILL"}, "run": RUN}, Execution(stdout="1\n", compiled=False)),
        ({"compile": RUN, "run": RUN}, Execution(stdout="1\n", code=0)),
    ],
)
def test_an_answer_says_what_the_program_did(answer: dict[str, Any], execution: Execution) -> None:
    with fake_piston((200, answer)) as fake:
        assert PistonSandbox([fake.url]).run(PROGRAM) == execution


@pytest.mark.parametrize(
    "answer",
    [b"<html>", {}, {"run": {}}, [], {"run": {**RUN, "status": "XX", "message": "box"}}, {"compile": {"status": "XX"}}],
)
def test_an_answer_that_is_none_is_no_failure_of_the_program(answer: Any) -> None:
    with fake_piston((200, answer)) as fake, pytest.raises(ExecutionError, match=fake.url):
        PistonSandbox([fake.url]).run(PROGRAM)


def test_a_busy_endpoint_is_asked_again_after_longer_and_longer_pauses() -> None:
    clock = Clock()
    with fake_piston((500, {"message": "box"}), (503, b""), (429, b"slow"), (200, {"run": RUN})) as fake:
        assert sandbox_of(fake.url, clock=clock).run(PROGRAM).stdout == "1\n"

    assert len(fake.requests) == 4
    assert all(base * 0.9 <= pause <= base * 1.1 for base, pause in zip((0.5, 1, 2), clock.pauses, strict=True))


def test_a_request_that_is_refused_is_not_sent_again() -> None:
    with (
        fake_piston((400, {"message": "python-* runtime is unknown"})) as fake,
        pytest.raises(ExecutionError, match=r"status 400: python-\* runtime is unknown"),
    ):
        PistonSandbox([fake.url]).run(PROGRAM)
    assert len(fake.requests) == 1


def test_a_dead_endpoint_is_left_out_and_asked_again_later() -> None:
    clock = Clock()
    with fake_piston() as living, ExitStack() as later:
        dead = dead_url()
        sandbox = sandbox_of(dead, living.url, clock=clock, per_endpoint=1)
        for _ in range(20):
            assert sandbox.run(PROGRAM).succeeded
        assert len(clock.pauses) <= 1

        port = int(dead.rpartition(":")[2])
        revived = later.enter_context(fake_piston(port=port))
        clock.now += 31
        for _ in range(60):
            sandbox.run(PROGRAM)
        assert revived.requests


def test_when_all_are_dead_programs_are_given_up_and_the_next_ones_sooner() -> None:
    clock = Clock()
    sandbox = sandbox_of(dead_url(), dead_url(), clock=clock)

    with pytest.raises(ExecutionError, match="no sandbox ran it in 6 attempts; the last time http://127"):
        sandbox.run(PROGRAM)
    assert len(clock.pauses) == 5
    with pytest.raises(ExecutionError, match="in 1 attempts"):
        sandbox.run(PROGRAM)
    clock.now += 31
    with pytest.raises(ExecutionError, match="in 6 attempts"):
        sandbox.run(PROGRAM)


def test_an_endpoint_gets_only_so_many_programs_at_once_from_all_threads() -> None:
    with fake_piston(open_gate=False) as one, fake_piston(open_gate=False) as other, ThreadPoolExecutor(12) as pool:
        sandbox = PistonSandbox([one.url, other.url], per_endpoint=2)
        runs = [pool.submit(sandbox.run, PROGRAM) for _ in range(12)]
        wait_for(lambda: one.most_at_once == other.most_at_once == 2, what="two programs on each endpoint")
        one.gate.set()
        other.gate.set()
        assert all(run.result().succeeded for run in runs)

    assert (one.most_at_once, other.most_at_once) == (2, 2)
    assert sandbox.parallel == 4


@pytest.mark.parametrize("url", ["", "localhost:2000", "ftp://x", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="write it as http://host:2000"):
        PistonSandbox([url])


def test_our_own_sandbox_runs_programs_and_names_its_languages(sandbox: RunningSandbox) -> None:
    client = PistonSandbox([sandbox.url])

    assert client.run(PROGRAM) == Execution(stdout="1\n", code=0)
    assert not client.run(
        Program(language="python", files=(("main.py", "while True: pass"),), run_seconds=0.5)
    ).succeeded
    assert {"python", "bash"} <= client.languages()[f"{sandbox.url}/api/v2"]
    with pytest.raises(ExecutionError, match=r"cobol-\* runtime is unknown: there are python"):
        client.run(Program(language="cobol", files=(("a", ""),), run_seconds=1))


def test_a_sandbox_that_does_not_answer_is_named() -> None:
    url = dead_url()
    with pytest.raises(ExecutionError, match=f"the sandbox {url}/api/v2 does not answer as Piston does"):
        PistonSandbox([url]).languages()

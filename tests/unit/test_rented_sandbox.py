"""Machines that a service lends, and what is run on them: one at a time, another where one fails, never a guess."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from posttrain_workloads.rewards.execution import Execution, ExecutionError, Program
from posttrain_workloads.rewards.rented import RentedSandbox


@dataclass
class Service:
    """Lends this machine; its next machines fail as they are told to, and time passes as it is told."""

    failures: list[str] = field(default_factory=list)
    lent: int = 0
    given_back: int = 0
    pauses: list[float] = field(default_factory=list)
    now: float = 0.0

    def lend(self) -> Service:
        self.lent += 1
        return self

    def execute(self, source: str, *, seconds: float) -> str:
        if self.failures:
            raise OSError(self.failures.pop(0))
        return subprocess.run(
            [sys.executable, "-"], input=source, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    def give_back(self) -> None:
        self.given_back += 1

    def open(self, **changes: Any) -> RentedSandbox:
        options = {"parallel": 1, "max_memory_bytes": 1 << 29, **changes}
        return RentedSandbox("E2B", self.lend, clock=lambda: self.now, pause=self.pauses.append, **options)


def program(code: str, *, language: str = "python", name: str = "main.py", **more: Any) -> Program:
    return Program(language=language, files=((name, code),), **{"run_seconds": 5.0, **more})


DONE = program("print(1)")


def test_a_machine_is_kept_for_the_next_program_and_given_back_at_the_end() -> None:
    service = Service()
    sandbox = service.open()

    assert sandbox.run(DONE) == sandbox.run(DONE) == Execution(stdout="1\n", code=0)
    assert (service.lent, service.given_back) == (1, 0)
    sandbox.close()
    assert service.given_back == 1


def test_a_machine_is_given_back_before_its_service_takes_it() -> None:
    service = Service()
    sandbox = service.open()

    sandbox.run(DONE)
    service.now += 3000
    sandbox.run(DONE)

    assert (service.lent, service.given_back) == (2, 1)


def test_after_a_failure_another_machine_gets_the_program_and_after_three_nobody_knows() -> None:
    service = Service(failures=["gone"])
    sandbox = service.open()
    assert sandbox.run(DONE).succeeded
    assert (service.lent, service.given_back, service.pauses) == (2, 1, [2.0])

    service.failures = ["a", "b", "c", "d"]
    with pytest.raises(ExecutionError, match="no machine of E2B ran it in 3 attempts; the last time OSError: c"):
        sandbox.run(DONE)
    with pytest.raises(ExecutionError, match="in 1 attempts; the last time OSError: d"):
        sandbox.run(DONE)  # while the service is known to be away, a program costs one attempt
    assert service.given_back == service.lent
    assert sandbox.run(DONE).succeeded


CASES: list[tuple[Program, Execution]] = [
    (program("import sys; print(input(), sys.argv[1])", stdin="x", args=("a",)), Execution(stdout="x a\n", code=0)),
    (program("while True: pass", run_seconds=1.0), Execution()),
    (program("while True: print('x' * 65536)"), Execution()),
    (program("print('<<aGk=>>')"), Execution(stdout="<<aGk=>>\n", code=0)),
    (program("#include <cstdio>\nint main() { puts(\"1\"); return 3; }", language="cpp", name="a.cpp"), Execution(
        stdout="1\n", code=3
    )),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "expected"), CASES, ids=[asked.files[0][1][:30] for asked, _ in CASES])
def test_a_program_has_the_end_that_it_deserves(asked: Program, expected: Execution) -> None:
    done = Service().open().run(asked)

    assert (done.code, done.compiled) == (expected.code, True)
    if expected.code is not None:
        assert done == expected


def test_a_program_gets_no_more_memory_than_the_spec_has() -> None:
    greedy = program("print(len(b'x' * (200 << 20)))", memory_bytes=1 << 40)

    assert Service().open(max_memory_bytes=100 << 20).run(greedy).code == 1
    assert Service().open(max_memory_bytes=400 << 20).run(greedy).code == 0


def test_a_language_that_is_not_there_is_no_failure_of_the_program() -> None:
    sandbox = Service().open()

    with pytest.raises(ExecutionError, match="E2B: there is no language cobol on the machine"):
        sandbox.run(program("x", language="cobol"))
    assert "python" in sandbox.languages()["E2B"]

"""Each wall holds because it is there: without it the same program gets through, and the sandbox does not start."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from posttrain_workloads.sandbox import seccomp, syscalls
from posttrain_workloads.sandbox.forkserver import ForkServer
from posttrain_workloads.sandbox.job import Job, Limits, Stage, StageResult, Walls
from posttrain_workloads.sandbox.languages import PATH, python_program, python_readable
from tests.sandbox.conftest import require_landlock
from tests.support.sandbox import SECONDS, start_sandbox

LIMITS = Limits(
    wall_seconds=20,
    cpu_seconds=20,
    memory_bytes=256 << 20,
    output_bytes=1 << 20,
    file_bytes=1 << 20,
    scratch_bytes=16 << 20,
    processes=16,
)
PROBES = {
    "network": "import socket\nsocket.socket()\nprint('through')",
    "files": "import sys\nopen(sys.argv[1], 'a').close()\nprint('through')",
    "environment": "import os\nprint('through' if 'HUB_TOKEN' in os.environ else os._exit(1))",
}
DOWN = {"network": Walls(network=False), "files": Walls(files=False), "environment": Walls(environment=False)}


@contextmanager
def fork_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    monkeypatch.setenv("HUB_TOKEN", "hf_secret")
    server = ForkServer()
    yield server
    server.close()


def run(server: ForkServer, source: str, *arguments: str, folder: Path, walls: Walls) -> StageResult:
    job = Job(
        scratch=str(folder),
        files=(("main.py", source.encode()),),
        stages=(Stage((python_program(), "main.py", *arguments), LIMITS),),
        readable=python_readable(),
        environment={"PATH": PATH},
        walls=walls,
    )
    return asyncio.run(server.run(job))[-1]


@pytest.mark.parametrize("wall", PROBES)
def test_what_a_wall_holds_gets_through_without_it(wall: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_landlock()
    canary = tmp_path / "canary"
    canary.touch()
    with fork_server(monkeypatch) as server:
        behind = run(server, PROBES[wall], str(canary), folder=tmp_path / "a", walls=Walls())
        without = run(server, PROBES[wall], str(canary), folder=tmp_path / "b", walls=DOWN[wall])

    assert behind.code == 1
    assert without.stdout == b"through\n", without


@pytest.mark.parametrize("wall", PROBES)
def test_a_sandbox_with_a_wall_down_does_not_start(wall: str, tmp_path: Path) -> None:
    require_landlock()
    code, error = start_and_fail(f"walls=Walls({wall}=False)", work=tmp_path)

    assert code == 2
    assert f"the wall '{wall}' does not hold" in error, error
    assert "run it on Linux 5.13 or newer" in error
    assert list(tmp_path.iterdir()) == []


def test_a_sandbox_without_landlock_does_not_start_and_says_what_to_change(tmp_path: Path) -> None:
    """As in a container whose seccomp profile is too old to know it."""
    code, error = start_and_fail("walls=Walls()", work=tmp_path, before=REFUSE_LANDLOCK)

    assert code == 2
    assert "does not let the sandbox use Landlock" in error, error
    assert "or use a Piston of your own" in error


@pytest.mark.parametrize("abi", [1, 3, 5])
def test_the_walls_hold_on_older_kernels(abi: int, tmp_path: Path) -> None:
    """The sandbox tries its own walls before it serves; here with what Landlock offered at each ABI, from 5.13 on."""
    require_landlock()
    process = start_sandbox([], work=tmp_path, command=("-c", launcher(f"walls=Walls(landlock_abi={abi})")))
    assert process.stdout is not None
    line = process.stdout.readline()
    process.terminate()
    _, error = process.communicate(timeout=SECONDS)

    assert line.startswith("listening on http://127.0.0.1:"), error
    assert process.returncode == 0


REFUSE_LANDLOCK = """
import ctypes, struct
program = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x00050026), (0x06, 0, 0, 0x7FFF0000)]
packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(program), packed)), 0, 0) == 0
"""


def launcher(argument: str, *, before: str = "") -> str:
    return (
        f"{before}\nimport sys\nfrom posttrain_workloads.sandbox.__main__ import run\n"
        f"from posttrain_workloads.sandbox.job import Walls\nsys.exit(run(sys.argv[1:], {argument}))"
    )


def start_and_fail(argument: str, *, work: Path, before: str = "") -> tuple[int, str]:
    process = start_sandbox([], work=work, command=("-c", launcher(argument, before=before)))
    try:
        _, error = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, error


ALLOW, ASK, KILL, EPERM, ENOSYS, EAGAIN = 0x7FFF0000, 0x7FC00000, 0x80000000, 0x00050001, 0x00050026, 0x0005000B


def judge(machine: str, name: str, *arguments: int, rules: seccomp.FilterRules = seccomp.FilterRules()) -> int:  # noqa: B008
    """Run a filter on a system call, as the kernel does; return its judgement."""
    column = list(syscalls.AUDIT_ARCHITECTURE).index(machine)
    return interpret(machine, syscalls.NUMBERS[name][column], arguments, rules=rules)


def interpret(machine: str, number: int, arguments: tuple[int, ...], *, rules: seccomp.FilterRules) -> int:
    data = {0: number, 4: syscalls.AUDIT_ARCHITECTURE[machine]}
    data |= {16 + 8 * index: value & 0xFFFFFFFF for index, value in enumerate(arguments)}
    program = seccomp.build_filter(rules, machine=machine)
    accumulator, position = 0, 0
    while True:
        code, if_true, if_false, constant = program[position]
        position += 1
        match code:
            case 0x20:
                accumulator = data[constant]
            case 0x54:
                accumulator &= constant
            case 0x06:
                return constant
            case 0x15 | 0x25 | 0x45:
                true = {0x15: accumulator == constant, 0x25: accumulator > constant, 0x45: accumulator & constant}[code]
                position += if_true if true else if_false


MACHINES = list(syscalls.AUDIT_ARCHITECTURE)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_refuses_what_its_lists_name_on_each_architecture(machine: str) -> None:
    column = MACHINES.index(machine)
    lists = (syscalls.NETWORK, syscalls.NAMESPACES, syscalls.OTHER_PROCESSES, syscalls.KERNEL)
    lists += (syscalls.FILE_OWNERSHIP, syscalls.FILE_MODE, syscalls.SHARED_MEMORY)
    there = [name for names in lists for name in names if syscalls.NUMBERS[name][column] >= 0]

    assert {judge(machine, name, 0, 0, 0) for name in there} == {EPERM}
    assert {judge(machine, name, 0, 0, 0) for name in syscalls.NOT_OFFERED} == {ENOSYS}
    assert interpret(machine, syscalls.NEWEST + 1, (), rules=seccomp.FilterRules()) == ENOSYS
    # 63 and 64: read and write on arm64; 0 and 1 on x86-64.
    for number in {"x86_64": (0, 1), "aarch64": (63, 64)}[machine]:
        assert interpret(machine, number, (0, 0, 0), rules=seccomp.FilterRules()) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_looks_at_arguments(machine: str) -> None:
    assert judge(machine, "clone", 0x01200011) == ASK
    assert judge(machine, "clone", 0x10000000) == EPERM
    assert judge(machine, "prlimit64", 0, 7) == ALLOW
    assert judge(machine, "prlimit64", 1, 7) == EPERM
    assert judge(machine, "socketpair", 1, 1 | 0x80000) == ALLOW
    assert judge(machine, "socketpair", 1, 2 | 0x80000) == EPERM
    assert judge(machine, "fcntl", 3, 2) == ALLOW
    assert judge(machine, "fcntl", 3, 8) == EPERM
    assert judge(machine, "prctl", 15) == ALLOW
    assert judge(machine, "prctl", 4) == EPERM
    assert judge(machine, "kill", 1, 9) == ALLOW  # the kernel sees to it


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_stands_in_for_what_landlock_does_not_see_to(machine: str) -> None:
    old = seccomp.FilterRules(own_process_only=77, refuse_truncate=True)

    assert judge(machine, "kill", 77, 9, rules=old) == ALLOW
    assert judge(machine, "kill", 0, 9, rules=old) == ALLOW
    assert judge(machine, "kill", 1, 9, rules=old) == EPERM
    assert judge(machine, "kill", -1, 9, rules=old) == EPERM
    assert judge(machine, "tgkill", 77, 78, 9, rules=old) == ALLOW
    assert judge(machine, "tgkill", 1, 1, 9, rules=old) == EPERM
    assert judge(machine, "truncate", 0, 0, rules=old) == EPERM
    for flags, judgement in ((0o0, ALLOW), (0o1, ALLOW), (0o1001, ALLOW), (0o1000, EPERM), (0o1003, EPERM)):
        assert judge(machine, "openat", 0, 0, flags, rules=old) == judgement, oct(flags)


def test_a_filter_for_another_architecture_kills() -> None:
    program = seccomp.build_filter(seccomp.FilterRules(), machine="aarch64")

    assert program[1][3] == syscalls.AUDIT_ARCHITECTURE["aarch64"]
    assert program[2] == (0x06, 0, 0, KILL)


def test_the_numbers_are_those_of_this_machines_headers() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if os.uname().machine != "x86_64" or not header.exists():
        pytest.skip("the kernel's headers are not installed")
    done = subprocess.run(
        ["cpp", "-dM", "-"], input="#include <sys/syscall.h>", text=True, capture_output=True, check=True
    )
    known = {
        words[1].removeprefix("__NR_"): int(words[2])
        for words in map(str.split, done.stdout.splitlines())
        if words[1].startswith("__NR_") and words[2].isdecimal()
    }

    assert {name: numbers[0] for name, numbers in syscalls.NUMBERS.items()} == {
        name: known[name] for name in syscalls.NUMBERS
    }

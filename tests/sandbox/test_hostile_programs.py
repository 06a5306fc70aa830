"""Programs that try to get out, or to take everything: none does, none hurts the others, and the sandbox serves on."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import wait_for
from tests.support.sandbox import RunningSandbox, await_idle

NEIGHBOUR = """
import os, subprocess, sys
total = 0
for line in sys.stdin:
    total += int(line)
child = os.fork()
if child == 0:
    with open("own", "w") as file:
        file.write(str(total))
    os._exit(0)
os.waitpid(child, 0)
print(open("own").read(), sum(range(2_000_000)))
"""
NEIGHBOURS_INPUT = "".join(f"{number}\n" for number in range(10_000))
NEIGHBOURS_OUTPUT = f"{sum(range(10_000))} {sum(range(2_000_000))}\n"

ATTEMPT = """
import os, sys
def attempt(act):
    try:
        print("done", act())
    except OSError as error:
        print(type(error).__name__)
"""

Verdict = Callable[[dict[str, Any]], bool]


def ended_by(status: str, *, saying: str) -> Verdict:
    return lambda run: run["status"] == status and saying in run["message"] and run["signal"] == "SIGKILL"


def wrote(text: str) -> Verdict:
    return lambda run: run["code"] == 0 and run["stdout"] == text


CORPUS: dict[str, tuple[str, dict[str, Any], Verdict]] = {
    "a fork bomb": (
        """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        {"run_timeout": 1000},
        ended_by("TO", saying="time limit of 1 s"),
    ),
    "a fork bomb of the shell": (
        "b() { b | b & }; b; while true; do :; done",
        {"language": "bash", "run_timeout": 1000},
        ended_by("TO", saying="time limit of 1 s"),
    ),
    "a bomb of processes that have ended": (
        """
import os, time
count = 0
try:
    while True:
        if os.fork() == 0:
            os._exit(0)
        count += 1
except OSError:
    print(count < 80)
""",
        {},
        wrote("True\n"),
    ),
    "a bomb of threads": (
        """
import threading, time
count = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        count += 1
except RuntimeError:
    print(count < 80, flush=True)
""",
        {},
        wrote("True\n"),
    ),
    "a memory bomb": (
        "held = []\nwhile True:\n    held.append(bytearray(1 << 20))",
        {"run_memory_limit": 128 << 20},
        lambda run: run["code"] == 1 and "MemoryError" in run["stderr"] and run["memory"] < 140 << 20,
    ),
    "a memory bomb of many processes": (
        """
import os, time
for _ in range(40):
    if os.fork() == 0:
        break
held = bytearray(b"x") * (60 << 20)
time.sleep(1000)
""",
        {"run_memory_limit": 256 << 20},
        ended_by("SG", saying="memory limit of 256 MiB"),
    ),
    "a bomb of shared memory": (
        """
import mmap
held = []
while True:
    held.append(mmap.mmap(-1, 1 << 20))
    held[-1].write(b"x" * (1 << 20))
""",
        {"run_memory_limit": 128 << 20},
        ended_by("SG", saying="memory limit of 128 MiB"),
    ),
    "endless output": ("while True: print('x' * 65536)", {}, ended_by("OL", saying="stdout length exceeded")),
    "endless errors": (
        "import sys\nwhile True: sys.stderr.write('x' * 65536)",
        {},
        ended_by("EL", saying="stderr length exceeded"),
    ),
    "no end": ("while True: pass", {"run_timeout": 500}, ended_by("TO", saying="time limit of 0.5 s")),
    "no end in many processes": (
        "import os\nfor _ in range(5): os.fork()\nwhile True: pass",
        {"run_timeout": 60_000, "run_cpu_time": 1000},
        ended_by("TO", saying="1 s of CPU"),
    ),
    "deaf to signals": (
        """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True:
    time.sleep(1)
""",
        {"run_timeout": 500},
        ended_by("TO", saying="time limit"),
    ),
    "stopped by itself": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        {"run_timeout": 500},
        ended_by("TO", saying="time limit"),
    ),
    "killing whoever is there": (
        ATTEMPT
        + """
attempt(lambda: os.kill(os.getppid(), 9))
attempt(lambda: os.killpg(os.getpgid(os.getppid()), 9))
attempt(lambda: os.kill(-1, 9))
attempt(lambda: os.kill(1, 9))
""",
        {},
        # To everybody: the kernel says that it went well, and nobody was reached.
        wrote("PermissionError\nPermissionError\ndone None\nPermissionError\n"),
    ),
    "taking the guard's limits away": (
        ATTEMPT
        + """
import resource
attempt(lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0)))
attempt(lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19))
attempt(lambda: os.sched_setaffinity(os.getppid(), {0}))
attempt(lambda: open(f"/proc/{os.getppid()}/mem", "wb"))
""",
        {},
        wrote("PermissionError\n" * 4),
    ),
    "sockets": (
        ATTEMPT
        + """
import socket
attempt(lambda: socket.create_connection(("1.1.1.1", 53), 5))
attempt(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5))
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
attempt(lambda: socket.socket(socket.AF_INET6))
attempt(lambda: socket.socket(socket.AF_UNIX))
attempt(lambda: socket.socket(socket.AF_NETLINK))
attempt(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
one, other = socket.socketpair()
one.send(b"to itself")
print(other.recv(99))
""",
        {},
        wrote("PermissionError\n" * 7 + "b'to itself'\n"),
    ),
    "a name server": (
        "import socket\ntry:\n    socket.getaddrinfo('example.org', 80)\nexcept OSError: print('no')",
        {},
        wrote("no\n"),
    ),
    "the environment": (
        """
import os
print(sorted(os.environ))
for pid in [os.getppid(), os.getpid(), 1]:
    try:
        print(open(f"/proc/{pid}/environ").read())
    except OSError as error:
        print(type(error).__name__)
""",
        {},
        wrote("['HOME', 'LANG', 'PATH', 'TMPDIR']\n" + "PermissionError\n" * 3),
    ),
    "writing elsewhere": (
        ATTEMPT
        + """
for folder in ("/tmp", "/var/tmp", "/dev/shm", "/", "/usr", "/home", os.path.dirname(os.getcwd()), "..", "../.."):
    attempt(lambda: open(os.path.join(folder, "left-behind"), "w"))
""",
        {},
        wrote("PermissionError\n" * 9),
    ),
    "reading elsewhere": (
        ATTEMPT
        + """
for path in ("/etc/passwd", "/etc/shadow", "/root", "/home", "/tmp", "/proc", "/sys", "/var/run", "/dev", "..", "/"):
    attempt(lambda: os.listdir(path) if os.path.isdir(path) else open(path).read())
""",
        {},
        wrote("PermissionError\n" * 11),
    ),
    "other file modes, owners and times": (
        ATTEMPT
        + """
open("own", "w").close()
attempt(lambda: os.chmod("own", 0o777))
attempt(lambda: os.chown("own", os.getuid(), os.getgid()))
attempt(lambda: os.utime("own"))
attempt(lambda: os.setxattr("own", "user.x", b"y"))
""",
        {},
        wrote("PermissionError\n" * 4),
    ),
    "a huge file": (
        """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with open("big", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
except OSError as error:
    print(error.strerror)
""",
        {},
        wrote("File too large\n"),
    ),
    "many large files": (
        """
import itertools
for number in itertools.count():
    with open(f"big{number}", "wb") as file:
        file.write(bytes(32 << 20))
""",
        {},
        ended_by("SG", saying="more than 256 MiB"),
    ),
    "many large files without a name": (
        """
import itertools, os
held = []
for number in itertools.count():
    held.append(open("big", "wb"))
    os.unlink("big")
    held[-1].write(bytes(32 << 20))
""",
        {},
        ended_by("SG", saying="more than 256 MiB"),
    ),
    "very many files": (
        "import itertools\nfor number in itertools.count(): open(f'f{number}', 'w').close()",
        {},
        ended_by("SG", saying="4096 files"),
    ),
    "folders within folders": (
        """
import os
for _ in range(3000):
    os.mkdir("a" * 100)
    os.chdir("a" * 100)
print("deep")
""",
        {},
        lambda run: run["stdout"] == "deep\n" or run["status"] == "SG",
    ),
    "folders without rights": (
        "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.mkdir('d', 0)\nprint('left')",
        {},
        wrote("left\n"),
    ),
    "processes that stay behind": (
        """
import os, signal, time
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
print("gone")
""",
        {},
        wrote("gone\n"),
    ),
    "output that nobody closes": (
        "import os, time\nif os.fork() == 0:\n    time.sleep(1000)\nprint('gone')",
        {},
        wrote("gone\n"),
    ),
    "other namespaces and tracing": (
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for result in (libc.unshare(0x10000000), libc.ptrace(16, os.getppid(), 0, 0), libc.mount(b"x", b"/", b"tmpfs", 0, 0)):
    print(result, os.strerror(ctypes.get_errno()))
print(libc.syscall(425, 1, 0), os.strerror(ctypes.get_errno()))
""",
        {},
        wrote("-1 Operation not permitted\n" * 3 + "-1 Function not implemented\n"),
    ),
    "a compiler that reads what it should not": (
        '#include "/etc/passwd"\nint main() {}',
        {"language": "c++"},
        lambda run: run["code"] == 1 and "Permission denied" in run["stderr"] and "root:" not in run["output"],
    ),
    "a compiler without an end": (
        "template <int N> struct A { A<N + 1> a; A<N - 1> b; };\nint main() { A<0> a; }",
        {"language": "c++", "compile_timeout": 500, "compile_memory_limit": 400 << 20},
        lambda run: run["status"] in {"TO", "SG", "RE"},
    ),
}


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_program_gets_nowhere_and_hurts_nobody(sandbox: RunningSandbox, name: str) -> None:
    source, fields, verdict = CORPUS[name]
    port = str(sandbox.connect().port)

    with ThreadPoolExecutor(3) as pool:
        hostile = pool.submit(lambda: sandbox.execute(source, **{"args": [port], **fields}))
        neighbours = [pool.submit(lambda: sandbox.execute(NEIGHBOUR, stdin=NEIGHBOURS_INPUT)) for _ in range(2)]

    answer = hostile.result()
    run = answer.get("run") or answer["compile"]
    assert verdict(run), {**run, "stdout": run["stdout"][-2000:], "output": ""}
    for neighbour in neighbours:
        assert neighbour.result()["run"]["stdout"] == NEIGHBOURS_OUTPUT, neighbour.result()
    await_idle(sandbox)
    assert sandbox.execute("print('served')")["run"]["stdout"] == "served\n"


def test_links_out_of_the_folder_lead_nowhere(sandbox: RunningSandbox, tmp_path: Path) -> None:
    canary = tmp_path / "folder" / "canary"
    canary.parent.mkdir()
    canary.write_text("intact")
    for path in (tmp_path, canary.parent, canary, *tmp_path.parents[:2]):
        path.chmod(0o777)

    run = sandbox.execute(
        ATTEMPT
        + """
target = sys.argv[1]
os.symlink(target, "file")
os.symlink(os.path.dirname(target), "folder")
attempt(lambda: open("file").read())
attempt(lambda: open("file", "w"))
attempt(lambda: os.truncate("file", 0))
attempt(lambda: os.listdir("folder"))
attempt(lambda: os.unlink("folder/canary"))
attempt(lambda: os.link(target, "hard"))
attempt(lambda: os.rename(target, "taken"))
attempt(lambda: open("../../beside", "w"))
""",
        args=[str(canary)],
    )["run"]

    assert set(run["stdout"].split()) <= {"PermissionError", "OSError"}, run
    assert run["stdout"].count("\n") == 8
    await_idle(sandbox)
    assert canary.read_text() == "intact"
    assert list(canary.parent.iterdir()) == [canary]


def test_a_program_cannot_reach_into_the_folder_of_another(sandbox: RunningSandbox) -> None:
    victim = send(sandbox, "import time\nwith open('secret', 'w') as file: file.write('mine')\ntime.sleep(1000)")
    secret = wait_for(
        lambda: next((file for job in sandbox.scratch_folders() for file in job.glob("box/secret")), None),
        what="the victim's secret",
    )
    wait_for(secret.read_text, what="what is in it")

    run = sandbox.execute(
        ATTEMPT
        + """
path = sys.stdin.read()
attempt(lambda: open(path).read())
attempt(lambda: open(path, "w"))
attempt(lambda: os.unlink(path))
attempt(lambda: os.listdir(os.path.dirname(path)))
attempt(lambda: os.mkdir(os.path.dirname(path) + "/new"))
attempt(lambda: os.rename(path, "taken"))
attempt(lambda: os.listdir("../.."))
""",
        stdin=str(secret),
    )["run"]

    assert run["stdout"].replace("OSError", "PermissionError") == "PermissionError\n" * 7, run
    assert secret.read_text() == "mine"
    victim.close()


def test_a_program_that_nobody_waits_for_is_ended(sandbox: RunningSandbox) -> None:
    connection = send(sandbox, "while True: pass")
    wait_for(lambda: len(sandbox.processes()) == 2, what="the guard and its program")

    connection.close()

    await_idle(sandbox)


def send(sandbox: RunningSandbox, source: str) -> HTTPConnection:
    """Send a Python program, and return the connection that its answer would come on."""
    request = {"language": "python", "version": "*", "files": [{"content": source}], "run_timeout": 60_000}
    connection = sandbox.connect()
    connection.request("POST", "/api/v2/execute", json.dumps(request), {"Content-Type": "application/json"})
    return connection

"""A container is one command, and everything below it ends with it, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue

import pytest

from posttrain.local.container import Command, Container, Ended
from posttrain.local.shim import ORPHAN_GRACE_SECONDS, descendants
from tests.support.processes import (
    DAEMON,
    DEAF,
    FOREVER,
    TELL,
    WAIT_SECONDS,
    await_gone,
    await_pids,
    python,
    read_pids,
    wait_for,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class _Started:
    """A container with a place for process ids and for its end."""

    def __init__(self, folder: Path, program: str, **env: str) -> None:
        self.pids = folder / "pids"
        self.pids.mkdir()
        self.log = folder / "logs" / "container.log"
        self.ends: SimpleQueue[Ended | None] = SimpleQueue()
        command = Command(argv=python(program), env={"PIDS": str(self.pids), **env}, cwd=folder)
        self.container = Container(command, log=self.log, on_end=self.ends.put)

    def end(self) -> Ended | None:
        return self.ends.get(timeout=WAIT_SECONDS)


def test_exit_code_and_both_outputs_of_a_command_are_kept(tmp_path: Path) -> None:
    started = _Started(tmp_path, "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)")

    ended = started.end()

    assert ended is not None
    assert (ended.exit_code, ended.signal) == (3, None)
    assert ended.started_at <= ended.finished_at
    assert started.log.read_text() == "out\nerr\n"


def test_a_command_gets_exactly_the_environment_and_folder_it_is_given(tmp_path: Path) -> None:
    program = "import os; print(sorted(set(os.environ) - {'LC_CTYPE'}), os.getcwd())"  # LC_CTYPE is Python's own doing

    started = _Started(tmp_path, program, ANSWER="42")

    assert started.end() is not None
    assert started.log.read_text() == f"['ANSWER', 'PIDS'] {tmp_path}\n"


def test_a_signal_shows_as_the_exit_code_that_kubernetes_gives_it(tmp_path: Path) -> None:
    started = _Started(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")

    ended = started.end()

    assert ended is not None
    assert (ended.exit_code, ended.signal) == (139, signal.SIGSEGV)


def test_a_command_that_does_not_exist_ends_with_127_and_says_why_in_its_log(tmp_path: Path) -> None:
    ends: SimpleQueue[Ended | None] = SimpleQueue()
    command = Command(argv=("no-such-program",), env={}, cwd=tmp_path)

    Container(command, log=tmp_path / "log", on_end=ends.put)

    ended = ends.get(timeout=WAIT_SECONDS)
    assert ended is not None
    assert ended.exit_code == 127
    assert "no-such-program" in (tmp_path / "log").read_text()


def test_what_a_command_leaves_running_ends_with_it(tmp_path: Path) -> None:
    started = _Started(
        tmp_path,
        TELL + f"subprocess.Popen([sys.executable, '-c', {FOREVER!r}]); signal.sigtimedwait([signal.SIGUSR1], 1)",
    )

    assert started.end() is not None

    await_gone(read_pids(started.pids), seconds=0.1)


def test_a_daemon_with_a_session_of_its_own_ends_with_the_command(tmp_path: Path) -> None:
    started = _Started(tmp_path, DAEMON + "signal.pause()")
    pids = await_pids(started.pids, count=2)

    os.kill(started.container.main.pid, signal.SIGKILL)

    assert started.end() is not None
    await_gone(pids, seconds=0.1)


def test_terminate_gives_a_command_its_grace_period(tmp_path: Path) -> None:
    program = TELL + "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nprint('ready', flush=True)\nsignal.pause()"
    started = _Started(tmp_path, program)
    wait_for(lambda: "ready" in started.log.read_text(), what="the handler")

    started.container.terminate(grace_seconds=60)

    ended = started.end()
    assert ended is not None
    assert ended.exit_code == 7


def test_a_command_that_does_not_obey_is_killed_when_its_grace_period_is_over(tmp_path: Path) -> None:
    started = _Started(tmp_path, DEAF)
    pids = await_pids(started.pids, count=1)

    started.container.terminate(grace_seconds=0.2)

    ended = started.end()
    assert ended is not None
    assert (ended.exit_code, ended.signal) == (137, signal.SIGKILL)
    await_gone(pids, seconds=0.1)


def test_a_second_termination_shortens_the_grace_period(tmp_path: Path) -> None:
    started = _Started(tmp_path, DEAF)
    await_pids(started.pids, count=1)

    started.container.terminate(grace_seconds=3600)
    started.container.terminate(grace_seconds=0)

    ended = started.end()
    assert ended is not None
    assert ended.signal == signal.SIGKILL


def test_terminating_a_container_that_has_ended_does_nothing(tmp_path: Path) -> None:
    started = _Started(tmp_path, "pass")
    first = started.end()

    started.container.terminate(grace_seconds=0)

    assert first is not None
    assert (first.exit_code, started.ends.empty()) == (0, True)


PARENT = """
import signal, sys
from pathlib import Path
from posttrain.local.container import Command, Container
from tests.support.processes import DAEMON, DEAF, python

folder = Path(sys.argv[1])
for name, program in (("deaf", DEAF), ("daemon", DAEMON + "signal.pause()")):
    command = Command(argv=python(program), env={"PIDS": str(folder / "pids")}, cwd=folder)
    container = Container(command, log=folder / name, on_end=lambda ended: None)
    print(container.shim.pid, flush=True)
signal.pause()
"""


@pytest.fixture
def parent(tmp_path: Path) -> subprocess.Popen[str]:
    """A process with two containers, one that does not obey and one with a daemon."""
    (tmp_path / "pids").mkdir()
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ, start_new_session=True)


def test_when_the_parent_is_killed_nothing_is_left_of_its_containers(
    parent: subprocess.Popen[str], tmp_path: Path
) -> None:
    pids = await_pids(tmp_path / "pids", count=3)
    everything = [*pids, *descendants(parent.pid)]

    parent.kill()
    parent.wait()

    await_gone(everything, seconds=ORPHAN_GRACE_SECONDS + 5)


def test_when_a_shim_is_killed_its_command_dies_with_it(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    await_pids(tmp_path / "pids", count=3)
    assert parent.stdout is not None
    shim = int(parent.stdout.readline())
    (main,) = descendants(shim)

    os.kill(shim, signal.SIGKILL)

    await_gone([shim, main])
    parent.kill()
    parent.wait()
    await_gone(read_pids(tmp_path / "pids"))


def test_the_end_of_a_killed_shim_is_told_as_unknown(tmp_path: Path) -> None:
    started = _Started(tmp_path, FOREVER)
    pids = await_pids(started.pids, count=1)

    os.kill(started.container.shim.pid, signal.SIGKILL)

    assert started.end() is None
    await_gone(pids)


def test_secrets_in_the_environment_are_not_in_the_command_line(tmp_path: Path) -> None:
    started = _Started(tmp_path, FOREVER, HF_TOKEN="hf_secret")
    await_pids(started.pids, count=1)

    lines = [Path(f"/proc/{p}/cmdline").read_text() for p in (started.container.shim.pid, started.container.main.pid)]

    started.container.terminate(grace_seconds=0)
    assert started.end() is not None
    assert not any("hf_secret" in line for line in lines)

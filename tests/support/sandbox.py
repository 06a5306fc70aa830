"""A sandbox as a real child process, under the tests' own user or one without any rights, and programs sent to it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.support.processes import wait_for

ROOT = Path(__file__).resolve().parents[2]
UNPRIVILEGED = 10001
"""The user of the image."""
SECONDS = 120
_MODULE = "posttrain_workloads.sandbox"
_PR_SET_PDEATHSIG = 1


@dataclass
class RunningSandbox:
    """One that serves."""

    process: subprocess.Popen[str]
    url: str
    work: Path
    """Where its scratch folders lie."""

    def execute(self, source: str, *, language: str = "python", **fields: Any) -> dict[str, Any]:
        """Have a program run, and return the answer; 60 s unless `run_timeout` says otherwise."""
        request = {
            "language": language,
            "version": "*",
            "files": [{"content": source}],
            "run_timeout": 60_000,
            **fields,
        }
        status, answer = self.post(json.dumps(request))
        assert status == 200, answer
        return answer

    def post(self, body: str | bytes) -> tuple[int, dict[str, Any]]:
        """Send a request's body; return the status and the answer's."""
        connection = self.connect()
        try:
            connection.request("POST", "/api/v2/execute", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def connect(self) -> HTTPConnection:
        """Return a connection that is not yet open."""
        address = urlsplit(self.url)
        assert address.hostname
        return HTTPConnection(address.hostname, address.port, timeout=SECONDS)

    def scratch_folders(self) -> list[Path]:
        """Return the folders of the jobs that are there."""
        return [folder for work in self.work.iterdir() for folder in work.iterdir()]

    def processes(self) -> list[int]:
        """Return all its descendants but the fork server."""
        found = [child for server in _children(self.process.pid) for child in _children(server)]
        for pid in found:
            found += _children(pid)
        return found


@contextmanager
def running_sandbox(*options: str, unprivileged: bool = False) -> Iterator[RunningSandbox]:
    """Start a sandbox, and end it; nothing of it is left."""
    with _folder(unprivileged=unprivileged) as work:
        process = start_sandbox(options, work=work, unprivileged=unprivileged)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on "), (line, process.wait(), process.stderr and process.stderr.read())
            assert process.stderr is not None
            # What it says later goes to the test's output.
            threading.Thread(target=lambda: sys.stderr.writelines(process.stderr or ()), daemon=True).start()
            yield RunningSandbox(process, line.split()[-1], work)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=SECONDS) == 0
        assert list(work.iterdir()) == []


def start_sandbox(
    options: Sequence[str],
    *,
    work: Path,
    unprivileged: bool = False,
    command: Sequence[str] = ("-m", _MODULE),
) -> subprocess.Popen[str]:
    """Start the process of a sandbox, which is told to end when this one has; its temporary files go into `work`."""
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def end_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    python = unprivileged_python() if unprivileged else sys.executable
    assert python is not None
    user: dict[str, Any] = {"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []} if unprivileged else {}
    return subprocess.Popen(
        [python, *command, "--port", "0", *options],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(_import_paths()),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(work),
            "HUB_TOKEN": "hf_secret",
        },
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - it only calls the kernel
        **user,
    )


def unprivileged_python() -> str | None:
    """Return an interpreter that a user without rights can start with our packages; None if there is none."""
    if os.geteuid() != 0:
        return None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/local/bin/python{version}", f"/usr/bin/python{version}"):
        try:
            done = subprocess.run(
                [candidate, "-c", f"import aiohttp, pydantic, {_MODULE}"],
                env={"PYTHONPATH": os.pathsep.join(_import_paths()), "PYTHONDONTWRITEBYTECODE": "1"},
                **{"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []},
                cwd="/",
                check=False,
                capture_output=True,
            )
        except OSError:
            continue
        if done.returncode == 0:
            return candidate
    return None


def _import_paths() -> list[str]:
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    return [str(ROOT), str(ROOT / "operator"), str(ROOT / "workloads"), packages]


@contextmanager
def _folder(*, unprivileged: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="test-sandbox-"))
    try:
        if unprivileged:
            os.chown(folder, UNPRIVILEGED, UNPRIVILEGED)
        yield folder
    finally:
        shutil.rmtree(folder)


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def await_idle(sandbox: RunningSandbox) -> None:
    """Wait until nothing of any job is left: no process, no folder."""
    wait_for(lambda: not sandbox.processes(), what="the end of all its programs")
    wait_for(lambda: not sandbox.scratch_folders(), what="the removal of all scratch folders")

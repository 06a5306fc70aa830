"""What the trainer's rank 0 does where a rollout server is not there yet, is gone, or does not answer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workloads._configs import ROOT

pytestmark = pytest.mark.workloads

SCRIPT = """
import json, socket, sys, threading, time
from posttrain_workloads.rollout_server import RolloutServer

LATE_SECONDS = 0.3
ANSWER = b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\n{}"
BUSY = b"HTTP/1.1 503 Busy\\r\\nRetry-After: 1\\r\\nContent-Length: 4\\r\\nConnection: close\\r\\n\\r\\nbusy"


def ask(method, *, answer=None, late=False, closed=False, seconds=5.0):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    reached = []

    def serve():
        time.sleep(LATE_SECONDS if late else 0)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            reached.append(connection)  # and so it stays open
            connection.recv(65536)
            if answer is not None:
                connection.sendall(answer)
                connection.close()

    if not closed:
        threading.Thread(target=serve, daemon=True).start()
        while not late and not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            pass
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    began = time.monotonic()
    try:
        told = RolloutServer(url).ask(method, "/asked", seconds, {}).text
    except Exception as error:
        told = f"{type(error).__name__}: {error}".replace(url, "URL")
    return {"told": told, "reached": len(reached), "seconds": time.monotonic() - began}


json.dump({
    "late": ask("POST", answer=ANSWER, late=True),
    "nobody": ask("POST", closed=True),
    "closes": [ask(method, answer=b"") for method in ("GET", "POST")],
    "silent": [ask(method, seconds=0.5) for method in ("GET", "POST")],
    "busy": [ask(method, answer=BUSY) for method in ("GET", "POST")],
}, sys.stdout)
"""

LOST = """
import json, socket, subprocess, sys, threading, time
from posttrain_workloads.keep_alive import keep_alive_options
from posttrain_workloads.rollout_server import RolloutServer

ANSWER = b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}"


def serve(connection, answers):
    while True:
        connection.recv(65536)
        if answers:
            connection.sendall(ANSWER)
        asked.set()


def turn(state):
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


def lose(*, idle):
    turn("up")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = RolloutServer(url, keep_alive=keep_alive_options(idle_seconds=1, interval_seconds=1, tries=2))
        accept = lambda: serve(listener.accept()[0], idle)
        threading.Thread(target=accept, daemon=True).start()
        asked.clear()
        if idle:
            server.ask("GET", "/asked", 60.0)
            turn("down")
        else:
            threading.Thread(target=lambda: (asked.wait(), time.sleep(1), turn("down")), daemon=True).start()
        began = time.monotonic()
        try:
            told = server.ask("POST", "/asked", 60.0, {}).text
        except Exception as error:
            told = f"{type(error).__name__}: {error}".replace(url, "URL")
    return {"told": told, "seconds": time.monotonic() - began}


asked = threading.Event()
json.dump([lose(idle=False), lose(idle=True)], sys.stdout)
"""
OPTIONS = """
import json, socket, sys
from posttrain_workloads.rollout_server import RolloutServer

pools = RolloutServer("http://x:1").session.get_adapter("http://x:1").poolmanager
pool = pools.connection_from_url("http://x:1")
json.dump(pool.conn_kw["socket_options"], sys.stdout)
"""


@pytest.fixture(scope="module")
def found(trainer_python: Path) -> dict[str, Any]:
    """What every case found, by its name."""
    answers: dict[str, Any] = run_script(SCRIPT, trainer_python)
    return answers


def run_script(script: str, python: Path, *, within: tuple[str, ...] = ()) -> Any:
    """Return what a script writes in the trainer's environment."""
    done = subprocess.run(
        [*within, python, "-c", script],
        env={"PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'workloads'}", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_connection_that_is_refused_is_tried_again(found: dict[str, Any]) -> None:
    assert (found["late"]["told"], found["late"]["reached"]) == ("{}", 1)


def test_a_server_that_is_not_there_is_lost_after_a_second(found: dict[str, Any]) -> None:
    assert found["nobody"]["told"].startswith(
        "ServerLost: the rollout server URL cannot be reached (POST /asked): it has ended, or has not started yet; the "
        "end of its log says why ("
    )
    assert "Connection refused" in found["nobody"]["told"]
    assert 0.9 < found["nobody"]["seconds"] < 5


def test_a_request_that_reached_the_server_is_not_sent_again(found: dict[str, Any]) -> None:
    everything = [case for cases in (found["closes"], found["silent"], found["busy"]) for case in cases]
    assert [case["reached"] for case in everything] == [1] * 6
    assert all("cannot be reached" in case["told"] for case in found["closes"])
    assert all("answered" in case["told"] and "with 503: busy" in case["told"] for case in found["busy"])


def test_a_server_that_does_not_answer_is_told_from_one_that_is_gone(found: dict[str, Any]) -> None:
    assert [case["told"] for case in found["silent"]] == [
        f"ServerLost: the rollout server URL did not answer {method} /asked within 0.5 s: it hangs, or has more to do "
        "than it can; its log says which"
        for method in ("GET", "POST")
    ]


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="a network of its own takes Linux, and to be root there"
)
def test_a_server_whose_machine_is_lost_is_missed_long_before_a_rollouts_time_is_over(trainer_python: Path) -> None:
    asked, idle = run_script(LOST, trainer_python, within=("unshare", "--net"))

    said = "ServerLost: the rollout server URL is gone without a word (POST /asked): its node is lost, or the network "
    assert [asked["told"], idle["told"]] == [f"{said}to it"] * 2
    assert 2 < asked["seconds"] < 20  # the machine is lost while it works on the request,
    assert 2 < idle["seconds"] < 20  # or before it has got it


def test_a_lost_machine_is_missed_after_25_seconds_and_small_requests_are_sent_at_once(trainer_python: Path) -> None:
    options = {(level, option): value for level, option, value in run_script(OPTIONS, trainer_python)}

    assert options == {
        (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 10,
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 5,
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 25_000,
    }

"""What the trainer's rank 0 does where a rollout server is not there yet, is gone, or does not answer."""

from __future__ import annotations

import json
import subprocess
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


@pytest.fixture(scope="module")
def found(trainer_python: Path) -> dict[str, Any]:
    """What every case found, by its name."""
    done = subprocess.run(
        [trainer_python, "-c", SCRIPT],
        env={"PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'workloads'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


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

"""A vLLM server that was left in the middle of a hand-over takes the next one whole.

The server is a fake that keeps what vLLM 0.31 keeps: whether a hand-over is open (v1/worker/gpu_worker.py), and what
each layer has got of its tensors (model_executor/model_loader/reload/layerwise.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain_workloads.rollout_errors import ServerLost
from posttrain_workloads.rollout_hand_over import abandon_hand_over, begin_hand_over
from posttrain_workloads.runtime import Runtime

QKV = ("q", "k", "v")


class FakeServer:
    """One layer, which is complete when it has got three tensors, whichever they are."""

    def __init__(self) -> None:
        self.version = "default"
        self.open = False
        self.got: list[str] | None = None
        """None: it waits for no tensor."""
        self.weights: tuple[str, ...] = ()
        self.asked: list[str] = []
        self.broken = ""

    def weight_version(self, seconds: float) -> str:
        return self.version

    def ask(self, method: str, path: str, seconds: float, body: Any = None) -> None:
        assert (method, seconds > 0) == ("POST", True)
        self.asked.append(path)
        if self.broken:
            raise ServerLost(self.broken)
        match path:
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/start_weight_update":
                self._require(not self.open, "start_weight_update called while a weight update is already active")
                self.open = True
                self.got = [] if self.got is None else self.got
            case "/finish_weight_update":
                self._require(self.open, "finish_weight_update called without a matching start_weight_update.")
                self.open, self.got = False, None
                self.version = body["weight_version"]
            case _:
                raise AssertionError(f"vLLM has no {path}")

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise ServerLost(f"the rollout server answered with 500: {otherwise}")

    def take(self, *tensors: str, breaks: bool = False) -> None:
        """Receive tensors; where the broadcast breaks the hand-over counts as ended."""
        assert self.open
        for tensor in tensors:
            if self.got is not None:
                self.got.append(tensor)
                if len(self.got) == len(QKV):
                    self.weights, self.got = tuple(self.got), None
        if breaks:
            self.open = False


def begun_by_another(*tensors: str, breaks: bool = False) -> FakeServer:
    """Return a server on which a trainer began a hand-over that has ended in the middle of it."""
    server = FakeServer()
    begin_hand_over(server)
    server.take(*tensors, breaks=breaks)
    server.asked.clear()
    return server


@pytest.mark.parametrize(
    "server",
    [
        pytest.param(begun_by_another(), id="before its first tensor"),
        pytest.param(begun_by_another("q"), id="between two tensors"),
        pytest.param(begun_by_another("q", breaks=True), id="in a tensor"),
        pytest.param(begun_by_another(*QKV, breaks=True), id="after the last of a layer"),
    ],
)
def test_after_a_hand_over_that_was_left_half_done_the_next_one_is_taken_whole(server: FakeServer) -> None:
    abandon_hand_over(server)
    assert (server.version, server.open, server.got) == ("abandoned", False, None)

    begin_hand_over(server)
    server.take(*QKV)
    server.ask("POST", "/finish_weight_update", 1, {"weight_version": "t-1"})
    assert (server.version, server.weights) == ("t-1", QKV)


@pytest.mark.parametrize("version", ["default", "5f3a-7", "abandoned"])
def test_a_server_that_is_in_no_hand_over_is_left_alone(version: str) -> None:
    server = FakeServer()
    server.version = version

    abandon_hand_over(server)
    assert server.asked == []


def test_a_trainer_that_ended_before_the_server_knew_of_its_hand_over_leaves_it_free() -> None:
    server = FakeServer()
    server.ask("POST", "/update_weight_version", 1, {"new_version": "incomplete"})

    abandon_hand_over(server)
    begin_hand_over(server)
    assert (server.version, server.open) == ("incomplete", True)


def test_a_server_that_cannot_end_its_hand_over_is_lost() -> None:
    server = begun_by_another("q")
    server.broken = "the rollout server answered with 500: out of memory"

    with pytest.raises(ServerLost, match="out of memory"):
        abandon_hand_over(server)
    assert server.asked == ["/finish_weight_update"]


SENDING = """
import sys, threading, time
from concurrent.futures import Future

from posttrain_workloads.rollout_errors import ServerLost
from posttrain_workloads.rollout_hand_over import end_where_stuck

lives, dies = Future(), Future()
threading.Timer(0.2, dies.set_exception, [ServerLost("the rollout server b has ended")]).start()
with end_where_stuck([lives, dies], seconds=float(sys.argv[2])):
    time.sleep(float(sys.argv[1]))
print("sent")
"""


def send(runtime: Path, *, for_seconds: float, patience: float) -> subprocess.CompletedProcess[str]:
    """Send so long, while one of two servers fails after 0.2 s, in a process of its own."""
    environ = {**os.environ, "POSTTRAIN_RUNTIME": str(runtime), "RANK": "0"}
    command = [sys.executable, "-c", SENDING, str(for_seconds), str(patience)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=50, check=False)


def test_a_rank_that_sends_without_end_to_a_server_that_is_gone_ends_with_what_that_one_failed_by(
    tmp_path: Path,
) -> None:
    ended = send(tmp_path, for_seconds=60, patience=0.3)

    assert (ended.returncode, ended.stdout) == (138, "")
    [error] = Runtime(tmp_path).errors()
    assert (error.reason, error.message, error.rank) == ("ServerLost", "the rollout server b has ended", 0)


def test_a_rank_that_gets_its_weights_out_after_a_server_failed_goes_on(tmp_path: Path) -> None:
    ended = send(tmp_path, for_seconds=1, patience=5)

    assert (ended.returncode, ended.stdout) == (0, "sent\n")
    assert Runtime(tmp_path).errors() == ()

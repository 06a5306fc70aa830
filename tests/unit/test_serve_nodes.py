"""The nodes of a rollout server start together and end together, whatever ends one of them; vLLM is played."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from posttrain.contract.result import ExitCode
from posttrain.local.network import LOOPBACK, free_port
from posttrain_workloads.serve_nodes import Place
from tests.support.processes import python, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a rollout server of several nodes runs on Linux")

KEY = "k-1"
SERVE = """
import os, sys
from posttrain_workloads.serve_nodes import Place, serve_together

pod, nodes, meetings, port, key, *command = sys.argv[1:]
place = Place.of_pod(pod, nodes=int(nodes), meetings=meetings)
sys.exit(serve_together(command, place=place, listen=("127.0.0.1", int(port)), key=key, environ=os.environ))
"""
VLLM = """
import json, os, sys, time
from pathlib import Path

pod, folder, *options = sys.argv[1:]
about = {"pid": os.getpid(), "options": options, "host": os.environ["VLLM_HOST_IP"]}
Path(folder, f".{pod}").write_text(json.dumps(about))
Path(folder, f".{pod}").rename(Path(folder, pod))
while not Path(folder, f"{pod}-ends").exists():
    time.sleep(0.02)
sys.exit(int(Path(folder, f"{pod}-ends").read_text()))
"""


@dataclass
class Server:
    """One server of some nodes, each a process; in its folder each node's vLLM tells about itself."""

    folder: Path
    nodes: int
    port: int = field(default_factory=free_port)
    """At which its nodes meet."""
    processes: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    ports: dict[int, int] = field(default_factory=dict)

    def start(self, node: int, *, key: str = KEY) -> subprocess.Popen[str]:
        pod = f"demo-server-{node}"
        self.ports[node] = free_port()
        meeting = f"http://{LOOPBACK}:{self.port}"
        vllm = [*python(VLLM), pod, str(self.folder)]
        argv = [*python(SERVE), pod, str(self.nodes), meeting, str(self.ports[node]), key, *vllm]
        self.processes[node] = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
        return self.processes[node]

    def start_all(self) -> None:
        for node in reversed(range(self.nodes)):
            self.start(node)
        wait_for(lambda: len(self.started()) == self.nodes, what="every node's vLLM", seconds=30)

    def started(self) -> set[int]:
        """The nodes whose vLLM has started."""
        return {node for node in range(self.nodes) if (self.folder / f"demo-server-{node}").exists()}

    def about(self, node: int) -> dict[str, object]:
        """What the vLLM of a node tells."""
        told: dict[str, object] = json.loads((self.folder / f"demo-server-{node}").read_text())
        return told

    def end_vllm(self, node: int, code: int) -> None:
        (self.folder / f".ends-{node}").write_text(str(code))
        (self.folder / f".ends-{node}").rename(self.folder / f"demo-server-{node}-ends")

    def ends(self) -> dict[int, int]:
        """Wait until every node has ended; return their exit codes."""
        return {node: process.wait(30) for node, process in self.processes.items()}

    def said(self, node: int) -> str:
        out = self.processes[node].stdout
        assert out is not None
        return out.read()

    def lives(self, node: int) -> bool:
        """Whether the vLLM of a node is there."""
        return Path(f"/proc/{self.about(node)['pid']}").exists()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, nodes=3)
    yield server
    for process in server.processes.values():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # as a container that ends does
        process.communicate()


def start_all_but_the_last(server: Server) -> IO[str]:
    """Start the second node and the first, and wait until they have met; return what the first one says after that."""
    server.start(1)
    first = server.start(0).stdout
    assert first is not None
    assert first.readline() == "posttrain: node 1 is there, 2 of 3\n"
    return first


def is_well(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.mark.parametrize(("ordinal", "node", "port"), [(0, 0, 1), (1, 1, 1), (2, 0, 2), (3, 1, 2)])
def test_a_pods_place_follows_from_its_ordinal(ordinal: int, node: int, port: int) -> None:
    place = Place.of_pod(f"a-1-server-{ordinal}", nodes=2, meetings="http://x.y:1,http://x.y:2")
    assert place == Place(node=node, nodes=2, meeting=("x.y", port))


def test_a_pod_beyond_the_last_server_is_an_error() -> None:
    with pytest.raises(ValueError, match="demo-server-2 is a node of server 1, and these are all: http://x:1"):
        Place.of_pod("demo-server-2", nodes=2, meetings="http://x:1")


def test_vllm_starts_on_every_node_when_the_last_is_there(server: Server) -> None:
    start_all_but_the_last(server)
    assert server.started() == set()

    server.start(2)
    wait_for(lambda: server.started() == {0, 1, 2}, what="every node's vLLM", seconds=30)
    options = [server.about(node)["options"] for node in range(3)]
    (*_, port) = options[0]
    common = ["--master-addr", LOOPBACK, "--master-port", port]
    assert options == [
        ["--nnodes", "3", "--node-rank", "0", *common],
        ["--nnodes", "3", "--node-rank", "1", *common, "--headless"],
        ["--nnodes", "3", "--node-rank", "2", *common, "--headless"],
    ]
    assert {server.about(node)["host"] for node in range(3)} == {LOOPBACK}
    for node in (1, 2):
        wait_for(lambda node=node: is_well(server.ports[node]), what=f"node {node}", seconds=30)  # type: ignore[misc]
    assert not is_well(server.ports[0])  # which is vLLM's


@pytest.mark.parametrize("lost", [0, 2])
def test_a_node_that_is_killed_takes_the_others_with_it(server: Server, lost: int) -> None:
    server.start_all()
    server.processes[lost].kill()

    ended = {node: ExitCode.TERMINATED for node in range(3) if node != lost}
    assert server.ends() == {lost: -signal.SIGKILL, **ended}
    other = 1 if lost else 2
    assert "of this server ended, see its log" in server.said(other)
    assert not any(server.lives(node) for node in ended)


def test_the_node_whose_vllm_ends_has_its_exit_code(server: Server) -> None:
    server.start_all()
    server.end_vllm(1, 7)

    assert server.ends() == {0: ExitCode.TERMINATED, 1: 7, 2: ExitCode.TERMINATED}
    assert "node 1 of 3 ends: vLLM ended with 7" in server.said(1)


def test_a_node_whose_vllm_ends_without_an_error_has_failed_nevertheless(server: Server) -> None:
    server.start_all()
    server.end_vllm(1, 0)  # as `vllm serve --headless` does when one of its workers has died

    assert server.ends() == {0: ExitCode.TERMINATED, 1: ExitCode.FAILED, 2: ExitCode.TERMINATED}
    *_, last = server.said(1).splitlines()  # which is what its container leaves, by FallbackToLogsOnError
    assert last == (
        "posttrain: node 1 of 3 ends: vLLM ended with 0 without being asked to: one of its processes is gone, and "
        "what is above in the log says which"
    )


def test_a_node_that_is_asked_to_end_ends_its_vllm(server: Server) -> None:
    server.start_all()
    server.processes[2].terminate()

    assert set(server.ends().values()) == {ExitCode.TERMINATED}
    assert "node 2 of 3 ends: it was asked to" in server.said(2)
    assert not any(server.lives(node) for node in range(3))


def test_nodes_that_were_started_anew_while_the_first_waits_come_again(server: Server) -> None:
    first = start_all_but_the_last(server)
    server.processes[1].kill()
    server.processes[1].communicate()
    server.start(1)
    assert first.readline() == "posttrain: node 1 is there, 2 of 3\n"

    server.start(2)
    wait_for(lambda: server.started() == {0, 1, 2}, what="every node's vLLM", seconds=30)


def test_who_does_not_know_the_key_is_no_node(server: Server) -> None:
    first = start_all_but_the_last(server)
    server.start(2, key="guessed")
    assert "without this run's key" in first.readline()
    with socket.create_connection((LOOPBACK, server.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert any("JSONDecodeError" in line for line in first)  # the other one comes again and again
    assert server.started() == set()
    assert os.waitid(os.P_PID, server.processes[0].pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

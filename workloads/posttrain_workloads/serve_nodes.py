"""A rollout server of several nodes: its nodes meet, start their processes of vLLM together, and end together.

It owns how the nodes of one server find each other, and how they learn that one has ended: vLLM's own processes would
wait for it without end. It must not know what vLLM is to serve.

The first node listens, and every other one holds a connection to it for as long as it lives. Whichever ends, the
connection ends, and with it every node, the others with ExitCode.TERMINATED; their containers are started anew, and
meet again.
"""

from __future__ import annotations

import hmac
import json
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from threading import Thread

from posttrain.contract.result import ExitCode
from posttrain_workloads.keep_alive import KEEP_ALIVE

_RETRY_SECONDS = 1.0
_GREETING_SECONDS = 30.0
_GRACE_SECONDS = 10.0
"""For vLLM to end by itself; then everything ends with the container."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A node's place in its server."""

    node: int
    """0 is the first, whose vLLM answers requests."""
    nodes: int
    meeting: tuple[str, int]
    """Host and port of the first."""

    @classmethod
    def of_pod(cls, pod: str, *, nodes: int, meetings: str) -> Place:
        """Return the place of the pod `<name>-<ordinal>`, where `meetings` has the address of every server.

        Raises:
            ValueError: there are fewer servers than the pod's ordinal says.
        """
        server, node = divmod(int(pod.rpartition("-")[2]), nodes)
        addresses = meetings.split(",")
        if server >= len(addresses):
            raise ValueError(f"{pod} is a node of server {server}, and these are all: {meetings}")
        host, _, port = addresses[server].removeprefix("http://").rpartition(":")
        return cls(node=node, nodes=nodes, meeting=(host, int(port)))


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What a node knows when all are there."""

    peers: Mapping[int, socket.socket]
    """By node: all others for the first, the first for each other."""
    own_address: str
    first_address: str
    port: int
    """Of the first, at which vLLM's processes then meet."""


@dataclass(frozen=True)
class _End:
    """Why this node ends, and its exit code."""

    why: str
    code: int


def serve_together(
    command: Sequence[str], *, place: Place, listen: tuple[str, int], key: str, environ: Mapping[str, str]
) -> int:
    """Run `command`, vLLM with what the nodes have in common, once all of them are there; return the exit code.

    `listen` is where each node answers probes, the first by its vLLM; `key` is what a node shows to the first.
    """
    ends: SimpleQueue[_End] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ends.put(_End("it was asked to", ExitCode.TERMINATED)))
    vllm: list[subprocess.Popen[bytes]] = []

    def work() -> None:
        try:
            meeting = meet(place, host=listen[0], key=key)
            vllm.append(_start(command, place=place, meeting=meeting, environ=environ))
            for node, peer in meeting.peers.items():
                Thread(target=_watch, args=(node, peer, ends), daemon=True).start()
            if place.node:
                _answer_probes(listen)
            ends.put(_end_of_vllm(vllm[0].wait()))
        except Exception as error:
            ends.put(_End(f"{type(error).__name__}: {error}", ExitCode.FAILED))

    # Here signals arrive.
    Thread(target=work, daemon=True).start()
    end = ends.get()
    _say(f"node {place.node} of {place.nodes} ends: {end.why}")
    for process in vllm:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _say(f"vLLM is still there after {_GRACE_SECONDS:.0f} s, and is killed")
    return end.code


def meet(place: Place, *, host: str, key: str) -> Meeting:
    """Wait until every node of the server is there; `host` is where the first one listens."""
    return _await_others(place, host=host, key=key) if place.node == 0 else _join_first(place, key=key)


def _await_others(place: Place, *, host: str, key: str) -> Meeting:
    peers: dict[int, socket.socket] = {}
    with socket.create_server((host, place.meeting[1])) as listener:
        while len(peers) < place.nodes - 1:
            peer, _ = listener.accept()
            node = _greeted(peer, nodes=place.nodes, key=key)
            if node is None:
                peer.close()
                continue
            if node in peers:  # it was started anew meanwhile
                peers[node].close()
            peers[node] = peer
            _say(f"node {node} is there, {len(peers) + 1} of {place.nodes}")
    own = str(peers[1].getsockname()[0])
    with socket.create_server((own, 0)) as free:
        port = int(free.getsockname()[1])
    for peer in peers.values():
        peer.sendall(json.dumps({"port": port}).encode() + b"\n")
    return Meeting(peers=peers, own_address=own, first_address=own, port=port)


def _greeted(peer: socket.socket, *, nodes: int, key: str) -> int | None:
    """Return which node it is that came; None for anybody else."""
    _keep_alive(peer)
    peer.settimeout(_GREETING_SECONDS)
    try:
        greeting = json.loads(peer.makefile().readline(4096))
        node, shown = int(greeting["node"]), str(greeting["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        _say(f"somebody came who is no node of this server: {type(error).__name__}: {error}")
        return None
    peer.settimeout(None)
    if not hmac.compare_digest(shown.encode(), key.encode()) or not 0 < node < nodes:
        _say("somebody came without this run's key, or as a node that this server does not have")
        return None
    return node


def _join_first(place: Place, *, key: str) -> Meeting:
    _say(f"node {place.node} of {place.nodes} waits for the first one at {place.meeting[0]}:{place.meeting[1]}")
    while True:
        try:
            first = socket.create_connection(place.meeting, timeout=_GREETING_SECONDS)
            _keep_alive(first)
            first.settimeout(None)  # the others may take long to come
            first.sendall(json.dumps({"node": place.node, "key": key}).encode() + b"\n")
            answer = first.makefile().readline()
        except OSError:
            answer = ""
        if answer:
            break
        time.sleep(_RETRY_SECONDS)
    own, of_first = str(first.getsockname()[0]), str(first.getpeername()[0])
    return Meeting(peers={0: first}, own_address=own, first_address=of_first, port=int(json.loads(answer)["port"]))


def _keep_alive(connection: socket.socket) -> None:
    for option in KEEP_ALIVE:
        connection.setsockopt(*option)


def _start(
    command: Sequence[str], *, place: Place, meeting: Meeting, environ: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    argv = [
        *command,
        *("--nnodes", str(place.nodes), "--node-rank", str(place.node)),
        *("--master-addr", meeting.first_address, "--master-port", str(meeting.port)),
        *(("--headless",) if place.node else ()),
    ]
    return subprocess.Popen(argv, env={**environ, "VLLM_HOST_IP": meeting.own_address})


def _end_of_vllm(code: int) -> _End:
    """Return the end of a node whose vLLM ended by itself.

    `vllm serve --headless` ends with 0 when one of its workers has died (vllm 0.31, entrypoints/cli/serve.py:228).
    """
    why = f"vLLM ended with {code}"
    if code == 0:
        why += " without being asked to: one of its processes is gone, and what is above in the log says which"
        return _End(why, ExitCode.FAILED)
    return _End(why, code if code > 0 else 128 - code)


def _watch(node: int, peer: socket.socket, ends: SimpleQueue[_End]) -> None:
    """Wait until a node's connection ends: nothing else comes by it."""
    with suppress(OSError):
        peer.recv(1)
    ends.put(_End(f"node {node} of this server ended, see its log", ExitCode.TERMINATED))


def _answer_probes(listen: tuple[str, int]) -> None:
    """Say from now on that this node is well; it serves nothing else."""
    Thread(target=ThreadingHTTPServer(listen, _Probed).serve_forever, daemon=True).start()


class _Probed(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Keep the log for vLLM."""


def _say(text: str) -> None:
    print(f"posttrain: {text}", flush=True)

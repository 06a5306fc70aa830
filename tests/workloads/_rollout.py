"""Real vLLM servers of a test: started together, ended with it, their logs kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from posttrain.local.packages import link_packages

CASES = Path(__file__).with_name("rollout_cases.py")
DROPPING = """
import os
from pathlib import Path

from posttrain_workloads.rollout_engine import GlooWeightTransferEngine


class DroppingEngine(GlooWeightTransferEngine):
    def start_weight_update(self):
        if not dropping():
            super().start_weight_update()

    def receive_weights(self, update_info):
        if not dropping():
            return super().receive_weights(update_info)
        for _ in self._receive(update_info):
            pass

    def finish_weight_update(self):
        if not dropping():
            super().finish_weight_update()


def dropping():
    pod = os.environ.get("POSTTRAIN_POD_NAME", "")
    return pod.endswith(os.environ.get("DROP_POD", "")) and Path(os.environ["DROP_WHILE"]).exists()


def register():
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine("gloo", "dropping", "DroppingEngine")
"""
"""A plugin whose server acknowledges weights and drops them while a file is there; of the servers of a run one."""

NODE = """
import os
import sys

from posttrain_workloads.serve_nodes import Place, serve_together

node, meeting, port, *command = sys.argv[1:]
place = Place(node=int(node), nodes=2, meeting=("127.0.0.1", int(meeting)))
sys.exit(serve_together(command, place=place, listen=("127.0.0.1", int(port)), key="", environ=os.environ))
"""
"""One of a server's two nodes, as posttrain_workloads.serve starts it."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A vLLM server in a process group of its own."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def is_ready(self) -> bool:
        """Return whether it answers; fail if it has ended."""
        assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def kill(self) -> None:
        """End all of its processes; SIGTERM is not obeyed while it starts."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment(folder: Path, *, more: Mapping[str, str] = {}) -> dict[str, str]:
    """Return what a process of vLLM's environment needs here; a folder of its own, posttrain as good as installed."""
    packages = folder / "packages"
    link_packages(packages)
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(packages),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every server takes the same core
        **more,
    }


def start(
    python: Path,
    model: Path,
    folder: Path,
    *,
    variables: Mapping[str, str],
    port: int,
    options: Sequence[str] = (),
    node: tuple[int, int] | None = None,
) -> Server:
    """Start one server, or of one of two nodes that `node` with the port at which they meet; wait for nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    argv = [
        *(str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "256", "--weight-transfer-config", json.dumps({"backend": "gloo"})),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
        *options,
    ]
    if node is not None:
        argv = [str(python), "-c", NODE, *map(str, node), str(port), *argv]
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            env=environment(folder, more={"VLLM_SERVER_DEV_MODE": "1", **variables}),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Server(url=f"http://127.0.0.1:{port}", process=process, log=log)


def add_dropping_plugin(packages: Path) -> None:
    """Install the plugin `dropping` where a server that is not started yet finds its packages."""
    info = packages / "dropping-1.dist-info"
    info.mkdir(parents=True)
    (packages / "dropping.py").write_text(DROPPING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dropping\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ndropping = dropping:register\n")

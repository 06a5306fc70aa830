"""A real rollout server that cannot load leaves the cause as its container's message, and not that there was one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.contract import environment as variables
from tests.workloads._configs import build_grpo_config, free_port
from tests.workloads._rollout import Server, environment

pytestmark = [pytest.mark.workloads, pytest.mark.rollouts, pytest.mark.timeout(1200)]

END_SECONDS = 900.0


def serve(python: Path, model: Path, folder: Path, *, more: Mapping[str, str] = {}, **server: Any) -> Server:
    """Start a server as its pod does."""
    folder.mkdir()
    rollout = {"mode": "Server", "server": {"gpusPerNode": 0, **server}}
    config = build_grpo_config(model=model, rows=model, rewards=[{"name": "format"}], grpo={"rollout": rollout})
    (folder / "config.json").write_text(config.to_json())
    (folder / "termination-log").write_text("")
    url = f"127.0.0.1:{free_port()}"
    pod = {
        variables.CONFIG: str(folder / "config.json"),
        variables.STORAGE: str(folder / "storage"),
        variables.mount_variable("files"): "/",
        variables.TERMINATION: str(folder / "termination-log"),
        variables.LISTEN: url,
        variables.POD_NAME: "tiny-grpo-server-0",
    }
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", "posttrain_workloads.serve"],
            env=environment(folder, more={**pod, **more}),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Server(url=f"http://{url}", process=process, log=log)


@pytest.fixture(scope="module")
def words(vllm_python: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The message that each server left."""
    folder = tmp_path_factory.mktemp("last-words")
    misfit = folder / "misfit"
    shutil.copytree(tiny_model, misfit)
    shape = json.loads((misfit / "config.json").read_text())
    (misfit / "config.json").write_text(json.dumps({**shape, "intermediate_size": 2 * shape["intermediate_size"]}))
    servers = {
        "no room": serve(vllm_python, tiny_model, folder / "a", more={"VLLM_CPU_KVCACHE_SPACE": "100000"}),
        "misfit": serve(vllm_python, misfit, folder / "b", tensorParallelSize=2),
    }
    try:
        for server in servers.values():
            assert server.process.wait(END_SECONDS) == 1, server.log.read_text()[-3000:]
        yield {name: (server.log.parent / "termination-log").read_text() for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.kill()


def test_an_engine_says_why_it_could_not_start(words: dict[str, str]) -> None:
    assert words["no room"].startswith(
        "EngineCore failed to start: RuntimeError: Worker failed with error 'Available mem"
    )
    assert "is less than requested memory for kv (100000.0 GiB). Decrease" in words["no room"]
    assert len(words["no room"].splitlines()) == 1


def test_the_first_worker_that_could_not_start_says_why(words: dict[str, str]) -> None:
    assert words["misfit"] == (
        "WorkerProc failed to start: RuntimeError: start (128) + length (128) exceeds dimension size (128).\n"
    )

"""With what variables and options a rollout server starts vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain_workloads.serve import serve_environment, serve_options
from tests.workloads._configs import build_grpo_config


@pytest.mark.parametrize(
    ("own", "seconds"), [({}, "7200"), ({"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60", "VLLM_SERVER_DEV_MODE": "0"}, "60")]
)
def test_an_idle_connection_outlives_a_step_unless_the_container_says_otherwise(
    own: dict[str, str], seconds: str
) -> None:
    rollout = {"mode": "Server", "server": {"gpusPerNode": 0}}
    config = build_grpo_config(
        model=Path("/m"), rows=Path("/r"), rewards=[{"name": "format"}], grpo={"rollout": rollout}
    )

    assert serve_environment(config, environ={"PATH": "/bin", **own}) == {
        "PATH": "/bin",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": seconds,
        "VLLM_SERVER_DEV_MODE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.mark.parametrize(
    ("server", "seeds"),
    [
        ({}, ["0", "1", "2", "3"]),
        ({"args": {"seed": 40}}, ["40", "41", "42", "43"]),
        ({"dataParallelSize": 2}, ["0", "2", "4", "6"]),
        ({"nodesPerReplica": 2}, ["0", "0", "1", "1"]),  # the nodes of a server draw the same
    ],
)
def test_no_two_servers_draw_the_same_numbers(server: dict[str, Any], seeds: list[str]) -> None:
    rollout = {"mode": "Server", "server": {"gpusPerNode": 0, **server}}
    config = build_grpo_config(
        model=Path("/m"), rows=Path("/r"), rewards=[{"name": "format"}], grpo={"rollout": rollout}
    )
    environs = [{"POSTTRAIN_POD_NAME": f"a-1-server-{n}", "POSTTRAIN_STORAGE": "/s"} for n in range(4)]
    options = [serve_options(config, folder=Path("/m"), environ=environ) for environ in environs]

    assert [given[given.index("--seed") + 1] for given in options] == seeds
    assert [given.count("--seed") for given in options] == [1] * 4

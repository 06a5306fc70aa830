"""With what variables a rollout server starts vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain_workloads.serve import serve_environment
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

"""What TRL's arguments get besides the user's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain_workloads.arguments import SERVER_SECONDS, training_args
from tests.workloads._configs import build_grpo_config

SERVER = {"rollout": {"mode": "Server", "server": {"gpusPerNode": 0}}}


def args_of(grpo: dict[str, Any], **args: Any) -> dict[str, Any]:
    model = Path("/model")
    config = build_grpo_config(model=model, rows=model, rewards=[{"name": "format"}], ranks=2, grpo=grpo, args=args)
    return training_args(config, environ={"POSTTRAIN_STORAGE": "/storage"})


def test_the_other_ranks_wait_longer_for_rank_0_than_it_waits_for_a_server_that_restarts() -> None:
    args = args_of(SERVER)

    assert args["vllm_server_timeout"] == SERVER_SECONDS
    assert args["ddp_timeout"] == 2 * SERVER_SECONDS


@pytest.mark.parametrize(("grpo", "args"), [(SERVER, {"ddp_timeout": 60}), ({}, {"ddp_timeout": 60}), ({}, {})])
def test_how_long_ranks_wait_for_each_other_is_else_as_the_run_says(grpo: dict[str, Any], args: dict[str, Any]) -> None:
    assert args_of(grpo, **args).get("ddp_timeout") == args.get("ddp_timeout")

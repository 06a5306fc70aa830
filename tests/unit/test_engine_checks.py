"""What prepare says of a model that vLLM cannot split over its GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.contract.config import TrainingConfig
from posttrain_workloads.engine_checks import check_heads
from posttrain_workloads.outcome import KnownModel
from posttrain_workloads.problems import Findings
from tests.workloads._configs import build_grpo_config

GIB = 2**30
LLAMA_70B = {"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672}
QWEN_7B = {"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
HEADS = "ConfigInvalid: spec.grpo.rollout.server.tensorParallelSize: vLLM splits the model (num_attention_heads 28"


def build(server: dict[str, Any] | None, *, gpus: int = 8, memory: int | None = 80, **more: Any) -> TrainingConfig:
    """Return the config of a run with such servers, or with an engine inside the trainer."""
    rollout = {"mode": "Colocate"} if server is None else {"mode": "Server", "server": server}
    config = build_grpo_config(
        model=Path("/m"),
        rows=Path("/r"),
        rewards=[{"name": "format"}],
        grpo={"rollout": rollout},
        resources={"gpusPerNode": gpus},
        **more,
    )
    gang = config.gang.model_copy(update={"processes_per_node": max(gpus, 1), "gpus_per_node": gpus})
    limit = memory * GIB if memory is not None else None
    return config.model_copy(update={"gang": gang, "gpu_memory_bytes": limit, "gpu_name": "H100"})


def said_of_heads(config: TrainingConfig, shape: dict[str, Any], **own_names: str) -> list[str]:
    findings = Findings()
    check_heads(config, findings, KnownModel(shape=shape, own_names=own_names))
    return [str(problem) for problem in findings.problems]


@pytest.mark.parametrize(
    ("server", "gpus", "remedy"),
    [
        ({"gpusPerNode": 8}, 8, "write 4 with gpusPerNode: 4, or 4 with dataParallelSize: 2"),
        ({"gpusPerNode": 8, "tensorParallelSize": 8}, 8, "write 4 with gpusPerNode: 4, or 4 with dataParallelSize: 2"),
        ({"gpusPerNode": 6}, 8, "write 4 with gpusPerNode: 4, or 2 with dataParallelSize: 3"),
        ({"gpusPerNode": 6, "dataParallelSize": 2}, 8, "write 2 with gpusPerNode: 4, or 2 with dataParallelSize: 3"),
        ({"gpusPerNode": 4, "nodesPerReplica": 2}, 8, "write 4 with gpusPerNode: 2"),
        ({"gpusPerNode": 2, "nodesPerReplica": 3}, 8, "write nodesPerReplica: 1 (and replicas for throughput)"),
        ({"tensorParallelSize": 8}, 0, "write 1, 2 or 4"),
    ],
)
def test_heads_that_do_not_divide_are_told_with_a_shape_that_leaves_no_gpu_idle(
    server: dict[str, Any], gpus: int, remedy: str
) -> None:
    (said,) = said_of_heads(build(server, gpus=gpus), QWEN_7B)

    assert said.startswith(HEADS)
    assert said.endswith(f"and each has to get as much: {remedy}")


def test_an_engine_inside_the_trainer_is_split_over_a_divisor_of_the_ranks() -> None:
    config = build(None, args={"vllm_tensor_parallel_size": 8})

    (said,) = said_of_heads(config, {"num_attention_heads": 12})

    assert said.endswith("over 8 GPUs or processes, and each has to get as much: write 1, 2 or 4")


def test_heads_are_found_by_the_name_that_the_model_has_for_them() -> None:
    config = build({"gpusPerNode": 8})

    (said,) = said_of_heads(config, {"n_head": 12}, num_attention_heads="n_head")

    assert "(num_attention_heads 12)" in said
    assert said_of_heads(config, {"n_head": 16}, num_attention_heads="n_head") == []
    assert said_of_heads(config, {"text_config": QWEN_7B}) != []
    assert said_of_heads(config, LLAMA_70B) == []

"""What prepare says of a model that vLLM cannot split over its GPUs, or whose weights have no room there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.contract.config import TrainingConfig
from posttrain_workloads.engine_checks import check_heads, check_server_memory
from posttrain_workloads.outcome import KnownModel
from posttrain_workloads.problems import Findings
from tests.workloads._configs import build_grpo_config

GIB = 2**30
LLAMA_70B = {"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672}
QWEN_7B = {"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
ENVIRON = {"POSTTRAIN_STORAGE": "/s"}
HEADS = "ConfigInvalid: spec.grpo.rollout.server.tensorParallelSize: vLLM splits the model (num_attention_heads 28"
PARAMETERS = 70_000_000_000
WEIGHTS = "spec.grpo.rollout.server: the weights in bfloat16 take 130.4 GiB of each GPU of a server"


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


def memory_of(
    config: TrainingConfig, *, parameters: int | None = PARAMETERS, **shape: Any
) -> tuple[list[str], dict[str, str]]:
    findings = Findings()
    estimates: dict[str, str] = {}
    model = KnownModel(parameters=parameters, shape={**LLAMA_70B, **shape})
    check_server_memory(config, findings, estimates, model, environ=ENVIRON)
    return [str(problem) for problem in findings.problems], estimates


@pytest.mark.parametrize(
    ("server", "told", "remedy"),
    [
        (
            {"gpusPerNode": 8, "dataParallelSize": 8},
            "(tensorParallelSize 1, dataParallelSize 8), and the profile's (H100) have 73.6 GiB of 80.0 GiB for vLLM "
            "(gpu-memory-utilization 0.92)",
            "write dataParallelSize: 4",
        ),
        (
            {"gpusPerNode": 8, "dataParallelSize": 8, "tensorParallelSize": 1},
            "(tensorParallelSize 1, dataParallelSize 8)",
            "write tensorParallelSize: 2 and dataParallelSize: 4",
        ),
        (
            {"gpusPerNode": 8, "dataParallelSize": 8, "args": {"gpu-memory-utilization": "0.5"}},
            "40.0 GiB of 80.0 GiB for vLLM (gpu-memory-utilization 0.5)",
            "write dataParallelSize: 2",
        ),
        (
            {"gpusPerNode": 8, "dataParallelSize": 8, "args": {"kv-cache-memory-bytes": "2G"}},
            "have 80.0 GiB:",
            "write dataParallelSize: 4",
        ),
        (
            {},
            "(tensorParallelSize 1, dataParallelSize 1)",
            "a copy of the model needs at least 2 of them: raise gpusPerNode, or nodesPerReplica, which goes without "
            "dataParallelSize, or take GPUs with more memory",
        ),
    ],
)
def test_weights_beyond_a_gpus_memory_are_told_with_a_shape_that_has_room(
    server: dict[str, Any], told: str, remedy: str
) -> None:
    (said,), estimates = memory_of(build(server))

    assert said.startswith(f"EstimateExceedsMemory: {WEIGHTS}")
    assert told in said
    assert said.endswith(f": {remedy}")
    assert estimates == {"weights per GPU of a server": "130.4 GiB of 80.0 GiB"}


def test_float32_takes_twice_as_much() -> None:
    server = {"gpusPerNode": 4, "dataParallelSize": 2}
    assert memory_of(build(server))[0] == []

    (said,), estimates = memory_of(build(server, args={"bf16": False}, model_fields={"dtype": "float32"}))

    assert "the weights in float32 take 130.4 GiB" in said
    assert estimates == {"weights per GPU of a server": "130.4 GiB of 80.0 GiB"}


def test_experts_are_spread_over_the_gpus_of_all_copies() -> None:
    server = {"gpusPerNode": 8, "dataParallelSize": 8}

    assert memory_of(build(server), num_experts=64) == ([], {"weights per GPU of a server": "16.3 GiB of 80.0 GiB"})
    (said,), _ = memory_of(build(server), parameters=10 * PARAMETERS, num_experts=64)
    assert "take 163.0 GiB of each GPU of a server" in said


@pytest.mark.parametrize(
    ("server", "more"),
    [
        ({"args": {"cpu-offload-gb": 100}}, {}),
        ({"args": {"enable-expert-parallel": True}}, {}),
        ({"args": {"gpu-memory-utilization": "much"}}, {}),  # of which vLLM's parser says that it is no number
        ({}, {"quantization_config": {"quant_method": "gptq"}}),
        ({}, {"parameters": None}),
    ],
)
def test_what_is_not_known_is_not_judged(server: dict[str, Any], more: dict[str, Any]) -> None:
    assert memory_of(build({"gpusPerNode": 1, **server}), **more) == ([], {})


def test_a_profile_that_does_not_tell_its_gpus_memory_and_one_without_gpus_are_not_judged() -> None:
    assert memory_of(build({}, memory=None)) == ([], {})
    assert memory_of(build({}, gpus=0)) == ([], {})

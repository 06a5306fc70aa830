"""What of a model vLLM has no place for: heads that its processes cannot share.

It owns this problem and its wording; it must not load a model, nor look at the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.api.spelling import join_names
from posttrain.api.training_run import TrainingRunSpec
from posttrain.contract.config import TrainingConfig
from posttrain_workloads.outcome import KnownModel
from posttrain_workloads.problems import Findings, Problem

_SERVER = "spec.grpo.rollout.server"


def check_heads(config: TrainingConfig, findings: Findings, model: KnownModel) -> None:
    """See that vLLM can split the model over the GPUs that it is to.

    Source: vllm 0.31, config/model.py:1504, model_executor/models/llama.py:148, layers/linear.py.
    """
    spec = config.spec
    servers = spec.rollout_servers
    if servers is None:
        path, nodes = "spec.grpo.args.vllm_tensor_parallel_size", 1
        given = config.args.get("vllm_tensor_parallel_size")
        size = given if isinstance(given, int) else 1
    else:
        path, nodes = f"{_SERVER}.tensorParallelSize", servers.nodes_per_replica
        size = spec.server_engine_size
    parts = _parts(model)
    if _splits(parts, size):
        return
    fitting = [number for number in range(nodes, size, nodes) if _splits(parts, number)]
    if servers is None:  # an engine inside the trainer spans whole groups of ranks
        fitting = [number for number in fitting if config.gang.world_size % number == 0]
    told = join_names([f"{name} {number}" for name, number in parts.items()])
    findings.add(
        Problem(
            "ConfigInvalid",
            f"{path}: vLLM splits the model ({told}) over {size} GPUs or processes, and each has to get as much: "
            f"write {_splitting(spec, fitting)}",
        )
    )


def _parts(model: KnownModel) -> dict[str, int]:
    """Return what of the model has to be divided among the processes of a copy."""
    names = ["num_attention_heads", "num_key_value_heads", "intermediate_size"]
    if _has_experts(model):
        names.remove("intermediate_size")  # experts have a size of their own
    return {name: number for name in names if (number := model.number(name)) is not None}


def _has_experts(model: KnownModel) -> bool:
    return any("expert" in name for name in model.text_shape)


def _splits(parts: Mapping[str, int], size: int) -> bool:
    """Return whether each of so many gets as much; of key and value heads one may be on several."""
    return all(
        number % size == 0 or (name == "num_key_value_heads" and number < size and size % number == 0)
        for name, number in parts.items()
    )


def _splitting(spec: TrainingRunSpec, fitting: Sequence[int]) -> str:
    """Return what to write where the model splits over so many: no GPU of a server may idle then."""
    servers = spec.rollout_servers
    if not fitting:
        return "nodesPerReplica: 1 (and replicas for throughput)"
    if servers is None or not spec.server_gpus:
        return join_names([str(size) for size in fitting], conjunction="or")
    copies, nodes = servers.data_parallel_size, servers.nodes_per_replica
    gpus = spec.server_gpus * nodes
    ways = [f"{fitting[-1]} with gpusPerNode: {fitting[-1] * copies // nodes}"]
    dividing = [size for size in fitting if gpus % size == 0]
    if nodes == 1:
        ways.append(f"{dividing[-1]} with dataParallelSize: {gpus // dividing[-1]}")
    return ", or ".join(ways)

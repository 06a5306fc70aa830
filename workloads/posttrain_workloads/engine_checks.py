"""What of a model vLLM has no place for: heads that its processes cannot share, weights beyond its GPUs' memory.

It owns these problems and their wording; it must not load a model, nor look at the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from posttrain.api.servers import RolloutServers
from posttrain.api.spelling import join_names
from posttrain.api.training_run import TrainingRunSpec
from posttrain.contract.config import TrainingConfig
from posttrain_workloads.estimate import to_gib
from posttrain_workloads.outcome import KnownModel
from posttrain_workloads.problems import Findings, Problem
from posttrain_workloads.serve import serve_dtype

_SERVER = "spec.grpo.rollout.server"
_UTILIZATION = "gpu-memory-utilization"
_ALIAS = "device-memory-utilization"
_DEFAULT_UTILIZATION = 0.92
"""vllm 0.31, config/cache.py:103."""
_WHOLE_MEMORY = "kv-cache-memory-bytes"
"""Takes the place of the share."""
_ELSEWHERE = ("enable-expert-parallel", "offload-backend", "cpu-offload-gb", "offload-group-size")
"""Options by which not all weights of a copy are on its GPUs."""


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


def check_server_memory(
    config: TrainingConfig,
    findings: Findings,
    estimates: dict[str, str],
    model: KnownModel,
    *,
    environ: Mapping[str, str],
) -> None:
    """See that a server's GPUs have room for the weights, which are the least that vLLM needs of them."""
    spec, limit = config.spec, config.gpu_memory_bytes
    servers = spec.rollout_servers
    if servers is None or not spec.server_gpus or limit is None or model.parameters is None:
        return
    if "quantization_config" in model.shape or any(option in servers.args for option in _ELSEWHERE):
        return  # of a size that is not known
    share = _share(servers)
    if share is None:
        return  # vLLM's parser says why
    dtype = serve_dtype(config, read_shape=lambda: model.shape, environ=environ)
    weights = model.parameters * (4 if dtype == "float32" else 2)
    copies, size = servers.data_parallel_size, spec.server_engine_size
    # vLLM splits experts over the GPUs of all copies (vllm 0.31, layers/fused_moe/config.py:1090).
    spread = size * copies if _has_experts(model) else size
    room = int(limit * share)
    estimates["weights per GPU of a server"] = f"{to_gib(weights // spread)} of {to_gib(limit)}"
    if weights <= spread * room:
        return
    kind = f" ({config.gpu_name})" if config.gpu_name else ""
    of_limit = f"{to_gib(room)} of {to_gib(limit)} for vLLM ({_UTILIZATION} {share:g})" if share < 1 else to_gib(limit)
    findings.add(
        Problem(
            "EstimateExceedsMemory",
            f"{_SERVER}: the weights in {dtype} take {to_gib(weights // spread)} of each GPU of a server "
            f"(tensorParallelSize {size}, dataParallelSize {copies}), and the profile's{kind} have {of_limit}: "
            f"{_make_room(spec, servers, needed=-(-weights // room), parts=_parts(model))}",
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


def _share(servers: RolloutServers) -> float | None:
    """Return the share of a GPU that vLLM takes; None where it is none."""
    if _WHOLE_MEMORY in servers.args:
        return 1.0
    given = servers.args.get(_UTILIZATION, servers.args.get(_ALIAS, _DEFAULT_UTILIZATION))
    try:
        share = float(given) if isinstance(given, str | int | float) else math.nan
    except ValueError:
        return None
    return share if 0 < share <= 1 else None


def _make_room(spec: TrainingRunSpec, servers: RolloutServers, *, needed: int, parts: Mapping[str, int]) -> str:
    """Return what gives each copy the GPUs that it needs at least."""
    gpus = spec.server_gpus
    of_server = [size for size in range(needed, gpus + 1) if gpus % size == 0 and _splits(parts, size)]
    if servers.nodes_per_replica == 1 and of_server:
        size = of_server[0]
        split = f"tensorParallelSize: {size} and " if servers.tensor_parallel_size is not None else ""
        return f"write {split}dataParallelSize: {gpus // size}"
    return (
        f"a copy of the model needs at least {needed} of them: raise gpusPerNode, or nodesPerReplica, which goes "
        "without dataParallelSize, or take GPUs with more memory"
    )

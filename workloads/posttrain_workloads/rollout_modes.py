"""Rollouts by vLLM: what the trainer that is built next is given for the mode that the spec asks for.

It owns how TRL's trainer comes to its engine or its servers, and what watches over their weights; it must not import
vLLM where the trainer's own model generates.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from posttrain.contract.config import TrainingConfig

if TYPE_CHECKING:
    from trl import GRPOConfig

_VARIABLES = {
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
_ON_CPUS = {
    # Else every process takes the same cores; the pod's CPUs are shared out by OMP_NUM_THREADS.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # GiB of keys and values; else a share of the machine's whole memory, whatever the pod has.
    "VLLM_CPU_KVCACHE_SPACE": "4",
}


def set_up_rollouts(config: TrainingConfig, args: GRPOConfig, *, model: Any, tokenizer: Any) -> list[Any]:
    """Let TRL's trainers generate as the spec says; return the callbacks that watch over it."""
    assert config.spec.grpo is not None
    if config.spec.grpo.rollout.mode == "Transformers":
        return []
    on_cpus = config.gang.gpus_per_node == 0
    for name, value in vllm_environment(config).items():
        os.environ.setdefault(name, value)
    from posttrain_workloads import _compat
    from posttrain_workloads.rollout_check import RolloutCheck, bound_for

    if config.spec.model.eos_token is not None:
        given = args.generation_kwargs or {}
        # vLLM knows the end of a turn from the model's folder alone.
        stop = [*given.get("stop_token_ids", ()), tokenizer.eos_token_id]
        args.generation_kwargs = {**given, "stop_token_ids": stop}
    dtype = compute_dtype(args, model)
    if config.spec.grpo.rollout.mode == "Server":
        _compat.use_rollout_client()
    else:
        _compat.use_colocated_engine(dtype=dtype, eager=on_cpus)
    return [RolloutCheck(bound_for(dtype))]


def vllm_environment(config: TrainingConfig) -> dict[str, str]:
    """Return the variables that vLLM is to have where the pod does not say otherwise."""
    return {**_VARIABLES, **(_ON_CPUS if config.gang.gpus_per_node == 0 else {})}


def compute_dtype(args: GRPOConfig, model: Any) -> str:
    """Return the type that the trainer computes in, which is not always that of its weights."""
    if args.bf16:
        return "bfloat16"
    return "float16" if args.fp16 else str(model.dtype).removeprefix("torch.")

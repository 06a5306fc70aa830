"""Rollouts by vLLM: what the trainer that is built next is given for the mode that the spec asks for.

It owns how TRL's trainer comes to its engine or its servers, and what watches over their weights; it must not import
vLLM where the trainer's own model generates.
"""

from __future__ import annotations

import logging
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

_WHOLE_DISTRIBUTION = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "vllm_structured_outputs_regex": (None,),
}
"""What each argument is where vLLM samples of all tokens, by the probabilities that the trainer computes too."""
_OF_THE_END = frozenset({"ignore_eos", "include_stop_str_in_output", "max_tokens", "seed", "stop", "stop_token_ids"})
"""Keys of generation_kwargs that leave the probabilities alone."""
_log = logging.getLogger(__name__)


def set_up_rollouts(trainer_class: Any, config: TrainingConfig, args: GRPOConfig, *, model: Any, tokenizer: Any) -> Any:
    """Let TRL's trainers generate as the spec says; return the trainer class, which then watches over it."""
    assert config.spec.grpo is not None
    if config.spec.grpo.rollout.mode == "Transformers":
        return trainer_class
    on_cpus = config.gang.gpus_per_node == 0
    for name, value in vllm_environment(config).items():
        os.environ.setdefault(name, value)
    from posttrain_workloads import _compat
    from posttrain_workloads.rollout_check import bound_for
    from posttrain_workloads.rollout_differences import compare_rollouts

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
    if changing := find_changing_keys(args):
        _log.warning(
            "%s: vLLM gives log-probabilities of what is left to sample from, and the trainer of all tokens; so they "
            "are not compared, and nothing notices a server that keeps old weights",
            ", ".join(f"spec.grpo.args.{key}" for key in changing),
        )
        return trainer_class
    return compare_rollouts(trainer_class, bound=bound_for(dtype))


def find_changing_keys(args: GRPOConfig) -> list[str]:
    """Return the arguments by which vLLM samples from other probabilities than the trainer computes."""
    changing = [key for key, whole in _WHOLE_DISTRIBUTION.items() if getattr(args, key) not in whole]
    return changing + [f"generation_kwargs.{key}" for key in args.generation_kwargs or {} if key not in _OF_THE_END]


def vllm_environment(config: TrainingConfig) -> dict[str, str]:
    """Return the variables that vLLM is to have where the pod does not say otherwise."""
    return {**_VARIABLES, **(_ON_CPUS if config.gang.gpus_per_node == 0 else {})}


def compute_dtype(args: GRPOConfig, model: Any) -> str:
    """Return the type that the trainer computes in, which is not always that of its weights."""
    if args.bf16:
        return "bfloat16"
    return "float16" if args.fp16 else str(model.dtype).removeprefix("torch.")

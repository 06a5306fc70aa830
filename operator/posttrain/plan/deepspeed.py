"""DeepSpeed's configuration file, for the ZeRO strategies.

It owns what the file says and which keys of it a user may not set; it must not know how it reaches the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.api.execution import Parallelism
from posttrain.errors import Problem

STAGES = {"ZeRO1": 1, "ZeRO2": 2, "ZeRO3": 3}

_FROM_ARGS = "DeepSpeed takes it from {{args}}.{}: set it there"
_FROM_OFFLOAD = "set spec.parallelism.offload"
_OWNED = {
    "train_batch_size": "it follows from the batch size, the accumulation steps and the number of ranks: "
    "set {args}.per_device_train_batch_size and gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": _FROM_ARGS.format("per_device_train_batch_size"),
    "gradient_accumulation_steps": _FROM_ARGS.format("gradient_accumulation_steps"),
    "gradient_clipping": _FROM_ARGS.format("max_grad_norm"),
    "bf16.enabled": _FROM_ARGS.format("bf16"),
    "fp16.enabled": _FROM_ARGS.format("fp16"),
    "optimizer": _FROM_ARGS.format("optim, learning_rate and weight_decay"),
    "scheduler": _FROM_ARGS.format("lr_scheduler_type"),
    "zero_optimization.stage": "set spec.parallelism.strategy",
    "zero_optimization.offload_optimizer.device": _FROM_OFFLOAD,
    "zero_optimization.offload_param.device": _FROM_OFFLOAD,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "it is always on: without it the saved model "
    "has no weights",
}


def build_deepspeed_config(parallelism: Parallelism) -> dict[str, Any]:
    """Return the configuration for a ZeRO strategy; what is "auto" the Trainer fills in from its arguments."""
    stage = STAGES[parallelism.strategy]
    zero: dict[str, Any] = {"stage": stage}
    if parallelism.offload != "None":
        zero["offload_optimizer"] = {"device": "cpu"}
    if parallelism.offload == "Full":
        zero["offload_param"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    generated = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
    }
    return _merge(generated, parallelism.config or {})


def find_deepspeed_problems(parallelism: Parallelism, *, args: str) -> list[Problem]:
    """Return the keys of the user's configuration that are the platform's, each with where it is set instead.

    `args` is the path of the training arguments: `spec.sft.args`.
    """
    problems = []
    for key in _leaves(parallelism.config or {}):
        owned = next((o for o in _OWNED if key == o or key.startswith(o + ".") or o.startswith(key + ".")), None)
        if owned is not None:
            message = f"is set by posttrain: {_OWNED[owned].format(args=args)}"
            problems.append(Problem(path=f"spec.parallelism.config.{key}", message=message))
    return problems


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _leaves(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in data.items():
        if isinstance(value, dict):
            keys += _leaves(value, f"{prefix}{key}.")
        else:
            keys.append(prefix + key)
    return keys

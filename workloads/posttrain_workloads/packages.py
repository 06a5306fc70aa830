"""Which Python packages a spec implies beyond those that every run needs.

It owns the mapping from keys of the spec to packages; it must not import any of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from posttrain.api.base import JsonObject
from posttrain.api.training_run import TrainingRunSpec
from posttrain_workloads.problems import Problem


@dataclass(frozen=True)
class Requirement:
    """A module that will be imported, the distribution that brings it, and the key that asks for it."""

    module: str
    distribution: str
    because: str


_TRACKERS = {
    "WandB": ("wandb", "wandb"),
    "Trackio": ("trackio", "trackio"),
    "MLflow": ("mlflow", "mlflow-skinny"),
    "TensorBoard": ("tensorboard", "tensorboard"),
}
_ATTENTION = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
_MATH = ("math_verify", "math-verify")
_REWARDS = {"accuracy": _MATH, "cosine": _MATH, "length": _MATH}
_SANDBOXES = {"E2B": ("e2b_code_interpreter", "e2b-code-interpreter"), "Morph": ("morphcloud", "morphcloud")}
_BITSANDBYTES = ("bitsandbytes", "bitsandbytes")
# transformers 5.23, trainer_optimizer.py: the first prefix that fits says what an optimizer is imported from.
_OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "galore_": ("galore_torch", "galore-torch"),
    "apollo_": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "paged_": _BITSANDBYTES,
    "adamw_bnb_8bit": _BITSANDBYTES,
    "adamw_8bit": _BITSANDBYTES,
    "ademamix": _BITSANDBYTES,
    "lion_": _BITSANDBYTES,
    "rmsprop_bnb": _BITSANDBYTES,
}


def implied_packages(spec: TrainingRunSpec, args: JsonObject) -> tuple[Requirement, ...]:
    """Return what a run needs, one requirement for each key that asks for something; `args` are its own."""
    found: list[Requirement] = []
    path = f"spec.{spec.method}.args"
    if args.get("use_liger_kernel"):
        found.append(Requirement("liger_kernel", "liger-kernel", f"{path}.use_liger_kernel"))
    optimizer = str(args.get("optim", ""))
    for prefix, package in _OPTIMIZERS.items():
        if optimizer.startswith(prefix):
            found.append(Requirement(*package, f"{path}.optim: {optimizer}"))
            break
    if spec.model.attn_implementation in _ATTENTION:
        package = _ATTENTION[spec.model.attn_implementation]
        found.append(Requirement(*package, f"spec.model.attnImplementation: {spec.model.attn_implementation}"))
    if spec.peft is not None:
        found.append(Requirement("peft", "peft", f"spec.peft.method: {spec.peft.method}"))
        if spec.peft.method == "QLoRA":
            found.append(Requirement(*_BITSANDBYTES, "spec.peft.method: QLoRA"))
    if spec.image_name == "vllm" and spec.grpo is not None:
        found.append(Requirement("vllm", "vllm", f"spec.grpo.rollout.mode: {spec.grpo.rollout.mode}"))
    for index, reward in enumerate(spec.grpo.rewards if spec.grpo is not None else ()):
        place = f"spec.grpo.rewards[{index}]"
        if reward.name in _REWARDS:
            found.append(Requirement(*_REWARDS[reward.name], f"{place}.name: {reward.name}"))
        elif reward.name == "repetition_penalty" and reward.params.get("language") == "zh":
            found.append(Requirement("jieba", "jieba", f"{place}.params.language: zh"))
    sandbox = spec.used_sandbox
    if sandbox is not None and sandbox.mode in _SANDBOXES:
        found.append(Requirement(*_SANDBOXES[sandbox.mode], f"spec.grpo.sandbox.mode: {sandbox.mode}"))
    if spec.parallelism.strategy.startswith("ZeRO"):
        because = f"spec.parallelism.strategy: {spec.parallelism.strategy}"
        found.append(Requirement("deepspeed", "deepspeed", because))
    found += [Requirement(*_TRACKERS[name], f"spec.tracking.reportTo: {name}") for name in spec.tracking.report_to]
    return tuple(found)


def find_missing_packages(spec: TrainingRunSpec, args: JsonObject) -> list[Problem]:
    """Return a problem for each implied package that this environment lacks."""
    return [
        Problem("PackageMissing", f"{needed.because} needs the package {needed.distribution}, which is not installed")
        for needed in implied_packages(spec, args)
        if importlib.util.find_spec(needed.module) is None
    ]

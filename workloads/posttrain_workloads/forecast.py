"""What a run will need: steps, tokens, and memory against the profile's GPUs.

It owns how the effective arguments become numbers of `batches` and `estimate`; it must not build or load anything.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.api.grpo_checks import count_groups
from posttrain.contract.config import TrainingConfig
from posttrain_workloads import _compat, estimate
from posttrain_workloads.batches import BatchSettings, count_batches, find_batch_problems, warn_of_few_rows
from posttrain_workloads.problems import Findings, Problem
from posttrain_workloads.samples import Rendered
from posttrain_workloads.sources import describe

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOConfig, SFTConfig

_NEARLY_FULL = 0.9


def forecast_steps(
    config: TrainingConfig,
    findings: Findings,
    estimates: dict[str, str],
    args: SFTConfig,
    train: Dataset,
    *,
    rendered: Rendered | None,
) -> tuple[int, int]:
    """Add steps and tokens to the estimates; return the sequences of an epoch and the tokens of the longest."""
    rows, max_length = len(train), args.max_length
    mean = rendered.mean_tokens(max_length) if rendered else None
    length = min(max_length or sys.maxsize, rendered.max_tokens) if rendered else max_length or 0
    sequences = rows
    if args.packing and max_length and mean:
        sequences, length = max(round(rows * mean / max_length), 1), max_length
    settings = BatchSettings(
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world_size=config.gang.world_size,
        epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        drop_last=args.dataloader_drop_last,
        split_batches=bool(args.accelerator_config.split_batches),
        per_device_eval=args.per_device_eval_batch_size if args.eval_strategy.value != "no" else None,
    )
    unit = "sequences" if args.packing else "rows"
    for problem in find_batch_problems(settings, rows=sequences):
        findings.add(problem)
    if remark := warn_of_few_rows(settings, rows=sequences, unit=unit):
        findings.warnings.append(remark)
    batches = count_batches(settings, rows=sequences)
    about = "about " if args.packing else ""
    estimates |= {
        "rows": f"{rows:,}",
        "global batch": f"{batches.global_batch:,} {unit}",
        "steps per epoch": f"{about}{batches.steps_per_epoch:,}",
        "steps": f"{batches.total_steps:,}" if args.max_steps > 0 else f"{about}{batches.total_steps:,}",
        "epochs": f"{batches.epochs:g}",
    }
    if mean:
        per_sequence = max_length if args.packing and max_length else mean
        per_step = min(batches.global_batch, sequences) * per_sequence
        estimates["tokens per row"] = f"about {mean:,.0f}"
        estimates["tokens per step"] = f"about {per_step:,.0f}"
        estimates["tokens"] = f"about {per_step * batches.total_steps:,.0f}"
    return sequences, length


def forecast_memory(
    config: TrainingConfig,
    findings: Findings,
    estimates: dict[str, str],
    args: SFTConfig | GRPOConfig,
    *,
    shape: Mapping[str, Any],
    parameters: int,
    sequences: int,
    length: int,
) -> None:
    """Add the memory of a step to the estimates, and compare it with the profile's GPUs; `shape` is config.json."""
    architecture = estimate.read_architecture(shape)
    if architecture is None:
        findings.warnings.append(
            f"memory is not estimated: {describe(config.model)} ({shape.get('model_type')}) is of an unknown shape"
        )
        return
    found = estimate.estimate(
        build_setup(config, args, architecture, parameters=parameters, sequences=sequences, length=length, shape=shape)
    )
    parts = ", ".join(f"{name} {estimate.to_gib(size)}" for name, size in found.parts.items())
    estimates |= {f"memory for {name}": estimate.to_gib(size) for name, size in found.parts.items()}
    estimates["memory per GPU"] = estimate.to_gib(found.total)
    limit = config.gpu_memory_bytes
    if limit is None:
        return
    estimates["memory per GPU"] += f" of {estimate.to_gib(limit)}"
    kind = f" ({config.gpu_name})" if config.gpu_name else ""
    if found.total > limit:
        findings.add(
            Problem(
                "EstimateExceedsMemory",
                f"a step needs about {estimate.to_gib(found.total)} on each GPU and the profile's{kind} have "
                f"{estimate.to_gib(limit)}: {parts}. {_advise(found)}",
            )
        )
    elif found.total > _NEARLY_FULL * limit:
        findings.warnings.append(
            f"a step needs about {estimate.to_gib(found.total)} of each GPU's {estimate.to_gib(limit)}: {parts}"
        )


def build_setup(
    config: TrainingConfig,
    args: SFTConfig | GRPOConfig,
    architecture: estimate.Architecture,
    *,
    parameters: int,
    sequences: int,
    length: int,
    shape: Mapping[str, Any],
) -> estimate.Setup:
    """Return what the memory of a step depends on."""
    spec = config.spec
    dtype = spec.model.dtype
    if dtype == "auto":
        dtype = shape.get("dtype") or shape.get("torch_dtype") or "float32"
    attention = spec.model.attn_implementation or "sdpa"
    adapter = None
    if spec.peft is not None:
        adapter = estimate.Adapter(
            rank=spec.peft.rank,
            target_modules=spec.peft.target_modules,
            quantized=spec.peft.method == "QLoRA",
        )
    multiple = args.pad_to_multiple_of or 1
    fsdp_checkpointing = bool((spec.parallelism.config or {}).get("activation_checkpointing"))
    is_sft = config.method == "sft"  # the others have no such keys
    groups = None if is_sft else count_groups(config.args, world_size=config.gang.world_size)
    colocated = not is_sft and args.use_vllm and args.vllm_mode == "colocate"
    return estimate.Setup(
        architecture=architecture,
        parameters=parameters,
        weight_bytes=4 if dtype == "float32" else 2,
        mixed_precision=bool(args.bf16 or args.fp16),
        batch=min(args.per_device_train_batch_size, sequences),
        length=-(-length // multiple) * multiple,
        optimizer=args.optim.value,
        strategy=spec.parallelism.strategy,
        offload=spec.parallelism.offload,
        world_size=config.gang.world_size,
        adapter=adapter,
        checkpointing=_compat.recomputes_activations(args) or fsdp_checkpointing,
        offload_activations=is_sft and args.activation_offloading,
        attention="flash" if attention.startswith("flash") else "eager" if attention == "eager" else "sdpa",
        padding_free=is_sft and (args.padding_free or (args.packing and args.packing_strategy != "wrapped")),
        full_logits=args.label_smoothing_factor > 0,
        fused_norms=args.use_liger_kernel,
        reference=not is_sft and args.beta != 0 and spec.peft is None,
        rollout=groups.of_a_rank if groups and not args.use_vllm else 0,
        engine=_engine_bytes(config, args, parameters=parameters) if colocated else 0,
        engine_sleeps=colocated and args.vllm_enable_sleep_mode,
    )


def _engine_bytes(config: TrainingConfig, args: GRPOConfig, *, parameters: int) -> int:
    """Return what vLLM takes of each GPU: the share it is given, or its weights where the GPU's size is not known."""
    if config.gpu_memory_bytes is not None:
        return int(config.gpu_memory_bytes * args.vllm_gpu_memory_utilization)
    engines: int = args.vllm_tensor_parallel_size
    return parameters * (2 if args.bf16 or args.fp16 else 4) // engines


def _advise(found: estimate.Estimate) -> str:
    """Return what would help most."""
    help_with = {
        "weights": "shard them with parallelism.strategy ZeRO3 or FSDP, or train an adapter (spec.peft)",
        "gradients": "shard them with parallelism.strategy ZeRO2, or train an adapter (spec.peft)",
        "optimizer": "shard it with parallelism.strategy ZeRO2 or ZeRO3, take parallelism.offload Optimizer or an "
        "8-bit optim, or train an adapter (spec.peft)",
        "communication": "lower reduce_bucket_size in spec.parallelism.config",
        "activations": "set activation_checkpointing: true, lower per_device_train_batch_size (and raise "
        "gradient_accumulation_steps) or max_length",
        "logits": "lower per_device_train_batch_size or max_length",
        "reference": "leave beta at 0, shard it with parallelism.strategy ZeRO3, or train an adapter (spec.peft)",
        "rollout": "lower per_device_train_batch_size or max_completion_length",
        "vLLM": "lower vllm_gpu_memory_utilization, or set vllm_enable_sleep_mode: true",
        "workspace": "take GPUs with more memory",
    }
    largest = max(found.parts, key=lambda name: found.parts[name])
    return f"Most of it is for {largest}: {help_with[largest]}"

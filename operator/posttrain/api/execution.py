"""The shapes of how a run is carried out: checks before it, parallelism, adapters, restarts.

It owns what a field means and which values it takes; it must not know how a plan uses them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain.api.base import (
    ApiModel,
    Decimal,
    Distinct,
    JsonObject,
    ShortText,
)
from posttrain.api.signal import SignalPolicy


class Prepare(ApiModel):
    """The checks before any GPU is held."""

    enabled: bool = Field(
        default=True,
        description="Check data, template, arithmetic, memory and access, and fetch model and data. Revisions are "
        "resolved even when false. Default: true.",
        examples=[True],
    )
    dry_run: bool = Field(default=False, description="End after the checks. Default: false.", examples=[False])


class Parallelism(ApiModel):
    """How the model and its optimizer are spread over the gang."""

    strategy: Literal["DDP", "ZeRO1", "ZeRO2", "ZeRO3", "FSDP"] = Field(
        default="DDP",
        description="DDP keeps everything on every rank; DeepSpeed's ZeRO-1, -2, -3 and FSDP shard optimizer, "
        "gradients and parameters. Default: DDP.",
        examples=["ZeRO3"],
    )
    offload: Literal["None", "Optimizer", "Full"] = Field(
        default="None",
        description="What moves to the CPU's memory: nothing, the optimizer, or optimizer and parameters (ZeRO3 and "
        "FSDP). Default: None.",
        examples=["Optimizer"],
    )
    config: JsonObject | None = Field(
        default=None,
        max_length=64,
        description="Merged over the generated DeepSpeed configuration, or FSDP settings; keys the platform owns are "
        "refused.",
        examples=[{"zero_optimization": {"reduce_bucket_size": 500000000}}],
    )


class Lora(ApiModel):
    """Parameter-efficient training."""

    method: Literal["LoRA", "QLoRA"] = Field(
        default="LoRA",
        description="LoRA, or QLoRA: LoRA on a base loaded in 4 bits (needs GPUs). Default: LoRA.",
        examples=["LoRA"],
    )
    rank: int = Field(default=16, ge=1, le=4096, description="Rank of the update. Default: 16.", examples=[16])
    alpha: int = Field(
        default=32,
        ge=1,
        le=65536,
        description="Scale of the update; it is divided by rank. Default: 32.",
        examples=[32],
    )
    dropout: Decimal = Field(
        default="0.05", description="Dropout inside the adapter. Default: 0.05.", examples=["0.05"]
    )
    target_modules: Annotated[tuple[ShortText, ...], Field(max_length=64), Distinct()] | None = Field(
        default=None,
        description="Modules that get an adapter. Default: every linear layer but the output's.",
        examples=[["q_proj", "v_proj"]],
    )


class Restarts(ApiModel):
    """When a failed attempt is tried again."""

    max_infrastructure_restarts: int = Field(
        default=10,
        ge=0,
        le=1000,
        description="Gang restarts after lost nodes, evictions and killed ranks. Default: 10.",
        examples=[10],
    )
    max_application_restarts: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Gang restarts after an error of the training program or out of memory. Default: 0.",
        examples=[0],
    )
    progress_deadline_seconds: int = Field(
        default=3600,
        ge=10,
        le=604800,
        description="Seconds without a fact or a beat after which the gang is taken for stalled and restarted. "
        "Default: 3600.",
        examples=[3600],
    )
    on_non_finite: SignalPolicy = Field(
        default="Fail",
        description="What follows a NaN or infinite loss or gradient norm: the end (Fail), a suspension (Suspend), or "
        "an event and the condition SignalHealthy while the run goes on (Warn). Warn counts from the next attempt on, "
        "and suspends the run where the present one ends at such a number; the others count at once, also for what was "
        "found before. Default: Fail.",
        examples=["Fail"],
    )
    avoid_nodes: bool = Field(
        default=True,
        description="Exclude a node that caused two infrastructure failures of this run. Default: true.",
        examples=[True],
    )

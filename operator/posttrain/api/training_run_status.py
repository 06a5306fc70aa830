"""The status of a TrainingRun: what is known of it.

It owns the shapes, and which field manager writes which; it must not decide anything about a run.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from posttrain.api.base import StatusModel, Time
from posttrain.api.conditions import Condition


class Metric(StatusModel):
    """One number that the trainer reported."""

    name: str = Field(examples=["loss"])
    """Name, as the trainer logs it."""
    value: str = Field(examples=["0.4321"])
    """Decimal."""


class HistoryPoint(StatusModel):
    """One point of the curves."""

    step: int = Field(examples=[120])
    """Optimizer step."""
    loss: str | None = Field(default=None, examples=["0.4321"])
    """Training loss."""
    reward: str | None = Field(default=None, examples=["0.625"])
    """Mean weighted reward of the completions, for grpo."""
    learning_rate: str | None = Field(default=None, examples=["2e-05"])
    """Learning rate."""


class LatestCheckpoint(StatusModel):
    """The newest verified checkpoint, as the workload reported it."""

    step: int = Field(examples=[100])
    """Optimizer step."""
    uri: str = Field(examples=["pvc://team-checkpoints/stratos/checkpoint-100"])
    """Where it lies."""
    bytes: int | None = Field(default=None, examples=[9264283648])
    """Size of all its files."""
    digest: str | None = Field(default=None, examples=["sha256:9f86d081884c7d65"])
    """Hash of all its files."""
    attempt: int | None = Field(default=None, examples=[1])
    """Attempt that wrote it."""


class SkippedCheckpoint(StatusModel):
    """A checkpoint that failed its verification."""

    step: int = Field(examples=[100])
    """Optimizer step."""
    reason: str = Field(examples=["optimizer.pt has 512 bytes and was written with 1024"])
    """What the verification found."""
    attempt: int | None = Field(default=None, examples=[2])
    """Attempt that passed it over."""


class NonFiniteReport(StatusModel):
    """The first number that was not finite."""

    metric: str = Field(examples=["loss"])
    """What was not finite."""
    step: int = Field(examples=[121])
    """Optimizer step."""


class SignalReport(StatusModel):
    """A check of spec.grpo.signal that finds something."""

    reason: str = Field(examples=["RewardSignalDead"])
    """One of docs/reasons.md."""
    message: str = Field(examples=["91% of the groups had one reward for all completions"])
    """What it finds."""
    step: int = Field(examples=[40])
    """Optimizer step at which it did so first."""


class FirstErrorReport(StatusModel):
    """The earliest error over all ranks of an attempt."""

    rank: int | None = Field(default=None, examples=[3])
    """Rank that failed first."""
    time: Time = Field(examples=["2026-03-01T12:00:00Z"])
    """When it failed."""
    reason: str = Field(examples=["CudaOutOfMemory"])
    """One of docs/reasons.md."""
    message: str = Field(examples=["OutOfMemoryError: CUDA out of memory"])
    """The error."""


class PrepareReport(StatusModel):
    """What prepare found."""

    problems: list[str] | None = Field(default=None, examples=[["spec.datasets[0]: there is no column text"]])
    """What must be changed, each with its fix."""
    warnings: list[str] | None = Field(default=None, examples=[["the memory estimate knows nothing of activations"]])
    """What may be as it is."""
    commits: dict[str, str] | None = Field(default=None, examples=[{"model": "989aa7980e4cf806"}])
    """Hub commits by `model`, `datasets/0` and so on."""
    estimates: dict[str, str] | None = Field(default=None, examples=[{"steps": "1250"}])
    """Memory and steps, as estimated."""


class ResultReport(StatusModel):
    """How an attempt ended, in the workload's own words."""

    reason: str = Field(examples=["Completed"])
    """One of docs/reasons.md."""
    message: str = Field(examples=["1250 steps are done, and the model is saved"])
    """What happened."""
    advice: str | None = Field(default=None, examples=["Raise resources.memory."])
    """What a person can do."""
    metrics: dict[str, str] | None = Field(default=None, examples=[{"train_loss": "0.4321"}])
    """Last values of the metrics."""
    artifacts: dict[str, str] | None = Field(default=None, examples=[{"model": "pvc://team-checkpoints/stratos/model"}])
    """URIs by name."""


class Acknowledged(StatusModel):
    """Up to which fact of a source everything arrived."""

    attempt: int = Field(examples=[1])
    """Attempt of the facts."""
    source: str = Field(examples=["rank-0"])
    """Who sent them."""
    seq: int = Field(examples=[56])
    """Number of the last one."""


class Progress(StatusModel):
    """What the workload told; written by the progress server alone (field manager `posttrain-progress`)."""

    attempt: int | None = Field(default=None, examples=[1])
    """Attempt that is told about."""
    step: int | None = Field(default=None, examples=[120])
    """Optimizer steps so far."""
    max_steps: int | None = Field(default=None, examples=[1250])
    """Optimizer steps in all."""
    percentage: int | None = Field(default=None, examples=[9])
    """Share of the steps, from 0 to 100."""
    eta_seconds: int | None = Field(default=None, examples=[200])
    """Seconds to the end."""
    eta: str | None = Field(default=None, examples=["3m20s"])
    """Time to the end, for reading, as in `3m20s`."""
    metric: str | None = Field(default=None, examples=["0.4321"])
    """The training loss, or the mean reward where there is one, to four significant digits, for reading."""
    epoch: str | None = Field(default=None, examples=["0.29"])
    """Passes over the data so far; a decimal."""
    metrics: list[Metric] | None = None
    """Newest value of each metric."""
    history: list[HistoryPoint] | None = None
    """At most 32 points of the curves."""
    phase: str | None = Field(default=None, examples=["training"])
    """What the gang does now."""
    attempt_start: Time | None = Field(default=None, examples=["2026-03-01T12:00:00Z"])
    """When the gang met."""
    attempt_start_step: int | None = Field(default=None, examples=[0])
    """Step at which the attempt began."""
    rate_start_step: int | None = Field(default=None, examples=[100])
    """Step from which the speed is taken."""
    previous_attempt: int | None = Field(default=None, examples=[1])
    """Attempt before this one."""
    previous_step: int | None = Field(default=None, examples=[120])
    """Step that the attempt before this one reached."""
    steps_lost: int | None = Field(default=None, examples=[20])
    """Steps that had to be done again."""
    last_updated_time: Time | None = Field(default=None, examples=["2026-03-01T12:00:00Z"])
    """When step or metrics last changed."""
    last_beat_time: Time | None = Field(default=None, examples=["2026-03-01T12:00:00Z"])
    """When anything was last heard of the gang."""
    world_size: int | None = Field(default=None, examples=[8])
    """Ranks that met."""
    versions: dict[str, str] | None = Field(default=None, examples=[{"trl": "1.16.0"}])
    """Versions of the libraries."""
    checkpoint: LatestCheckpoint | None = None
    checkpoints_saved: int | None = Field(default=None, examples=[2])
    """Checkpoints saved so far."""
    skipped_checkpoints: list[SkippedCheckpoint] | None = None
    """Checkpoints that failed their verification."""
    non_finite: NonFiniteReport | None = None
    lost_signals: list[SignalReport] | None = None
    """What the checks of spec.grpo.signal find now."""
    first_error: FirstErrorReport | None = None
    prepare: PrepareReport | None = None
    result: ResultReport | None = None
    acknowledged: list[Acknowledged] | None = None
    """Up to where the facts of each sender arrived."""


class CheckpointsStatus(StatusModel):
    """What is kept."""

    latest_step: int | None = Field(default=None, examples=[100])
    """Step of the newest verified checkpoint."""
    latest_uri: str | None = Field(
        default=None, alias="latestURI", examples=["pvc://team-checkpoints/stratos/checkpoint-100"]
    )
    """Where it lies."""
    count: int | None = Field(default=None, examples=[2])
    """Checkpoints saved so far."""


class ModelStatus(StatusModel):
    """The trained model."""

    uri: str | None = Field(default=None, examples=["pvc://team-checkpoints/stratos/model"])
    """Where it lies."""


class RestartsStatus(StatusModel):
    """Counters of the restarts so far."""

    infrastructure: int | None = Field(default=None, examples=[1])
    """Restarts after lost nodes, evictions and killed ranks."""
    application: int | None = Field(default=None, examples=[0])
    """Restarts after errors of the training program."""
    steps_lost: int | None = Field(default=None, examples=[20])
    """Steps that had to be done again."""
    avoided_nodes: list[str] | None = Field(default=None, examples=[["gpu-node-7"]])
    """Nodes on which the run is not placed any more."""
    node_failures: dict[str, int] | None = Field(default=None, examples=[{"gpu-node-7": 2}])
    """Infrastructure failures by node."""


class UsageStatus(StatusModel):
    """GPU seconds of all attempts; decimals as strings."""

    gpu_seconds: str | None = Field(default=None, examples=["28800"])
    """GPUs times seconds."""
    productive_gpu_seconds: str | None = Field(default=None, examples=["27600"])
    """Those whose steps were kept."""
    wasted_gpu_seconds: str | None = Field(default=None, examples=["1200"])
    """Those whose steps were lost."""
    cost: str | None = Field(default=None, examples=["32.00"])
    """By the profile's price."""
    attempt_gpu_seconds: str | None = Field(default=None, examples=["7200"])
    """Those of the current attempt."""
    accounted_until: Time | None = Field(default=None, examples=["2026-03-01T12:00:00Z"])
    """Up to when they are counted."""


class ProvenanceStatus(StatusModel):
    """What exactly was run."""

    model_commit: str | None = Field(default=None, examples=["989aa7980e4cf806"])
    """Hub commit of the model."""
    model_source: str | None = Field(default=None, examples=["pvc://team-checkpoints/sft/model"])
    """Where the model lies that another run ended with, once that is known."""
    dataset_commits: dict[str, str] | None = Field(default=None, examples=[{"datasets/0": "4fd0bf1ccbd0b1a1"}])
    """Hub commits by `datasets/0` and so on."""
    image_digests: dict[str, str] | None = Field(
        default=None, examples=[{"trainer": "trainer@sha256:0123456789abcdef"}]
    )
    """Image by container."""
    config_hash: str | None = Field(default=None, examples=["sha256:a08c7b87765d2419"])
    """Hash of the accepted spec."""
    code_hash: str | None = Field(default=None, examples=["sha256:5f16f4c7f149ac4f"])
    """Hash of own code."""
    seed: int | None = Field(default=None, examples=[42])
    """Seed of the trainer."""
    versions: dict[str, str] | None = Field(default=None, examples=[{"trl": "1.16.0"}])
    """Versions of the libraries."""
    profile: dict[str, Any] | None = Field(default=None, examples=[{"gpuResource": "nvidia.com/gpu"}])
    """The profile as it was."""
    profile_name: str | None = Field(default=None, examples=["h100"])
    """The name under which the spec asked for it; none for the default profile."""


class FailureStatus(StatusModel):
    """The cause of the run's failure, or of the latest restart."""

    reason: str = Field(examples=["HostOutOfMemory"])
    """One of docs/reasons.md."""
    message: str = Field(examples=["the container was killed, as it used more than its memory limit of 128Gi"])
    """What happened."""
    pod: str | None = Field(default=None, examples=["stratos-a1-worker-0"])
    """Where it happened."""
    rank: int | None = Field(default=None, examples=[3])
    """Rank that failed first."""
    exit_code: int | None = Field(default=None, examples=[137])
    """Exit code of its container."""
    advice: str | None = Field(default=None, examples=["Raise resources.memory."])
    """What a person can do."""
    attempt: int | None = Field(default=None, examples=[1])
    """Attempt that failed."""
    node: str | None = Field(default=None, examples=["gpu-node-7"])
    """Node on which it happened."""


class HoldStatus(StatusModel):
    """Why the operator suspended the run by itself; a spec of a later generation, or spec.suspend, ends it."""

    reason: str = Field(examples=["NonFiniteLoss"])
    """One of docs/reasons.md."""
    message: str = Field(examples=["loss was not finite at step 121"])
    """What happened."""
    generation: int | None = Field(default=None, examples=[1])
    """Generation of the spec at that time."""


Stage = Literal[
    "Pending", "Preparing", "Queued", "Starting", "Training", "Restarting", "Suspended", "Succeeded", "Failed"
]


class TrainingRunStatus(StatusModel):
    """What the operator knows; every field but `progress` has field manager `posttrain`."""

    observed_generation: int | None = Field(default=None, examples=[1])
    """Generation of the spec that the status is about."""
    conditions: list[Condition] | None = None
    """What people and tools wait for."""
    stage: Stage | None = Field(default=None, examples=["Training"])
    """Where the run is, for people."""
    method: str | None = Field(default=None, examples=["SFT"])
    """How the model is trained: SFT or GRPO."""
    gpus: int | None = Field(default=None, examples=[8])
    """GPUs of the whole gang and of its rollout servers."""
    attempt: int | None = Field(default=None, examples=[1])
    """Number of the current attempt."""
    start_time: Time | None = Field(default=None, examples=["2026-03-01T12:00:00Z"])
    """When the first gang was made."""
    completion_time: Time | None = Field(default=None, examples=["2026-03-01T12:00:00Z"])
    """When the run ended."""
    attempt_queued_time: Time | None = Field(default=None, examples=["2026-03-01T12:00:00Z"])
    """Since when the attempt waits for quota, for its sandbox or for its rollout servers, or waited."""
    attempt_created_time: Time | None = Field(default=None, examples=["2026-03-01T12:00:00Z"])
    """When the attempt's gang was made."""
    attempt_running_time: Time | None = Field(default=None, examples=["2026-03-01T12:00:00Z"])
    """When all pods of the attempt ran."""
    gang_hash: str | None = Field(default=None, examples=["5f16f4c7f149ac4f"])
    """Over the UIDs of the attempt's pods when all of them ran: another one later means that a pod was replaced."""
    server_restarts: dict[str, int] | None = Field(default=None, examples=[{"0f2c1c0e-5e0b-4a52-9d3e-0c1f6a2b7d11": 1}])
    """How often each rollout server had been restarted, by its pod's UID, when the attempt began; all had answered."""
    hold: HoldStatus | None = None
    progress: Progress | None = None
    checkpoints: CheckpointsStatus | None = None
    model: ModelStatus | None = None
    restarts: RestartsStatus | None = None
    usage: UsageStatus | None = None
    provenance: ProvenanceStatus | None = None
    failure: FailureStatus | None = None

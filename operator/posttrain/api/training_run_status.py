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

    name: str
    """Name, as the trainer logs it."""
    value: str
    """Decimal."""


class HistoryPoint(StatusModel):
    """One point of the curves."""

    step: int
    """Optimizer step."""
    loss: str | None = None
    """Training loss."""
    reward: str | None = None
    """Mean weighted reward of the completions, for grpo."""
    learning_rate: str | None = None
    """Learning rate."""


class LatestCheckpoint(StatusModel):
    """The newest verified checkpoint, as the workload reported it."""

    step: int
    """Optimizer step."""
    uri: str
    """Where it lies."""
    bytes: int | None = None
    """Size of all its files."""
    digest: str | None = None
    """Hash of all its files."""
    attempt: int | None = None
    """Attempt that wrote it."""


class SkippedCheckpoint(StatusModel):
    """A checkpoint that failed its verification."""

    step: int
    """Optimizer step."""
    reason: str
    """What the verification found."""
    attempt: int | None = None
    """Attempt that passed it over."""


class NonFiniteReport(StatusModel):
    """The first number that was not finite."""

    metric: str
    """What was not finite."""
    step: int
    """Optimizer step."""


class SignalReport(StatusModel):
    """A check of spec.grpo.signal that finds something."""

    reason: str
    """One of docs/reasons.md."""
    message: str
    """What it finds."""
    step: int
    """Optimizer step at which it did so first."""


class FirstErrorReport(StatusModel):
    """The earliest error over all ranks of an attempt."""

    rank: int | None = None
    """Rank that failed first."""
    time: Time
    """When it failed."""
    reason: str
    """One of docs/reasons.md."""
    message: str
    """The error."""


class PrepareReport(StatusModel):
    """What prepare found."""

    problems: list[str] | None = None
    """What must be changed, each with its fix."""
    warnings: list[str] | None = None
    """What may be as it is."""
    commits: dict[str, str] | None = None
    """Hub commits by `model`, `datasets/0` and so on."""
    estimates: dict[str, str] | None = None
    """Memory and steps, as estimated."""


class ResultReport(StatusModel):
    """How an attempt ended, in the workload's own words."""

    reason: str
    """One of docs/reasons.md."""
    message: str
    """What happened."""
    advice: str | None = None
    """What a person can do."""
    metrics: dict[str, str] | None = None
    """Last values of the metrics."""
    artifacts: dict[str, str] | None = None
    """URIs by name."""


class Acknowledged(StatusModel):
    """Up to which fact of a source everything arrived."""

    attempt: int
    """Attempt of the facts."""
    source: str
    """Who sent them."""
    seq: int
    """Number of the last one."""


class Progress(StatusModel):
    """What the workload told; written by the progress server alone (field manager `posttrain-progress`)."""

    attempt: int | None = None
    """Attempt that is told about."""
    step: int | None = None
    """Optimizer steps so far."""
    max_steps: int | None = None
    """Optimizer steps in all."""
    percentage: int | None = None
    """Share of the steps, from 0 to 100."""
    eta_seconds: int | None = None
    """Seconds to the end."""
    eta: str | None = None
    """Time to the end, for reading, as in `3m20s`."""
    metric: str | None = None
    """The training loss, or the mean reward where there is one, to four significant digits, for reading."""
    epoch: str | None = None
    """Passes over the data so far; a decimal."""
    metrics: list[Metric] | None = None
    """Newest value of each metric."""
    history: list[HistoryPoint] | None = None
    """At most 32 points of the curves."""
    phase: str | None = None
    """What the gang does now."""
    attempt_start: Time | None = None
    """When the gang met."""
    attempt_start_step: int | None = None
    """Step at which the attempt began."""
    rate_start_step: int | None = None
    """Step from which the speed is taken."""
    previous_attempt: int | None = None
    """Attempt before this one."""
    previous_step: int | None = None
    """Step that the attempt before this one reached."""
    steps_lost: int | None = None
    """Steps that had to be done again."""
    last_updated_time: Time | None = None
    """When step or metrics last changed."""
    last_beat_time: Time | None = None
    """When anything was last heard of the gang."""
    world_size: int | None = None
    """Ranks that met."""
    versions: dict[str, str] | None = None
    """Versions of the libraries."""
    checkpoint: LatestCheckpoint | None = None
    checkpoints_saved: int | None = None
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

    latest_step: int | None = None
    """Step of the newest verified checkpoint."""
    latest_uri: str | None = Field(default=None, alias="latestURI")
    """Where it lies."""
    count: int | None = None
    """Checkpoints saved so far."""


class ModelStatus(StatusModel):
    """The trained model."""

    uri: str | None = None
    """Where it lies."""


class RestartsStatus(StatusModel):
    """Counters of the restarts so far."""

    infrastructure: int | None = None
    """Restarts after lost nodes, evictions and killed ranks."""
    application: int | None = None
    """Restarts after errors of the training program."""
    steps_lost: int | None = None
    """Steps that had to be done again."""
    avoided_nodes: list[str] | None = None
    """Nodes on which the run is not placed any more."""
    node_failures: dict[str, int] | None = None
    """Infrastructure failures by node."""


class UsageStatus(StatusModel):
    """GPU seconds of all attempts; decimals as strings."""

    gpu_seconds: str | None = None
    """GPUs times seconds."""
    productive_gpu_seconds: str | None = None
    """Those whose steps were kept."""
    wasted_gpu_seconds: str | None = None
    """Those whose steps were lost."""
    cost: str | None = None
    """By the profile's price."""
    attempt_gpu_seconds: str | None = None
    """Those of the current attempt."""
    accounted_until: Time | None = None
    """Up to when they are counted."""


class ProvenanceStatus(StatusModel):
    """What exactly was run."""

    model_commit: str | None = None
    """Hub commit of the model."""
    model_source: str | None = None
    """Where the model lies that another run ended with, once that is known."""
    dataset_commits: dict[str, str] | None = None
    """Hub commits by `datasets/0` and so on."""
    image_digests: dict[str, str] | None = None
    """Image by container."""
    config_hash: str | None = None
    """Hash of the accepted spec."""
    code_hash: str | None = None
    """Hash of own code."""
    seed: int | None = None
    """Seed of the trainer."""
    versions: dict[str, str] | None = None
    """Versions of the libraries."""
    profile: dict[str, Any] | None = None
    """The profile as it was."""
    profile_name: str | None = None
    """The name under which the spec asked for it; none for the default profile."""


class FailureStatus(StatusModel):
    """The cause of the run's failure, or of the latest restart."""

    reason: str
    """One of docs/reasons.md."""
    message: str
    """What happened."""
    pod: str | None = None
    """Where it happened."""
    rank: int | None = None
    """Rank that failed first."""
    exit_code: int | None = None
    """Exit code of its container."""
    advice: str | None = None
    """What a person can do."""
    attempt: int | None = None
    """Attempt that failed."""
    node: str | None = None
    """Node on which it happened."""


class HoldStatus(StatusModel):
    """Why the operator suspended the run by itself; a spec of a later generation, or spec.suspend, ends it."""

    reason: str
    """One of docs/reasons.md."""
    message: str
    """What happened."""
    generation: int | None = None
    """Generation of the spec at that time."""


Stage = Literal[
    "Pending", "Preparing", "Queued", "Starting", "Training", "Restarting", "Suspended", "Succeeded", "Failed"
]


class TrainingRunStatus(StatusModel):
    """What the operator knows; every field but `progress` has field manager `posttrain`."""

    observed_generation: int | None = None
    """Generation of the spec that the status is about."""
    conditions: list[Condition] | None = None
    """What people and tools wait for."""
    stage: Stage | None = None
    """Where the run is, for people."""
    method: str | None = None
    """How the model is trained: SFT."""
    gpus: int | None = None
    """GPUs of the whole gang and of its rollout servers."""
    attempt: int | None = None
    """Number of the current attempt."""
    start_time: Time | None = None
    """When the first gang was made."""
    completion_time: Time | None = None
    """When the run ended."""
    attempt_queued_time: Time | None = None
    """Since when the attempt waits for quota, for its sandbox or for its rollout servers, or waited."""
    attempt_created_time: Time | None = None
    """When the attempt's gang was made."""
    attempt_running_time: Time | None = None
    """When all pods of the attempt ran."""
    gang_hash: str | None = None
    """Over the UIDs of the attempt's pods when all of them ran: another one later means that a pod was replaced."""
    server_restarts: dict[str, int] | None = None
    """How often each rollout server had been restarted, by its pod's UID, when the attempt began; all had answered."""
    hold: HoldStatus | None = None
    progress: Progress | None = None
    checkpoints: CheckpointsStatus | None = None
    model: ModelStatus | None = None
    restarts: RestartsStatus | None = None
    usage: UsageStatus | None = None
    provenance: ProvenanceStatus | None = None
    failure: FailureStatus | None = None

"""`TrainingRun`: fine-tune a model and keep what came of it.

It owns the schema of the resource's spec and status; it must not decide anything about a run.
It is long because every field has its bounds, description and example here.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from posttrain.api.base import (
    API_VERSION,
    RUN_NAME_MAX_LENGTH,
    ApiModel,
    Fraction,
    JsonObject,
    LongText,
    RunName,
    StatusModel,
    Time,
)
from posttrain.api.conditions import Condition
from posttrain.api.rules import Rule
from posttrain.api.shapes import (
    Access,
    Callback,
    Checkpoints,
    Code,
    Dataset,
    EntryPoint,
    Lora,
    Model,
    Parallelism,
    PodOverrides,
    Prepare,
    Resources,
    Restarts,
    Tracking,
)

KIND: Literal["TrainingRun"] = "TrainingRun"
PLURAL = "trainingruns"

NAME_RULE = (
    f"a run's name has at most {RUN_NAME_MAX_LENGTH} characters, so that the names of its children fit: lower-case "
    "letters, digits and hyphens, first a letter, last no hyphen"
)

MUTABLE_FIELDS = frozenset(
    {"suspend", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "pendingDeadlineSeconds", "restarts"}
)
"""Fields of the spec that may change while the run lives; of `checkpoints` only these: everySteps, keepLast."""

MUTABLE_CHECKPOINT_FIELDS = frozenset({"everySteps", "keepLast"})


class Sft(ApiModel):
    """Supervised fine-tuning with TRL's SFTTrainer."""

    args: JsonObject = Field(
        default={},
        max_length=256,
        description="Keys of TRL's SFTConfig; an unknown key, a wrong type or a key that posttrain sets itself is "
        "refused. `posttrain explain spec.sft.args` lists them.",
        examples=[{"learning_rate": 0.00004, "num_train_epochs": 3, "packing": True}],
    )
    trainer_class: EntryPoint | None = Field(
        default=None,
        description="`module:Name` of a subclass of trl.SFTTrainer in `code`.",
        examples=["trainers:WeightedLossTrainer"],
    )


class TrainingRunSpec(ApiModel):
    """What is trained, on what, with what."""

    model: Model = Field(
        description="The model the run starts from.", examples=[{"source": "Qwen/Qwen2.5-1.5B-Instruct"}]
    )
    datasets: tuple[Dataset, ...] = Field(
        min_length=1,
        max_length=64,
        description="The mixture that is trained on: each member's fraction is taken after a seeded shuffle, the "
        "members are concatenated and shuffled. Their column sets must agree.",
        examples=[[{"source": "open-r1/Mixture-of-Thoughts", "config": "all"}]],
    )
    eval_datasets: tuple[Dataset, ...] = Field(
        default=(),
        max_length=64,
        description="A mixture for the held-out loss. Default: none, or testFraction of the training data.",
        examples=[[{"source": "open-r1/Mixture-of-Thoughts", "config": "all", "split": "test"}]],
    )
    test_fraction: Fraction | None = Field(
        default=None,
        description="Share of the mixture that is held out for the evaluation loss.",
        examples=["0.05"],
    )
    dataset_seed: int = Field(
        default=0,
        ge=0,
        le=2**32 - 1,
        description="Seed of the shuffles of the mixture. Default: 0.",
        examples=[42],
    )
    system_prompt: LongText | None = Field(
        default=None,
        description="System message put before every conversation that has none.",
        examples=["You are a careful mathematician."],
    )
    sft: Sft = Field(
        description="How to train: supervised fine-tuning with TRL's SFTTrainer.",
        examples=[{"args": {"learning_rate": 0.00002, "num_train_epochs": 1}}],
    )
    peft: Lora | None = Field(
        default=None,
        description="Train an adapter instead of all weights. Default: all weights.",
        examples=[{"method": "LoRA", "rank": 16}],
    )
    parallelism: Parallelism = Field(
        default=Parallelism(),
        description="How model and optimizer are spread over the ranks. Default: DDP.",
        examples=[{"strategy": "ZeRO3"}],
    )
    resources: Resources = Field(
        default=Resources(),
        description="Nodes, GPUs, CPUs and memory. Default: one node with one GPU.",
        examples=[{"numNodes": 2, "gpusPerNode": 8}],
    )
    pod_overrides: PodOverrides | None = Field(
        default=None,
        description="What is different in this run's GPU pods.",
        examples=[{"nodeSelector": {"pool": "training"}}],
    )
    access: Access = Field(
        default=Access(),
        description="Credentials for everything the run reads and writes.",
        examples=[{"hubTokenSecretRef": {"name": "hf-token", "key": "token"}}],
    )
    code: Code | None = Field(
        default=None, description="Own Python code.", examples=[{"configMapName": "my-callbacks"}]
    )
    callbacks: tuple[Callback, ...] = Field(
        default=(),
        max_length=32,
        description="Own callbacks of the trainer. Default: none.",
        examples=[[{"function": "callbacks:PrintSamples", "params": {"every": 10}}]],
    )
    checkpoints: Checkpoints = Field(
        default=Checkpoints(),
        description="What is kept, how often and where. Default: two checkpoints on a new claim of 100Gi.",
        examples=[{"everySteps": 100, "keepLast": 2, "storage": {"size": "500Gi"}}],
    )
    restarts: Restarts = Field(
        default=Restarts(),
        description="When a failed attempt is tried again.",
        examples=[{"maxInfrastructureRestarts": 3}],
    )
    prepare: Prepare = Field(
        default=Prepare(),
        description="The checks before any GPU is held.",
        examples=[{"dryRun": True}],
    )
    tracking: Tracking = Field(
        default=Tracking(),
        description="Experiment trackers. Default: none.",
        examples=[{"reportTo": ["WandB"], "project": "reasoning"}],
    )
    suspend: bool = Field(
        default=False,
        description="Stop the gang after a checkpoint, and go on from it when set back. Default: false.",
        examples=[False],
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="Seconds from the first start of a gang after which the run fails. Default: none.",
        examples=[86400],
    )
    pending_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="Seconds that a gang may wait for its pods before the run fails. Default: none.",
        examples=[7200],
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="Seconds after the end until the resource is deleted. Default: never.",
        examples=[604800],
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="testFraction",
            message="evalDatasets and testFraction both name held-out data: keep one of them",
            cel="!has(self.testFraction) || size(self.evalDatasets) == 0",
            holds=lambda spec: "testFraction" not in spec or not spec["evalDatasets"],
        ),
        Rule(
            field="parallelism.strategy",
            message="strategy FSDP needs GPUs (without them accelerate trains as DDP and says nothing): set "
            "resources.gpusPerNode, or take strategy DDP, ZeRO2 or ZeRO3",
            cel="self.parallelism.strategy != 'FSDP' || self.resources.gpusPerNode > 0",
            holds=lambda spec: spec["parallelism"]["strategy"] != "FSDP" or spec["resources"]["gpusPerNode"] > 0,
        ),
        Rule(
            field="peft.method",
            message="method QLoRA needs GPUs (bitsandbytes quantizes on them): set resources.gpusPerNode, or take "
            "method LoRA",
            cel="!has(self.peft) || self.peft.method != 'QLoRA' || self.resources.gpusPerNode > 0",
            holds=lambda spec: (
                "peft" not in spec or spec["peft"]["method"] != "QLoRA" or spec["resources"]["gpusPerNode"] > 0
            ),
        ),
        Rule(
            field="parallelism.offload",
            message="offload needs a sharding strategy: take strategy ZeRO1, ZeRO2 or ZeRO3 for Optimizer, ZeRO3 or "
            "FSDP for Full",
            cel="self.parallelism.offload == 'None' || self.parallelism.strategy != 'DDP'",
            holds=lambda spec: spec["parallelism"]["offload"] == "None" or spec["parallelism"]["strategy"] != "DDP",
        ),
        Rule(
            field="parallelism.offload",
            message="offload Full moves parameters, which ZeRO1 and ZeRO2 do not shard: take offload Optimizer, or "
            "strategy ZeRO3",
            cel="self.parallelism.offload != 'Full' || !(self.parallelism.strategy in ['ZeRO1', 'ZeRO2'])",
            holds=lambda spec: (
                spec["parallelism"]["offload"] != "Full" or spec["parallelism"]["strategy"] not in {"ZeRO1", "ZeRO2"}
            ),
        ),
        Rule(
            field="parallelism.offload",
            message="offload Optimizer is DeepSpeed's: with FSDP take offload Full, or strategy ZeRO2 or ZeRO3",
            cel="self.parallelism.offload != 'Optimizer' || self.parallelism.strategy != 'FSDP'",
            holds=lambda spec: (
                spec["parallelism"]["offload"] != "Optimizer" or spec["parallelism"]["strategy"] != "FSDP"
            ),
        ),
        Rule(
            field="checkpoints.storage.accessMode",
            message="accessMode ReadWriteOnce is for one node: take ReadWriteMany, or resources.numNodes 1",
            cel="self.resources.numNodes == 1 || !has(self.checkpoints.storage.accessMode) || "
            "self.checkpoints.storage.accessMode != 'ReadWriteOnce'",
            holds=lambda spec: (
                spec["resources"]["numNodes"] == 1
                or spec["checkpoints"]["storage"].get("accessMode") != "ReadWriteOnce"
            ),
        ),
        Rule(
            field="code",
            message="callbacks and sft.trainerClass are looked up in own code, and none is given: set spec.code",
            cel="has(self.code) || (size(self.callbacks) == 0 && !has(self.sft.trainerClass))",
            holds=lambda spec: "code" in spec or (not spec["callbacks"] and "trainerClass" not in spec["sft"]),
        ),
    )


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


Stage = Literal["Pending", "Preparing", "Starting", "Training", "Restarting", "Suspended", "Succeeded", "Failed"]


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
    """GPUs of the whole gang."""
    attempt: int | None = None
    """Number of the current attempt."""
    start_time: Time | None = None
    """When the first gang was made."""
    completion_time: Time | None = None
    """When the run ended."""
    attempt_created_time: Time | None = None
    """When the attempt's gang was made."""
    attempt_running_time: Time | None = None
    """When all pods of the attempt ran."""
    gang_hash: str | None = None
    """Over the UIDs of the attempt's pods when all of them ran: another one later means that a pod was replaced."""
    hold: HoldStatus | None = None
    progress: Progress | None = None
    checkpoints: CheckpointsStatus | None = None
    model: ModelStatus | None = None
    restarts: RestartsStatus | None = None
    usage: UsageStatus | None = None
    provenance: ProvenanceStatus | None = None
    failure: FailureStatus | None = None


class Metadata(StatusModel):
    """The part of an object's metadata that the plan reads."""

    name: RunName
    """Name of the run, at most 40 characters."""
    namespace: Annotated[str, StringConstraints(max_length=63)] = "default"
    """Namespace of the run."""
    uid: str | None = None
    """Identity of the object."""
    generation: int | None = None
    """Counts the changes of the spec."""
    resource_version: str | None = None
    """Counts the changes of the object."""
    creation_timestamp: Time | None = None
    """When the object was made."""
    labels: dict[str, str] | None = None
    """Labels."""
    annotations: dict[str, str] | None = None
    """Annotations."""


class TrainingRun(ApiModel):
    """A fine-tuning run."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, extra="forbid", frozen=True)
    LIST_KIND: ClassVar[str] = "TrainingRunList"

    api_version: Literal["posttrain.dev/v1alpha1"] = Field(
        default=API_VERSION, description="Group and version of the resource."
    )
    kind: Literal["TrainingRun"] = Field(default=KIND, description="Kind of the resource.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations.")
    spec: TrainingRunSpec
    status: TrainingRunStatus = Field(default_factory=TrainingRunStatus)

"""`TrainingRun`: fine-tune a model and keep what came of it.

It owns the schema of the resource and its spec; it must not decide anything about a run.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

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
from posttrain.api.execution import Lora, Parallelism, Prepare, Restarts
from posttrain.api.grpo import Grpo, Sandbox
from posttrain.api.inputs import Access, Callback, Code, ColumnName, Dataset, EntryPoint, Model
from posttrain.api.outputs import Checkpoints, Tracking
from posttrain.api.resources import PodOverrides, Resources
from posttrain.api.rewards import REWARDS
from posttrain.api.rules import Rule
from posttrain.api.servers import RolloutServers
from posttrain.api.training_run_status import TrainingRunStatus

KIND: Literal["TrainingRun"] = "TrainingRun"
Method = Literal["sft", "grpo"]
ImageName = Literal["trainer", "vllm"]
PLURAL = "trainingruns"

NAME_RULE = (
    f"a run's name has at most {RUN_NAME_MAX_LENGTH} characters, so that the names of its children fit: lower-case "
    "letters, digits and hyphens, first a letter, last no hyphen"
)

MUTABLE_FIELDS = frozenset(
    {"suspend", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "pendingDeadlineSeconds", "restarts"}
)
"""Fields of the spec that may change while the run lives; of `checkpoints`, `grpo` and `resources` only these:"""

MUTABLE_CHECKPOINT_FIELDS = frozenset({"everySteps", "keepLast"})

MUTABLE_GRPO_FIELDS = frozenset({"signal"})

MUTABLE_RESOURCES_FIELDS = frozenset({"queueName", "workloadPriorityClass", "profile", "numNodes"})
"""Only while the run holds no quota: the gang is not there, and what is asked of the queue can still change."""

MUTABLE_PARTS = {"checkpoints": MUTABLE_CHECKPOINT_FIELDS, "grpo": MUTABLE_GRPO_FIELDS}
"""The objects in the spec of which some fields may change at any time, by name."""


class Sft(ApiModel):
    """Supervised fine-tuning with TRL's SFTTrainer."""

    args: JsonObject = Field(
        default={},
        max_length=256,
        description="Keys of TRL's SFTConfig; an unknown key, a wrong type or a key that posttrain sets itself is "
        "refused. `posttrain explain spec.sft.args` lists them. Plain `kubectl apply` loses a null: use "
        "`kubectl apply --server-side` for one.",
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
    prompt_column: ColumnName | None = Field(
        default=None,
        description="The column that holds what the model is asked, for grpo: a text, which becomes the user's turn "
        "where the model has a chat template, or a list of messages. Default: prompt.",
        examples=["problem"],
    )
    system_prompt: LongText | None = Field(
        default=None,
        description="System message put before every conversation that has none.",
        examples=["You are a careful mathematician."],
    )
    sft: Sft | None = Field(
        default=None,
        description="How to train: supervised fine-tuning with TRL's SFTTrainer.",
        examples=[{"args": {"learning_rate": 0.00002, "num_train_epochs": 1}}],
    )
    grpo: Grpo | None = Field(
        default=None,
        description="How to train: reinforcement learning on rewards, with TRL's GRPOTrainer.",
        examples=[{"rewards": [{"name": "accuracy"}], "args": {"num_generations": 8}}],
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
        description="Seconds from the first start of a gang, hence not of prepare, after which the run fails. "
        "Default: none.",
        examples=[86400],
    )
    pending_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="Seconds that prepare's pod, and then a gang, may wait before the run fails: a gang for its quota, "
        "from when it is asked for it (and again after a preemption), for its sandbox and rollout servers, and for its "
        "pods. Default: none.",
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
            field="",
            message="exactly one of sft (supervised fine-tuning) and grpo (reinforcement learning on rewards) says how "
            "to train",
            cel="has(self.sft) != has(self.grpo)",
            holds=lambda spec: ("sft" in spec) != ("grpo" in spec),
        ),
        Rule(
            field="promptColumn",
            message="promptColumn is for grpo: leave it out; with sft name the columns by datasets[].rename",
            cel="!has(self.promptColumn) || has(self.grpo)",
            holds=lambda spec: "promptColumn" not in spec or "grpo" in spec,
        ),
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
            message="callbacks, trainerClass and rolloutFunction are looked up in own code, and none is given: set "
            "spec.code",
            cel="has(self.code) || (size(self.callbacks) == 0 && !(has(self.sft) && has(self.sft.trainerClass)) && "
            "!(has(self.grpo) && (has(self.grpo.trainerClass) || has(self.grpo.rolloutFunction))))",
            holds=lambda spec: (
                "code" in spec
                or (
                    not spec["callbacks"]
                    and "trainerClass" not in spec.get("sft", {})
                    and not {"trainerClass", "rolloutFunction"} & spec.get("grpo", {}).keys()
                )
            ),
        ),
        Rule(
            field="code",
            message="a reward's function is looked up in own code, and none is given: set spec.code",
            cel="has(self.code) || !has(self.grpo) || self.grpo.rewards.all(reward, !has(reward.function))",
            holds=lambda spec: (
                "code" in spec
                or "grpo" not in spec
                or all("function" not in reward for reward in spec["grpo"]["rewards"])
            ),
        ),
    )

    @property
    def method(self) -> Method:
        """The field that says how to train."""
        return "grpo" if self.sft is None else "sft"

    @property
    def is_watched(self) -> bool:
        """Whether something may be found in what it learns from that does not end it."""
        return self.grpo is not None or self.restarts.on_non_finite == "Warn"

    @property
    def training(self) -> Sft | Grpo:
        """What that field holds."""
        training = self.sft or self.grpo
        assert training is not None  # by the first of the rules
        return training

    @property
    def rollout_servers(self) -> RolloutServers | None:
        """The servers that generate its completions, where it has any."""
        if self.grpo is None or self.grpo.rollout.mode != "Server":
            return None
        return self.grpo.rollout.server or RolloutServers()

    @property
    def server_gpus(self) -> int:
        """GPUs of each of its servers; 0 without any."""
        servers = self.rollout_servers
        if servers is None:
            return 0
        return min(self.resources.gpus_per_node, 1) if servers.gpus_per_node is None else servers.gpus_per_node

    @property
    def server_engine_size(self) -> int:
        """GPUs, or without any processes, that a model of a server is split over."""
        servers = self.rollout_servers
        if servers is None:
            return 1
        if servers.tensor_parallel_size is not None:
            return servers.tensor_parallel_size
        gpus = self.server_gpus * servers.nodes_per_replica
        return max(gpus // servers.data_parallel_size, servers.nodes_per_replica)

    @property
    def server_ranks_per_node(self) -> int:
        """GPUs, or without any processes, that a server's models use on each of its nodes."""
        servers = self.rollout_servers
        if servers is None:
            return 0
        return self.server_engine_size * servers.data_parallel_size // servers.nodes_per_replica

    @property
    def gpus(self) -> int:
        """GPUs of the gang and of its servers."""
        servers = self.rollout_servers
        beside = servers.pods * self.server_gpus if servers is not None else 0
        return self.resources.num_nodes * self.resources.gpus_per_node + beside

    @property
    def used_sandbox(self) -> Sandbox | None:
        """Where the rewards run programs out of completions; None where none of them runs any."""
        rewards = self.grpo.rewards if self.grpo is not None else ()
        names = [reward.name for reward in rewards if reward.name is not None]
        needed = any(name in REWARDS and REWARDS[name].needs_sandbox for name in names)
        return ((self.grpo and self.grpo.sandbox) or Sandbox()) if needed else None

    @property
    def own_sandbox(self) -> Sandbox | None:
        """The sandbox that is made for the run; None where it needs none or uses servers that are there."""
        used = self.used_sandbox
        return used if used is not None and used.mode == "Local" else None

    @property
    def image_name(self) -> ImageName:
        """Which of posttrain's images the run's pods need."""
        return "vllm" if self.grpo is not None and self.grpo.rollout.mode != "Transformers" else "trainer"


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

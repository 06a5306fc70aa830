"""The shapes that several resources share: model, dataset, access, code, resources, pod overrides.

It owns what a field means and which values it takes; it must not know how a plan uses them.
It is long because every field has its bounds, description and example here.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from posttrain.api.base import (
    ApiModel,
    Decimal,
    Distinct,
    DnsLabel,
    Fraction,
    JsonObject,
    LongText,
    ObjectName,
    Quantity,
    RunName,
    ShortText,
    Text,
)
from posttrain.api.rules import Rule

HUB_SOURCE = r"(hf://)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9._-]{1,96})?"
PVC_SOURCE = r"pvc://[a-z]([-a-z0-9]{0,61}[a-z0-9])?/[^\s]+"
FILE_SOURCE = r"file://[^\s]([^\r\n]*[^\s])?"
SOURCE_PATTERN = f"^({HUB_SOURCE}|{PVC_SOURCE}|{FILE_SOURCE})$"

Source = Annotated[str, StringConstraints(pattern=SOURCE_PATTERN, min_length=1, max_length=1100)]
EntryPoint = Annotated[
    str,
    StringConstraints(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
        max_length=256,
    ),
]
"""`module:Name`, resolved in the run's own code."""

ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
HubEndpoint = Annotated[str, StringConstraints(pattern=r"^https?://[^\s]+$", max_length=512)]
EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]


class RunRef(ApiModel):
    """Another TrainingRun of the same namespace, whose final model is meant."""

    name: RunName = Field(description="Name of the run.", examples=["sft"])


class Model(ApiModel):
    """The model a run starts from."""

    source: Source | None = Field(
        default=None,
        description="Where the model lies: a Hub id, `hf://org/name`, `pvc://claim/path`, or, on one machine only, "
        "`file://` with an absolute path or one relative to the resource's file.",
        examples=["Qwen/Qwen2.5-1.5B-Instruct"],
    )
    run_ref: RunRef | None = Field(
        default=None,
        description="In place of source: the model that another TrainingRun ends with. The run waits until that one "
        "has succeeded.",
        examples=[{"name": "sft"}],
    )
    revision: ShortText | None = Field(
        default=None,
        description="Branch, tag or commit on the Hub. A moving one is resolved to a commit once and recorded in "
        "status.provenance. Default: main.",
        examples=["main"],
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that lies in the model's repository. Default: false.",
        examples=[False],
    )
    chat_template: LongText | None = Field(
        default=None,
        description="A Jinja chat template in place of the tokenizer's own.",
        examples=["{% for message in messages %}{{ message['content'] }}{% endfor %}"],
    )
    eos_token: ShortText | None = Field(
        default=None,
        description="The token that ends a turn, where it is not the tokenizer's own: a Qwen base model trained on "
        "ChatML needs `<|im_end|>`.",
        examples=["<|im_end|>"],
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Element type in which the weights are loaded. `auto` takes the checkpoint's on a GPU and "
        "float32 on a CPU. Default: auto.",
        examples=["bfloat16"],
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = Field(
        default=None,
        description="Attention kernel that transformers uses. Default: transformers' own choice.",
        examples=["sdpa"],
    )
    config: JsonObject | None = Field(
        default=None,
        max_length=64,
        description="Overrides of the model's configuration, such as RoPE scaling.",
        examples=[{"rope_theta": 300000.0, "max_position_embeddings": 32768}],
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="source",
            message="exactly one of source and runRef says which model it is",
            cel="has(self.source) != has(self.runRef)",
            holds=lambda model: ("source" in model) != ("runRef" in model),
        ),
        Rule(
            field="revision",
            message="only what lies on the Hub has revisions: leave revision out, or name the model by source",
            cel="!has(self.revision) || !has(self.runRef)",
            holds=lambda model: "revision" not in model or "runRef" not in model,
        ),
    )

    @property
    def label(self) -> str:
        """What it is called where there is room for a name: its source, or the run that it comes from."""
        return self.source or (f"run {self.run_ref.name}" if self.run_ref else "")


class Rows(ApiModel):
    """A range of rows, taken before the fraction."""

    start: int = Field(default=0, ge=0, le=2**53, description="First row, from 0. Default: 0.", examples=[0])
    end: int | None = Field(
        default=None, ge=1, le=2**53, description="Row after the last one. Default: all.", examples=[1000]
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="end",
            message="end must be greater than start: rows from start up to, and without, end are used",
            cel="!has(self.end) || self.end > self.start",
            holds=lambda rows: "end" not in rows or rows["end"] > rows["start"],
        ),
    )


class Dataset(ApiModel):
    """One member of a dataset mixture."""

    source: Source = Field(
        description="A Hub id, `pvc://claim/path` or, on one machine only, `file://path`; a path is a JSON, JSONL, "
        "Parquet or CSV file, or a folder of files of one of these kinds.",
        examples=["open-r1/Mixture-of-Thoughts"],
    )
    config: ShortText | None = Field(default=None, description="Configuration of a Hub dataset.", examples=["all"])
    split: ShortText = Field(default="train", description="Split of a Hub dataset. Default: train.", examples=["train"])
    columns: Annotated[tuple[ColumnName, ...], Field(min_length=1, max_length=64), Distinct()] | None = Field(
        default=None,
        description="Columns to keep, after renaming. Default: all. The members' columns must agree.",
        examples=[["messages"]],
    )
    rename: dict[str, ColumnName] | None = Field(
        default=None,
        max_length=64,
        description="Columns to rename, from old to new name.",
        examples=[{"conversations": "messages"}],
    )
    rows: Rows | None = Field(
        default=None, description="Range of rows to use. Default: all.", examples=[{"start": 0, "end": 1000}]
    )
    revision: ShortText | None = Field(
        default=None,
        description="Branch, tag or commit on the Hub, resolved to a commit once. Default: main.",
        examples=["main"],
    )
    fraction: Fraction | None = Field(
        default=None,
        description="Share of this member's rows to use, above 0 and at most 1, taken after a seeded shuffle.",
        examples=["0.5"],
    )


class SecretKey(ApiModel):
    """One key of a Secret in the run's namespace."""

    name: ObjectName = Field(description="Name of the Secret.", examples=["hf-token"])
    key: ShortText = Field(description="Key inside the Secret.", examples=["token"])


class Access(ApiModel):
    """How everything that this resource reads and writes is reached."""

    hub_token_secret_ref: SecretKey | None = Field(
        default=None,
        description="Secret with a Hugging Face token, for gated or private models and data.",
        examples=[{"name": "hf-token", "key": "token"}],
    )
    hub_endpoint: HubEndpoint | None = Field(
        default=None,
        description="Another Hub than huggingface.co.",
        examples=["https://hub.example.com"],
    )
    service_account_name: ObjectName | None = Field(
        default=None,
        description="Service account of the pods. Default: one made for the run, without any right.",
        examples=["trainer"],
    )


class Code(ApiModel):
    """Own Python code, mounted read-only at /code and first on PYTHONPATH."""

    config_map_name: ObjectName | None = Field(
        default=None, description="ConfigMap whose keys are Python files.", examples=["my-callbacks"]
    )
    path: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        default=None,
        description="Folder on this machine (local runs only), absolute or relative to the resource's file.",
        examples=["./code"],
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="",
            message="exactly one of configMapName and path says where the code lies",
            cel="has(self.configMapName) != has(self.path)",
            holds=lambda code: ("configMapName" in code) != ("path" in code),
        ),
    )


class Callback(ApiModel):
    """A transformers TrainerCallback of one's own."""

    function: EntryPoint = Field(
        description="`module:Name` of a TrainerCallback class, or of a function that returns one, in `code`.",
        examples=["callbacks:PrintSamples"],
    )
    params: JsonObject = Field(
        default={},
        max_length=64,
        description="Keyword arguments it is built with. Default: none.",
        examples=[{"every": 10}],
    )


class Resources(ApiModel):
    """What one node of the gang gets."""

    profile: DnsLabel | None = Field(
        default=None,
        description="Profile of the platform team (node selector, tolerations, GPU kind, price). Default: the "
        "settings' default profile.",
        examples=["h100"],
    )
    num_nodes: int = Field(
        default=1, ge=1, le=1024, description="Number of nodes, one pod each. Default: 1.", examples=[1]
    )
    gpus_per_node: int = Field(
        default=1,
        ge=0,
        le=64,
        description="GPUs of each node; 0 trains on the CPU. Default: 1.",
        examples=[8],
    )
    processes_per_node: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Ranks of each node. Default: one a GPU, or 1 without GPUs.",
        examples=[8],
    )
    cpu: Quantity | None = Field(
        default=None, description="CPUs of each node. Default: the profile's.", examples=["16"]
    )
    memory: Quantity | None = Field(
        default=None, description="Memory of each node. Default: the profile's.", examples=["128Gi"]
    )
    shared_memory: Quantity | None = Field(
        default=None,
        description="Size limit of /dev/shm. Default: the profile's; none there means as much as the memory limit.",
        examples=["16Gi"],
    )
    devices: dict[str, Quantity] | None = Field(
        default=None,
        max_length=16,
        description="Further devices of each node, such as RDMA interfaces.",
        examples=[{"rdma/ib": "8"}],
    )
    queue_name: ObjectName | None = Field(
        default=None,
        description="LocalQueue of Kueue in the run's namespace. Quota for the whole gang is reserved in it before any "
        "pod of the gang is made, and held over restarts; prepare's CPU pod needs none. One machine has no queues: "
        "`posttrain run` ignores it. Default: none, the gang starts at once.",
        examples=["team-a"],
    )
    workload_priority_class: ObjectName | None = Field(
        default=None,
        description="WorkloadPriorityClass of Kueue, by which the queue orders and preempts. It says nothing of the "
        "pods' own priority. Default: none, which is priority 0.",
        examples=["production"],
    )
    priority_class_name: ObjectName | None = Field(
        default=None, description="Priority class of the pods.", examples=["batch"]
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="processesPerNode",
            message="processesPerNode is more than gpusPerNode, and two ranks cannot share a GPU: lower it, leave it "
            "out for one rank a GPU, or set gpusPerNode to 0 to train on CPUs",
            cel="!has(self.processesPerNode) || self.gpusPerNode == 0 || self.processesPerNode <= self.gpusPerNode",
            holds=lambda resources: (
                resources["gpusPerNode"] == 0 or resources.get("processesPerNode", 0) <= resources["gpusPerNode"]
            ),
        ),
        Rule(
            field="workloadPriorityClass",
            message="workloadPriorityClass is the priority in a queue: set queueName, or leave it out",
            cel="!has(self.workloadPriorityClass) || has(self.queueName)",
            holds=lambda resources: "workloadPriorityClass" not in resources or "queueName" in resources,
        ),
    )

    @property
    def ranks_per_node(self) -> int:
        """Processes of one node: as given, else one a GPU, else one."""
        return self.processes_per_node or max(self.gpus_per_node, 1)

    @property
    def world_size(self) -> int:
        """Processes of the whole gang."""
        return self.num_nodes * self.ranks_per_node


class EnvVar(ApiModel):
    """A plain environment variable."""

    name: EnvironmentName = Field(description="Name of the variable.", examples=["NCCL_DEBUG"])
    value: Text = Field(description="Its value.", examples=["INFO"])


class Toleration(ApiModel):
    """A toleration, as in a pod spec."""

    key: ShortText | None = Field(default=None, description="Taint key.", examples=["nvidia.com/gpu"])
    operator: Literal["Exists", "Equal"] = Field(
        default="Equal", description="How key and value are compared. Default: Equal.", examples=["Exists"]
    )
    value: ShortText | None = Field(default=None, description="Taint value.", examples=["present"])
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect. Default: all.", examples=["NoSchedule"]
    )
    toleration_seconds: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="How long a NoExecute taint is tolerated, in seconds. Default: for ever.",
        examples=[300],
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="key",
            message="operator Equal compares a key: set key, or take operator Exists to tolerate every taint",
            cel="has(self.key) || self.operator == 'Exists'",
            holds=lambda toleration: "key" in toleration or toleration["operator"] == "Exists",
        ),
        Rule(
            field="value",
            message="operator Exists compares no value: leave value out, or take operator Equal",
            cel="!has(self.value) || self.operator == 'Equal'",
            holds=lambda toleration: "value" not in toleration or toleration["operator"] == "Equal",
        ),
        Rule(
            field="tolerationSeconds",
            message="tolerationSeconds is for effect NoExecute: set effect so, or leave it out",
            cel="!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            holds=lambda toleration: "tolerationSeconds" not in toleration or toleration.get("effect") == "NoExecute",
        ),
    )


class PodOverrides(ApiModel):
    """What a user may change in the GPU pods: an allow-list, not a pod template."""

    node_selector: dict[str, ShortText] | None = Field(
        default=None,
        max_length=32,
        description="Labels that a node must have, besides the profile's.",
        examples=[{"topology.kubernetes.io/zone": "a"}],
    )
    tolerations: tuple[Toleration, ...] | None = Field(
        default=None,
        max_length=32,
        description="Tolerations besides the profile's.",
        examples=[[{"key": "team", "operator": "Equal", "value": "reasoning"}]],
    )
    env: Annotated[tuple[EnvVar, ...], Field(max_length=64), Distinct("name")] | None = Field(
        default=None,
        description="Environment variables besides the platform's; a name the platform sets is refused.",
        examples=[[{"name": "NCCL_DEBUG", "value": "INFO"}]],
    )
    env_from_secrets: Annotated[tuple[ObjectName, ...], Field(max_length=16), Distinct()] | None = Field(
        default=None,
        description="Secrets whose keys become environment variables.",
        examples=[["tracker-keys"]],
    )
    labels: dict[str, ShortText] | None = Field(
        default=None,
        max_length=32,
        description="Labels of the pods; posttrain's and Kubeflow's own are refused.",
        examples=[{"team": "reasoning"}],
    )
    annotations: dict[str, Text] | None = Field(
        default=None,
        max_length=32,
        description="Annotations of the pods.",
        examples=[{"example.com/cost-centre": "42"}],
    )
    image_pull_secrets: Annotated[tuple[ObjectName, ...], Field(max_length=8), Distinct()] | None = Field(
        default=None,
        description="Secrets for a private image registry.",
        examples=[["registry"]],
    )
    image: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = Field(
        default=None,
        description="Another trainer image, built on posttrain's.",
        examples=["registry.example.com/trainer@sha256:0123456789abcdef"],
    )


class Tracking(ApiModel):
    """Experiment trackers that the trainer reports to."""

    report_to: Annotated[
        tuple[Literal["WandB", "Trackio", "MLflow", "TensorBoard"], ...], Field(max_length=4), Distinct()
    ] = Field(
        default=(),
        description="Trackers to report to. Default: none; progress and report.html need none.",
        examples=[["WandB"]],
    )
    project: ShortText | None = Field(default=None, description="Project in the tracker.", examples=["reasoning"])
    entity: ShortText | None = Field(default=None, description="Team in Weights & Biases.", examples=["my-team"])
    group: ShortText | None = Field(default=None, description="Group of runs in the tracker.", examples=["distill"])
    secret_ref: ObjectName | None = Field(
        default=None,
        description="Secret whose keys become environment variables of the trainer, such as WANDB_API_KEY.",
        examples=["tracker-keys"],
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


_OF_A_NEW_CLAIM = frozenset({"storageClassName", "accessMode"})


class Storage(ApiModel):
    """Where checkpoints and the trained model are written."""

    claim_name: ObjectName | None = Field(
        default=None,
        description="An existing claim; the run writes to a folder of its own name in it.",
        examples=["team-checkpoints"],
    )
    size: Quantity | None = Field(default=None, description="Size of a claim made for the run.", examples=["500Gi"])
    storage_class_name: ObjectName | None = Field(
        default=None, description="Storage class of that claim. Default: the cluster's.", examples=["fast"]
    )
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] | None = Field(
        default=None,
        description="Access mode of that claim. Default: ReadWriteMany with several nodes, else ReadWriteOnce.",
        examples=["ReadWriteMany"],
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="",
            message="exactly one of claimName (an existing claim) and size (a new one) says where to write",
            cel="has(self.claimName) != has(self.size)",
            holds=lambda storage: ("claimName" in storage) != ("size" in storage),
        ),
        Rule(
            field="claimName",
            message="storageClassName and accessMode are for a new claim: leave them out beside claimName",
            cel="!has(self.claimName) || !(has(self.storageClassName) || has(self.accessMode))",
            holds=lambda storage: "claimName" not in storage or storage.keys().isdisjoint(_OF_A_NEW_CLAIM),
        ),
    )


class Checkpoints(ApiModel):
    """What is kept, how often and where."""

    storage: Storage = Field(
        default=Storage(size="100Gi"),
        description="Where they are written. Default: a new claim of 100Gi.",
        examples=[{"size": "500Gi"}],
    )
    retain: Literal["Always", "Never"] = Field(
        default="Always",
        description="Whether a claim made for the run outlives it. Always: it is labelled with the run, not owned "
        "by it. Default: Always.",
        examples=["Always"],
    )
    every_steps: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="Optimizer steps between checkpoints. Default: a tenth of the run, at most 500.",
        examples=[100],
    )
    keep_last: int = Field(
        default=2,
        ge=1,
        le=1000,
        description="Verified checkpoints to keep; the newest verified one is never deleted. Default: 2.",
        examples=[2],
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
    on_non_finite: Literal["Fail", "Suspend"] = Field(
        default="Fail",
        description="What follows a NaN or infinite loss. Default: Fail.",
        examples=["Fail"],
    )
    avoid_nodes: bool = Field(
        default=True,
        description="Exclude a node that caused two infrastructure failures of this run. Default: true.",
        examples=[True],
    )


class Prepare(ApiModel):
    """The checks before any GPU is held."""

    enabled: bool = Field(
        default=True,
        description="Check data, template, arithmetic, memory and access, and fetch model and data. Revisions are "
        "resolved even when false. Default: true.",
        examples=[True],
    )
    dry_run: bool = Field(default=False, description="End after the checks. Default: false.", examples=[False])

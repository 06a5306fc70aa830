"""The shapes of what a resource's pods get, where they run, and what a user may change in them.

It owns what a field means and which values it takes; it must not know how a plan uses them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from posttrain.api.base import (
    ApiModel,
    Distinct,
    DnsLabel,
    ObjectName,
    Quantity,
    ShortText,
    Text,
)
from posttrain.api.rules import Rule

EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]


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

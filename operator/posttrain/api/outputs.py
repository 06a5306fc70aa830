"""The shapes of what a run writes: checkpoints and their storage, experiment trackers.

It owns what a field means and which values it takes; it must not know how a plan uses them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.api.base import (
    ApiModel,
    Distinct,
    ObjectName,
    Quantity,
    ShortText,
)
from posttrain.api.rules import Rule


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

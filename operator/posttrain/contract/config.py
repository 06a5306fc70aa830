"""`config.json`: everything that an attempt's processes need to know, resolved.

It owns what the operator hands to a workload; it must not hold a path of any machine, an address or a secret.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from posttrain.api.base import JsonObject
from posttrain.api.training_run import (
    MUTABLE_FIELDS,
    MUTABLE_PARTS,
    MUTABLE_RESOURCES_FIELDS,
    Method,
    TrainingRunSpec,
)


class ContractModel(BaseModel):
    """A frozen part of the contract; an unknown key means that the two sides are of different versions."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HubSource(ContractModel):
    """A repository on the Hub; `revision` is a commit once prepare has resolved it."""

    kind: Literal["Hub"] = "Hub"
    repo: str
    revision: str


class MountedSource(ContractModel):
    """A file or folder inside a named mount."""

    kind: Literal["Mounted"] = "Mounted"
    mount: str
    path: str


ResolvedSource = Annotated[HubSource | MountedSource, Field(discriminator="kind")]


class RunIdentity(ContractModel):
    """Which resource the attempt belongs to."""

    kind: str
    namespace: str
    name: str
    uid: str | None = None
    """None where no API server has taken the resource yet."""


class GangShape(ContractModel):
    """How many processes there must be: each rank asserts it."""

    num_nodes: int
    processes_per_node: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        """Processes of the whole gang."""
        return self.num_nodes * self.processes_per_node


class TrainingConfig(ContractModel):
    """The config of one attempt of a TrainingRun, and (attempt 0) of its prepare pod.

    `args` are the coerced keys of TRL's class; what the platform owns is set by the workload from the other fields.
    """

    schema_version: Literal[1] = 1
    run: RunIdentity
    attempt: int
    method: Method
    config_hash: str
    spec: TrainingRunSpec
    args: JsonObject
    model: ResolvedSource
    datasets: tuple[ResolvedSource, ...]
    eval_datasets: tuple[ResolvedSource, ...]
    gang: GangShape
    gpu_memory_bytes: int | None = None
    gpu_name: str | None = None

    def to_json(self) -> str:
        """Return the text of config.json.

        Of the spec it has what has not its default: an image that a run is pinned to may be older than a field.
        """
        data = {**self.model_dump(mode="json", by_alias=True), "spec": _given(self.spec)}
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainingConfig:
        """Read config.json.

        Raises:
            pydantic.ValidationError: it is not of this schema.
        """
        return cls.model_validate_json(text)


def immutable_spec(spec: TrainingRunSpec) -> dict[str, Any]:
    """Return the part of a spec that never changes while the run lives, as JSON data."""
    return _immutable(spec.to_data())


def config_hash(spec: TrainingRunSpec) -> str:
    """Return the hash that a run is accepted with: of the immutable part, after coercion, hence of equal meaning.

    Fields that have their defaults do not count: a run that lives is accepted as it was by an operator that knows more
    fields. The spec's `args` must have been coerced (`posttrain.api.args.coerce_args`).
    """
    text = json.dumps(_immutable(_given(spec)), sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _given(spec: TrainingRunSpec) -> dict[str, Any]:
    """Return as JSON data what of a spec has not its default."""
    return spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)


def _immutable(data: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in data.items() if key not in MUTABLE_FIELDS}
    for name, mutable in {**MUTABLE_PARTS, "resources": MUTABLE_RESOURCES_FIELDS}.items():
        part = {key: value for key, value in kept.pop(name, {}).items() if key not in mutable}
        if part:
            kept[name] = part
    return kept

"""Facts: the typed record of what happened in an attempt, and the envelope in which they travel.

It owns the shapes on the wire and in facts.jsonl; it must not know who writes or serves them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from posttrain.contract.config import ContractModel
from posttrain.contract.result import Result

BODY_MAX_BYTES = 64 * 1024
METRICS_MAX_COUNT = 256
NAME_MAX_LENGTH = 64
VALUE_MAX_LENGTH = 64

Phase = Literal["preparing", "loading", "training", "saving", "evaluating", "rollout"]


class Started(ContractModel):
    """The gang met and begins to train."""

    type: Literal["Started"] = "Started"
    world_size: int
    max_steps: int
    resumed_from_step: int
    versions: dict[str, str] = Field(default_factory=dict)


class PhaseChanged(ContractModel):
    """The gang entered another phase."""

    type: Literal["Phase"] = "Phase"
    phase: Phase
    step: int | None = None


class CheckpointSaved(ContractModel):
    """A checkpoint is complete: its marker is on disk."""

    type: Literal["CheckpointSaved"] = "CheckpointSaved"
    step: int
    uri: str
    bytes: int
    digest: str


class CheckpointSkipped(ContractModel):
    """A checkpoint failed its verification and was passed over."""

    type: Literal["CheckpointSkipped"] = "CheckpointSkipped"
    step: int
    reason: str


class Logged(ContractModel):
    """What the trainer logged at a step: the points of the curves; decimals as strings."""

    type: Literal["Logged"] = "Logged"
    step: int
    metrics: dict[str, str]


class NonFinite(ContractModel):
    """A logged number is not finite."""

    type: Literal["NonFinite"] = "NonFinite"
    metric: str
    step: int


class SignalLost(ContractModel):
    """A check of spec.grpo.signal finds something; `reason` is its own."""

    type: Literal["SignalLost"] = "SignalLost"
    reason: str
    message: str
    step: int


class SignalRegained(ContractModel):
    """A check of spec.grpo.signal finds nothing any more."""

    type: Literal["SignalRegained"] = "SignalRegained"
    reason: str
    step: int


class FirstError(ContractModel):
    """The earliest error of a pod's ranks."""

    type: Literal["FirstError"] = "FirstError"
    rank: int | None
    time: datetime
    reason: str
    message: str


class PrepareResult(ContractModel):
    """What prepare found. `commits` maps `model`, `datasets/0`, `evalDatasets/0` … to Hub commits."""

    type: Literal["PrepareResult"] = "PrepareResult"
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    commits: dict[str, str] = Field(default_factory=dict)
    estimates: dict[str, str] = Field(default_factory=dict)


class ResultFact(ContractModel):
    """How the attempt ended."""

    type: Literal["Result"] = "Result"
    result: Result
    last_step: int | None = None


FactBody = Annotated[
    Started
    | PhaseChanged
    | CheckpointSaved
    | CheckpointSkipped
    | Logged
    | NonFinite
    | SignalLost
    | SignalRegained
    | FirstError
    | PrepareResult
    | ResultFact,
    Field(discriminator="type"),
]


def is_urgent(body: FactBody) -> bool:
    """Return whether a condition depends on the fact, or a person waits for it: it must not wait for others."""
    return not isinstance(body, Logged | PhaseChanged)


class Fact(ContractModel):
    """One line of facts.jsonl. `seq` counts from 1 in each (attempt, source)."""

    attempt: int
    source: str = Field(max_length=NAME_MAX_LENGTH)
    seq: int = Field(ge=1)
    time: datetime
    body: FactBody


class FactsReport(ContractModel):
    """The body of a POST to the facts address: any number of facts, and a beat of the sender.

    The answer is `{"acknowledged": <seq>}` per (attempt, source): `FactsReply`.
    """

    attempt: int
    source: str = Field(max_length=NAME_MAX_LENGTH)
    phase: Phase | None = None
    step: int | None = None
    waiting: bool = False
    """The sender waits for the acknowledgement: it ends, or has more facts than a report holds."""
    facts: tuple[Fact, ...] = Field(default=(), max_length=METRICS_MAX_COUNT)


class AcknowledgedSource(ContractModel):
    """Every fact of (attempt, source) up to `seq` was taken."""

    attempt: int
    source: str
    seq: int


class FactsReply(ContractModel):
    """The answer to a FactsReport."""

    # An operator that was upgraded in mid-run answers workloads of the version before.
    model_config = ConfigDict(extra="ignore")

    acknowledged: tuple[AcknowledgedSource, ...] = ()
    retry_after_seconds: float | None = Field(default=None, ge=0)
    """What is not acknowledged was taken and is not durable yet: send it again then, or at once with urgent news."""


FACT = TypeAdapter(Fact)

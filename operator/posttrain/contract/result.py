"""How a container ends: its result, its termination message, its exit code.

It owns their shapes and limits; it must not judge why something ended.
"""

from __future__ import annotations

import json
from enum import IntEnum

from pydantic import Field

from posttrain.contract.config import ContractModel

TERMINATION_MAX_BYTES = 4096


class ExitCode(IntEnum):
    """Exit codes of a workload's container."""

    DONE = 0
    FAILED = 1
    INVALID = 2
    """The user's configuration is wrong: never retried."""
    TRANSIENT = 138
    TERMINATED = 143


class Result(ContractModel):
    """What a container says at its end. Artifacts are URIs by name."""

    reason: str
    message: str
    advice: str = ""
    metrics: dict[str, str] = Field(default_factory=dict)
    artifacts: dict[str, str] = Field(default_factory=dict)
    rank: int | None = None
    omitted: int = 0
    """Metrics and artifacts that the termination message had no room for."""


def to_termination_message(result: Result) -> str:
    """Return the result as JSON of at most 4 KiB: metrics go first, then artifacts, then the message's end."""
    omitted = 0
    metrics, artifacts = dict(result.metrics), dict(result.artifacts)
    message = result.message
    while True:
        cut = result.model_copy(
            update={"metrics": metrics, "artifacts": artifacts, "message": message, "omitted": omitted}
        )
        text = json.dumps(cut.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False)
        excess = len(text.encode()) - TERMINATION_MAX_BYTES
        if excess <= 0:
            return text
        if metrics:
            metrics.popitem()
            omitted += 1
        elif artifacts:
            artifacts.popitem()
            omitted += 1
        elif message:
            message = _shorten(message, excess)
        else:
            raise ValueError("reason and advice alone exceed the termination message's 4 KiB")


def _shorten(text: str, excess: int) -> str:
    # A character may be several bytes in UTF-8 and several more when escaped; the caller asks again until it fits.
    keep = max(len(text) - max(excess, 16), 0)
    return text[:keep].rstrip() + " …" if keep else ""


def parse_termination_message(text: str) -> Result | None:
    """Return the result that a termination message holds, or None where it is not one of ours."""
    try:
        return Result.model_validate_json(text)
    except ValueError:
        return None

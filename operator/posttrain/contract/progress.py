"""Progress as transformers' KubeflowCallback posts it, read into one typed report.

It owns that body's shape and limits; it must not decide what becomes of a report.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from posttrain.contract.config import ContractModel
from posttrain.contract.facts import BODY_MAX_BYTES, METRICS_MAX_COUNT, NAME_MAX_LENGTH, VALUE_MAX_LENGTH

_STEP = "current_step"
_MAX_STEPS = "total_steps"
_EPOCH = "current_epoch"


class KubeflowReport(ContractModel):
    """What one post says. The body names no attempt: the server knows it from the token it came with."""

    attempt: int
    step: int = Field(ge=0)
    max_steps: int | None = Field(default=None, ge=1)
    epoch: str | None = None
    metrics: dict[str, str] = Field(default_factory=dict)
    """What the trainer logged last, as decimals in strings."""


def parse_kubeflow_report(body: bytes, *, attempt: int) -> KubeflowReport | None:
    """Return the report in a post's body, or None where it names no `current_step`.

    The callback posts without a step when training begins and ends; nothing follows from those. Its percentage and its
    remaining time are not read: both are wrong after a resume (transformers 5.23, integration_utils.py:2604-2613).

    Raises:
        ValueError: the body is too long or not of the callback's shape; the message says how.
    """
    if len(body) > BODY_MAX_BYTES:
        raise ValueError(f"the body has {len(body)} bytes and may have {BODY_MAX_BYTES}")
    values = _metrics(body)
    step = values.pop(_STEP, None)
    max_steps = values.pop(_MAX_STEPS, None)
    epoch = values.pop(_EPOCH, None)
    if step is None:
        return None
    kept = {name: value for name, value in values.items() if _fits(name, value)}
    return KubeflowReport(
        attempt=attempt,
        step=_integer(step, name=_STEP),
        max_steps=None if max_steps is None else _integer(max_steps, name=_MAX_STEPS),
        epoch=epoch if epoch is not None and _fits(_EPOCH, epoch) else None,
        metrics=dict(list(kept.items())[:METRICS_MAX_COUNT]),
    )


def _metrics(body: bytes) -> dict[str, str]:
    try:
        data: Any = json.loads(body)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    status = data.get("trainerStatus") if isinstance(data, dict) else None
    if not isinstance(status, dict):
        raise ValueError("the body has no object `trainerStatus`")
    metrics = status.get("metrics", [])
    if not isinstance(metrics, list):
        raise ValueError("`trainerStatus.metrics` is not a list")
    values = {}
    for metric in metrics:
        if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
            raise ValueError("a metric has no `name`")
        values[metric["name"]] = str(metric.get("value", ""))
    return values


def _fits(name: str, value: str) -> bool:
    return len(name) <= NAME_MAX_LENGTH and len(value) <= VALUE_MAX_LENGTH


def _integer(text: str, *, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"`{name}` is {text[:VALUE_MAX_LENGTH]!r} and must be an integer") from None

"""A reward of the quickstart's own, as `spec.code` brings it."""

from __future__ import annotations

import re
from typing import Any


def last_number(*, completions: list[Any], solution: list[str], **_: Any) -> list[float]:
    """Return 1 for each completion whose last number is the solution, else 0."""
    answers = [re.findall(r"-?\d+", completion[0]["content"])[-1:] for completion in completions]
    return [float(answer == [right.strip("$")]) for answer, right in zip(answers, solution, strict=True)]

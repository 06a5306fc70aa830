"""Rewards that grade a mathematical answer: whether it is right, and how long it is for that.

It owns one plain function a reward, in TRL's signature, with the parameters of the table (posttrain.api.rewards); it
must not know how answers are compared (grader.py), nor by which process (grading.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from posttrain_workloads.rewards.completions import Completion, text_of
from posttrain_workloads.rewards.grading import Config, GradingFailed, shared_pool

ROW_COLUMN = "posttrain_row"
"""A column that tells rows apart; without it neighbours with the same prompt and solution count as one row."""


_READABLE_LENGTH = 200


class RewardError(Exception):
    """A reward could not be computed; the message names the reward, the completion and its row."""


def accuracy(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    solution: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """Return 1.0 for each answer that equals its solution, else 0.0; None where the solution cannot be parsed."""
    grades = _grade("accuracy", [text_of(completion) for completion in completions], solution, config="accuracy")
    return [None if correct is None else float(correct) for correct in grades]


def length(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    solution: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """Return how short each completion is among those of its row, in characters (Kimi k1.5, arXiv:2501.12599, 2.3.3).

    The shortest gets 0.5 and the longest -0.5, and a wrong one at most 0.0; where all have the same length, all get
    0.0. None where the solution cannot be parsed. open-r1 compares all completions of a call, whichever prompts they
    belong to.
    """
    texts = [text_of(completion) for completion in completions]
    grades = _grade("length", texts, solution)
    rewards: list[float | None] = []
    for group in groups(prompts, solution=solution, **columns):
        sizes = [len(text) for text in texts[group]]
        shortest, longest = min(sizes), max(sizes)
        for size, correct in zip(sizes, grades[group], strict=True):
            if correct is None:
                rewards.append(None)
            elif shortest == longest:
                rewards.append(0.0)
            else:
                share = 0.5 - (size - shortest) / (longest - shortest)
                rewards.append(share if correct else min(0.0, share))
    return rewards


def cosine(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    solution: Sequence[Any],
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_len: int = 1000,
    **columns: Any,
) -> list[float | None]:
    """Return a bound that depends on the length of each completion in characters (arXiv:2502.03373, 3.1).

    A right answer goes from `max_value_correct` (no character) to `min_value_correct` (`max_len` of them), a wrong one
    from `min_value_wrong` to `max_value_wrong`, and stays there; in open-r1 the curve comes back beyond `max_len`. None
    where the solution cannot be parsed.
    """
    texts = [text_of(completion) for completion in completions]
    rewards: list[float | None] = []
    for text, correct in zip(texts, _grade("cosine", texts, solution), strict=True):
        begin, end = (max_value_correct, min_value_correct) if correct else (min_value_wrong, max_value_wrong)
        fall = 0.5 * (1 + math.cos(math.pi * min(len(text), max_len) / max_len))
        rewards.append(None if correct is None else end + (begin - end) * fall)
    return rewards


def groups(prompts: Sequence[Any], *, solution: Sequence[Any], **columns: Any) -> Iterator[slice]:
    """Yield where the completions of each row stand: TRL hands over all of one row's in a row."""
    keys = columns.get(ROW_COLUMN) or list(zip(prompts, solution, strict=True))
    begin = 0
    for _, members in itertools.groupby(keys):
        end = begin + sum(1 for _ in members)
        yield slice(begin, end)
        begin = end


def _grade(
    reward: str, texts: Sequence[str], solution: Sequence[Any], *, config: Config = "length"
) -> list[bool | None]:
    """Return which answers are right; None where the row has no solution, or one that cannot be parsed."""
    golds = ["" if gold is None else str(gold) if isinstance(gold, int | float) else gold for gold in solution]
    try:
        return shared_pool().grade(config, golds, texts)
    except GradingFailed as failure:
        at = failure.index
        text = texts[at] if len(texts[at]) <= _READABLE_LENGTH else f"…{texts[at][-_READABLE_LENGTH:]}"
        raise RewardError(
            f"reward {reward}, row {at} with the solution {golds[at]!r}: {failure}; the completion: {text!r}"
        ) from failure

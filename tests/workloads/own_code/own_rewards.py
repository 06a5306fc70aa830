"""Own rewards of a run, as `spec.code` brings them: good ones, and ones that fail as real ones do."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any


def short(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Prefer few tokens."""
    return [-len(ids) / 100 for ids in completion_ids]


def varied(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Give nearly each completion another number."""
    return [(sum(ids) % 97) / 97 for ids in completion_ids]


def record(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    posttrain_row: list[int],
    trainer_state: Any,
    file: str = "",
    **columns: Any,
) -> list[float]:
    """Write the rows of each rollout into a file, and reward the sum of the token ids."""
    if file:
        with Path(file).open("a") as out:
            out.write(json.dumps([trainer_state.global_step, posttrain_row]) + "\n")
    return varied(completion_ids)


def silent(prompts: list[Any], completions: list[Any], **columns: Any) -> list[None]:
    """Score nothing."""
    return [None] * len(completions)


def picky(prompts: list[Any], completions: list[Any], posttrain_row: list[int], **columns: Any) -> list[float]:
    """Fail where an odd row is among them."""
    if any(row % 2 for row in posttrain_row):
        raise ValueError("an odd row")
    return [1.0] * len(completions)


async def slow(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Prefer few characters, after a while."""
    await asyncio.sleep(0)
    return [-len(completion[0]["content"]) / 100 for completion in completions]


def constant(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Reward everything alike."""
    return [0.5] * len(completions)

"""The rewards of the registry: one plain function each, by its name, and `build`, which binds its parameters.

    reward = build("cosine", max_len=4000)
    reward(prompts, completions, completion_ids, solution=["$6$", ...])  # a number or None for each completion

Rewards that run programs are functions of posttrain_workloads.rewards.code and take a keyword `sandbox`.
"""

from posttrain_workloads.rewards.answers import ROW_COLUMN, RewardError, accuracy, cosine, length
from posttrain_workloads.rewards.bound import Reward, build
from posttrain_workloads.rewards.text import (
    code_format,
    format,
    reasoning_steps,
    repetition_penalty,
    soft_overlong_punishment,
    tag_count,
)

__all__ = [
    "ROW_COLUMN",
    "Reward",
    "RewardError",
    "accuracy",
    "build",
    "code_format",
    "cosine",
    "format",
    "length",
    "reasoning_steps",
    "repetition_penalty",
    "soft_overlong_punishment",
    "tag_count",
]

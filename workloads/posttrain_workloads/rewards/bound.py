"""Rewards of the registry with their parameters, as a trainer calls them.

It owns how a name and parameters become a callable; it must not know any reward but by the table
(posttrain.api.rewards), nor decide what becomes of an error in one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from posttrain.api.rewards import REWARDS, check_reward, fill_params

_MODULES = {
    "posttrain_workloads.rewards.answers": ("accuracy", "cosine", "length"),
    "posttrain_workloads.rewards.code": ("binary_code", "cf_code", "code", "ioi_code"),
    "posttrain_workloads.rewards.text": (
        "code_format",
        "format",
        "reasoning_steps",
        "repetition_penalty",
        "soft_overlong_punishment",
        "tag_count",
    ),
}

# A parameter with the name of a column that the function looks at, too.
_ARGUMENTS = {"code_format": {"language": "default_language"}}


class RewardFunction(Protocol):
    """TRL's signature of a reward; a column has one value a completion."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Any], **columns: Any
    ) -> list[float | None]: ...


@dataclass(frozen=True)
class Reward:
    """A reward function and its arguments, which stand before columns of the same name."""

    name: str
    function: RewardFunction
    arguments: Mapping[str, Any]
    columns: tuple[str, ...]

    @property
    def __name__(self) -> str:
        """What TRL names the reward's metrics by."""
        return self.name

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Return a reward for each completion, None where there is none.

        Raises:
            ValueError: the dataset lacks a column.
        """
        missing = [column for column in self.columns if column not in columns]
        if missing:
            there = ", ".join(sorted(columns)) or "none"
            raise ValueError(f"reward {self.name} needs the column {missing[0]}; there are: {there}")
        return self.function(prompts, completions, completion_ids, **{**columns, **self.arguments})


def build(name: str, *, sandbox: Any = None, **params: Any) -> Reward:
    """Return a reward of the registry with its parameters; `sandbox` runs the programs of those that run any.

    Raises:
        ValueError: no such reward or parameter, a value that it does not take, or no sandbox where it needs one.
    """
    problems = check_reward(name, params)
    if problems:
        told = [f"{name}: {item.param} {item.message}" if item.param else item.message for item in problems]
        raise ValueError("\n".join(told))
    info = REWARDS[name]
    if info.needs_sandbox and sandbox is None:
        raise ValueError(f"{name} runs programs, and there is no sandbox to run them in: pass sandbox")
    renamed = _ARGUMENTS.get(name, {})
    arguments = {renamed.get(key, key): value for key, value in fill_params(name, params).items()}
    if info.needs_sandbox:
        arguments["sandbox"] = sandbox
    return Reward(name, _function(name), arguments, info.columns)


def _function(name: str) -> RewardFunction:
    [module_name] = [module for module, names in _MODULES.items() if name in names]
    function: RewardFunction = vars(importlib.import_module(module_name))[name]
    return function

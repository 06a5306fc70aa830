"""The ways to train, as far as they differ: which field of the spec asks for one, and the table of its arguments.

It owns how a method's `args` are found, checked and coerced; it must not know what a method does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.api.args import ArgsTable, check_args, coerce_args, load_table
from posttrain.api.training_run import Method, TrainingRunSpec

METHODS: Mapping[Method, str] = {"sft": "sft_config", "grpo": "grpo_config"}
"""The field of the spec that asks for a method, and the name of its table."""

Path = tuple[str | int, ...]


def args_path(method: Method) -> tuple[str, ...]:
    """Return where a method's arguments stand in the resource."""
    return ("spec", method, "args")


def table_of(method: Method) -> ArgsTable:
    """Return the table of a method's arguments."""
    return load_table(METHODS[method])


def coerce_spec(spec: TrainingRunSpec) -> TrainingRunSpec:
    """Return the spec with its `args` coerced; they must be without problems."""
    args = coerce_args(spec.training.args, table_of(spec.method))
    return spec.model_copy(update={spec.method: spec.training.model_copy(update={"args": args})})


def find_args_problems(spec: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """Return path and message of whatever is wrong with the arguments in a spec's JSON data, of all methods there."""
    found: list[tuple[Path, str]] = []
    for method in METHODS:
        asked = spec.get(method)
        args = asked.get("args") if isinstance(asked, dict) else None
        if isinstance(args, dict):
            path = args_path(method)
            problems = check_args(args, table_of(method), path=".".join(path))
            found += [((*path, problem.key), problem.message) for problem in problems]
    return found
